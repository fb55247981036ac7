//! The task that iterates over a source with `async for`. There is at most one, and closing the
//! source wakes it.

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyWeakrefMethods, PyWeakrefReference};

use crate::py::gil_cell::GilCell;

/// See the module. The reference is weak, because the waiting task keeps its waiter alive.
#[derive(Debug, Default)]
pub(crate) struct Reader(GilCell<Option<Py<PyWeakrefReference>>>);

impl Reader {
    /// Register a waiting task.
    pub(crate) fn begin(&self, waiter: &Bound<'_, PyAny>, source: &str) -> PyResult<()> {
        let py = waiter.py();
        let mine = PyWeakrefReference::new(waiter)?.unbind();
        let known = self.0.with(py, |known| known.as_ref().map(|known| known.clone_ref(py)));
        if known.is_some_and(|known| known.bind(py).upgrade().is_some()) {
            let text = format!("another task is already waiting for this {source}");
            return Err(PyRuntimeError::new_err(text));
        }
        drop(self.0.with(py, |known| known.replace(mine)));
        Ok(())
    }

    /// Unregister the waiting task.
    pub(crate) fn forget(&self, py: Python<'_>) {
        drop(self.0.with(py, Option::take));
    }

    /// Wake the waiting task, because the source is closed.
    pub(crate) fn end(&self, py: Python<'_>) -> PyResult<()> {
        let known = self.0.with(py, Option::take);
        match known.and_then(|known| known.bind(py).upgrade()) {
            Some(waiter) => waiter.call_method0(intern!(py, "closed")).map(drop),
            None => Ok(()),
        }
    }
}

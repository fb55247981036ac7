//! The task that iterates a source with `async for`: one at a time, and woken when the source is
//! closed.

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyWeakrefMethods, PyWeakrefReference};

use crate::py::gil_cell::GilCell;

/// See the module. The reference is weak: the task that waits keeps its waiter alive.
#[derive(Debug, Default)]
pub(crate) struct Reader(GilCell<Option<Py<PyWeakrefReference>>>);

impl Reader {
    /// A task begins to wait.
    pub(crate) fn begin(&self, waiter: &Bound<'_, PyAny>, source: &str) -> PyResult<()> {
        let py = waiter.py();
        let mine = PyWeakrefReference::new(waiter)?.unbind();
        let known = self.0.with(py, |known| known.as_ref().map(|known| known.clone_ref(py)));
        if known.is_some_and(|known| known.bind(py).upgrade().is_some()) {
            let text = format!("another task waits for this {source}: one reader at a time");
            return Err(PyRuntimeError::new_err(text));
        }
        drop(self.0.with(py, |known| known.replace(mine)));
        Ok(())
    }

    /// It waits no longer.
    pub(crate) fn forget(&self, py: Python<'_>) {
        drop(self.0.with(py, Option::take));
    }

    /// The source is closed: wake the task that waits.
    pub(crate) fn end(&self, py: Python<'_>) -> PyResult<()> {
        let known = self.0.with(py, Option::take);
        match known.and_then(|known| known.bind(py).upgrade()) {
            Some(waiter) => waiter.call_method0(intern!(py, "closed")).map(drop),
            None => Ok(()),
        }
    }
}

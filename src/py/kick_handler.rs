//! The exit handler of a `KvmVm`: pyvmm's own, or any Python object with `kick()`.

use std::io;
use std::sync::Arc;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::event::{PyWrappedExitHandler, call_kick};
use crate::exit_handler::{ExitHandler, WrappedExitHandler};
use crate::sync::{Mutex, rank};

/// An exit handler as the vCPUs hold it.
#[derive(Debug)]
pub(super) enum Handler {
    Native(WrappedExitHandler),
    Python(Arc<PythonHandler>),
}

/// A Python object with `kick()`, and the exception of a kick.
#[derive(Debug)]
pub(super) struct PythonHandler {
    pub(super) object: Py<PyAny>,
    raised: Mutex<Option<PyErr>, rank::KickRaised>,
}

impl ExitHandler for Handler {
    fn kick(&self) -> io::Result<()> {
        match self {
            Self::Native(handler) => handler.kick(),
            Self::Python(handler) => call_kick(&handler.object).map_err(|error| {
                handler.raised.lock().get_or_insert(error);
                io::Error::other("kick() raised")
            }),
        }
    }
}

impl PythonHandler {
    /// Raise what `kick()` raised, once.
    pub(super) fn check(&self) -> PyResult<()> {
        self.raised.lock().take().map_or(Ok(()), Err)
    }
}

/// The exit handler that a Python object is, and the object if it is not pyvmm's own.
pub(super) fn handler(
    object: &Bound<'_, PyAny>,
) -> PyResult<(Handler, Option<Arc<PythonHandler>>)> {
    if let Ok(native) = object.cast::<PyWrappedExitHandler>() {
        return Ok((Handler::Native(native.get().handler()?.clone()), None));
    }
    if !object.getattr_opt("kick")?.is_some_and(|kick| kick.is_callable()) {
        let class = object.get_type();
        let text = format!("an exit handler needs kick(), which {} lacks", class.name()?);
        return Err(PyTypeError::new_err(text));
    }
    let handler = PythonHandler { object: object.clone().unbind(), raised: Mutex::new(None) };
    let handler = Arc::new(handler);
    Ok((Handler::Python(Arc::clone(&handler)), Some(handler)))
}

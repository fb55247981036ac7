//! `VmmExitHandler` and `WrappedExitHandler` for Python: shared with the machine, usable in any
//! event manager.

use std::sync::Arc;

use event_manager::{EventSet, Events};
use pyo3::intern;
use pyo3::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::event_fd::PyEventFd;
use super::events::{PyEventOps, PyEvents};
use crate::error::Result;
use crate::event::BoxedSubscriber;
use crate::exit_handler::{ExitHandler, VmmExitHandler, WrappedExitHandler};
use crate::py::enter::on_vcpu_thread;
use crate::py::owned::Owned;
use crate::py::returned::refuse_awaitable;
use crate::sync::{Mutex, rank};

/// Stops a run loop: a kick writes its `exit_event`, and the loop reads its `keep_running` flag.
///
/// It is a subscriber: on IN it clears the flag, on ERROR it removes itself.
#[pyclass(frozen, weakref, name = "VmmExitHandler", module = "pyvmm")]
#[derive(Debug)]
pub struct PyVmmExitHandler(Shared);

/// A `VmmExitHandler` as the loop, the machine and its vCPUs share it. A clone is the same handler.
///
/// Args:
///     handler: the handler to share; None for a new one.
#[pyclass(frozen, weakref, name = "WrappedExitHandler", module = "pyvmm")]
#[derive(Debug)]
pub struct PyWrappedExitHandler(Shared);

/// The handler that an object shares.
#[derive(Debug)]
struct Shared {
    handler: Owned<WrappedExitHandler>,
    /// The handler's address, which all objects of this handler share.
    key: u64,
}

impl Shared {
    fn over(handler: WrappedExitHandler) -> Self {
        let key = Arc::<Mutex<VmmExitHandler, rank::ExitHandler>>::as_ptr(handler.inner()) as u64;
        Self { handler: Owned::new("exit handler", handler), key }
    }

    fn get(&self) -> Result<&WrappedExitHandler> {
        self.handler.get()
    }

    fn another(&self) -> PyResult<Self> {
        Ok(Self::over(self.get()?.clone()))
    }

    fn repr(&self, class: &str) -> String {
        match self.handler.peek().map(WrappedExitHandler::keep_running) {
            Some(true) => format!("{class}(keep_running=True)"),
            Some(false) => format!("{class}(keep_running=False)"),
            None => format!("{class}(unreachable)"),
        }
    }
}

/// The crate's own subscriber of a Python object, if it has one. Then no Python code runs for it.
pub(crate) fn as_native_subscriber(object: &Bound<'_, PyAny>) -> PyResult<Option<BoxedSubscriber>> {
    let handler = if let Ok(wrapped) = object.cast::<PyWrappedExitHandler>() {
        wrapped.get().0.get()?
    } else if let Ok(handler) = object.cast::<PyVmmExitHandler>() {
        handler.get().0.get()?
    } else {
        return Ok(None);
    };
    Ok(Some(Box::new(handler.clone())))
}

/// Call an exit handler's `kick()`. On the thread of the vCPU whose guest has ended.
pub(crate) fn call_kick(handler: &Py<PyAny>) -> PyResult<()> {
    on_vcpu_thread(
        |py| {
            let handler = handler.bind(py);
            let name = || Ok(format!("{}.kick", handler.get_type().qualname()?));
            refuse_awaitable(&handler.call_method0(intern!(py, "kick"))?, name).map(|()| Ok(()))
        },
        |_, error| Err(error),
    )
}

fn exit_event(handler: &WrappedExitHandler) -> Arc<EventFd> {
    Arc::clone(handler.inner().lock().exit_event())
}

fn init(handler: &WrappedExitHandler, ops: &Bound<'_, PyEventOps>) -> PyResult<()> {
    let py = ops.py();
    let events = Events::new(&*exit_event(handler), EventSet::IN);
    ops.get().add(py, Bound::new(py, PyEvents::happened(events))?.as_any())
}

fn process(
    handler: &WrappedExitHandler,
    events: &PyEvents,
    ops: &Bound<'_, PyEventOps>,
) -> PyResult<()> {
    let set = events.events().event_set();
    if set.contains(EventSet::IN) {
        handler.inner().lock().stop_elsewhere()?;
    }
    if set.contains(EventSet::ERROR) {
        let py = ops.py();
        let watched = Events::empty(&*exit_event(handler));
        ops.get().remove(py, Bound::new(py, PyEvents::happened(watched))?.as_any())?;
    }
    Ok(())
}

impl PyWrappedExitHandler {
    pub(crate) fn over(handler: WrappedExitHandler) -> Self {
        Self(Shared::over(handler))
    }

    pub(crate) fn handler(&self) -> Result<&WrappedExitHandler> {
        self.0.get()
    }
}

#[pymethods]
impl PyVmmExitHandler {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self(Shared::over(WrappedExitHandler::new()?)))
    }

    /// The eventfd that a kick writes to.
    #[getter]
    fn exit_event(&self) -> PyResult<PyEventFd> {
        Ok(PyEventFd::over(exit_event(self.0.get()?)))
    }

    /// False once the loop has processed a kick.
    fn keep_running(&self) -> PyResult<bool> {
        Ok(self.0.get()?.keep_running())
    }

    /// Write to the exit event. May be called from any thread.
    fn kick(&self) -> PyResult<()> {
        Ok(self.0.get()?.kick()?)
    }

    /// Set the flag again and discard previous kicks.
    fn rearm(&self) -> PyResult<()> {
        self.0.get()?.rearm();
        Ok(())
    }

    /// Register the exit event for IN.
    fn init(&self, ops: &Bound<'_, PyEventOps>) -> PyResult<()> {
        init(self.0.get()?, ops)
    }

    /// Handle an event of the exit event.
    fn process(&self, events: &PyEvents, ops: &Bound<'_, PyEventOps>) -> PyResult<()> {
        process(self.0.get()?, events, ops)
    }

    fn __repr__(&self) -> String {
        self.0.repr("VmmExitHandler")
    }
}

#[pymethods]
impl PyWrappedExitHandler {
    #[new]
    #[pyo3(signature = (handler = None))]
    fn new(handler: Option<&PyVmmExitHandler>) -> PyResult<Self> {
        match handler {
            Some(PyVmmExitHandler(shared)) => Ok(Self(shared.another()?)),
            None => Ok(Self(Shared::over(WrappedExitHandler::new()?))),
        }
    }

    /// The shared handler.
    #[getter(handler)]
    fn shared(&self) -> PyResult<PyVmmExitHandler> {
        Ok(PyVmmExitHandler(self.0.another()?))
    }

    /// False once the loop has processed a kick.
    fn keep_running(&self) -> PyResult<bool> {
        Ok(self.0.get()?.keep_running())
    }

    /// Write to the exit event. May be called from any thread.
    fn kick(&self) -> PyResult<()> {
        Ok(self.0.get()?.kick()?)
    }

    /// Set the flag again and discard previous kicks.
    fn rearm(&self) -> PyResult<()> {
        self.0.get()?.rearm();
        Ok(())
    }

    /// Return another object for the same handler.
    #[pyo3(name = "clone")]
    fn another(&self) -> PyResult<Self> {
        Ok(Self(self.0.another()?))
    }

    fn __copy__(&self) -> PyResult<Self> {
        self.another()
    }

    /// Register the exit event for IN.
    fn init(&self, ops: &Bound<'_, PyEventOps>) -> PyResult<()> {
        init(self.0.get()?, ops)
    }

    /// Handle an event of the exit event.
    fn process(&self, events: &PyEvents, ops: &Bound<'_, PyEventOps>) -> PyResult<()> {
        process(self.0.get()?, events, ops)
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.0.key == other.0.key
    }

    fn __hash__(&self) -> u64 {
        self.0.key
    }

    fn __repr__(&self) -> String {
        self.0.repr("WrappedExitHandler")
    }
}

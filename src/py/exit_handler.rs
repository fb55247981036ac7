//! `VmmExitHandler` and `WrappedExitHandler` for Python: shared with the machine, usable in any event manager.

use std::sync::Arc;

use event_manager::{EventSet, Events};
use pyo3::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::event_fd::PyEventFd;
use super::events::{PyEventOps, PyEvents};
use crate::event::BoxedSubscriber;
use crate::exit_handler::{ExitHandler, VmmExitHandler, WrappedExitHandler};
use crate::sync::{Mutex, rank};

/// Stops a run loop: an `exit_event` that a kick writes and a `keep_running` flag that the loop reads.
///
/// A subscriber: on IN it clears the flag, on ERROR it removes itself.
#[pyclass(frozen, weakref, name = "VmmExitHandler", module = "pyvmm")]
#[derive(Debug)]
pub struct PyVmmExitHandler(WrappedExitHandler);

/// A `VmmExitHandler` as the loop, the machine and its vCPUs share it. A clone is the same handler.
///
/// Args:
///     handler: the handler to share; None for a new one.
#[pyclass(frozen, weakref, name = "WrappedExitHandler", module = "pyvmm")]
#[derive(Debug)]
pub struct PyWrappedExitHandler(WrappedExitHandler);

/// The crate's own subscriber behind a Python object, if it is one: then no Python code runs for it.
pub(super) fn as_native_subscriber(object: &Bound<'_, PyAny>) -> PyResult<Option<BoxedSubscriber>> {
    let handler = if let Ok(wrapped) = object.cast::<PyWrappedExitHandler>() {
        &wrapped.get().0
    } else if let Ok(handler) = object.cast::<PyVmmExitHandler>() {
        &handler.get().0
    } else {
        return Ok(None);
    };
    handler.check_process()?;
    Ok(Some(Box::new(handler.clone())))
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
        handler.inner().lock().stop();
    }
    if set.contains(EventSet::ERROR) {
        let py = ops.py();
        let watched = Events::empty(&*exit_event(handler));
        ops.get().remove(py, Bound::new(py, PyEvents::happened(watched))?.as_any())?;
    }
    Ok(())
}

impl PyWrappedExitHandler {
    pub(super) fn over(handler: WrappedExitHandler) -> Self {
        Self(handler)
    }

    pub(super) fn handler(&self) -> &WrappedExitHandler {
        &self.0
    }
}

#[pymethods]
impl PyVmmExitHandler {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self(WrappedExitHandler::new()?))
    }

    /// The eventfd that a kick writes.
    #[getter]
    fn exit_event(&self) -> PyEventFd {
        PyEventFd::over(exit_event(&self.0))
    }

    /// False once the loop has processed a kick.
    #[getter]
    fn keep_running(&self) -> bool {
        self.0.keep_running()
    }

    /// Write the exit event. From any thread.
    fn kick(&self) -> PyResult<()> {
        self.0.check_process()?;
        Ok(self.0.kick()?)
    }

    /// Set the flag again and forget the kicks so far.
    fn rearm(&self) -> PyResult<()> {
        self.0.check_process()?;
        self.0.rearm();
        Ok(())
    }

    /// Register the exit event for IN.
    fn init(&self, ops: &Bound<'_, PyEventOps>) -> PyResult<()> {
        init(&self.0, ops)
    }

    /// Handle an event of the exit event.
    fn process(&self, events: &PyEvents, ops: &Bound<'_, PyEventOps>) -> PyResult<()> {
        process(&self.0, events, ops)
    }

    fn __repr__(&self) -> String {
        format!("VmmExitHandler(keep_running={})", literal(self.keep_running()))
    }
}

#[pymethods]
impl PyWrappedExitHandler {
    #[new]
    #[pyo3(signature = (handler = None))]
    fn new(handler: Option<&PyVmmExitHandler>) -> PyResult<Self> {
        match handler {
            Some(PyVmmExitHandler(shared)) => Ok(Self(shared.clone())),
            None => Ok(Self(WrappedExitHandler::new()?)),
        }
    }

    /// The shared handler.
    #[getter(handler)]
    fn shared(&self) -> PyVmmExitHandler {
        PyVmmExitHandler(self.0.clone())
    }

    /// False once the loop has processed a kick.
    fn keep_running(&self) -> bool {
        self.0.keep_running()
    }

    /// Write the exit event. From any thread.
    fn kick(&self) -> PyResult<()> {
        self.0.check_process()?;
        Ok(self.0.kick()?)
    }

    /// Set the flag again and forget the kicks so far.
    fn rearm(&self) -> PyResult<()> {
        self.0.check_process()?;
        self.0.rearm();
        Ok(())
    }

    /// Another object for the same handler.
    #[pyo3(name = "clone")]
    fn another(&self) -> Self {
        Self(self.0.clone())
    }

    fn __copy__(&self) -> Self {
        self.another()
    }

    /// Register the exit event for IN.
    fn init(&self, ops: &Bound<'_, PyEventOps>) -> PyResult<()> {
        init(&self.0, ops)
    }

    /// Handle an event of the exit event.
    fn process(&self, events: &PyEvents, ops: &Bound<'_, PyEventOps>) -> PyResult<()> {
        process(&self.0, events, ops)
    }

    fn __eq__(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.0.inner(), other.0.inner())
    }

    fn __hash__(&self) -> u64 {
        Arc::<Mutex<VmmExitHandler, rank::ExitHandler>>::as_ptr(self.0.inner()) as u64
    }

    fn __repr__(&self) -> String {
        format!("WrappedExitHandler(keep_running={})", literal(self.keep_running()))
    }
}

fn literal(value: bool) -> &'static str {
    if value { "True" } else { "False" }
}

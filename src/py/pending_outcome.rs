//! The outcome of callbacks on vCPU threads for the thread in `run`: an exception, or the value of
//! a `Stop`.

use pyo3::exceptions::PyBaseException;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use super::enter::try_attach;
use crate::sync::{Mutex, rank};
use crate::vcpu::current;

/// See the module. No Python code runs under its lock.
#[derive(Debug, Default)]
pub(super) struct PendingOutcome(Mutex<Outcomes, rank::PendingOutcome>);

#[derive(Debug, Default)]
struct Outcomes {
    error: Option<Py<PyBaseException>>,
    stop: Option<(u64, Py<PyAny>)>,
    /// How a run ended during a wait for output that had already succeeded.
    exit: Option<Py<PyAny>>,
}

impl PendingOutcome {
    /// Store an exception of a callback. The run raises the first; later ones are added to its
    /// notes.
    pub(super) fn raise(&self, py: Python<'_>, error: PyErr) {
        let error = error.into_value(py);
        let mut outcomes = self.0.lock();
        match &outcomes.error {
            None => outcomes.error = Some(error),
            Some(first) => {
                let first = first.clone_ref(py);
                drop(outcomes);
                note(py, first.bind(py), error.bind(py));
            }
        }
    }

    /// Store the value with which a callback ends the run.
    pub(super) fn stop(&self, vcpu: u64, value: Py<PyAny>) {
        // Kept until the lock is free: dropping one may run Python code.
        let _later = self.0.lock().stop.replace((vcpu, value));
    }

    /// Store an exception, with a note that names its place.
    pub(super) fn raise_with_note(&self, py: Python<'_>, error: PyErr, text: &str) {
        // Fails if memory is short. Then the exception has no note.
        let _ = error.value(py).call_method1(intern!(py, "add_note"), (text,));
        self.raise(py, error);
    }

    /// Store the value of a `Stop` that a callback has returned. Returns whether it was one.
    pub(super) fn take_if_stop(&self, value: &Bound<'_, PyAny>) -> PyResult<bool> {
        let value = stop_value(value)?;
        Ok(value.map(|value| self.stop_here(value)).is_some())
    }

    /// [`Self::stop`] for the vCPU of this thread.
    pub(super) fn stop_here(&self, value: Py<PyAny>) {
        self.stop(current().map_or(0, |handle| handle.id()), value);
    }

    /// Raise the stored exception, once.
    pub(super) fn check(&self, py: Python<'_>) -> PyResult<()> {
        let error = self.0.lock().error.take();
        error.map_or(Ok(()), |error| Err(PyErr::from_value(error.into_bound(py).into_any())))
    }

    /// The error that ends a run, with the stored exception, if there is one, in its notes.
    pub(super) fn beside(&self, py: Python<'_>, error: PyErr) -> PyErr {
        let other = self.0.lock().error.take();
        if let Some(other) = other {
            note(py, error.value(py), other.bind(py));
        }
        error
    }

    /// Pass an exception that no `run` or `wait` has raised to `sys.unraisablehook`. The machine is
    /// closed.
    pub(super) fn report(&self, py: Python<'_>) {
        if let Err(error) = self.check(py) {
            error.write_unraisable(py, None);
        }
    }

    /// Whether an outcome is stored.
    pub(super) fn is_pending(&self) -> bool {
        let outcomes = self.0.lock();
        outcomes.error.is_some() || outcomes.stop.is_some()
    }

    /// Take the vCPU and the value of a `Stop`.
    pub(super) fn take_stop(&self) -> Option<(u64, Py<PyAny>)> {
        self.0.lock().stop.take()
    }

    /// Keep the exit of a run for the next `run` or `wait`; None drops one that is kept.
    pub(super) fn keep_exit(&self, exit: Option<Py<PyAny>>) {
        // Kept until the lock is free: dropping one may run Python code.
        let _later = std::mem::replace(&mut self.0.lock().exit, exit);
    }

    /// Take the exit that is kept.
    pub(super) fn take_exit(&self) -> Option<Py<PyAny>> {
        self.0.lock().exit.take()
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Some(outcomes) = self.0.try_lock() else { return Ok(()) };
        visit.call(&outcomes.error)?;
        visit.call(&outcomes.exit)?;
        outcomes.stop.as_ref().map_or(Ok(()), |(_, value)| visit.call(value))
    }
}

/// A callback that has dropped its machine may raise when no thread is left to run it.
impl Drop for PendingOutcome {
    fn drop(&mut self) {
        let Some(error) = self.0.get_mut().error.take() else { return };
        // Once the interpreter finalizes, there is no way to report it.
        let _ = try_attach(|py| {
            PyErr::from_value(error.into_bound(py).into_any()).write_unraisable(py, None);
        });
    }
}

/// The value of a `Stop`; None for anything else.
pub(super) fn stop_value(said: &Bound<'_, PyAny>) -> PyResult<Option<Py<PyAny>>> {
    let py = said.py();
    static STOP: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    if !said.is_instance(STOP.import(py, "pyvmm.exits", "Stop")?)? {
        return Ok(None);
    }
    said.getattr(intern!(py, "value")).map(|value| Some(value.unbind()))
}

/// The position of this thread's vCPU, for a note.
pub(super) fn position() -> String {
    let Some(handle) = current() else { return String::new() };
    match handle.with_vcpu(|vcpu| vcpu.general()) {
        Ok(regs) => format!(", vCPU {}, guest RIP {:#x}", handle.id(), regs.rip),
        Err(_) => format!(", vCPU {}", handle.id()),
    }
}

fn note(py: Python<'_>, error: &Bound<'_, PyBaseException>, other: &Bound<'_, PyBaseException>) {
    let text = match other.repr() {
        Ok(repr) => format!("another callback raised {repr}"),
        Err(_) => "another callback raised as well".to_owned(),
    };
    // Fails if memory is short. Then only the first exception is reported.
    let _ = error.call_method1(intern!(py, "add_note"), (text,));
}

//! `Serial` for Python: the host's side of a serial port.

use std::os::fd::RawFd;
use std::sync::{Arc, Weak};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

use super::event::PyEventFd;
use super::exit;
use super::lease::ReuseTracker;
use super::owned::Owned;
use super::registry::Close;
use crate::devices::{Chunk, Serial};
use crate::error::{Error, Result};
use crate::sync::{Mutex, rank};

/// The host's side of a serial port, a 16550A.
#[pyclass(frozen, weakref, name = "Serial", module = "pyvmm")]
#[derive(Debug)]
pub struct PySerial {
    serial: Owned<Arc<Serial>>,
    /// Output that the writer of `pyvmm.streams` has taken and not yet reported as written.
    taken: Mutex<Option<Chunk>, rank::TakenOutput>,
    /// The machine's object, kept alive by this object, and its core. None for the loop's own use.
    machine: Option<(Py<PyAny>, Weak<dyn Close>)>,
    tracker: ReuseTracker,
}

impl PySerial {
    /// For the loop's own use.
    pub(super) fn over(serial: Arc<Serial>, tracker: &ReuseTracker) -> Self {
        let (serial, taken) = (Owned::new("serial port", serial), Mutex::default());
        Self { serial, taken, machine: None, tracker: tracker.clone() }
    }

    /// The port of a machine's object, whose core is `core`.
    pub(super) fn of_machine(
        serial: Arc<Serial>,
        machine: Py<PyAny>,
        core: Weak<dyn Close>,
        tracker: &ReuseTracker,
    ) -> Self {
        Self { machine: Some((machine, core)), ..Self::over(serial, tracker) }
    }

    /// A guest that no longer exists takes no input; its last output can still be taken.
    fn check_open(&self) -> Result<()> {
        match &self.machine {
            Some((_, core)) if !core.upgrade().is_some_and(|core| core.is_open()) => {
                Err(Error::closed("machine"))
            }
            _ => Ok(()),
        }
    }

    /// The port, for operations that a reset cannot undo.
    fn port(&self) -> PyResult<&Arc<Serial>> {
        self.tracker.hand_out();
        self.bytes()
    }

    /// The machine's object.
    pub(super) fn machine(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.machine.as_ref().map(|(machine, _)| machine.clone_ref(py))
    }

    /// The port, for input and output, which a reset undoes. Fails in a forked child, where it
    /// would interrupt the parent's guest.
    pub(super) fn bytes(&self) -> PyResult<&Arc<Serial>> {
        Ok(self.serial.get()?)
    }
}

#[pymethods]
impl PySerial {
    /// Send input to the guest, which reads it at its own pace.
    ///
    /// Raises:
    ///     ClosedError: the machine is closed.
    fn send(&self, py: Python<'_>, data: PyBackedBytes) -> PyResult<()> {
        let port = self.bytes()?;
        Ok(py.detach(|| {
            self.check_open()?;
            port.feed(&data);
            Ok::<_, Error>(())
        })?)
    }

    /// Send the guest a break, after the input sent so far. On Linux's console, a break and a
    /// letter are a SysRq.
    ///
    /// Raises:
    ///     ClosedError: the machine is closed.
    fn send_break(&self, py: Python<'_>) -> PyResult<()> {
        let port = self.bytes()?;
        Ok(py.detach(|| {
            self.check_open()?;
            port.send_break();
            Ok::<_, Error>(())
        })?)
    }

    /// Return the buffered output and clear it. Without a configured output, at most the newest MiB
    /// is kept.
    fn take_output<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let port = self.bytes()?;
        let bytes = py.detach(|| port.take_output());
        Ok(PyBytes::new(py, &bytes))
    }

    /// End the current run, or the next one, at the byte that completes this text. This happens
    /// once.
    ///
    /// Output printed before this call does not count. The run ends with `Exit(reason="stopped",
    /// value=text)`. The guest stops after the instruction that printed the byte, and the next run
    /// continues there. An empty text cancels the request.
    ///
    /// Raises:
    ///     ClosedError: the machine is closed.
    fn stop_at(&self, py: Python<'_>, text: PyBackedBytes) -> PyResult<()> {
        let port = self.port()?;
        Ok(py.detach(|| {
            self.check_open()?;
            port.stop_at(text.to_vec());
            Ok::<_, Error>(())
        })?)
    }

    /// For `pyvmm.streams`: take at most `most` bytes of the output. `_finish_write` says how many
    /// of them were written.
    fn _take<'py>(&self, py: Python<'py>, most: usize) -> PyResult<Bound<'py, PyBytes>> {
        let port = self.port()?;
        let chunk = py.detach(|| port.take_chunk(most));
        let bytes = PyBytes::new(py, &chunk.bytes);
        *self.taken.lock() = Some(chunk);
        Ok(bytes)
    }

    /// For `pyvmm.streams`: `written` bytes of the taken output were written. The
    /// other bytes are pending again, and the loop is notified of them after `again_s`.
    fn _finish_write(&self, py: Python<'_>, written: usize, again_s: Option<f64>) -> PyResult<()> {
        let port = self.port()?;
        let taken = self.taken.lock().take();
        let again = exit::timeout(again_s)?;
        py.detach(|| {
            taken.iter().for_each(|chunk| port.finish_write(chunk, written));
            again.into_iter().for_each(|delay| port.notify_after(delay));
        });
        Ok(())
    }

    /// The number of input bytes that the guest has not read yet.
    #[getter]
    fn input_waiting(&self, py: Python<'_>) -> PyResult<usize> {
        let port = self.bytes()?;
        Ok(py.detach(|| port.input_waiting()))
    }

    /// A file descriptor that is readable when output is available for `take_output`.
    ///
    /// A configured output takes what is available too. To wait for output beside it, use `expect`.
    fn fileno(&self) -> PyResult<RawFd> {
        Ok(self.port()?.output_fd()?)
    }

    /// Readable when the guest has read all its input, and at the start.
    #[getter]
    fn input_wanted(&self) -> PyResult<PyEventFd> {
        Ok(PyEventFd::over(Arc::clone(self.port()?.input_wanted()?)))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        self.machine.iter().try_for_each(|(machine, _)| visit.call(machine))
    }
}

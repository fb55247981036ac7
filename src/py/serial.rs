//! `Serial` for Python: the host's side of the first serial port.

use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

use super::event_fd::PyEventFd;
use crate::devices::Serial;
use crate::process::Birthplace;

/// The host's side of the first serial port, a 16550A.
#[pyclass(frozen, weakref, name = "Serial", module = "pyvmm")]
#[derive(Debug)]
pub struct PySerial {
    serial: Arc<Serial>,
    birthplace: Birthplace,
}

impl PySerial {
    pub(super) fn over(serial: Arc<Serial>) -> Self {
        Self { serial, birthplace: Birthplace::here() }
    }

    /// The port; not in a forked child, whose parent's guest would be interrupted.
    fn port(&self) -> PyResult<&Arc<Serial>> {
        self.birthplace.check("serial port")?;
        Ok(&self.serial)
    }
}

#[pymethods]
impl PySerial {
    /// Give the guest input; it reads it at its own pace.
    fn send(&self, py: Python<'_>, data: PyBackedBytes) -> PyResult<()> {
        let port = self.port()?;
        py.detach(|| port.feed(&data));
        Ok(())
    }

    /// Take the output there is. Without a configured output, at most the newest MiB.
    fn read<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let port = self.port()?;
        let bytes = py.detach(|| port.take());
        Ok(PyBytes::new(py, &bytes))
    }

    /// Bytes of input that the guest has not read yet.
    #[getter]
    fn input_waiting(&self, py: Python<'_>) -> PyResult<usize> {
        let port = self.port()?;
        Ok(py.detach(|| port.input_waiting()))
    }

    /// A file descriptor that is readable when there is output to take, on a machine whose output Python takes.
    fn fileno(&self) -> PyResult<RawFd> {
        let none = "nobody takes this machine's output as it comes: read() has it";
        self.port()?.output_fd().ok_or_else(|| PyValueError::new_err(none))
    }

    /// Readable when the guest has read all its input; readable at first, too.
    #[getter]
    fn input_wanted(&self) -> PyResult<PyEventFd> {
        Ok(PyEventFd::over(Arc::clone(self.port()?.input_wanted()?)))
    }
}

//! `Serial` for Python: the host's side of the first serial port.

use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

use super::event_fd::PyEventFd;
use crate::devices::Serial;

/// The host's side of the first serial port, a 16550A.
#[pyclass(frozen, weakref, name = "Serial", module = "pyvmm")]
#[derive(Debug)]
pub struct PySerial(pub(super) Arc<Serial>);

#[pymethods]
impl PySerial {
    /// Give the guest input; it reads it at its own pace.
    fn send(&self, py: Python<'_>, data: PyBackedBytes) {
        py.detach(|| self.0.feed(&data));
    }

    /// Take the output there is. Without a configured output, at most the newest MiB.
    fn read<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let bytes = py.detach(|| self.0.take());
        PyBytes::new(py, &bytes)
    }

    /// Bytes of input that the guest has not read yet.
    #[getter]
    fn input_waiting(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.input_waiting())
    }

    /// A file descriptor that is readable when there is output to take, on a machine whose output Python takes.
    fn fileno(&self) -> PyResult<RawFd> {
        let none = "nobody takes this machine's output as it comes: read() has it";
        self.0.output_fd().ok_or_else(|| PyValueError::new_err(none))
    }

    /// Readable when the guest has read all its input; readable at first, too.
    #[getter]
    fn input_wanted(&self) -> PyResult<PyEventFd> {
        Ok(PyEventFd::over(Arc::clone(self.0.input_wanted()?)))
    }
}

//! The console device of a machine for Python: `Vmm.virtio_console`.

use std::os::fd::IntoRawFd;
use std::sync::Arc;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::ending::import;
use super::parts::Part;
use super::virtio;
use super::vmm::PyVmm;
use crate::virtio::Console;

/// The virtio console of a machine: `Vmm.virtio_console`. It holds the machine.
#[pyclass(frozen, weakref, name = "ConsoleDevice", module = "pyvmm")]
#[derive(Debug)]
pub struct PyConsoleDevice(Py<PyVmm>);

impl PyConsoleDevice {
    fn device(&self) -> PyResult<Arc<Console>> {
        Ok(virtio::nth(&self.0, 0)?.1)
    }
}

#[pymethods]
impl PyConsoleDevice {
    /// The names of its ports. The first is the console.
    #[getter]
    fn ports<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.device()?.names())
    }

    /// Connect to a port, and return the host's end as a `socket.socket` of type SOCK_STREAM.
    ///
    /// The socket blocks by default, and works with asyncio. It first has the newest MiB that the
    /// guest wrote before. A guest that writes more than the socket holds waits until it is read.
    /// The machine's loop moves the bytes, so it has to run. The end of the machine is an end of
    /// the stream.
    ///
    /// Raises:
    ///     ConfigError: there is no such port.
    ///     StateError: the port is connected already.
    #[pyo3(signature = (port = None))]
    fn connect<'py>(&self, py: Python<'py>, port: Option<&str>) -> PyResult<Bound<'py, PyAny>> {
        self.0.get().changing()?;
        let device = self.device()?;
        let first = device.names().into_iter().next().unwrap_or_default();
        let port = port.unwrap_or(&first);
        let fd = py.detach(|| device.connect(port))?;
        let socket = import(py, "socket")?.getattr(intern!(py, "socket"))?;
        let keywords = pyo3::types::PyDict::new(py);
        keywords.set_item(intern!(py, "fileno"), fd.into_raw_fd())?;
        socket.call((), Some(&keywords))
    }

    /// Change the size of the console, in characters.
    fn resize(&self, py: Python<'_>, columns: u16, rows: u16) -> PyResult<()> {
        self.0.get().changing()?;
        let device = self.device()?;
        py.detach(|| device.resize(columns, rows));
        Ok(())
    }

    fn __repr__(&self) -> String {
        let device = self.device();
        device.map_or_else(
            |_| "ConsoleDevice(unreachable)".into(),
            |device| format!("ConsoleDevice(ports={:?})", device.names()),
        )
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0)
    }
}

#[pymethods]
impl PyVmm {
    /// The virtio console; the same object each time.
    ///
    /// Raises:
    ///     ConfigError: the machine has none: `VmmConfig(console=VirtioConsole())`.
    #[getter]
    fn virtio_console<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyConsoleDevice>> {
        virtio::only::<Console>(
            slf.get(),
            "console",
            "VmmConfig(console=VirtioConsole()) adds one",
        )?;
        let make = || Bound::new(slf.py(), PyConsoleDevice(slf.clone().unbind()));
        slf.get().parts.get_or_make(slf.py(), Part::Console, make)
    }
}

//! The socket device of a machine for `pyvmm.vsock`, which `Vmm.vsock` is of.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use pyo3::prelude::*;

use super::ending::import;
use super::virtio;
use super::vmm::PyVmm;
use crate::virtio::Vsock;

impl PyVmm {
    fn vsock_device(&self) -> PyResult<Arc<Vsock>> {
        virtio::only(self, "vsock", "VmmConfig(vsock=Vsock()) adds one")
    }
}

#[pymethods]
impl PyVmm {
    /// The host's side of the guest's sockets.
    ///
    /// Raises:
    ///     ConfigError: the machine has none: `VmmConfig(vsock=Vsock())`.
    #[getter]
    fn vsock<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.get().vsock_device()?;
        import(slf.py(), "pyvmm.vsock")?.call_method1("VsockHost", (slf,))
    }

    /// For `pyvmm.vsock`: the guest's address, and how many connections there are.
    fn _vsock_status(&self, py: Python<'_>) -> PyResult<(u64, usize)> {
        let device = self.vsock_device()?;
        Ok(py.detach(|| (device.cid(), device.connections())))
    }

    /// For `pyvmm.vsock`: request a connection. Returns the program's end, which reads a zero byte
    /// when the guest accepts.
    fn _vsock_connect(&self, py: Python<'_>, port: u32) -> PyResult<RawFd> {
        self.vmm()?;
        let device = self.vsock_device()?;
        Ok(py.detach(|| device.connect(port))?.into_raw_fd())
    }

    /// For `pyvmm.vsock`: let the guest connect to a listening unix socket, of which this is an
    /// `O_PATH` descriptor that the call takes.
    fn _vsock_listen(&self, py: Python<'_>, port: u32, listener: RawFd) -> PyResult<()> {
        // SAFETY: the caller gives a descriptor that it has just opened, and forgets it.
        let listener = unsafe { OwnedFd::from_raw_fd(listener) };
        self.vmm()?;
        let device = self.vsock_device()?;
        Ok(py.detach(|| device.listen(port, listener))?)
    }

    /// For `pyvmm.vsock`: undo `_vsock_listen`.
    fn _vsock_unlisten(&self, py: Python<'_>, port: u32) -> PyResult<()> {
        let device = self.vsock_device()?;
        py.detach(|| device.unlisten(port));
        Ok(())
    }
}

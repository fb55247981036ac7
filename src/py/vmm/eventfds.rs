//! `Vmm` for Python, continued: eventfds that the kernel handles without an exit, towards the guest
//! (irqfd) and from it (ioeventfd). On the caller's thread.

use pyo3::prelude::*;

use super::object::PyVmm;
use crate::devices::Access;
use crate::py::event::PyEventFd;
use crate::vm::IoEvent;

fn io_event(address: u64, length: usize, datamatch: Option<u64>, pio: bool) -> IoEvent {
    let access = if pio { Access::Pio } else { Access::Mmio };
    IoEvent { access, address, length, datamatch }
}

#[pymethods]
impl PyVmm {
    /// In the kernel, pulse an interrupt line for each write to an eventfd: KVM_IRQFD.
    ///
    /// Raises:
    ///     StateError: the machine has no interrupt controller, or is closed.
    ///     KvmError: KVM refuses it, for example because the eventfd already pulses a line.
    fn add_irqfd(&self, py: Python<'_>, event_fd: &PyEventFd, line: u32) -> PyResult<()> {
        let (vmm, event) = (self.changing()?, event_fd.shared(py)?);
        Ok(py.detach(|| vmm.vm()?.add_irqfd(&event, line))?)
    }

    /// Undo `add_irqfd`.
    fn remove_irqfd(&self, py: Python<'_>, event_fd: &PyEventFd, line: u32) -> PyResult<()> {
        let (vmm, event) = (self.changing()?, event_fd.shared(py)?);
        Ok(py.detach(|| vmm.vm()?.remove_irqfd(&event, line))?)
    }

    /// In the kernel, add one to an eventfd for each guest write to an address: KVM_IOEVENTFD.
    ///
    /// The writes cause no exits.
    ///
    /// Args:
    ///     address: a guest-physical address, or a port if `pio` is set.
    ///     event_fd: the eventfd; a subscriber that watches it is called.
    ///     length: the size of the matching writes: 1, 2, 4 or 8; required with `datamatch`.
    ///     datamatch: the only value that matches; None matches every write.
    ///     pio: the address is a port.
    ///
    /// Raises:
    ///     ConfigError: no such write is possible.
    ///     KvmError: KVM refuses it, for example because another eventfd uses the address.
    #[pyo3(signature = (address, event_fd, *, length = 0, datamatch = None, pio = false))]
    fn add_ioeventfd(
        slf: &Bound<'_, Self>,
        address: u64,
        event_fd: &PyEventFd,
        length: usize,
        datamatch: Option<u64>,
        pio: bool,
    ) -> PyResult<()> {
        let (event, on) = (event_fd.shared(slf.py())?, io_event(address, length, datamatch, pio));
        let vmm = slf.get().changing()?;
        Ok(slf.py().detach(|| vmm.vm()?.add_ioeventfd(&event, &on))?)
    }

    /// Undo `add_ioeventfd`, with the same arguments.
    #[pyo3(signature = (address, event_fd, *, length = 0, datamatch = None, pio = false))]
    fn remove_ioeventfd(
        slf: &Bound<'_, Self>,
        address: u64,
        event_fd: &PyEventFd,
        length: usize,
        datamatch: Option<u64>,
        pio: bool,
    ) -> PyResult<()> {
        let (event, on) = (event_fd.shared(slf.py())?, io_event(address, length, datamatch, pio));
        let vmm = slf.get().changing()?;
        Ok(slf.py().detach(|| vmm.vm()?.remove_ioeventfd(&event, &on))?)
    }
}

//! `Vmm` for Python, continued: interrupts that the program sends to the guest, and `IrqLine`. On
//! the caller's thread.

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use super::object::PyVmm;
use crate::py::interrupt;

#[pymethods]
impl PyVmm {
    /// Return an interrupt line: pin 0 to 23 of the I/O APIC. The first sixteen are also lines of
    /// the PICs.
    ///
    /// Raises:
    ///     StateError: the machine has no interrupt controller, or is closed.
    ///     ConfigError: the machine has no such line.
    fn irq(slf: Bound<'_, Self>, line: u32) -> PyResult<PyIrqLine> {
        slf.get().core()?.vm()?.check_irq_line(line)?;
        Ok(PyIrqLine { vmm: slf.unbind(), line })
    }

    /// Send a message-signalled interrupt (KVM_SIGNAL_MSI). Return whether a vCPU accepted it.
    ///
    /// Args:
    ///     address: 0xfee00000 plus the destination's APIC id shifted left by 12 (Intel SDM volume
    ///         3, 11.11.1).
    ///     data: the vector, with the delivery mode in the higher bits.
    ///
    /// Raises:
    ///     StateError: the machine has no interrupt controller, or is closed.
    fn msi(&self, py: Python<'_>, address: u64, data: u32) -> PyResult<bool> {
        let vmm = self.core()?;
        Ok(py.detach(|| vmm.vm()?.signal_msi(address, data))?)
    }

    /// Send a non-maskable interrupt to a vCPU. May be called from any thread.
    ///
    /// Raises:
    ///     ConfigError: there is no such vCPU.
    #[pyo3(signature = (vcpu = 0))]
    fn nmi(&self, py: Python<'_>, vcpu: u64) -> PyResult<()> {
        let vmm = self.core()?;
        interrupt::limited(py, None, |limit| vmm.vm()?.nmi(vcpu, limit))
    }
}

/// An interrupt line of a machine: `Vmm.irq`. Usable from any thread.
#[pyclass(frozen, name = "IrqLine", module = "pyvmm")]
#[derive(Debug)]
pub struct PyIrqLine {
    vmm: Py<PyVmm>,
    /// The line's number.
    #[pyo3(get)]
    line: u32,
}

impl PyIrqLine {
    fn set_levels(&self, py: Python<'_>, levels: &[bool]) -> PyResult<()> {
        let vmm = self.vmm.get().core()?;
        Ok(py.detach(|| {
            let vm = vmm.vm()?;
            levels.iter().try_for_each(|level| vm.set_irq_line(self.line, *level))
        })?)
    }
}

#[pymethods]
impl PyIrqLine {
    /// Raise the line: KVM_IRQ_LINE.
    ///
    /// Raises:
    ///     ClosedError: the machine is closed.
    #[pyo3(name = "raise_")]
    fn assert(&self, py: Python<'_>) -> PyResult<()> {
        self.set_levels(py, &[true])
    }

    /// Lower the line.
    fn lower(&self, py: Python<'_>) -> PyResult<()> {
        self.set_levels(py, &[false])
    }

    /// Raise and lower the line, for an edge-triggered interrupt.
    fn pulse(&self, py: Python<'_>) -> PyResult<()> {
        self.set_levels(py, &[true, false])
    }

    fn __repr__(&self) -> String {
        format!("IrqLine({})", self.line)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        visit.call(&self.vmm)
    }
}

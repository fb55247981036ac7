//! `Vcpu` for Python: the state of a stopped vCPU, and running one on the calling thread.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyInt, PyString, PyTuple};

use super::cpuid::{cpuid_entries, cpuid_entry};
use super::ending::import;
use super::gil_cell::GilCell;
use super::items::Items;
use super::lease::ReuseTracker;
use super::parts::{Part, Parts};
use super::processor::Processor;
use super::registers::{PyMsrBytes, PyRegisterBytes};
use super::vcpu_exit::PyVcpuExit;
use crate::error::{Error, ErrorKind, Result};
use crate::vcpu::{DebugOwner, DebugRequest, RegisterClass, Vcpu, VcpuHandle};

/// A virtual CPU of a machine. Its state can be read and changed while its guest is not running.
///
/// The registers are views: each access reads or changes the vCPU itself. While the guest runs, an
/// access raises StateError. `vcpus` and hooks always return the same object for a vCPU.
#[pyclass(frozen, weakref, name = "Vcpu", module = "pyvmm")]
#[derive(Debug)]
pub struct PyVcpu {
    processor: Processor,
    /// The vCPU's number.
    #[pyo3(get)]
    id: u64,
    /// The view of the general registers, for the next access.
    regs: GilCell<Option<Py<PyAny>>>,
}

impl PyVcpu {
    pub(super) fn look<T: Send>(
        &self,
        py: Python<'_>,
        look: impl FnOnce(&mut Vcpu) -> Result<T> + Send,
    ) -> PyResult<T> {
        self.processor.with_vcpu(py, look)
    }

    /// The object for a vCPU of a machine's object.
    pub(super) fn of(
        handle: &Arc<VcpuHandle>,
        machine: Option<Py<PyAny>>,
        tracker: &ReuseTracker,
    ) -> Self {
        let processor = Processor::of(Arc::downgrade(handle), machine, tracker);
        Self { id: handle.id(), processor, regs: GilCell::default() }
    }

    /// The object for a vCPU of a machine's object: the existing one, or a new one.
    pub(super) fn of_machine<'py>(
        machine: &Bound<'py, PyAny>,
        handle: &Arc<VcpuHandle>,
        parts: &Parts,
    ) -> PyResult<Bound<'py, Self>> {
        let py = machine.py();
        parts.get_or_make(py, Part::Vcpu(handle.id()), || {
            Bound::new(py, Self::of(handle, Some(machine.clone().unbind()), &parts.tracker))
        })
    }

    /// A view of one class of registers, created on demand. It keeps the machine alive.
    fn view<'py>(
        &self,
        py: Python<'py>,
        name: &Bound<'py, PyString>,
        class: RegisterClass,
    ) -> PyResult<Bound<'py, PyAny>> {
        let processor = self.processor.another(py)?;
        let bytes = PyRegisterBytes { processor, class };
        import(py, intern!(py, "pyvmm.registers"))?.getattr(name)?.call1((bytes,))
    }
}

/// The vCPUs of a machine's object.
pub(super) fn to_python<'py>(
    machine: &Bound<'py, PyAny>,
    handles: &[Arc<VcpuHandle>],
    parts: &Parts,
) -> PyResult<Bound<'py, PyTuple>> {
    let of = |handle| PyVcpu::of_machine(machine, handle, parts);
    let vcpus: Vec<_> = handles.iter().map(of).collect::<PyResult<_>>()?;
    PyTuple::new(machine.py(), vcpus)
}

#[pymethods]
impl PyVcpu {
    /// The general registers, RIP and RFLAGS.
    #[getter]
    fn regs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.processor.handle.check_process()?;
        if let Some(known) = self.regs.with(py, |regs| regs.as_ref().map(|regs| regs.clone_ref(py)))
        {
            return Ok(known.into_bound(py));
        }
        let new = self.view(py, intern!(py, "Regs"), RegisterClass::General)?;
        let former = self.regs.with(py, |regs| regs.replace(new.clone().unbind()));
        drop(former);
        Ok(new)
    }

    /// Segments, descriptor tables, control registers, EFER.
    #[getter]
    fn sregs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.view(py, intern!(py, "Sregs"), RegisterClass::Special)
    }

    /// x87, SSE and AVX.
    #[getter]
    fn fpu<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.view(py, intern!(py, "Fpu"), RegisterClass::Xsave)
    }

    /// XCR0.
    #[getter]
    fn xcrs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.view(py, intern!(py, "Xcrs"), RegisterClass::Xcrs)
    }

    /// DR0 to DR3, DR6, DR7.
    #[getter]
    fn debugregs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.view(py, intern!(py, "DebugRegs"), RegisterClass::Debug)
    }

    /// Exceptions, interrupts and NMIs that are pending or being delivered.
    #[getter]
    fn events<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.view(py, intern!(py, "VcpuEvents"), RegisterClass::Events)
    }

    /// The local APIC, if the machine has an interrupt controller.
    #[getter]
    fn lapic<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.view(py, intern!(py, "Lapic"), RegisterClass::Lapic)
    }

    /// Model-specific registers, by number or name.
    #[getter]
    fn msrs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let msrs = PyMsrBytes { processor: self.processor.another(py)? };
        import(py, intern!(py, "pyvmm.registers"))?.getattr(intern!(py, "Msrs"))?.call1((msrs,))
    }

    /// Whether the vCPU runs, waits for INIT and SIPI, or is halted: KVM_GET_MP_STATE.
    #[getter]
    fn mp_state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let processor = self.processor.another(py)?;
        let number = PyRegisterBytes { processor, class: RegisterClass::MpState }.load(py, 0, 4)?;
        import(py, "pyvmm.registers")?.getattr("MpState")?.call1((number,))
    }

    #[setter]
    fn set_mp_state(&self, py: Python<'_>, state: u64) -> PyResult<()> {
        let processor = self.processor.another(py)?;
        PyRegisterBytes { processor, class: RegisterClass::MpState }.store(py, 0, 4, state)
    }

    /// The CPUID that the guest sees: a tuple of `CpuidEntry`. It can be changed until the vCPU has
    /// run.
    #[getter]
    fn cpuid<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        cpuid_entries(py, &self.processor.with_vcpu(py, |vcpu| vcpu.cpuid())?)
    }

    #[setter]
    fn set_cpuid(&self, py: Python<'_>, entries: Items<Bound<'_, PyAny>>) -> PyResult<()> {
        let entries: Vec<_> = entries.0.iter().map(cpuid_entry).collect::<PyResult<_>>()?;
        if self.processor.tracker.is_leased() {
            let detail = "the job's machine may have run other jobs, so its CPUID cannot change";
            let error = Error::new(ErrorKind::State, "cpuid", detail);
            return Err(error.hint("change it in the setup of the pool's forks").into());
        }
        self.processor.change(py, |vcpu| vcpu.set_cpuid(&entries))
    }

    /// Enter the guest on this thread and return its next exit. No device answers the exit.
    ///
    /// After a read, call `answer`; the next `run_once` completes it. Ctrl-C on the main thread
    /// ends the call.
    ///
    /// Raises:
    ///     StateError: the guest is running, or the machine is closed.
    ///     KvmError: KVM_RUN failed.
    fn run_once(&self, py: Python<'_>) -> PyResult<PyVcpuExit> {
        let handle = self.processor.handle()?;
        loop {
            if let Some(exit) = py.detach(|| handle.run_once())? {
                return PyVcpuExit::of(py, exit);
            }
            py.check_signals()?;
        }
    }

    /// Make the current or next `run_once` return `VcpuExit.Interrupted`. May be called from any
    /// thread.
    fn kick(&self, py: Python<'_>) -> PyResult<()> {
        let handle = self.processor.handle()?;
        handle.check_process()?;
        py.detach(|| handle.kick());
        Ok(())
    }

    /// Set the value that the guest reads after `VcpuExit.IoIn` or `MmioRead`: bytes, or a
    /// little-endian number.
    ///
    /// Raises:
    ///     StateError: the guest does not wait for an answer, or is running.
    ///     ValueError: the guest reads a different number of bytes.
    ///     OverflowError: the number has more bits, or is negative.
    fn answer(&self, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = data.py();
        let Some(wanted) = self.processor.with_vcpu(py, |vcpu| Ok(vcpu.wanted()))? else {
            return self.processor.change(py, |vcpu| vcpu.answer(&[]));
        };
        let bytes: PyBackedBytes = match data.cast::<PyInt>() {
            Ok(number) => number.call_method1("to_bytes", (wanted, "little"))?.extract()?,
            Err(_) => data.extract()?,
        };
        if bytes.len() != wanted {
            let text = format!("the guest reads {wanted} bytes, not {}", bytes.len());
            return Err(PyValueError::new_err(text));
        }
        self.processor.change(py, |vcpu| vcpu.answer(&bytes))
    }

    /// Translate a guest-virtual address by the vCPU's page tables.
    ///
    /// Return the guest-physical address, or None if it is not mapped.
    ///
    /// Raises:
    ///     StateError: the guest is running, or the machine is closed.
    fn translate(&self, py: Python<'_>, address: u64) -> PyResult<Option<u64>> {
        self.processor.with_vcpu(py, |vcpu| {
            let paging = vcpu.paging()?;
            Ok(vcpu.translate(&paging, address))
        })
    }

    /// Exit with kind "debug" after each instruction, or before execution at up to four linear
    /// addresses.
    ///
    /// Uses KVM_SET_GUEST_DEBUG; without arguments, both are switched off. To continue from a
    /// breakpoint, remove it for one step.
    ///
    /// Raises:
    ///     StateError: the guest is running, or the machine is closed.
    ///     ConfigError: there are more than four breakpoints.
    #[pyo3(signature = (*, single_step = false, breakpoints = None))]
    fn debug(
        &self,
        py: Python<'_>,
        single_step: bool,
        breakpoints: Option<Items<u64>>,
    ) -> PyResult<()> {
        let breakpoints = breakpoints.map_or_else(Vec::new, |items| items.0);
        let request = DebugRequest { single_step, breakpoints };
        self.processor.change(py, |vcpu| vcpu.debug(DebugOwner::Program, request))
    }

    fn __repr__(&self) -> String {
        format!("Vcpu({})", self.id)
    }

    fn _repr_html_<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        crate::py::notebook::html(slf, "vcpu")
    }

    fn __eq__(&self, other: &Self) -> bool {
        match (self.processor.handle.peek(), other.processor.handle.peek()) {
            (Some(handle), Some(other)) => handle.ptr_eq(other),
            _ => std::ptr::eq(self, other),
        }
    }

    fn __hash__(&self) -> u64 {
        self.id
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        self.processor.traverse(&visit)?;
        // SAFETY: the collector holds the GIL.
        unsafe { self.regs.peek(|regs| visit.call(regs)) }.unwrap_or(Ok(()))
    }
}

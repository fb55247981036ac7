//! `Vcpu` for Python: access to the registers of a stopped vCPU.

use std::sync::{Arc, Weak};
use std::time::Duration;

use kvm_bindings::kvm_cpuid_entry2;
use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyInt, PyString, PyTuple};

use super::ending::import;
use super::lease::Tie;
use super::owned::Owned;
use super::parts::{Part, Parts};
use super::vcpu_exit::PyVcpuExit;
use super::wakeup;

use crate::error::{Error, ErrorKind, Result};
use crate::vcpu::{DebugOwner, DebugRequest, RegisterClass, Vcpu, VcpuHandle};

/// A vCPU, usable until its machine is closed.
#[derive(Debug)]
struct Processor {
    handle: Owned<Weak<VcpuHandle>>,
    /// The machine's object, so that the machine stays open while a vCPU or its registers are
    /// referenced.
    machine: Option<Py<PyAny>>,
    tie: Tie,
}

impl Processor {
    /// Access the vCPU, with changes that a reset undoes. If another thread uses it for long, as a
    /// snapshot does, this waits without the GIL, and a signal handler that raises ends the wait.
    fn look<T: Send>(
        &self,
        py: Python<'_>,
        look: impl FnOnce(&mut Vcpu) -> Result<T> + Send,
    ) -> PyResult<T> {
        let handle = self.upgrade()?;
        let mut tried = handle.try_with_vcpu(Duration::ZERO, look);
        loop {
            let look = match tried {
                Ok(result) => return Ok(result?),
                Err(look) => look,
            };
            py.check_signals()?;
            tried = py.detach(|| handle.try_with_vcpu(wakeup::SIGNAL_CHECK_INTERVAL, look));
        }
    }

    /// Access the vCPU, with changes that a reset cannot undo.
    fn change<T: Send>(
        &self,
        py: Python<'_>,
        change: impl FnOnce(&mut Vcpu) -> Result<T> + Send,
    ) -> PyResult<T> {
        self.tie.change();
        self.look(py, change)
    }

    /// The vCPU, to run it directly.
    fn handle(&self) -> Result<Arc<VcpuHandle>> {
        self.tie.hand_out();
        self.upgrade()
    }

    fn upgrade(&self) -> Result<Arc<VcpuHandle>> {
        self.handle.get()?.upgrade().ok_or_else(|| Error::closed("machine"))
    }

    fn of(handle: Weak<VcpuHandle>, machine: Option<Py<PyAny>>, tie: &Tie) -> Self {
        Self { handle: Owned::new("vCPU", handle), machine, tie: tie.clone() }
    }

    fn another(&self, py: Python<'_>) -> Result<Self> {
        let machine = self.machine.as_ref().map(|machine| machine.clone_ref(py));
        Ok(Self::of(Weak::clone(self.handle.get()?), machine, &self.tie))
    }

    fn traverse(&self, visit: &PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        visit.call(&self.machine)
    }
}

/// One class of a vCPU's registers, as the bytes of the kernel's structure. `pyvmm.registers` names
/// them.
#[pyclass(frozen, name = "RegisterBytes", module = "pyvmm")]
#[derive(Debug)]
pub struct PyRegisterBytes {
    processor: Processor,
    class: RegisterClass,
}

fn outside() -> PyErr {
    PyValueError::new_err("these bytes are outside the registers")
}

#[pymethods]
impl PyRegisterBytes {
    /// Return the little-endian number of 1 to 8 bytes at an offset.
    ///
    /// Raises:
    ///     StateError: the guest is running, or the machine is closed.
    fn load(&self, py: Python<'_>, offset: usize, size: usize) -> PyResult<u64> {
        let number = self.processor.look(py, |vcpu| {
            vcpu.load(self.class, |bytes| {
                let from = bytes.get(offset..)?.get(..size)?;
                let mut number = [0; 8];
                number.get_mut(..size)?.copy_from_slice(from);
                Some(u64::from_le_bytes(number))
            })
        })?;
        number.ok_or_else(outside)
    }

    /// Write a number of 1 to 8 bytes at an offset.
    ///
    /// Raises:
    ///     OverflowError: the number has more bits.
    ///     KvmError: KVM refuses it; nothing changes.
    ///     StateError: the guest is running, or the machine is closed.
    fn store(&self, py: Python<'_>, offset: usize, size: usize, value: u64) -> PyResult<()> {
        let number = value.to_le_bytes();
        let Some((low, high)) = number.split_at_checked(size) else {
            return Err(outside());
        };
        if high.iter().any(|byte| *byte != 0) {
            let detail = format!("{value:#x} does not fit into {} bits", 8 * size);
            return Err(PyOverflowError::new_err(detail));
        }
        self.replace(py, offset, low)
    }

    /// Return all bytes.
    ///
    /// Raises:
    ///     StateError: the guest is running, or the machine is closed.
    fn read<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = self.processor.look(py, |vcpu| vcpu.load(self.class, <[u8]>::to_vec))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Write bytes at an offset. Raises the same exceptions as `store`.
    fn replace(&self, py: Python<'_>, offset: usize, bytes: &[u8]) -> PyResult<()> {
        let mut is_inside = false;
        self.processor.look(py, |vcpu| {
            vcpu.store(self.class, |all| {
                let end = offset.saturating_add(bytes.len());
                if let Some(to) = all.get_mut(offset..end) {
                    to.copy_from_slice(bytes);
                    is_inside = true;
                }
            })
        })?;
        if is_inside { Ok(()) } else { Err(outside()) }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        self.processor.traverse(&visit)
    }
}

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
}

impl PyVcpu {
    pub(super) fn look<T: Send>(
        &self,
        py: Python<'_>,
        look: impl FnOnce(&mut Vcpu) -> Result<T> + Send,
    ) -> PyResult<T> {
        self.processor.look(py, look)
    }

    /// The object for a vCPU of a machine's object.
    pub(super) fn of(handle: &Arc<VcpuHandle>, machine: Option<Py<PyAny>>, tie: &Tie) -> Self {
        Self { id: handle.id(), processor: Processor::of(Arc::downgrade(handle), machine, tie) }
    }

    /// The object for a vCPU of a machine's object: the existing one, or a new one.
    pub(super) fn of_machine<'py>(
        machine: &Bound<'py, PyAny>,
        handle: &Arc<VcpuHandle>,
        parts: &Parts,
    ) -> PyResult<Bound<'py, Self>> {
        let py = machine.py();
        parts.get_or_make(py, Part::Vcpu(handle.id()), || {
            Bound::new(py, Self::of(handle, Some(machine.clone().unbind()), &parts.tie))
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

/// CPUID leaves as Python objects.
pub(super) fn cpuid_entries<'py>(
    py: Python<'py>,
    table: &[kvm_cpuid_entry2],
) -> PyResult<Bound<'py, PyTuple>> {
    let class = import(py, "pyvmm.registers")?.getattr("CpuidEntry")?;
    let entries: Vec<_> = table
        .iter()
        .map(|e| class.call1((e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)))
        .collect::<PyResult<_>>()?;
    PyTuple::new(py, entries)
}

fn cpuid_entry(entry: &Bound<'_, PyAny>) -> PyResult<kvm_cpuid_entry2> {
    let number = |name: &str| entry.getattr(name)?.extract::<u32>();
    Ok(kvm_cpuid_entry2 {
        function: number("function")?,
        index: number("index")?,
        flags: number("flags")?,
        eax: number("eax")?,
        ebx: number("ebx")?,
        ecx: number("ecx")?,
        edx: number("edx")?,
        ..Default::default()
    })
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
        self.view(py, intern!(py, "Regs"), RegisterClass::General)
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
        cpuid_entries(py, &self.processor.look(py, |vcpu| vcpu.cpuid())?)
    }

    #[setter]
    fn set_cpuid(&self, py: Python<'_>, entries: Vec<Bound<'_, PyAny>>) -> PyResult<()> {
        let entries: Vec<_> = entries.iter().map(cpuid_entry).collect::<PyResult<_>>()?;
        if self.processor.tie.is_lent() {
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
        let Some(wanted) = self.processor.look(py, |vcpu| Ok(vcpu.wanted()))? else {
            return self.processor.change(py, |vcpu| vcpu.answer(&[]));
        };
        let bytes: Vec<u8> = match data.cast::<PyInt>() {
            Ok(number) => number.call_method1("to_bytes", (wanted, "little"))?.extract()?,
            Err(_) => data.extract::<std::borrow::Cow<'_, [u8]>>()?.into_owned(),
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
        self.processor.look(py, |vcpu| {
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
        breakpoints: Option<Vec<u64>>,
    ) -> PyResult<()> {
        let breakpoints = breakpoints.unwrap_or_default();
        let request = DebugRequest { single_step, breakpoints };
        self.processor.change(py, |vcpu| vcpu.debug(DebugOwner::Program, request))
    }

    fn __repr__(&self) -> String {
        format!("Vcpu({})", self.id)
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
        self.processor.traverse(&visit)
    }
}

/// Model-specific registers by number. `pyvmm.registers` names them.
#[pyclass(frozen, name = "MsrBytes", module = "pyvmm")]
#[derive(Debug)]
pub struct PyMsrBytes {
    processor: Processor,
}

#[pymethods]
impl PyMsrBytes {
    /// Return the register's value.
    ///
    /// Raises:
    ///     KvmError: KVM does not know the register.
    ///     StateError: the guest is running, or the machine is closed.
    fn load(&self, py: Python<'_>, index: u32) -> PyResult<u64> {
        self.processor.look(py, |vcpu| vcpu.msr(index))
    }

    /// Set the register. Raises the same exceptions as `load`.
    fn store(&self, py: Python<'_>, index: u32, value: u64) -> PyResult<()> {
        self.processor.change(py, |vcpu| vcpu.set_msr(index, value))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        self.processor.traverse(&visit)
    }
}

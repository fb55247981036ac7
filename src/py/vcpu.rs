//! `Vcpu` for Python: a virtual processor at rest, looked into by its classes of registers.

use std::sync::{Arc, Weak};

use kvm_bindings::kvm_cpuid_entry2;
use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyInt, PyTuple};

use super::vcpu_exit::PyVcpuExit;

use crate::error::{Error, ErrorKind, Result};
use crate::vcpu::{Cell, RegisterClass, Vcpu};

/// A virtual processor, as long as its machine is not closed.
#[derive(Clone, Debug)]
struct Processor(Weak<Cell>);

impl Processor {
    fn look<T>(&self, look: impl FnOnce(&mut Vcpu) -> Result<T>) -> Result<T> {
        self.cell()?.with_vcpu(look)
    }

    fn cell(&self) -> Result<Arc<Cell>> {
        let closed = || Error::new(ErrorKind::State, "vcpu", "the machine is closed");
        self.0.upgrade().ok_or_else(closed)
    }
}

/// One class of a vCPU's registers, as the bytes of the kernel's structure. `pyvmm.registers` names them.
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
    /// The little-endian number of 1 to 8 bytes at an offset.
    ///
    /// Raises:
    ///     StateError: the guest is running, or the machine is closed.
    fn load(&self, offset: usize, size: usize) -> PyResult<u64> {
        let number = self.processor.look(|vcpu| {
            vcpu.load(self.class, |bytes| {
                let from = bytes.get(offset..)?.get(..size)?;
                let mut number = [0; 8];
                number.get_mut(..size)?.copy_from_slice(from);
                Some(u64::from_le_bytes(number))
            })
        })?;
        number.ok_or_else(outside)
    }

    /// Put a number of 1 to 8 bytes at an offset.
    ///
    /// Raises:
    ///     OverflowError: the number has more bits.
    ///     KvmError: KVM refuses it; nothing has changed.
    ///     StateError: the guest is running, or the machine is closed.
    fn store(&self, offset: usize, size: usize, value: u64) -> PyResult<()> {
        let number = value.to_le_bytes();
        let Some((low, high)) = number.split_at_checked(size) else {
            return Err(outside());
        };
        if high.iter().any(|byte| *byte != 0) {
            let detail = format!("{value:#x} does not fit into {} bits", 8 * size);
            return Err(PyOverflowError::new_err(detail));
        }
        self.replace(offset, low)
    }

    /// All of them.
    ///
    /// Raises:
    ///     StateError: the guest is running, or the machine is closed.
    fn read<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(self.processor.look(|vcpu| vcpu.load(self.class, |bytes| PyBytes::new(py, bytes)))?)
    }

    /// Put bytes at an offset; raises as `store` does.
    fn replace(&self, offset: usize, bytes: &[u8]) -> PyResult<()> {
        let mut is_inside = false;
        self.processor.look(|vcpu| {
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
}

/// A virtual processor of a machine. While its guest does not run its state can be read and changed.
///
/// The registers are views: each access reads or changes the vCPU itself. While the guest runs they raise StateError.
#[pyclass(frozen, weakref, name = "Vcpu", module = "pyvmm")]
#[derive(Debug)]
pub struct PyVcpu {
    processor: Processor,
    /// The vCPU's number.
    #[pyo3(get)]
    id: u64,
    #[pyo3(get)]
    regs: Py<PyAny>,
    #[pyo3(get)]
    sregs: Py<PyAny>,
    #[pyo3(get)]
    fpu: Py<PyAny>,
    #[pyo3(get)]
    xcrs: Py<PyAny>,
    #[pyo3(get)]
    debugregs: Py<PyAny>,
    #[pyo3(get)]
    events: Py<PyAny>,
    #[pyo3(get)]
    lapic: Py<PyAny>,
    #[pyo3(get)]
    msrs: Py<PyAny>,
    mp_state: PyRegisterBytes,
}

impl PyVcpu {
    pub(super) fn look<T>(&self, look: impl FnOnce(&mut Vcpu) -> Result<T>) -> Result<T> {
        self.processor.look(look)
    }

    pub(super) fn of(py: Python<'_>, cell: &Arc<Cell>) -> PyResult<Py<Self>> {
        let processor = Processor(Arc::downgrade(cell));
        let classes = py.import("pyvmm.registers")?;
        let registers = |class| PyRegisterBytes { processor: processor.clone(), class };
        let view =
            |name, class| classes.getattr(name)?.call1((registers(class),)).map(Bound::unbind);
        let msrs = PyMsrBytes { processor: processor.clone() };
        let vcpu = Self {
            id: cell.id(),
            regs: view("Regs", RegisterClass::General)?,
            sregs: view("Sregs", RegisterClass::Special)?,
            fpu: view("Fpu", RegisterClass::Xsave)?,
            xcrs: view("Xcrs", RegisterClass::Xcrs)?,
            debugregs: view("DebugRegs", RegisterClass::Debug)?,
            events: view("VcpuEvents", RegisterClass::Events)?,
            lapic: view("Lapic", RegisterClass::Lapic)?,
            msrs: classes.getattr("Msrs")?.call1((msrs,))?.unbind(),
            mp_state: registers(RegisterClass::MpState),
            processor,
        };
        Py::new(py, vcpu)
    }
}

/// CPUID leaves as Python has them.
pub(super) fn cpuid_entries<'py>(
    py: Python<'py>,
    table: &[kvm_cpuid_entry2],
) -> PyResult<Bound<'py, PyTuple>> {
    let class = py.import("pyvmm.registers")?.getattr("CpuidEntry")?;
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

/// The vCPUs of a machine.
pub(super) fn to_python<'py>(
    py: Python<'py>,
    cells: &[Arc<Cell>],
) -> PyResult<Bound<'py, PyTuple>> {
    let vcpus: Vec<_> = cells.iter().map(|cell| PyVcpu::of(py, cell)).collect::<PyResult<_>>()?;
    PyTuple::new(py, vcpus)
}

#[pymethods]
impl PyVcpu {
    /// Whether it runs, waits for INIT and SIPI, or is halted: KVM_GET_MP_STATE.
    #[getter]
    fn mp_state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let number = self.mp_state.load(0, 4)?;
        py.import("pyvmm.registers")?.getattr("MpState")?.call1((number,))
    }

    #[setter]
    fn set_mp_state(&self, state: u64) -> PyResult<()> {
        self.mp_state.store(0, 4, state)
    }

    /// What CPUID says to the guest: a tuple of `CpuidEntry`. It can be changed until the vCPU has run.
    #[getter]
    fn cpuid<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        cpuid_entries(py, &self.processor.look(|vcpu| vcpu.cpuid())?)
    }

    #[setter]
    fn set_cpuid(&self, entries: Vec<Bound<'_, PyAny>>) -> PyResult<()> {
        let entries: Vec<_> = entries.iter().map(cpuid_entry).collect::<PyResult<_>>()?;
        Ok(self.processor.look(|vcpu| vcpu.set_cpuid(&entries))?)
    }

    /// Enter the guest on this thread until its next exit, and return that. No device answers it.
    ///
    /// A read waits for `answer`; the next `run_once` completes it. Ctrl-C on the main thread ends it.
    ///
    /// Raises:
    ///     StateError: the guest is running, or the machine is closed.
    ///     KvmError: KVM_RUN failed.
    fn run_once(&self, py: Python<'_>) -> PyResult<PyVcpuExit> {
        let cell = self.processor.cell()?;
        loop {
            if let Some(exit) = py.detach(|| cell.run_once())? {
                return PyVcpuExit::of(py, exit);
            }
            py.check_signals()?;
        }
    }

    /// Bring `run_once` back with `VcpuExit.Interrupted`: the one in progress, else the next. From any thread.
    fn kick(&self, py: Python<'_>) -> PyResult<()> {
        let cell = self.processor.cell()?;
        cell.check_process()?;
        py.detach(|| cell.kick());
        Ok(())
    }

    /// Say what the guest reads, after `VcpuExit.IoIn` or `MmioRead`: bytes, or a number in little-endian order.
    ///
    /// Raises:
    ///     StateError: the guest does not wait for an answer, or runs.
    ///     ValueError: it is another number of bytes than the guest reads.
    ///     OverflowError: the number has more bits, or is negative.
    fn answer(&self, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let Some(wanted) = self.processor.look(|vcpu| Ok(vcpu.wanted()))? else {
            return Ok(self.processor.look(|vcpu| vcpu.answer(&[]))?);
        };
        let bytes: Vec<u8> = match data.cast::<PyInt>() {
            Ok(number) => number.call_method1("to_bytes", (wanted, "little"))?.extract()?,
            Err(_) => data.extract::<std::borrow::Cow<'_, [u8]>>()?.into_owned(),
        };
        if bytes.len() != wanted {
            let text = format!("the guest reads {wanted} bytes, not {}", bytes.len());
            return Err(PyValueError::new_err(text));
        }
        Ok(self.processor.look(|vcpu| vcpu.answer(&bytes))?)
    }

    /// The guest-physical address behind a guest-virtual one, by the vCPU's page tables; None where none is mapped.
    ///
    /// Raises:
    ///     StateError: the guest is running, or the machine is closed.
    fn translate(&self, address: u64) -> PyResult<Option<u64>> {
        Ok(self.processor.look(|vcpu| {
            let paging = vcpu.paging()?;
            Ok(vcpu.translate(&paging, address))
        })?)
    }

    /// Have each instruction, or execution at up to four linear addresses, come out as an exit of kind "debug".
    ///
    /// KVM_SET_GUEST_DEBUG; without arguments no more. To go on from a breakpoint, take it away for one step.
    ///
    /// Raises:
    ///     StateError: the guest is running, or the machine is closed.
    ///     ConfigError: more than four breakpoints.
    #[pyo3(signature = (*, single_step = false, breakpoints = None))]
    fn debug(&self, single_step: bool, breakpoints: Option<Vec<u64>>) -> PyResult<()> {
        let breakpoints = breakpoints.unwrap_or_default();
        Ok(self.processor.look(|vcpu| vcpu.debug(single_step, &breakpoints))?)
    }

    fn __repr__(&self) -> String {
        format!("Vcpu({})", self.id)
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
    /// The register's value.
    ///
    /// Raises:
    ///     KvmError: KVM does not know it.
    ///     StateError: the guest is running, or the machine is closed.
    fn load(&self, index: u32) -> PyResult<u64> {
        Ok(self.processor.look(|vcpu| vcpu.msr(index))?)
    }

    /// Change the register; raises as `load` does.
    fn store(&self, index: u32, value: u64) -> PyResult<()> {
        Ok(self.processor.look(|vcpu| vcpu.set_msr(index, value))?)
    }
}

//! `VcpuExit` for Python, the result of `Vcpu.run_once`, with one class for each kind.

use kvm_bindings::{KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL};
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyBytes, PyDict, PyString, PyTuple};

use crate::vcpu::VcpuExit;

/// Why a vCPU exited the guest: the exits of the kernel's KVM documentation, chapter 5, for
/// `match`.
///
/// Exits of the same kind with equal fields are equal. They can be hashed and pickled.
#[pyclass(frozen, name = "VcpuExit", module = "pyvmm")]
#[derive(Debug)]
pub enum PyVcpuExit {
    /// `IN` or `INS`: `count` reads of `size` bytes from a port.
    ///
    /// `Vcpu.answer` sets the value; the default is all one bits.
    IoIn {
        /// The port.
        port: u16,
        /// The size of one read in bytes: 1, 2 or 4.
        size: usize,
        /// The number of reads; more than one for `REP INS`.
        count: usize,
    },
    /// `OUT` or `OUTS`: writes of `size` bytes each to a port.
    IoOut {
        /// The port.
        port: u16,
        /// The size of one write in bytes: 1, 2 or 4.
        size: usize,
        /// All bytes that were written.
        data: Py<PyBytes>,
    },
    /// A read where there is no memory. `Vcpu.answer` sets the value; the default is all one bits.
    MmioRead {
        /// The guest-physical address.
        address: u64,
        /// The size in bytes: 1 to 8.
        length: usize,
    },
    /// A write where there is no memory, or read-only memory.
    MmioWrite {
        /// The guest-physical address.
        address: u64,
        /// What was written.
        data: Py<PyBytes>,
    },
    /// `RDMSR` of a register that KVM does not know, or that a hook selected.
    ///
    /// Without an answer the guest gets a fault.
    Rdmsr {
        /// The register's number.
        index: u32,
        /// "unknown", "invalid" or "filter": KVM_MSR_EXIT_REASON_*.
        reason: Py<PyString>,
    },
    /// `WRMSR` to such a register.
    Wrmsr {
        /// The register's number.
        index: u32,
        /// What was written.
        value: u64,
        /// As for `Rdmsr`.
        reason: Py<PyString>,
    },
    /// `HLT`.
    Hlt {},
    /// A triple fault.
    Shutdown {},
    /// `Vcpu.kick` ended the call; the guest caused no exit.
    Interrupted {},
    /// The guest can accept an interrupt now.
    IrqWindowOpen {},
    /// The processor refused to enter the guest.
    FailEntry {
        /// The processor's reason.
        reason: u64,
        /// The host's processor.
        cpu: u32,
    },
    /// KVM could not continue.
    ///
    /// Suberror 1 means that KVM cannot emulate an instruction. The exit then has the instruction's
    /// bytes, perhaps with following ones, its disassembly in nasm syntax, and the registers by
    /// name: the general ones, rip, rflags, efer, cr0 to cr4 and the selectors.
    InternalError {
        /// KVM_INTERNAL_ERROR_*; 1 for an instruction that KVM could not emulate.
        suberror: u32,
        /// The bytes of that instruction, if KVM reports them.
        instruction: Py<PyBytes>,
        /// KVM's additional data.
        data: Py<PyTuple>,
        /// That instruction as text, in nasm syntax. None if the bytes are not an instruction.
        disassembly: Option<String>,
        /// The registers at the exit, by name.
        registers: Py<PyDict>,
    },
    /// A breakpoint or a single step.
    Debug {
        /// The exception: 1 or 3.
        exception: u32,
        /// The linear address of the instruction.
        pc: u64,
        /// DR6.
        dr6: u64,
        /// DR7.
        dr7: u64,
    },
    /// The guest's platform code requests a reset or power-off.
    SystemEvent {
        /// KVM_SYSTEM_EVENT_*.
        kind: u32,
        /// KVM's additional data.
        data: Py<PyTuple>,
    },
    /// An access that the memory's attributes forbid.
    MemoryFault {
        /// KVM_MEMORY_EXIT_FLAG_*.
        flags: u64,
        /// The guest-physical address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// Another exit.
    Unknown {
        /// KVM_EXIT_*.
        number: u32,
    },
}

impl PyVcpuExit {
    pub(super) fn of(py: Python<'_>, exit: VcpuExit) -> PyResult<Self> {
        let bytes = |data: &[u8]| PyBytes::new(py, data).unbind();
        let numbers = |data: Vec<u64>| PyTuple::new(py, data).map(Bound::unbind);
        Ok(match exit {
            VcpuExit::IoIn { port, size, count } => Self::IoIn { port, size, count },
            VcpuExit::IoOut { port, size, data } => Self::IoOut { port, size, data: bytes(&data) },
            VcpuExit::MmioRead { address, length } => Self::MmioRead { address, length },
            VcpuExit::MmioWrite { address, data } => {
                Self::MmioWrite { address, data: bytes(&data) }
            }
            VcpuExit::Rdmsr { index, reason } => {
                Self::Rdmsr { index, reason: msr_reason(py, reason) }
            }
            VcpuExit::Wrmsr { index, value, reason } => {
                Self::Wrmsr { index, value, reason: msr_reason(py, reason) }
            }
            VcpuExit::Hlt => Self::Hlt {},
            VcpuExit::Shutdown => Self::Shutdown {},
            VcpuExit::Interrupted => Self::Interrupted {},
            VcpuExit::IrqWindowOpen => Self::IrqWindowOpen {},
            VcpuExit::FailEntry { reason, cpu } => Self::FailEntry { reason, cpu },
            VcpuExit::InternalError { suberror, instruction, data, disassembly, registers } => {
                Self::InternalError {
                    suberror,
                    instruction: bytes(&instruction),
                    data: numbers(data)?,
                    disassembly,
                    registers: registers.into_py_dict(py)?.unbind(),
                }
            }
            VcpuExit::Debug { exception, pc, dr6, dr7 } => Self::Debug { exception, pc, dr6, dr7 },
            VcpuExit::SystemEvent { kind, data } => {
                Self::SystemEvent { kind, data: numbers(data)? }
            }
            VcpuExit::MemoryFault { flags, address, size } => {
                Self::MemoryFault { flags, address, size }
            }
            VcpuExit::Unknown { number } => Self::Unknown { number },
        })
    }
}

fn msr_reason(py: Python<'_>, reason: u32) -> Py<PyString> {
    let text = match reason {
        KVM_MSR_EXIT_REASON_INVAL => "invalid",
        KVM_MSR_EXIT_REASON_FILTER => "filter",
        _ => "unknown",
    };
    PyString::intern(py, text).unbind()
}

/// The name of an exit's variant; its class is `VcpuExit_IoIn`.
fn variant(exit: &Bound<'_, PyAny>) -> PyResult<String> {
    let name = exit.get_type().name()?.to_string();
    Ok(name.rsplit('_').next().unwrap_or_default().to_owned())
}

/// The names and values of an exit's fields, in order.
fn fields<'py>(exit: &Bound<'py, PyAny>) -> PyResult<Vec<(String, Bound<'py, PyAny>)>> {
    let names: Vec<String> = exit.get_type().getattr("__match_args__")?.extract()?;
    let value = |name: String| exit.getattr(name.as_str()).map(|value| (name, value));
    names.into_iter().map(value).collect()
}

#[pymethods]
impl PyVcpuExit {
    /// Return the exit as a dict. "type" is the name of its class, such as "IoIn"; the fields
    /// follow by name.
    ///
    /// The dict and its values belong to the caller.
    fn as_dict<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(slf.py());
        dict.set_item("type", variant(slf.as_any())?)?;
        for (name, value) in fields(slf.as_any())? {
            match value.cast::<PyDict>() {
                Ok(registers) => dict.set_item(name, registers.copy()?)?,
                Err(_) => dict.set_item(name, value)?,
            }
        }
        Ok(dict)
    }

    fn __eq__(slf: &Bound<'_, Self>, other: &Bound<'_, Self>) -> PyResult<bool> {
        if !slf.as_any().get_type().is(other.as_any().get_type()) {
            return Ok(false);
        }
        for ((_, ours), (_, theirs)) in fields(slf.as_any())?.iter().zip(&fields(other.as_any())?) {
            if !ours.eq(theirs)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Dicts are not included, because they can change and a hash must not.
    fn __hash__(slf: &Bound<'_, Self>) -> PyResult<isize> {
        let values = fields(slf.as_any())?.into_iter().map(|(_, value)| value);
        let values = PyTuple::new(
            slf.py(),
            values.filter(|value| !value.is_instance_of::<PyDict>()).collect::<Vec<_>>(),
        )?;
        (variant(slf.as_any())?, values).into_pyobject(slf.py())?.hash()
    }

    /// Uses a function of the package, because pickle cannot find a variant's class by name.
    fn __reduce__<'py>(
        slf: &Bound<'py, Self>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let mut arguments = vec![variant(slf.as_any())?.into_pyobject(slf.py())?.into_any()];
        arguments.extend(fields(slf.as_any())?.into_iter().map(|(_, value)| value));
        let restored = slf.py().import("pyvmm.exits")?.getattr("_vcpu_exit")?;
        Ok((restored, PyTuple::new(slf.py(), arguments)?))
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let mut shown = Vec::new();
        for (name, value) in fields(slf.as_any())? {
            let is_hex =
                matches!(name.as_str(), "port" | "address" | "index" | "pc" | "dr6" | "dr7");
            let text = match value.extract::<u64>() {
                Ok(number) if is_hex => format!("{number:#x}"),
                _ => value.repr()?.to_string(),
            };
            shown.push(format!("{name}={text}"));
        }
        Ok(format!("VcpuExit.{}({})", variant(slf.as_any())?, shown.join(", ")))
    }
}

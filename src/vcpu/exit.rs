//! An exit of KVM's as a value of its own, and the turn of those who drive a vCPU by hand.

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::{MsrExitReason, VcpuExit as Borrowed};
use smallvec::SmallVec;

use super::fault::{Instruction, named};
use super::fixup::fix_up;
use super::kick::StopWord;
use super::registers::Vcpu;
use super::run_page::RunPage;
use crate::error::{Error, Result};

/// The bytes of an access: most have at most eight.
pub type Data = SmallVec<[u8; 8]>;

/// Why KVM_RUN came back: the exits of the kernel's KVM documentation, chapter 5.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuExit {
    /// `IN` or `INS`: `count` reads of `size` bytes, which wait for an answer.
    IoIn {
        /// The port.
        port: u16,
        /// Bytes of one read.
        size: usize,
        /// Reads; more than one for `REP INS`.
        count: usize,
    },
    /// `OUT` or `OUTS`: one or more writes of `size` bytes.
    IoOut {
        /// The port.
        port: u16,
        /// Bytes of one write.
        size: usize,
        /// All of them.
        data: Data,
    },
    /// A read where no memory is, which waits for an answer.
    MmioRead {
        /// The guest-physical address.
        address: u64,
        /// Bytes.
        length: usize,
    },
    /// A write where no memory is, or where the guest cannot write.
    MmioWrite {
        /// The guest-physical address.
        address: u64,
        /// What was written.
        data: Data,
    },
    /// `RDMSR` of a register that KVM does not know or that is filtered: it waits for an answer.
    Rdmsr {
        /// The register's number.
        index: u32,
        /// `KVM_MSR_EXIT_REASON_*`
        reason: u32,
    },
    /// `WRMSR` to such a register.
    Wrmsr {
        /// The register's number.
        index: u32,
        /// The value.
        value: u64,
        /// `KVM_MSR_EXIT_REASON_*`
        reason: u32,
    },
    /// `HLT`, without an interrupt controller of KVM's.
    Hlt,
    /// A triple fault.
    Shutdown,
    /// A kick or an immediate exit, not the guest.
    Interrupted,
    /// The guest can take an interrupt now.
    IrqWindowOpen,
    /// The processor refused to enter the guest.
    FailEntry {
        /// The processor's reason.
        reason: u64,
        /// The host's processor.
        cpu: u32,
    },
    /// KVM could not go on.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`
        suberror: u32,
        /// The bytes of the instruction that it could not emulate, where it says them.
        instruction: Vec<u8>,
        /// What else it says.
        data: Vec<u64>,
        /// That instruction as text.
        disassembly: Option<String>,
        /// The registers it stood with, by name.
        registers: Vec<(&'static str, u64)>,
    },
    /// A breakpoint or a single step.
    Debug {
        /// The exception's number: 1 or 3.
        exception: u32,
        /// The linear address of the instruction.
        pc: u64,
        /// DR6
        dr6: u64,
        /// DR7
        dr7: u64,
    },
    /// The guest's platform code asks for a reset or to be turned off.
    SystemEvent {
        /// `KVM_SYSTEM_EVENT_*`
        kind: u32,
        /// What else it says.
        data: Vec<u64>,
    },
    /// An access that the memory's attributes forbid.
    MemoryFault {
        /// `KVM_MEMORY_EXIT_FLAG_*`
        flags: u64,
        /// The guest-physical address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// Another exit, by its number.
    Unknown {
        /// `KVM_EXIT_*`
        number: u32,
    },
}

/// Exits by what a hook or a counter asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ExitKind {
    /// Ports.
    Io,
    /// Addresses without memory.
    Mmio,
    /// Model-specific registers.
    Msr,
    /// `HLT`
    Hlt,
    /// A triple fault.
    Shutdown,
    /// A breakpoint or a single step.
    Debug,
    /// KVM could not go on.
    InternalError,
    /// A reset or power-off by the platform's code.
    SystemEvent,
    /// The processor refused the guest.
    FailEntry,
    /// An access that the memory's attributes forbid.
    MemoryFault,
    /// Any other.
    Unknown,
}

impl ExitKind {
    /// Every kind.
    pub const ALL: [Self; 11] = [
        Self::Io,
        Self::Mmio,
        Self::Msr,
        Self::Hlt,
        Self::Shutdown,
        Self::Debug,
        Self::InternalError,
        Self::SystemEvent,
        Self::FailEntry,
        Self::MemoryFault,
        Self::Unknown,
    ];

    pub(super) fn bit(self) -> u64 {
        1 << self as u8
    }

    /// The kind's name, as Python's `ExitKind` has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::Mmio => "mmio",
            Self::Msr => "msr",
            Self::Hlt => "hlt",
            Self::Shutdown => "shutdown",
            Self::Debug => "debug",
            Self::InternalError => "internal-error",
            Self::SystemEvent => "system-event",
            Self::FailEntry => "fail-entry",
            Self::MemoryFault => "memory-fault",
            Self::Unknown => "unknown",
        }
    }
}

impl VcpuExit {
    /// What a hook or a counter knows it by; none for what is not the guest's.
    #[must_use]
    pub fn kind(&self) -> Option<ExitKind> {
        Some(match self {
            Self::IoIn { .. } | Self::IoOut { .. } => ExitKind::Io,
            Self::MmioRead { .. } | Self::MmioWrite { .. } => ExitKind::Mmio,
            Self::Rdmsr { .. } | Self::Wrmsr { .. } => ExitKind::Msr,
            Self::Hlt => ExitKind::Hlt,
            Self::Shutdown => ExitKind::Shutdown,
            Self::Debug { .. } => ExitKind::Debug,
            Self::InternalError { .. } => ExitKind::InternalError,
            Self::SystemEvent { .. } => ExitKind::SystemEvent,
            Self::FailEntry { .. } => ExitKind::FailEntry,
            Self::MemoryFault { .. } => ExitKind::MemoryFault,
            Self::Unknown { .. } => ExitKind::Unknown,
            Self::Interrupted | Self::IrqWindowOpen => return None,
        })
    }

    /// The port, address or register of an access, and whether it is a write.
    #[must_use]
    pub fn place(&self) -> Option<(u64, bool)> {
        match self {
            Self::IoIn { port, .. } => Some((u64::from(*port), false)),
            Self::IoOut { port, .. } => Some((u64::from(*port), true)),
            Self::MmioRead { address, .. } => Some((*address, false)),
            Self::MmioWrite { address, .. } => Some((*address, true)),
            Self::Rdmsr { index, .. } => Some((u64::from(*index), false)),
            Self::Wrmsr { index, .. } => Some((u64::from(*index), true)),
            Self::MemoryFault { address, .. } => Some((*address, false)),
            _ => None,
        }
    }

    /// Whether the guest waits for what it reads.
    pub(super) fn is_read(&self) -> bool {
        matches!(self, Self::IoIn { .. } | Self::MmioRead { .. } | Self::Rdmsr { .. })
    }

    /// Whether KVM completes the instruction at the next entry.
    pub(super) fn is_access(&self) -> bool {
        self.is_write() || self.is_read()
    }

    /// Whether the guest has written a device or a register of the host's.
    #[must_use]
    pub fn is_write(&self) -> bool {
        matches!(self, Self::IoOut { .. } | Self::MmioWrite { .. } | Self::Wrmsr { .. })
    }

    /// How many bytes a read waits for.
    #[must_use]
    pub fn wanted(&self) -> Option<usize> {
        match self {
            Self::IoIn { size, count, .. } => Some(size.saturating_mul(*count)),
            Self::MmioRead { length, .. } => Some(*length),
            Self::Rdmsr { .. } => Some(8),
            _ => None,
        }
    }
}

/// Enter the guest until it exits or the stop word is set; none for a signal that was no kick. A
/// read is answered with ones for now.
pub(super) fn run_once(vcpu: &mut Vcpu, stop: &StopWord) -> Result<Option<VcpuExit>> {
    // Kick, point 4.
    while !stop.is_set() {
        match enter(vcpu) {
            Ok(exit) => return Ok(Some(exit)),
            Err(error) => match error.errno() {
                // Kick, point 6.
                libc::EINTR if stop.is_set() => break,
                libc::EINTR => return Ok(None),
                // A vCPU that waited for INIT and SIPI has got one.
                libc::EAGAIN => {}
                _ => return Err(Error::kvm("KVM_RUN", error)),
            },
        }
    }
    Ok(Some(VcpuExit::Interrupted))
}

/// Enter the guest, or take the exit that was found when an instruction was completed. A read is
/// answered with ones for now, one of a model-specific register with a fault.
pub(super) fn enter(vcpu: &mut Vcpu) -> std::result::Result<VcpuExit, kvm_ioctls::Error> {
    vcpu.has_run = true;
    let result = match vcpu.waiting.take() {
        Some(exit) => Ok(exit),
        None => run(vcpu),
    };
    vcpu.has_page_registers = true;
    let found = result.as_ref().ok();
    vcpu.is_pending = found.is_some_and(VcpuExit::is_access);
    vcpu.awaits_answer = found.is_some_and(VcpuExit::is_read);
    result
}

/// Run the guest to its next exit but those that a fix-up takes away. A kick ends it: it has the
/// next KVM_RUN fail.
fn run(vcpu: &mut Vcpu) -> std::result::Result<VcpuExit, kvm_ioctls::Error> {
    loop {
        let exit = vcpu.fd.run().map(|exit| owned(exit, &vcpu.page))?;
        vcpu.has_page_registers = true;
        match exit {
            VcpuExit::InternalError { .. } if fix_up(vcpu) => {}
            exit => return Ok(with_state(exit, vcpu)),
        }
    }
}

/// An emulation failure with the instruction and the registers.
fn with_state(mut exit: VcpuExit, vcpu: &Vcpu) -> VcpuExit {
    if let VcpuExit::InternalError { suberror, instruction, disassembly, registers, .. } = &mut exit
    {
        if let (Ok(regs), Ok(sregs)) = (vcpu.general(), vcpu.fd.get_sregs()) {
            if *suberror == KVM_INTERNAL_ERROR_EMULATION {
                let found = Instruction::at(vcpu, &regs, &sregs);
                (*instruction, *disassembly) = (found.bytes, found.text);
            }
            *registers = named(&regs, &sregs);
        }
    }
    exit
}

pub(super) fn owned(exit: Borrowed<'_>, page: &RunPage) -> VcpuExit {
    match exit {
        Borrowed::IoIn(port, data) => {
            data.fill(0xff);
            let size = page.io_exit().size;
            VcpuExit::IoIn { port, size, count: data.len() / size }
        }
        Borrowed::IoOut(port, data) => {
            VcpuExit::IoOut { port, size: page.io_exit().size, data: Data::from_slice(data) }
        }
        Borrowed::MmioRead(address, data) => {
            data.fill(0xff);
            VcpuExit::MmioRead { address, length: data.len() }
        }
        Borrowed::MmioWrite(address, data) => {
            VcpuExit::MmioWrite { address, data: Data::from_slice(data) }
        }
        Borrowed::X86Rdmsr(msr) => {
            *msr.error = 1;
            VcpuExit::Rdmsr { index: msr.index, reason: MsrExitReason::bits(&msr.reason) }
        }
        Borrowed::X86Wrmsr(msr) => {
            *msr.error = 1;
            let reason = MsrExitReason::bits(&msr.reason);
            VcpuExit::Wrmsr { index: msr.index, value: msr.data, reason }
        }
        Borrowed::Hlt => VcpuExit::Hlt,
        Borrowed::Shutdown => VcpuExit::Shutdown,
        Borrowed::Intr => VcpuExit::Interrupted,
        Borrowed::IrqWindowOpen => VcpuExit::IrqWindowOpen,
        Borrowed::FailEntry(reason, cpu) => VcpuExit::FailEntry { reason, cpu },
        Borrowed::InternalError => {
            let error = page.internal_error();
            let instruction = error.instruction.get(..error.instruction_len).unwrap_or_default();
            let data = error.data.get(..error.ndata).unwrap_or_default();
            VcpuExit::InternalError {
                suberror: error.suberror,
                instruction: instruction.to_vec(),
                data: data.to_vec(),
                disassembly: None,
                registers: Vec::new(),
            }
        }
        Borrowed::Debug(debug) => VcpuExit::Debug {
            exception: debug.exception,
            pc: debug.pc,
            dr6: debug.dr6,
            dr7: debug.dr7,
        },
        Borrowed::SystemEvent(kind, data) => VcpuExit::SystemEvent { kind, data: data.to_vec() },
        Borrowed::MemoryFault { flags, gpa, size } => {
            VcpuExit::MemoryFault { flags, address: gpa, size }
        }
        Borrowed::Unsupported(number) => VcpuExit::Unknown { number },
        _ => VcpuExit::Unknown { number: page.exit_reason() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_answered_with_ones_at_first() {
        let page = RunPage::blank();
        let mut data = [0; 4];
        let exit = owned(Borrowed::MmioRead(0x1000, &mut data), &page);
        assert_eq!(exit, VcpuExit::MmioRead { address: 0x1000, length: 4 });
        assert!(exit.is_read() && exit.is_access());
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn exits_without_a_name_have_their_number() {
        let page = RunPage::blank();
        assert_eq!(owned(Borrowed::Unsupported(99), &page), VcpuExit::Unknown { number: 99 });
        assert_eq!(owned(Borrowed::Hyperv, &page), VcpuExit::Unknown { number: 0 });
    }
}

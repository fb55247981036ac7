//! An exit of KVM's as a value of its own, for those who drive a vCPU by hand.

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::VcpuExit as Borrowed;

use super::fault::{Instruction, named};
use super::fixup::fix_up;
use super::kick::StopWord;
use super::registers::Vcpu;
use super::run_page::RunPage;
use crate::error::{Error, Result};

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
        data: Vec<u8>,
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
        data: Vec<u8>,
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

impl VcpuExit {
    /// Whether the guest waits for what it reads.
    pub(super) fn is_read(&self) -> bool {
        matches!(self, Self::IoIn { .. } | Self::MmioRead { .. })
    }

    /// Whether KVM completes the instruction at the next entry.
    fn is_access(&self) -> bool {
        self.is_read() || matches!(self, Self::IoOut { .. } | Self::MmioWrite { .. })
    }
}

/// Enter the guest until it exits or the stop word is set; none for a signal that was no kick. A read is answered with
/// ones for now.
pub(super) fn run_once(vcpu: &mut Vcpu, stop: &StopWord) -> Result<Option<VcpuExit>> {
    // Kick, point 4.
    while !stop.is_set() {
        vcpu.has_run = true;
        let result = vcpu.fd.run();
        vcpu.has_page_registers = true;
        let exit = match result.map(|exit| owned(exit, &vcpu.page)) {
            Ok(VcpuExit::InternalError { .. }) if fix_up(vcpu) => continue,
            Ok(exit) => with_state(exit, vcpu),
            Err(error) => {
                (vcpu.is_pending, vcpu.awaits_answer) = (false, false);
                match error.errno() {
                    // Kick, point 6.
                    libc::EINTR if stop.is_set() => break,
                    libc::EINTR => return Ok(None),
                    // A vCPU that waited for INIT and SIPI has got one.
                    libc::EAGAIN => continue,
                    _ => return Err(Error::kvm("KVM_RUN", error)),
                }
            }
        };
        (vcpu.is_pending, vcpu.awaits_answer) = (exit.is_access(), exit.is_read());
        return Ok(Some(exit));
    }
    Ok(Some(VcpuExit::Interrupted))
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

fn owned(exit: Borrowed<'_>, page: &RunPage) -> VcpuExit {
    match exit {
        Borrowed::IoIn(port, data) => {
            data.fill(0xff);
            let size = page.io_exit().size;
            VcpuExit::IoIn { port, size, count: data.len() / size }
        }
        Borrowed::IoOut(port, data) => {
            VcpuExit::IoOut { port, size: page.io_exit().size, data: data.to_vec() }
        }
        Borrowed::MmioRead(address, data) => {
            data.fill(0xff);
            VcpuExit::MmioRead { address, length: data.len() }
        }
        Borrowed::MmioWrite(address, data) => VcpuExit::MmioWrite { address, data: data.to_vec() },
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

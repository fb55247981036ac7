//! Calls KVM_RUN: enters the guest, and completes, abandons or edits the instruction of the last
//! exit. `run.rs` decides what an exit means. On the thread that has the vCPU.

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, kvm_regs};
use kvm_ioctls::{MsrExitReason, VcpuExit as Borrowed};

use super::exit::{Data, VcpuExit};
use super::fault::{Instruction, linear, named};
use super::fixup::{Fixed, fix_up};
use super::kick::{ImmediateExit, StopWord};
use super::pending::PendingIo;
use super::run_page::RunPage;
use super::vcpu::Vcpu;
use crate::error::{Error, Result};
use crate::hop::hop;
use crate::x86::DB;

/// DR6 and DR7 as KVM reports a single step: their bits that are always one, and BS.
const DR6_STEPPED: u64 = 0xffff_4ff0;
const DR7_INITIAL: u64 = 0x400;

/// More than the accesses of eight bytes that any instruction makes; XSAVE makes the most.
const ABANDONED_PARTS: usize = 4096;

/// Enter the guest until it exits or the stop word is set; `None` after a signal that was not a
/// kick. Until a read is answered, its data is all one bits.
pub(super) fn run_once(vcpu: &mut Vcpu, stop: &StopWord) -> Result<Option<VcpuExit>> {
    // Kick, point 4.
    while !stop.is_set() {
        match enter(vcpu) {
            Ok(exit) => return Ok(Some(exit)),
            Err(error) => match error.errno() {
                // Kick, point 6.
                libc::EINTR if stop.is_set() => break,
                libc::EINTR => return Ok(None),
                // A vCPU that waited for INIT or SIPI has received one.
                libc::EAGAIN => {}
                _ => return Err(Error::kvm("KVM_RUN", error)),
            },
        }
    }
    Ok(Some(VcpuExit::Interrupted))
}

/// Enter the guest, or take the exit that completing an instruction has produced. Until it is
/// answered, a read gives all one bits, and an access to a model-specific register faults.
pub(super) fn enter(vcpu: &mut Vcpu) -> std::result::Result<VcpuExit, kvm_ioctls::Error> {
    hop!();
    vcpu.has_run = true;
    let result = match std::mem::take(&mut vcpu.pending) {
        PendingIo::Exit(exit) => Ok(exit),
        PendingIo::Idle | PendingIo::Access { .. } => run(vcpu),
    };
    vcpu.has_page_registers = true;
    if let Ok(exit) = &result {
        vcpu.pending = PendingIo::after(exit);
    }
    result
}

/// Run the guest to its next exit that no fix-up resolves. A kick makes the next KVM_RUN fail.
fn run(vcpu: &mut Vcpu) -> std::result::Result<VcpuExit, kvm_ioctls::Error> {
    loop {
        let exit = vcpu.raw_fd.run().map(|exit| owned(exit, &vcpu.page));
        vcpu.note_exit(exit.as_ref());
        let exit = exit?;
        vcpu.has_page_registers = true;
        match exit {
            exit @ VcpuExit::InternalError { .. } => match fix_up(vcpu) {
                Fixed::Yes if vcpu.guest_debug.is_stepping() => return Ok(stepped(vcpu)),
                Fixed::Yes => {}
                Fixed::No => return Ok(with_state(exit, vcpu)),
                Fixed::Shutdown => return Ok(VcpuExit::Shutdown),
            },
            exit => return Ok(exit),
        }
    }
}

/// The exit of a single step over an instruction that a fix-up has executed.
fn stepped(vcpu: &Vcpu) -> VcpuExit {
    let regs = vcpu.page.registers();
    let pc = vcpu.fd().get_sregs().map_or(regs.rip, |sregs| linear(&regs, &sregs));
    VcpuExit::Debug { exception: u32::from(DB), pc, dr6: DR6_STEPPED, dr7: DR7_INITIAL }
}

/// Add the instruction and the registers to an emulation failure.
fn with_state(mut exit: VcpuExit, vcpu: &Vcpu) -> VcpuExit {
    if let VcpuExit::InternalError { suberror, instruction, disassembly, registers, .. } = &mut exit
        && let (Ok(regs), Ok(sregs)) = (vcpu.general(), vcpu.fd().get_sregs())
    {
        if *suberror == KVM_INTERNAL_ERROR_EMULATION {
            let found = Instruction::at(vcpu, &regs, &sregs);
            (*instruction, *disassembly) = (found.bytes, found.text);
        }
        *registers = named(&regs, &sregs);
    }
    exit
}

/// Copy an exit out of the run page.
// Long because it has one arm for each kind of exit.
fn owned(exit: Borrowed<'_>, page: &RunPage) -> VcpuExit {
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

impl Vcpu {
    /// Complete an access that has been answered, so that the registers are those after the
    /// instruction. While an access is unanswered, they are those before it.
    pub(super) fn complete(&mut self) {
        if self.has_host_access || !self.pending.is_answered() {
            return;
        }
        self.page.set(true);
        let result = self.raw_fd.run().map(|exit| owned(exit, &self.page));
        self.note_exit(result.as_ref());
        self.has_page_registers = true;
        // A further exit of the instruction is kept for the next entry.
        self.pending = result.map_or(PendingIo::Idle, PendingIo::Exit);
    }

    /// Complete the access that KVM has begun, without an effect outside the vCPU: reads give all
    /// one bits, writes reach no device, and a repeated instruction ends at the current element.
    pub(crate) fn abandon(&mut self) {
        let mut is_access = self.pending.is_access();
        let mut left = ABANDONED_PARTS;
        while is_access && left > 0 {
            // Otherwise KVM would exit for each element. With zero it would not complete the
            // current one.
            self.set_regs_at_entry(&kvm_regs { rcx: 1, ..self.page.registers() });
            self.page.set(true);
            let exit = self.raw_fd.run().map(|exit| owned(exit, &self.page));
            self.note_exit(exit.as_ref());
            is_access = exit.is_ok_and(|exit| exit.is_access());
            left -= 1;
        }
        self.forget_access();
    }

    /// Complete the instruction whose exit has been answered, then apply the changes of registers
    /// that a hook made. `is_stopped` reads the stop word.
    pub(super) fn apply_edits(&mut self, is_stopped: impl Fn() -> bool) {
        let Some(edits) = self.pending.take_edits() else { return };
        self.complete();
        // Kick, point 8: a concurrent kick has set the word first, and the word is checked before
        // the next entry.
        self.page.set(is_stopped());
        let after = edits.over(&self.page.registers());
        // Cannot fail: KVM accepts any general registers.
        if self.fd().set_regs(&after).is_ok() {
            self.page.set_registers(&after);
        }
    }
}

#[cfg(test)]
mod tests {
    //! Covers src/vcpu/exit.rs.

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

//! Makes a guest execute the instruction of an exit again: completes the part that KVM has begun,
//! then undoes its effect. On the vCPU's thread.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_sregs};

use super::exit::VcpuExit;
use super::kick::{ImmediateExit, StopWord};
use super::pending::{PendingIo, RegisterEdits};
use super::string_io;
use super::vcpu::Vcpu;
use crate::memory::GuestMemory;

/// Saved bytes of guest-physical memory.
type Kept = Vec<(u64, Vec<u8>)>;

impl Vcpu {
    /// Have the guest execute the instruction of this exit again, with the registers that a hook
    /// has set. Returns whether it is complete instead, with data from memory.
    pub(super) fn execute_again(&mut self, exit: &VcpuExit, stop: &StopWord) -> bool {
        if exit.is_read() {
            let is_edited = self.pending.edits().is_some_and(RegisterEdits::is_change);
            if !is_edited && self.answer_from_memory(exit) {
                return true;
            }
            self.undo(exit);
            // Kick, point 8: a concurrent kick has set the word first, and the word is checked
            // before the next entry.
            self.page.set(stop.is_set());
        // In the kernel, the vCPU stays halted.
        } else if *exit == VcpuExit::Hlt && !self.has_reported_halt {
            let Ok(mut regs) = self.general() else { return false };
            regs.rip = regs.rip.wrapping_sub(1);
            if self.fd().set_regs(&regs).is_ok() {
                self.page.set_registers(&regs);
            }
        }
        false
    }

    /// If the vCPU rests before a read that nobody has been asked for, have the guest execute the
    /// instruction again: KVM would complete it over registers that the host sets meanwhile.
    pub(super) fn take_back_pending(&mut self) {
        let PendingIo::Exit(exit) = &self.pending else { return };
        // KVM completes the write of a model-specific register as it does reads. Other writes leave
        // the registers alone.
        if exit.is_read() || matches!(exit, VcpuExit::Wrmsr { .. }) {
            let exit = exit.clone();
            self.undo(&exit);
        }
    }

    /// If memory has been added there, answer the read from it, as if the instruction had begun
    /// after that. Returns false if there is no memory.
    pub(super) fn answer_from_memory(&mut self, exit: &VcpuExit) -> bool {
        let VcpuExit::MmioRead { address, length } = exit else { return false };
        let Some(data) = read(&self.memory, *address, *length) else { return false };
        self.page.answer(&data);
        // Another part of the same access, beyond the end of a page, still exits even if it has
        // memory now.
        self.has_found_memory = true;
        true
    }

    /// Have KVM complete the read with all one bits, then restore what that has changed: registers,
    /// and memory if the instruction writes what it has read.
    fn undo(&mut self, exit: &VcpuExit) {
        let Ok(to) = self.general() else { return };
        let from = self.pending.take_edits().map_or(to, |edits| edits.from);
        let (sregs, fpu) = (self.fd().get_sregs().ok(), self.fd().get_fpu().ok());
        let kept = self.written_by(exit, &from, sregs.as_ref());
        self.abandon();
        for (address, bytes) in kept {
            // Fails if the slot has been removed since, and the bytes with it.
            let _ = self.memory.write(address, &bytes);
        }
        self.put_back(sregs, fpu);
        // Cannot fail: KVM accepts any general registers. This also drops a pending exception.
        if self.fd().set_regs(&to).is_ok() {
            self.page.set_registers(&to);
            self.has_page_registers = true;
        }
    }

    /// The one bits may have been loaded into a segment register, a table register or a vector
    /// register.
    fn put_back(&self, sregs: Option<kvm_sregs>, fpu: Option<kvm_fpu>) {
        if let Some(sregs) = sregs.filter(|sregs| self.fd().get_sregs().ok() != Some(*sregs)) {
            // Cannot fail: KVM has just returned these values.
            let _ = self.set_sregs(&sregs);
        }
        if let Some(fpu) = fpu.filter(|fpu| self.fd().get_fpu().ok() != Some(*fpu)) {
            let _ = self.fd().set_fpu(&fpu);
        }
    }

    /// The memory that the instruction writes: at the address that it reads, or at the destination
    /// of a string instruction.
    fn written_by(&self, exit: &VcpuExit, regs: &kvm_regs, sregs: Option<&kvm_sregs>) -> Kept {
        let mut kept = Kept::new();
        if let VcpuExit::MmioRead { address, length } = exit {
            kept.extend(read(&self.memory, *address, *length).map(|bytes| (*address, bytes)));
        }
        let size = exit.wanted().unwrap_or(0);
        let target = sregs.and_then(|sregs| string_io::target(self, regs, sregs, size as u64));
        for (address, length) in target.unwrap_or_default() {
            kept.extend(read(&self.memory, address, length).map(|bytes| (address, bytes)));
        }
        kept
    }
}

fn read(memory: &GuestMemory, address: u64, length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; length];
    memory.read(address, &mut bytes).ok().map(|()| bytes)
}

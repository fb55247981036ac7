//! State that KVM takes from the run page with the next KVM_RUN (KVM_CAP_SYNC_REGS), which saves
//! system calls. Until then KVM has the state before, so every other ioctl goes through
//! [`Vcpu::fd`]. On the thread that has the vCPU.

use kvm_bindings::{kvm_regs, kvm_sregs, kvm_vcpu_events};
use kvm_ioctls::{SyncReg, VcpuFd};

use super::vcpu::Vcpu;
use crate::error::{Error, ErrorKind, Result};
use crate::kvm::checked as kvm;
use crate::x86::CR0_PG;

/// CR8 is a priority of four bits.
const MAX_CR8: u64 = 15;
/// A bit of CR3 that is part of an address in every paging mode.
const CR3_ADDRESS_BIT: u64 = 1 << 12;

impl Vcpu {
    /// The descriptor, for every ioctl but KVM_RUN: KVM has the whole state first.
    pub(crate) fn fd(&self) -> &VcpuFd {
        self.forget_whole_state();
        if let Some((sregs, events)) = self.page.take_entry_state() {
            // Cannot fail: KVM has taken these values for this vCPU before.
            #[allow(clippy::disallowed_methods, reason = "the run page has them already")]
            let _ = self.raw_fd.set_sregs(&sregs);
            let _ = self.raw_fd.set_vcpu_events(&events);
        }
        &self.raw_fd
    }

    /// Have these general registers from the next entry on.
    pub(crate) fn set_regs_at_entry(&mut self, registers: &kvm_regs) {
        self.page.set_registers(registers);
        self.raw_fd.set_sync_dirty_reg(SyncReg::Register);
        self.has_page_registers = true;
    }

    /// Have these special registers and events from the next entry on. KVM must have taken them
    /// for this vCPU before: an entry has no way to refuse them one by one. Without an in-kernel
    /// LAPIC, whose base and priority are special registers too.
    pub(crate) fn set_state_at_entry(&mut self, sregs: &kvm_sregs, events: &kvm_vcpu_events) {
        self.page.set_special(sregs.cr8, sregs.apic_base);
        self.page.set_entry_state(sregs, events);
    }

    /// Set the special registers by `set`. This is the only way to set them: KVM_RUN takes some of
    /// them from the run page.
    ///
    /// # Errors
    /// If KVM refuses them, or would ignore CR8.
    pub(crate) fn set_special(
        &self,
        sregs: &kvm_sregs,
        set: impl FnOnce(&VcpuFd) -> Result<()>,
    ) -> Result<()> {
        if sregs.cr8 > MAX_CR8 {
            let detail =
                format!("CR8 is {:#x}, and the processor has {MAX_CR8} at most", sregs.cr8);
            return Err(Error::new(ErrorKind::Kvm, "KVM_SET_SREGS", detail));
        }
        set(self.fd())?;
        self.page.set_special(sregs.cr8, sregs.apic_base);
        Ok(())
    }

    /// Set the special registers.
    ///
    /// # Errors
    /// As for [`Self::set_special`].
    pub(crate) fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()> {
        #[allow(clippy::disallowed_methods, reason = "the call that sets the run page as well")]
        self.set_special(sregs, |fd| kvm("KVM_SET_SREGS", fd.set_sregs(sregs)))
    }

    /// Have the processor forget the translations that it has cached. KVM flushes them only if a
    /// control register changes, so CR3 does: the state of the snapshot is set next.
    ///
    /// # Errors
    /// If KVM refuses the registers.
    pub(crate) fn forget_translations(&self) -> Result<()> {
        let now = kvm("KVM_GET_SREGS", self.fd().get_sregs())?;
        if now.cr0 & CR0_PG == 0 {
            return Ok(()); // none are used, and the guest's MOV to CR0 flushes them
        }
        // Flushed now, and if the snapshot's CR3 is this one, once more.
        self.set_sregs(&kvm_sregs { cr3: now.cr3 ^ CR3_ADDRESS_BIT, ..now })
    }
}

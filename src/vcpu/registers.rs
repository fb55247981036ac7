//! The registers of a vCPU, class by class, as the bytes of the kernel's structures. On the thread
//! that has the vCPU.

use std::fmt::Write;

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_regs, kvm_xcrs};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::guest_debug::{self, DebugOwner, DebugRequest};
use super::pending::{PendingIo, RegisterEdits};
use super::vcpu::Vcpu;
use crate::cpu::cpuid;
use crate::debug::Paging;
use crate::error::{Error, ErrorKind, Result};
use crate::kvm::{checked as kvm, open_kvm};

/// A class of registers: the structure that one pair of ioctls moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterClass {
    /// `kvm_regs`
    General,
    /// `kvm_sregs`
    Special,
    /// `kvm_debugregs`
    Debug,
    /// `kvm_vcpu_events`
    Events,
    /// `kvm_mp_state`
    MpState,
    /// `kvm_xcrs`
    Xcrs,
    /// `kvm_xsave`: x87, SSE, AVX
    Xsave,
    /// `kvm_lapic_state`
    Lapic,
}

/// The bytes of a KVM structure.
fn bytes<T: IntoBytes + Immutable>(value: &T) -> &[u8] {
    value.as_bytes()
}

/// A KVM structure after a change of its bytes.
fn changed<T: FromBytes + IntoBytes>(mut value: T, change: impl FnOnce(&mut [u8])) -> T {
    change(value.as_mut_bytes());
    value
}

impl Vcpu {
    /// Read a class of registers.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn load<T>(&mut self, class: RegisterClass, look: impl FnOnce(&[u8]) -> T) -> Result<T> {
        self.complete();
        let fd = self.fd();
        Ok(match class {
            RegisterClass::General => look(bytes(&self.general()?)),
            RegisterClass::Special => look(bytes(&kvm("KVM_GET_SREGS", fd.get_sregs())?)),
            RegisterClass::Debug => look(bytes(&kvm("KVM_GET_DEBUGREGS", fd.get_debug_regs())?)),
            RegisterClass::Events => {
                look(bytes(&kvm("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?))
            }
            RegisterClass::MpState => look(bytes(&kvm("KVM_GET_MP_STATE", fd.get_mp_state())?)),
            RegisterClass::Xcrs => look(bytes(&kvm("KVM_GET_XCRS", fd.get_xcrs())?)),
            RegisterClass::Xsave => look(bytes(&kvm("KVM_GET_XSAVE", fd.get_xsave())?)),
            RegisterClass::Lapic => look(bytes(&kvm("KVM_GET_LAPIC", fd.get_lapic())?)),
        })
    }

    /// The little-endian number of 1 to 8 bytes at an offset of a class; none if they are outside.
    ///
    /// # Errors
    /// When KVM refuses it.
    pub fn load_number(
        &mut self,
        class: RegisterClass,
        offset: usize,
        size: usize,
    ) -> Result<Option<u64>> {
        if class == RegisterClass::General && size == 8 {
            self.complete();
            if self.has_page_registers && self.pending.edits().is_none() {
                return Ok(self.page.register(offset));
            }
        }
        self.load(class, |bytes| {
            let from = bytes.get(offset..)?.get(..size)?;
            let mut number = [0; 8];
            number.get_mut(..size)?.copy_from_slice(from);
            Some(u64::from_le_bytes(number))
        })
    }

    /// Change a class of registers, with `change` on the bytes of its structure.
    ///
    /// # Errors
    /// If KVM refuses the new values; they are as before then.
    pub fn store(&mut self, class: RegisterClass, change: impl FnOnce(&mut [u8])) -> Result<()> {
        self.discard_answer();
        self.complete();
        match class {
            RegisterClass::General => self.store_general(change),
            RegisterClass::Special => {
                let sregs = changed(kvm("KVM_GET_SREGS", self.fd().get_sregs())?, change);
                self.set_sregs(&sregs)
            }
            RegisterClass::Debug => {
                let regs = changed(kvm("KVM_GET_DEBUGREGS", self.fd().get_debug_regs())?, change);
                kvm("KVM_SET_DEBUGREGS", self.fd().set_debug_regs(&regs))
            }
            RegisterClass::Events => {
                let events =
                    changed(kvm("KVM_GET_VCPU_EVENTS", self.fd().get_vcpu_events())?, change);
                kvm("KVM_SET_VCPU_EVENTS", self.fd().set_vcpu_events(&events))
            }
            RegisterClass::MpState => {
                let state = changed(kvm("KVM_GET_MP_STATE", self.fd().get_mp_state())?, change);
                kvm("KVM_SET_MP_STATE", self.fd().set_mp_state(state))
            }
            RegisterClass::Xcrs => {
                let xcrs = changed(kvm("KVM_GET_XCRS", self.fd().get_xcrs())?, change);
                self.fd().set_xcrs(&xcrs).map_err(|e| xcrs_refused(&xcrs, e))
            }
            RegisterClass::Xsave => {
                let xsave = changed(kvm("KVM_GET_XSAVE", self.fd().get_xsave())?, change);
                // SAFETY: KVM_SET_XSAVE reads 4 KiB, the size of kvm_xsave, unless a permission for
                // dynamic features has been asked for, which nothing here does.
                kvm("KVM_SET_XSAVE", unsafe { self.fd().set_xsave(&xsave) })
            }
            RegisterClass::Lapic => {
                let lapic = changed(kvm("KVM_GET_LAPIC", self.fd().get_lapic())?, change);
                kvm("KVM_SET_LAPIC", self.fd().set_lapic(&lapic))
            }
        }
    }

    /// While no hook or device has answered a read, its data is all one bits. An answer can still
    /// come while its exit is being answered.
    fn discard_answer(&mut self) {
        if !self.has_host_access {
            self.pending.set_answered();
        }
    }

    fn store_general(&mut self, change: impl FnOnce(&mut [u8])) -> Result<()> {
        self.take_back_pending();
        let from = self.general()?;
        let to = changed(from, change);
        if self.has_host_access
            && let PendingIo::Access { edits, .. } = &mut self.pending
        {
            // KVM has not completed the instruction, and would overwrite the registers.
            let from = edits.as_ref().map_or(from, |edits| edits.from);
            *edits = Some(Box::new(RegisterEdits { from, to }));
            return Ok(());
        }
        self.set_general(&to)
    }

    pub(super) fn set_general(&mut self, to: &kvm_regs) -> Result<()> {
        kvm("KVM_SET_REGS", self.fd().set_regs(to))?;
        self.page.set_registers(to);
        self.has_page_registers = true;
        Ok(())
    }

    /// The CPUID table of the guest.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>> {
        cpuid::of_vcpu(self.fd())
    }

    /// Change the CPUID table of the guest.
    ///
    /// # Errors
    /// [`ErrorKind::State`] once the vCPU has run: KVM does not allow a change then.
    pub fn set_cpuid(&mut self, entries: &[kvm_cpuid_entry2]) -> Result<()> {
        let at = "KVM_SET_CPUID2";
        if self.has_run {
            return Err(Error::new(ErrorKind::State, at, "the vCPU has run already"));
        }
        let table = CpuId::from_entries(entries)
            .map_err(|e| Error::new(ErrorKind::Config, at, format!("{e:?}")))?;
        self.constant_msrs.clear();
        self.accepted_state = None;
        kvm(at, self.fd().set_cpuid2(&table))
    }

    /// Have single steps and breakpoints exit. Replaces the previous request of the same owner.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if both owners together have more breakpoints than the processor's
    /// four. If KVM refuses. The requests do not change then.
    pub fn debug(&mut self, owner: DebugOwner, request: DebugRequest) -> Result<()> {
        let wanted = self.guest_debug.with(owner, request);
        let debug = wanted.merged()?;
        self.complete();
        kvm(guest_debug::AT, self.fd().set_guest_debug(&debug))?;
        self.guest_debug = wanted;
        Ok(())
    }

    /// The current paging mode of the vCPU.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn paging(&mut self) -> Result<Paging> {
        self.complete();
        Ok(Paging::of(&kvm("KVM_GET_SREGS", self.fd().get_sregs())?))
    }
}

/// Adds the bits that KVM accepts to the error. KVM may offer a guest fewer than the processor has.
fn xcrs_refused(xcrs: &kvm_xcrs, error: kvm_ioctls::Error) -> Error {
    let mut refused = Error::kvm("KVM_SET_XCRS", error);
    let supported = open_kvm()
        .ok()
        .and_then(|kvm| kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).ok());
    if let (Some(table), [xcr0, ..]) = (supported, &xcrs.xcrs) {
        let mask = cpuid::xcr0_mask(table.as_slice());
        let _ = write!(refused.detail, ": XCR0 {:#x}, of which KVM offers {mask:#x}", xcr0.value);
    }
    refused
}

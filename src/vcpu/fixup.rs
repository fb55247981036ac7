//! The vCPU's side of a fix-up: copies its registers, executes the instruction, and writes the
//! result back. On the vCPU's thread, after `KVM_EXIT_INTERNAL_ERROR`.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{KVM_VCPUEVENT_VALID_SHADOW, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xsave};
use kvm_ioctls::VcpuFd;

use super::fault::instruction_bytes;
use super::vcpu::Vcpu;
use crate::debug::{bitness, decode};
use crate::fixup::{Cpu, Fault, Flow, Platform, Stop, execute};
use crate::x86::{CR4_PGE, DB, RF, TF, UD};

/// The vector of the debug exception, and the single-step bit of DR6.
const DR6_STEP: u64 = 1 << 14;

/// Execute the instruction that KVM has refused, if fix-ups are on and one exists for it. Returns
/// false if the exit has to be reported.
pub(super) fn fix_up(vcpu: &mut Vcpu) -> bool {
    let Some(counts) = vcpu.fixups.clone() else { return false };
    let error = vcpu.page.internal_error();
    if error.suberror != kvm_bindings::KVM_INTERNAL_ERROR_EMULATION {
        return false;
    }
    let (Ok(regs), Ok(sregs)) = (vcpu.general(), vcpu.fd().get_sregs()) else { return false };
    let bytes = instruction_bytes(vcpu, &regs, &sregs);
    let Some(instruction) = decode(&bytes, bitness(&sregs), regs.rip) else {
        return refuse(vcpu, &regs, &sregs);
    };
    let mut host = Host { vcpu };
    let mut cpu = Cpu { regs, sregs, platform: &mut host };
    let done = execute(&mut cpu, &instruction);
    let (regs_after, sregs_after) = (cpu.regs, cpu.sregs);
    let is_fixed = match done {
        Ok(flow) => {
            let is_step = flow == Flow::Next && regs.rflags & TF != 0;
            put_back(vcpu, (&regs_after, &sregs_after), &sregs, is_step.then_some(step()))
                && (!is_step || note_step(vcpu.fd()))
        }
        Err(Stop::Fault(fault)) => raise(vcpu, &regs, &sregs, fault),
        Err(Stop::Unknown) => return refuse(vcpu, &regs, &sregs),
    };
    if is_fixed {
        counts.add(instruction.mnemonic());
    }
    is_fixed
}

/// Raise #UD if the instruction was in ring 3. KVM does this itself unless it has been asked to
/// exit instead.
fn refuse(vcpu: &Vcpu, regs: &kvm_regs, sregs: &kvm_sregs) -> bool {
    let is_user = sregs.cr0 & 1 != 0 && sregs.ss.dpl == 3;
    is_user && raise(vcpu, regs, sregs, Fault { vector: UD, code: None, address: None })
}

fn step() -> Fault {
    Fault { vector: DB, code: None, address: None }
}

fn note_step(fd: &VcpuFd) -> bool {
    let Ok(mut debug) = fd.get_debug_regs() else { return false };
    debug.dr6 |= DR6_STEP;
    fd.set_debug_regs(&debug).is_ok()
}

/// Have KVM raise a fault at the instruction.
fn raise(vcpu: &Vcpu, regs: &kvm_regs, sregs: &kvm_sregs, fault: Fault) -> bool {
    let after = kvm_regs { rflags: regs.rflags | RF, ..*regs };
    let cr2 = fault.address.unwrap_or(sregs.cr2);
    put_back(vcpu, (&after, &kvm_sregs { cr2, ..*sregs }), sregs, Some(fault))
}

fn put_back(
    vcpu: &Vcpu,
    (regs, sregs): (&kvm_regs, &kvm_sregs),
    before: &kvm_sregs,
    fault: Option<Fault>,
) -> bool {
    if sregs != before && vcpu.set_sregs(sregs).is_err() {
        return false;
    }
    if vcpu.fd().set_regs(regs).is_err() {
        return false;
    }
    vcpu.page.set_registers(regs);
    vcpu.fd().get_vcpu_events().is_ok_and(|events| {
        let after = events_after(events, fault);
        after == events || vcpu.fd().set_vcpu_events(&after).is_ok()
    })
}

/// The events after an instruction: no interrupt shadow of the one before it, and its fault to be
/// delivered.
fn events_after(mut events: kvm_vcpu_events, fault: Option<Fault>) -> kvm_vcpu_events {
    if events.interrupt.shadow != 0 {
        events.interrupt.shadow = 0;
        events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
    }
    (events.exception.pending, events.exception.injected) = (0, 0);
    if let Some(fault) = fault {
        events.exception.injected = 1;
        events.exception.nr = fault.vector;
        events.exception.has_error_code = u8::from(fault.code.is_some());
        events.exception.error_code = fault.code.unwrap_or(0);
    }
    events
}

/// A fix-up's access to the vCPU.
struct Host<'a> {
    vcpu: &'a Vcpu,
}

impl Host<'_> {
    /// A host pointer to guest memory that the host may write, aligned to its size.
    fn place(&self, address: u64, size: u64) -> Option<crate::memory::View> {
        if !address.is_multiple_of(size) {
            return None;
        }
        self.vcpu.memory.view(address, size).ok().filter(crate::memory::View::is_writable)
    }
}

impl Platform for Host<'_> {
    fn read(&mut self, address: u64, data: &mut [u8]) -> bool {
        self.vcpu.memory.read(address, data).is_ok()
    }

    fn write(&mut self, address: u64, data: &[u8]) -> bool {
        self.vcpu.memory.write(address, data).is_ok()
    }

    fn set_bits(&mut self, address: u64, size: u64, old: u64, bits: u64) -> bool {
        let Some(place) = self.place(address, size) else { return false };
        let is_set = match (size, u32::try_from(old), u32::try_from(old | bits)) {
            (4, Ok(old), Ok(new)) => {
                // SAFETY: `place` is 4 aligned bytes of a mapping that it keeps alive. Rust code
                // accesses them only as atomics, and any value is valid.
                let entry = unsafe { AtomicU32::from_ptr(place.as_ptr().cast()) };
                // SeqCst: as the processor's own locked update.
                entry.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok()
            }
            (8, ..) => {
                // SAFETY: as above, with 8 bytes.
                let entry = unsafe { AtomicU64::from_ptr(place.as_ptr().cast()) };
                // SeqCst: as above.
                entry.compare_exchange(old, old | bits, Ordering::SeqCst, Ordering::SeqCst).is_ok()
            }
            _ => false,
        };
        if is_set {
            self.vcpu.memory.note_write(address, size);
        }
        is_set
    }

    fn exchange(&mut self, address: u64, old: u128, new: u128) -> Option<u128> {
        let place = self.place(address, 16)?;
        if !std::arch::is_x86_feature_detected!("cmpxchg16b") {
            return None;
        }
        let halves = |whole: u128| {
            let [low, high] = [whole & u128::from(u64::MAX), whole >> 64]
                .map(|half| u64::try_from(half).unwrap_or(0));
            (high, low)
        };
        let ((mut high, mut low), (new_high, new_low)) = (halves(old), halves(new));
        // SAFETY: the processor has the instruction; `place` is 16 aligned bytes of a mapping that
        // it keeps alive. RBX, which the compiler reserves, is restored. All operands name their
        // registers: the class `reg` may include RBX, whose value the exchange would replace.
        unsafe {
            std::arch::asm!(
                "xchg rsi, rbx",
                "lock cmpxchg16b [rdi]",
                "mov rbx, rsi",
                inout("rsi") new_low => _,
                in("rdi") place.as_ptr(),
                inout("rax") low,
                inout("rdx") high,
                in("rcx") new_high,
                options(nostack),
            );
        }
        let found = u128::from(high) << 64 | u128::from(low);
        if found == old {
            self.vcpu.memory.note_write(address, 16);
        }
        Some(found)
    }

    fn msr(&mut self, index: u32) -> Option<u64> {
        super::msr::msr_of(self.vcpu.fd(), index).ok()
    }

    fn xcr0(&mut self) -> Option<u64> {
        let xcrs = self.vcpu.fd().get_xcrs().ok()?;
        xcrs.xcrs
            .iter()
            .take(usize::try_from(xcrs.nr_xcrs).ok()?)
            .find(|x| x.xcr == 0)
            .map(|x| x.value)
    }

    fn xsave(&mut self) -> Option<Vec<u8>> {
        let area = self.vcpu.fd().get_xsave().ok()?;
        Some(area.region.iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    fn set_xsave(&mut self, image: &[u8]) -> bool {
        let mut area = kvm_xsave::default();
        for (to, from) in area.region.iter_mut().zip(image.chunks_exact(4)) {
            *to = from.try_into().map_or(0, u32::from_le_bytes);
        }
        // SAFETY: KVM_SET_XSAVE reads 4 KiB, the size of kvm_xsave, unless a permission for dynamic
        // features has been asked for, which nothing here does.
        unsafe { self.vcpu.fd().set_xsave(&area) }.is_ok()
    }

    fn flush_translations(&mut self) -> bool {
        let Ok(sregs) = self.vcpu.fd().get_sregs() else { return false };
        let other = kvm_sregs { cr4: sregs.cr4 ^ CR4_PGE, ..sregs };
        self.vcpu.set_sregs(&other).is_ok() && self.vcpu.set_sregs(&sregs).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_replaces_what_waits_and_ends_the_shadow() {
        let mut events = kvm_vcpu_events::default();
        events.interrupt.shadow = 1;
        events.exception.pending = 1;
        events.exception.nr = UD;
        let after = events_after(events, None);
        assert_eq!((after.interrupt.shadow, after.exception.pending), (0, 0));
        assert_eq!(after.flags, KVM_VCPUEVENT_VALID_SHADOW);
        let fault = Fault { vector: 14, code: Some(6), address: Some(0x1000) };
        let after = events_after(events, Some(fault)).exception;
        let code = (after.has_error_code, after.error_code);
        assert_eq!((after.injected, after.nr, code), (1, 14, (1, 6)));
    }
}

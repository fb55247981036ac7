//! The vCPU's side of a fix-up: copies its registers, executes the instruction, and writes the
//! result back. On the vCPU's thread, after `KVM_EXIT_INTERNAL_ERROR`.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use iced_x86::Mnemonic;
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_VCPUEVENT_VALID_SHADOW, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::fault::{bytes_in_page, instruction_bytes, linear, page_of_code};
use super::vcpu::Vcpu;
use crate::debug::{bitness, decode};
use crate::fixup::{Cpu, Fault, NativeCode, Outcome, Platform, execute, is_vector, undefined};
use crate::layout::PAGE;
use crate::x86::{CR0_PE, CR4_PGE};

/// The single-step bit of DR6, and the bit of DR7 that guards the debug registers.
const DR6_STEP: u64 = 1 << 14;
const DR7_GUARD: u64 = 1 << 13;

/// How many instructions one exit may execute. Interrupts wait meanwhile.
const MAX_FOLLOWED: usize = 64;

/// What a fix-up has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fixed {
    /// The guest continues.
    Yes,
    /// The exit has to be reported.
    No,
    /// The guest has shut itself down by a triple fault.
    Shutdown,
}

/// Execute the instruction that KVM has refused, if fix-ups are on and one exists for it.
pub(super) fn fix_up(vcpu: &mut Vcpu) -> Fixed {
    let mut native = std::mem::take(&mut vcpu.native);
    let fixed = attempt(vcpu, &mut native);
    vcpu.native = native;
    fixed
}

fn attempt(vcpu: &Vcpu, native: &mut NativeCode) -> Fixed {
    let Some(counts) = &vcpu.fixups else { return Fixed::No };
    let error = vcpu.page.internal_error();
    if error.suberror != kvm_bindings::KVM_INTERNAL_ERROR_EMULATION {
        return Fixed::No;
    }
    let (Ok(regs), Ok(sregs)) = (vcpu.general(), vcpu.fd().get_sregs()) else { return Fixed::No };
    let bytes = instruction_bytes(vcpu, &regs, &sregs);
    let mut host = Host { vcpu, native, xcr0: None, state: None, is_state_changed: false };
    let mut cpu = Cpu::new(regs, sregs, &mut host);
    let mut executed = Vec::new();
    let mut outcome = Outcome::Unknown;
    if let Some(instruction) = decode(&bytes, bitness(&sregs), regs.rip) {
        outcome = execute(&mut cpu, &instruction);
        executed.push(instruction.mnemonic());
        if is_vector(&instruction) && outcome == (Outcome::Done { is_step: false }) {
            outcome = follow(vcpu, &mut cpu, &mut executed);
        }
    }
    if outcome == Outcome::Unknown {
        executed.clear();
        // KVM itself raises #UD in ring 3, unless it has been asked to exit instead.
        if sregs.cr0 & CR0_PE != 0 && sregs.ss.dpl == 3 {
            outcome = undefined(&mut cpu);
        }
    }
    let after = After { regs: cpu.regs, sregs: cpu.sregs, unmasks_nmi: cpu.unmasks_nmi };
    if !host.put_state() {
        return Fixed::No;
    }
    let fixed = conclude(vcpu, &after, &sregs, outcome);
    if fixed != Fixed::No {
        counts.add(&executed);
    }
    fixed
}

/// Execute the vector instructions that follow one, in its page, without an exit for each.
fn follow(vcpu: &Vcpu, cpu: &mut Cpu<'_>, executed: &mut Vec<Mnemonic>) -> Outcome {
    let mut outcome = Outcome::Done { is_step: false };
    let page_of = |cpu: &Cpu<'_>| linear(&cpu.regs, &cpu.sregs) / PAGE;
    let page = page_of(cpu);
    if vcpu.guest_debug.is_on() || has_breakpoints(vcpu.fd()) {
        return outcome;
    }
    let Some(in_memory) = page_of_code(vcpu, &cpu.regs, &cpu.sregs) else { return outcome };
    while executed.len() < MAX_FOLLOWED && page_of(cpu) == page {
        let bytes = bytes_in_page(vcpu, in_memory, &cpu.regs, &cpu.sregs);
        let found = decode(&bytes, bitness(&cpu.sregs), cpu.regs.rip).filter(is_vector);
        let Some(instruction) = found else { break };
        let next = execute(cpu, &instruction);
        // KVM executes it, or exits for it.
        if next == Outcome::Unknown {
            break;
        }
        outcome = next;
        executed.push(instruction.mnemonic());
        if outcome != (Outcome::Done { is_step: false }) || cpu.regs.rip != instruction.next_ip() {
            break;
        }
    }
    outcome
}

/// Whether the guest has enabled breakpoints of its own.
fn has_breakpoints(fd: &VcpuFd) -> bool {
    fd.get_debug_regs().map_or(true, |debug| debug.dr7 & 0xff != 0)
}

/// The state after an instruction.
struct After {
    regs: kvm_regs,
    sregs: kvm_sregs,
    unmasks_nmi: bool,
}

fn conclude(vcpu: &Vcpu, after: &After, before: &kvm_sregs, outcome: Outcome) -> Fixed {
    let (fault, is_step) = match outcome {
        Outcome::Done { is_step } => (None, is_step),
        Outcome::Inject { fault, is_step } => (Some(fault), is_step),
        Outcome::Shutdown => return Fixed::Shutdown,
        Outcome::Unknown => return Fixed::No,
    };
    let is_set = put_back(vcpu, after, before, fault) && (!is_step || note_step(vcpu.fd()));
    if is_set { Fixed::Yes } else { Fixed::No }
}

fn note_step(fd: &VcpuFd) -> bool {
    let Ok(mut debug) = fd.get_debug_regs() else { return false };
    debug.dr6 |= DR6_STEP;
    debug.dr7 &= !DR7_GUARD;
    fd.set_debug_regs(&debug).is_ok()
}

fn put_back(vcpu: &Vcpu, after: &After, before: &kvm_sregs, fault: Option<Fault>) -> bool {
    if after.sregs != *before && vcpu.set_sregs(&after.sregs).is_err() {
        return false;
    }
    if vcpu.fd().set_regs(&after.regs).is_err() {
        return false;
    }
    vcpu.page.set_registers(&after.regs);
    vcpu.fd().get_vcpu_events().is_ok_and(|events| {
        let new = events_after(events, fault, after.unmasks_nmi);
        new == events || vcpu.fd().set_vcpu_events(&new).is_ok()
    })
}

/// The events after an instruction: no interrupt shadow of the one before it, and its fault to be
/// delivered.
fn events_after(
    mut events: kvm_vcpu_events,
    fault: Option<Fault>,
    unmasks_nmi: bool,
) -> kvm_vcpu_events {
    if events.interrupt.shadow != 0 {
        events.interrupt.shadow = 0;
        events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
    }
    if unmasks_nmi {
        events.nmi.masked = 0;
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
    native: &'a mut NativeCode,
    /// XCR0, from its first use on.
    xcr0: Option<u64>,
    /// The extended state, from its first use on.
    state: Option<Vec<u8>>,
    is_state_changed: bool,
}

impl Host<'_> {
    /// Set the extended state that an instruction has changed.
    fn put_state(&self) -> bool {
        let Some(image) = self.state.as_ref().filter(|_| self.is_state_changed) else {
            return true;
        };
        let mut area = kvm_xsave::default();
        for (to, from) in area.region.iter_mut().zip(image.chunks_exact(4)) {
            *to = from.try_into().map_or(0, u32::from_le_bytes);
        }
        // SAFETY: KVM_SET_XSAVE reads 4 KiB, the size of kvm_xsave, unless a permission for dynamic
        // features has been asked for, which nothing here does.
        unsafe { self.vcpu.fd().set_xsave(&area) }.is_ok()
    }

    /// A host pointer to memory that the guest may write, aligned to its size.
    fn place(&self, address: u64, size: u64) -> Option<crate::memory::View> {
        let memory = &self.vcpu.memory;
        if !address.is_multiple_of(size) || memory.check_guest_writes(address, size).is_err() {
            return None;
        }
        memory.view(address, size).ok()
    }
}

impl Platform for Host<'_> {
    fn read(&mut self, address: u64, data: &mut [u8]) -> bool {
        self.vcpu.memory.read(address, data).is_ok()
    }

    fn is_writable(&self, address: u64, length: usize) -> bool {
        self.vcpu.memory.check_guest_writes(address, length as u64).is_ok()
    }

    fn write(&mut self, address: u64, data: &[u8]) -> bool {
        self.is_writable(address, data.len()) && self.vcpu.memory.write(address, data).is_ok()
    }

    fn set_bits(&mut self, address: u64, size: u64, old: u64, bits: u64) -> bool {
        // As KVM's own walks do: tables in ROM are used as they are.
        if self.vcpu.memory.check_guest_writes(address, size).is_err() {
            return true;
        }
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

    fn cpuid(&mut self, leaf: u32) -> Option<[u32; 4]> {
        let cpuid = self.vcpu.fd().get_cpuid2(KVM_MAX_CPUID_ENTRIES).ok()?;
        let entry = cpuid.as_slice().iter().find(|e| e.function == leaf && e.index == 0);
        Some(entry.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]))
    }

    fn xcr0(&mut self) -> Option<u64> {
        if self.xcr0.is_none() {
            let xcrs = self.vcpu.fd().get_xcrs().ok()?;
            let known = xcrs.xcrs.iter().take(usize::try_from(xcrs.nr_xcrs).ok()?);
            self.xcr0 = known.into_iter().find(|x| x.xcr == 0).map(|x| x.value);
        }
        self.xcr0
    }

    fn xsave(&mut self) -> Option<Vec<u8>> {
        if self.state.is_none() {
            let area = self.vcpu.fd().get_xsave().ok()?;
            self.state = Some(area.region.iter().flat_map(|word| word.to_le_bytes()).collect());
        }
        self.state.clone()
    }

    fn set_xsave(&mut self, image: &[u8]) -> bool {
        self.state = Some(image.to_vec());
        self.is_state_changed = true;
        true
    }

    fn native(&mut self) -> Option<&mut NativeCode> {
        Some(self.native)
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
        events.exception.nr = 6;
        events.nmi.masked = 1;
        let after = events_after(events, None, false);
        assert_eq!((after.interrupt.shadow, after.exception.pending, after.nmi.masked), (0, 0, 1));
        assert_eq!(after.flags, KVM_VCPUEVENT_VALID_SHADOW);
        let fault = Fault { vector: 14, code: Some(6), address: Some(0x1000) };
        let after = events_after(events, Some(fault), true);
        assert_eq!(after.nmi.masked, 0);
        let after = after.exception;
        let code = (after.has_error_code, after.error_code);
        assert_eq!((after.injected, after.nr, code), (1, 14, (1, 6)));
    }
}

//! Whether a vCPU with a local APIC in the kernel is halted permanently, and the CPU time of its
//! thread. KVM does not exit for HLT on such a machine; `vmm/halt_watch.rs` looks. Any thread.

use std::time::Duration;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_lapic_state,
    kvm_vcpu_events,
};

use super::exit::VcpuExit;
use super::handle::VcpuHandle;
use super::pending::PendingIo;
use super::vcpu::Vcpu;
use crate::error::Result;
use crate::kvm::checked as kvm;
use crate::x86::IF;

/// The first line of a local APIC, as a register of 32 bits.
const LVT_LINT0: usize = 0x350;
const MASKED: u32 = 1 << 16;
const MODE: u32 = 0b111 << 8;
const NMI: u32 = 0b100 << 8;

impl VcpuHandle {
    /// The CPU time of the thread that runs the vCPU; `None` if no thread does.
    pub(crate) fn cpu_time(&self) -> Option<Duration> {
        // With the lock, which the thread needs to end.
        self.state.lock().runner.and_then(|thread| thread.cpu_time())
    }
}

impl Vcpu {
    /// Whether it waits with interrupts off, and nothing that KVM has received wakes it. A
    /// processor that waits for its startup interrupt does.
    ///
    /// # Errors
    /// If KVM refuses a query.
    pub(crate) fn is_halted_forever(&self, has_pit: bool) -> Result<bool> {
        if !self.pending.is_idle() {
            return Ok(false);
        }
        match kvm("KVM_GET_MP_STATE", self.fd().get_mp_state())?.mp_state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => return Ok(true),
            KVM_MP_STATE_HALTED => {}
            _ => return Ok(false),
        }
        if self.general()?.rflags & IF != 0 {
            return Ok(false);
        }
        let events = kvm("KVM_GET_VCPU_EVENTS", self.fd().get_vcpu_events())?;
        if will_wake(&events) {
            return Ok(false);
        }
        // The PIT can be an NMI watchdog, through this line.
        Ok(!has_pit || !takes_nmi(&kvm("KVM_GET_LAPIC", self.fd().get_lapic())?))
    }

    /// Have the next entry return HLT as an exit.
    pub(crate) fn report_halt(&mut self) {
        self.pending = PendingIo::Exit(VcpuExit::Hlt);
        self.has_reported_halt = true;
    }
}

/// Whether an event is pending that a vCPU takes with interrupts off.
fn will_wake(events: &kvm_vcpu_events) -> bool {
    let has_nmi = events.nmi.injected != 0 || events.nmi.pending != 0 && events.nmi.masked == 0;
    let has_exception = events.exception.injected != 0 || events.exception.pending != 0;
    has_nmi
        || has_exception
        || events.interrupt.injected != 0
        || events.smi.pending != 0
        || events.smi.latched_init != 0
}

fn takes_nmi(lapic: &kvm_lapic_state) -> bool {
    let bytes = lapic.regs.get(LVT_LINT0..).unwrap_or_default().iter().take(4);
    let line = bytes.rev().fold(0, |line, byte| line << 8 | u32::from(byte.cast_unsigned()));
    line & MASKED == 0 && line & MODE == NMI
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_nmi_wakes_unless_it_is_masked() {
        let mut events = kvm_vcpu_events::default();
        assert!(!will_wake(&events));
        (events.nmi.pending, events.nmi.masked) = (1, 1);
        assert!(!will_wake(&events));
        events.nmi.masked = 0;
        assert!(will_wake(&events));
        events = kvm_vcpu_events::default();
        events.smi.pending = 1;
        assert!(will_wake(&events));
    }

    #[test]
    fn a_line_in_nmi_mode_is_seen_unless_it_is_masked() {
        let mut lapic = kvm_lapic_state::default();
        let mut set = |line: u32| {
            for (register, byte) in lapic.regs.iter_mut().skip(LVT_LINT0).zip(line.to_le_bytes()) {
                *register = byte.cast_signed();
            }
            takes_nmi(&lapic)
        };
        assert_eq!([0x0_0400, 0x1_0400, 0x0_0700, 0].map(&mut set), [true, false, false, false]);
    }
}

//! Finds out whether every vCPU is halted permanently, so that nothing inside the machine can wake
//! one. On the thread that runs the loop.

use std::time::Duration;

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
use kvm_ioctls::VmFd;

use super::KvmVm;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::ExitHandler;
use crate::kvm::checked as kvm;
use crate::limit::Limit;
use crate::vcpu::VmRunState;

/// How long it waits for a vCPU to leave its guest. One in a callback takes longer, and is not
/// halted.
const BRIEF: Duration = Duration::from_millis(10);

/// Redirection entries of the I/O APIC: delivery mode and mask.
const MODE: u64 = 0b111 << 8;
const SMI: u64 = 0b010 << 8;
const NMI: u64 = 0b100 << 8;
const INIT: u64 = 0b101 << 8;
const MASKED: u64 = 1 << 16;

impl<EH: ExitHandler> KvmVm<EH> {
    /// Whether the kernel handles HLT, because the machine has an interrupt controller.
    pub(crate) fn hides_halts(&self) -> bool {
        self.irqchip
    }

    /// The CPU time of each vCPU's thread. `None` unless each is run by a thread.
    pub(crate) fn cpu_times(&self) -> Option<Vec<Duration>> {
        self.handles().iter().map(|handle| handle.cpu_time()).collect()
    }

    /// If every vCPU is halted with interrupts off, and nothing in the machine can wake one, have
    /// one of them exit. They leave their guests for a moment. Devices are not quiesced: what they
    /// do meanwhile wakes no such vCPU.
    ///
    /// # Errors
    /// If the machine is not running, a vCPU does not leave its guest at once, or KVM refuses.
    pub(crate) fn end_if_halted(&self) -> Result<()> {
        self.check_process()?;
        let check_running = || match self.state() {
            VmRunState::Running => Ok(()),
            _ => Err(Error::new(ErrorKind::State, "halt", "the machine is not running")),
        };
        let leaving = self.vcpus.quiesce(check_running)?;
        let _held = Held(self);
        let limit = Limit::new(Some(BRIEF), &|| Ok(()));
        leaving.wait(&limit)?;
        self.vcpus.at_rest(&limit, |vcpus| {
            // Unless another thread has paused it meanwhile, the guest notices nothing of this.
            let is_running = self.state() == VmRunState::Running;
            vcpus.iter_mut().for_each(|vcpu| vcpu.knows_of_pause |= is_running);
            for vcpu in vcpus.iter() {
                if !vcpu.is_halted_forever(self.pit)? {
                    return Ok(());
                }
            }
            if is_running && !delivers_to_halted(&self.fd)? {
                vcpus.iter_mut().take(1).for_each(|vcpu| vcpu.report_halt());
            }
            Ok(())
        })
    }
}

/// Lets the vCPUs continue when it is dropped.
struct Held<'a, EH: ExitHandler>(&'a KvmVm<EH>);

impl<EH: ExitHandler> Drop for Held<'_, EH> {
    fn drop(&mut self) {
        self.0.vcpus.release(|| self.0.state());
    }
}

/// Whether the I/O APIC turns an interrupt into one that a vCPU takes with interrupts off, such as
/// that of an NMI watchdog.
fn delivers_to_halted(fd: &VmFd) -> Result<bool> {
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    kvm("KVM_GET_IRQCHIP", fd.get_irqchip(&mut chip))?;
    // SAFETY: KVM has filled in this member of the union, and any bits are valid numbers.
    let entries = unsafe { chip.chip.ioapic.redirtbl };
    // SAFETY: both members of the union are the same 64 bits.
    Ok(entries.iter().any(|entry| wakes_halted(unsafe { entry.bits })))
}

fn wakes_halted(entry: u64) -> bool {
    entry & MASKED == 0 && matches!(entry & MODE, SMI | NMI | INIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_unmasked_entry_of_such_a_mode_wakes_a_halted_vcpu() {
        assert!([0x400, 0x200, 0x500, 0xff00_0000_0000_0431].map(wakes_halted).iter().all(|w| *w));
        let others = [0, 0x1_0400, 0x700, 0x31, 0x100].map(wakes_halted);
        assert!(others.iter().all(|wakes| !wakes));
    }
}

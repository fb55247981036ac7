//! What snapshot and reset need of a `KvmVm`: its vCPUs at rest with their last exits completed,
//! and its run state after a reset. On the calling thread.

use kvm_ioctls::VmFd;

use super::KvmVm;
use crate::error::Result;
use crate::exit_handler::{Exit, ExitHandler, Outcome};
use crate::hop::hop;
use crate::limit::Limit;
use crate::sync::{MappedMutexGuard, MutexGuard, rank};
use crate::vcpu::{Vcpu, VmRunState};

impl<EH: ExitHandler> KvmVm<EH> {
    /// Whether it has an in-kernel interrupt controller, an in-kernel PIT, and fix-ups.
    pub(crate) fn chips(&self) -> (bool, bool, bool) {
        (self.irqchip, self.pit, self.has_fixups)
    }

    /// The interrupt lines that the host holds high. None can be changed while the result lives.
    pub(crate) fn lines(&self) -> MutexGuard<'_, u32, rank::IrqLines> {
        self.lines.lock()
    }

    /// Keep every vCPU at rest during `act`, which reads or changes the state of the whole machine.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if a vCPU is running; the error of `limit`, which ends
    /// the wait for a vCPU that is completing an exit; the error of `act`.
    pub(crate) fn at_rest<T>(
        &self,
        limit: &Limit<'_>,
        act: impl FnOnce(&VmFd, &mut [MappedMutexGuard<'_, Vcpu, rank::Vcpu>]) -> Result<T>,
    ) -> Result<T> {
        hop!();
        self.check_process()?;
        self.vcpus.at_rest(limit, |vcpus| act(&self.fd, vcpus))
    }

    /// Complete the instructions of the vCPUs' last exits. The vCPUs are at rest or leaving their
    /// guests. If this ends the guest, the run state becomes `Exiting`.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if a vCPU is running or its exit is not answered yet; the
    /// error of `limit`, which ends the wait for a callback.
    pub(crate) fn complete_pending_io(&self, limit: &Limit<'_>) -> Result<()> {
        for handle in self.handles() {
            match handle.complete_pending_io(limit)? {
                Outcome::End(exit) if self.state() != VmRunState::Exiting => {
                    self.shared.vcpu_ended(Exit { vcpu: Some(handle.id()), ..*exit });
                }
                Outcome::Stop => drop(self.shared.exit_handler.kick()),
                Outcome::End(_) => {}
                // Another thread has reported the result, or there is nothing to report.
                Outcome::Continue | Outcome::Wait => continue,
            }
            handle.reported();
        }
        Ok(())
    }

    /// Mark the machine as one that has not run.
    pub(crate) fn renew(&self) {
        self.shared.run_state.renew();
    }

    /// Mark the guest as not ended, after a reset has replaced its vCPUs' registers.
    pub(crate) fn revive(&self) {
        self.set_prepared();
        *self.shared.exit.lock() = None;
        self.shared.run_state.revive();
    }
}

//! A `KvmVm` as a snapshot needs it: captured as a whole while its vCPUs are at rest, and brought
//! back to life. On the thread that takes the snapshot or resets.

use kvm_ioctls::VmFd;

use super::KvmVm;
use crate::error::Result;
use crate::exit_handler::{Exit, ExitHandler, Outcome};
use crate::hop::hop;
use crate::limit::Limit;
use crate::sync::{MappedMutexGuard, MutexGuard, rank};
use crate::vcpu::{Vcpu, VmRunState};

impl<EH: ExitHandler> KvmVm<EH> {
    /// Whether it has an in-kernel interrupt controller, a PIT, and fix-ups.
    pub(crate) fn chips(&self) -> (bool, bool, bool) {
        (self.irqchip, self.pit, self.has_fixups)
    }

    /// The interrupt lines that the host holds high, which nobody changes meanwhile.
    pub(crate) fn lines(&self) -> MutexGuard<'_, u32, rank::IrqLines> {
        self.lines.lock()
    }

    /// Hold every vCPU at rest while `act` looks at all of the machine, or changes it.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] when one is running; what `limit` ends the wait for one
    /// with that completes an exit for another thread; what `act` returns.
    pub(crate) fn at_rest<T>(
        &self,
        limit: &Limit<'_>,
        act: impl FnOnce(&VmFd, &mut [MappedMutexGuard<'_, Vcpu, rank::Vcpu>]) -> Result<T>,
    ) -> Result<T> {
        hop!();
        self.check_process()?;
        self.vcpus.at_rest(limit, |vcpus| act(&self.fd, vcpus))
    }

    /// Complete all that the vCPUs' last exits began. They are at rest, or on their way there. If
    /// that ends the guest, the machine's state says so.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] when one is running, or its exit is not answered yet;
    /// what `limit` ends the wait for a callback with.
    pub(crate) fn complete_pending_io(&self, limit: &Limit<'_>) -> Result<()> {
        for handle in self.handles() {
            match handle.complete_pending_io(limit)? {
                Outcome::End(exit) if self.state() != VmRunState::Exiting => {
                    self.shared.vcpu_ended(Exit { vcpu: Some(handle.id()), ..exit });
                }
                Outcome::Stop => drop(self.shared.exit_handler.kick()),
                Outcome::End(_) => {}
                // Another thread has reported what it came to, or there is nothing to report.
                Outcome::Continue | Outcome::Wait => continue,
            }
            handle.reported();
        }
        Ok(())
    }

    /// The machine is as it was before its first run.
    pub(crate) fn renew(&self) {
        self.shared.run_state.renew();
    }

    /// The vCPUs have other registers: the guest has not ended, and starts where they say.
    pub(crate) fn revive(&self) {
        self.set_prepared();
        *self.shared.exit.lock() = None;
        self.shared.run_state.revive();
    }
}

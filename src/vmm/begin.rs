//! How a run begins: on the caller's thread, if that may be all it needs. Most runs of a fuzzer are
//! over before another thread would have woken up. After a while, or when the guest needs the
//! program's code, the vCPU's own thread continues the run, and the caller's thread runs the loop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::life::Running;
use crate::error::Result;
use crate::hop::hop;
use crate::kvm::moves_vcpus_quickly;
use crate::vcpu::{LeaveReason, VcpuHandle, can_tick};

/// How long a guest runs on the caller's thread. Events of the loop wait for so long.
const BRIEF: Duration = Duration::from_micros(200);

/// How many runs begin on the vCPU's own thread after one that was handed over to it.
const RUNS_ON_OWN_THREAD: u32 = 15;

/// The state of a run that has begun.
pub(super) enum Begun {
    /// The vCPUs' own threads run it, or nobody because it was stopped before.
    Runs,
    /// The guest has ended, or a device has ended the run.
    HasEnded,
}

impl Running<'_> {
    /// Begin a run.
    ///
    /// # Errors
    /// As for [`KvmVm::run`](crate::vm::KvmVm::run).
    pub(super) fn begin(&self, deadline: Option<Instant>) -> Result<Begun> {
        match self.vm.handles().as_slice() {
            [handle] if self.may_begin_here()? => self.begin_here(handle, deadline),
            _ => self.start_vcpus().map(|()| Begun::Runs),
        }
    }

    /// Whether nobody can tell that the run begins on this thread.
    fn may_begin_here(&self) -> Result<bool> {
        let mut runner = self.vmm.runner.lock();
        if runner.runs_on_own_thread > 0 {
            runner.runs_on_own_thread -= 1;
            return Ok(false);
        }
        drop(runner);
        // A trace shows the vCPU's thread.
        let is_observed = self.vmm.router.is_observed();
        Ok(!is_observed && moves_vcpus_quickly() && can_tick() && !self.event_manager.is_ready()?)
    }

    fn begin_here(&self, handle: &Arc<VcpuHandle>, deadline: Option<Instant>) -> Result<Begun> {
        hop!();
        if !self.forget_last()? {
            return Ok(Begun::Runs);
        }
        let entry = self.vm.first_address(self.vmm.entry);
        let here = self.vm.run_here(handle, &self.event_manager, entry)?;
        let brief = Instant::now() + BRIEF;
        let until = deadline.map_or(brief, |deadline| deadline.min(brief));
        match here.run_without_calls(until) {
            LeaveReason::Ended | LeaveReason::Stopped => return Ok(Begun::HasEnded),
            LeaveReason::CalledOut
            | LeaveReason::Ticked
            | LeaveReason::Waits
            | LeaveReason::Signalled
            | LeaveReason::NeedsProgram
            | LeaveReason::Busy => {}
        }
        drop(here);
        self.vmm.runner.lock().runs_on_own_thread = RUNS_ON_OWN_THREAD;
        self.vm.hand_over(handle)?;
        Ok(Begun::Runs)
    }
}

//! Running a vCPU from its handle, on the caller's thread: one exit at a time for a bare machine,
//! and what its last exit has left for a snapshot or a reset.

use super::enter::run_once;
use super::exit::VcpuExit;
use super::handle::{VcpuHandle, closed};
use super::kick::this_thread;
use super::run::drain_string_io;
use super::signal::unblock_kicks;
use crate::error::Result;
use crate::exit_handler::Outcome;
use crate::limit::Limit;

impl VcpuHandle {
    /// Bring a vCPU that is on its way to rest there, and complete all that its last exit began,
    /// with every element of a repeated instruction. Returns what that came to, for the
    /// caller to act on; the vCPU's own thread, where there is one, does both.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] while its guest runs, or when this thread is the one that
    /// answers its exit; if it reads and no answer has been given; what `limit` ends the wait
    /// with.
    pub(crate) fn complete_pending_io(&self, limit: &Limit<'_>) -> Result<Outcome> {
        let mut vcpu = {
            let mut state = self.rested(limit)?;
            let is_held = state.is_held();
            let vcpu = state.vcpu.as_mut().filter(|_| is_held).ok_or_else(|| self.running())?;
            vcpu.check_answered()?;
            if vcpu.pending.is_idle() {
                return Ok(Outcome::Continue);
            }
            if self.complete_on_own_thread(&mut state) {
                drop(state);
                return self.wait_while_leaving(limit).map(|()| Outcome::Continue);
            }
            let Some(vcpu) = state.vcpu.take() else { return Ok(Outcome::Continue) };
            state.runner = Some(this_thread());
            vcpu
        };
        let outcome = drain_string_io(&mut vcpu, self);
        self.put_back(vcpu, matches!(outcome, Outcome::Stop | Outcome::End(_)));
        Ok(outcome)
    }

    /// Enter the guest on this thread and return its next exit, unanswered, or
    /// [`VcpuExit::Interrupted`] because of [`Self::kick`]; `None` for a signal to this thread that
    /// is the program's.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] while its guest runs already, or when there is no signal
    /// for kicks; what KVM_RUN fails with.
    pub fn run_once(&self) -> Result<Option<VcpuExit>> {
        self.check_process()?;
        unblock_kicks()?;
        let mut vcpu = {
            let mut state = self.state.lock();
            if std::mem::take(&mut state.is_kicked) {
                return Ok(Some(VcpuExit::Interrupted));
            }
            if state.is_closed {
                return Err(closed());
            }
            let is_held = state.is_held();
            let vcpu = state.vcpu.take_if(|_| is_held).ok_or_else(|| self.running())?;
            self.stop.clear(&*self.page); // Kick, point 7.
            (state.runner, state.is_in_run_once) = (Some(this_thread()), true);
            vcpu
        };
        let exit = run_once(&mut vcpu, &self.stop);
        let mut state = self.state.lock();
        state.is_in_run_once = false;
        if matches!(exit, Ok(Some(VcpuExit::Interrupted))) {
            state.is_kicked = false;
        }
        self.rest(&mut state, vcpu);
        exit
    }

    /// Bring `run_once` back, the one in progress or the next. From any thread.
    pub fn kick(&self) {
        let mut state = self.state.lock();
        state.is_kicked = true;
        // A vCPU that a thread of its own runs is not `run_once`'s to stop: it would stay at rest.
        if state.is_held() {
            self.bring_out(&state);
        }
    }
}

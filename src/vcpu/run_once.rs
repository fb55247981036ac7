//! Operations on a vCPU by the calling thread: `run_once` for a bare machine, and completing its
//! last exit for a snapshot or a reset.

use super::enter::run_once;
use super::exit::VcpuExit;
use super::handle::{HandleState, VcpuHandle, closed};
use super::run::drain_string_io;
use super::signal::unblock_kicks_once;
use super::thread_id::ThreadId;
use super::vcpu::Vcpu;
use crate::error::Result;
use crate::exit_handler::Outcome;
use crate::limit::Limit;

impl VcpuHandle {
    /// Wait for a vCPU that is leaving its guest, then complete the instruction of its last exit,
    /// with every element of a repeated instruction. Returns the outcome, on which the caller has
    /// to act. If the vCPU has its own thread, that thread does both.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] while its guest runs, if this thread is answering its
    /// exit, or if a read is unanswered; the error of `limit`, which ends the wait.
    pub(crate) fn complete_pending_io(&self, limit: &Limit<'_>) -> Result<Outcome> {
        let mut vcpu = {
            let mut state = self.rested(limit)?;
            let is_held = state.commands.is_held();
            let vcpu =
                state.commands.vcpu.as_mut().filter(|_| is_held).ok_or_else(|| self.running())?;
            vcpu.check_answered()?;
            if vcpu.pending.is_idle() {
                return Ok(Outcome::Continue);
            }
            if self.complete_on_own_thread(&mut state) {
                drop(state);
                return self.wait_while_leaving(limit).map(|()| Outcome::Continue);
            }
            let Some(vcpu) = state.commands.vcpu.take() else { return Ok(Outcome::Continue) };
            state.runner = Some(ThreadId::current());
            vcpu
        };
        let outcome = drain_string_io(&mut vcpu, self);
        self.put_back(vcpu, matches!(outcome, Outcome::Stop | Outcome::End(_)));
        Ok(outcome)
    }

    /// Enter the guest on this thread and return its next exit, unanswered. Returns
    /// [`VcpuExit::Interrupted`] after [`Self::kick`], and `None` after another signal to this
    /// thread.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] while its guest runs already, or if there is no kick
    /// signal; the error of KVM_RUN.
    pub fn run_once(&self) -> Result<Option<VcpuExit>> {
        self.check_process()?;
        unblock_kicks_once()?;
        let mut vcpu = {
            let mut state = self.state.lock();
            if std::mem::take(&mut state.is_kicked) {
                return Ok(Some(VcpuExit::Interrupted));
            }
            self.take_for_run_once(&mut state)?
        };
        let exit = run_once(&mut vcpu, &self.stop);
        let mut state = self.state.lock();
        state.is_in_run_once = false;
        if matches!(exit, Ok(Some(VcpuExit::Interrupted))) {
            state.is_kicked = false;
        }
        self.rest(state, vcpu);
        exit
    }

    /// Take a vCPU at rest, to run it on this thread.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] while its guest is running.
    pub(super) fn take_for_run_once(&self, state: &mut HandleState) -> Result<Vcpu> {
        if state.commands.is_closed {
            return Err(closed());
        }
        let is_held = state.commands.is_held();
        let vcpu = state.commands.vcpu.take_if(|_| is_held).ok_or_else(|| self.running())?;
        self.stop.clear(&*self.page); // Kick, point 7.
        (state.runner, state.is_in_run_once) = (Some(ThreadId::current()), true);
        Ok(vcpu)
    }

    /// Make `run_once` return: the call in progress, or the next one. From any thread.
    pub fn kick(&self) {
        let mut state = self.state.lock();
        state.is_kicked = true;
        // If its own thread runs the vCPU, this must not stop it: the vCPU would stay at rest.
        if state.commands.is_held() {
            self.bring_out(&state);
        }
    }
}

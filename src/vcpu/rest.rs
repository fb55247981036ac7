//! Waits for a vCPU to come to rest, or for its callback to return. Any thread.

use std::time::Instant;

use super::handle::{HandleState, VcpuHandle, closed};
use super::thread_id::ThreadId;
use super::vcpu::VcpuName;
use crate::error::{Error, ErrorKind, Result};
use crate::limit::Limit;
use crate::sync::{MutexGuard, rank};

impl VcpuHandle {
    /// Wait until a vCPU that is leaving its guest is at rest, including a callback that answers
    /// its exit, and until the reason has been reported. A later report would concern a guest that
    /// a reset has replaced.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if this thread is answering its exit; the error of `limit`, which ends
    /// the wait.
    pub(crate) fn wait_while_leaving(&self, limit: &Limit<'_>) -> Result<()> {
        self.rested(limit).map(drop)
    }

    pub(super) fn rested(
        &self,
        limit: &Limit<'_>,
    ) -> Result<MutexGuard<'_, HandleState, rank::Vcpu>> {
        self.check_process()?;
        let mut state = self.state.lock();
        while !state.commands.is_settled() {
            if state.runner == Some(ThreadId::current()) {
                let (at, detail) =
                    (VcpuName(self.id()).to_string(), "its exit is not answered yet");
                let error = Error::new(ErrorKind::State, at, detail);
                return Err(error.hint("let the callback return first"));
            }
            MutexGuard::unlocked(&mut state, || {
                limit.wait(VcpuName(self.id()), |until| {
                    self.wait_until(until, |state| state.commands.is_settled())
                })
            })?;
        }
        if state.commands.is_closed { Err(closed()) } else { Ok(state) }
    }

    /// Wait until `is_over` returns true for the state, or until this time. Returns whether it did.
    fn wait_until(&self, until: Instant, is_over: impl Fn(&HandleState) -> bool) -> bool {
        let mut state = self.state.lock();
        while !is_over(&state) {
            if self.changed.wait_until(&mut state, until) {
                return is_over(&state);
            }
        }
        true
    }

    /// Wait until no callback of an ended run is in progress.
    pub(crate) fn wait_for_callback(&self, limit: &Limit<'_>) -> Result<()> {
        limit.wait(VcpuName(self.id()), |until| {
            self.wait_until(until, |state| state.commands.is_settled())
        })
    }

    /// Wait until the vCPU is at rest, or has been at rest since `counted`: another thread may have
    /// made it run again. Returns false at the deadline; `None` is no deadline.
    pub(crate) fn wait_for_rest(&self, counted: u64, until: Option<Instant>) -> bool {
        let is_over =
            |state: &HandleState| state.is_at_rest() || state.commands.transitions != counted;
        if let Some(until) = until {
            return self.wait_until(until, is_over);
        }
        let mut state = self.state.lock();
        while !is_over(&state) {
            self.changed.wait(&mut state);
        }
        true
    }

    /// Whether it is at rest, or will come to rest without a further command.
    pub(crate) fn stays_out(&self) -> bool {
        let commands = &self.state.lock().commands;
        commands.is_held() && !commands.is_lost && !commands.is_closed
    }

    /// Whether a thread runs it, or is in a callback for it.
    pub(crate) fn is_in_use(&self) -> bool {
        let commands = &self.state.lock().commands;
        let is_in_use = commands.vcpu.is_none() || commands.is_completing || commands.is_reporting;
        is_in_use && !commands.is_lost && !commands.is_closed
    }
}

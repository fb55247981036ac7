//! The handle's side of a vCPU's own thread: starts it, gives it commands, and takes the vCPU back.
//! What the thread does with the vCPU is in `thread.rs`. The thread outlives a run. It ends with
//! its machine, or when it has been idle for a while.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::handle::{HandleState, OwnThread, VcpuCommand, VcpuHandle};
use super::kick::this_thread;
use super::signal::SignalMask;
use super::stack;
use super::vcpu::Vcpu;
use crate::error::Result;

/// How long a thread waits for its vCPU's next run before it ends.
const IDLE_LIMIT: Duration = Duration::from_secs(1);

/// What the vCPU's own thread does next.
pub(super) struct Task {
    pub(super) vcpu: Vcpu,
    /// Complete the last exit instead of running the guest.
    pub(super) completes: bool,
    pub(super) mask: Option<SignalMask>,
}

impl VcpuHandle {
    /// Begin a run, with the vCPU at rest until [`Self::run`]. `spawn` starts a thread with the
    /// given number if there is none, or if its stack does not have the size that is now
    /// configured.
    ///
    /// # Errors
    /// As for [`Self::begin`]; the error of `spawn`.
    pub(super) fn begin_run(
        &self,
        spawn: impl FnOnce(u64) -> Result<JoinHandle<()>>,
    ) -> Result<()> {
        let stack_size = stack::size();
        let mut state = self.begin(None)?;
        state.mask = Some(SignalMask::of_this_thread());
        // A thread in a callback keeps its stack.
        let is_usable = |own: &OwnThread| own.stack_size == stack_size || state.vcpu.is_none();
        if state.thread.as_ref().is_some_and(is_usable) {
            return Ok(());
        }
        let number = state.threads + 1;
        let thread = spawn(number)?;
        state.threads = number;
        // A previous thread finds that it has been replaced, and ends by itself.
        state.thread = Some(OwnThread { thread, number, stack_size });
        self.changed.notify_all();
        Ok(())
    }

    /// Have the thread enter the guest, at once or when it has started. A command to end is not
    /// replaced.
    pub(super) fn run(&self) {
        let mut state = self.state.lock();
        self.command_run(&mut state);
        // A thread in `run_here` waits in its event loop. Fails only in a forked child.
        state.here.iter().for_each(|event_manager| drop(event_manager.kick()));
    }

    /// Set the command to enter the guest.
    pub(super) fn command_run(&self, state: &mut HandleState) {
        if state.command == VcpuCommand::Exit {
            return;
        }
        self.stop.clear(&*self.page); // Kick, point 7.
        if state.command == VcpuCommand::Complete {
            state.is_completing = false; // The next entry completes it.
        }
        state.command = VcpuCommand::Run;
        state.runs_on_resume = false;
        state.transitions += 1;
        self.changed.notify_all();
    }

    /// Have a vCPU that [`Self::stop_with`] has stopped enter its guest again. A vCPU that was at
    /// rest before stays at rest.
    pub(crate) fn resume(&self) {
        let runs = self.state.lock().runs_on_resume;
        if runs {
            self.run();
        }
    }

    /// Have the vCPU enter its guest when it is resumed.
    pub(super) fn run_on_resume(&self) {
        self.state.lock().runs_on_resume = true;
    }

    /// End the run: bring the vCPU out of its guest; it rests until the next run. Returns before it
    /// is out.
    pub(crate) fn end_run(&self) {
        self.stop_with(VcpuCommand::Park);
        let mut state = self.state.lock();
        (state.is_in_run, state.here) = (false, None);
        state.runs_on_resume = false;
        self.changed.notify_all();
    }

    /// Take the vCPU's own thread. The caller joins it, except in a forked child, where it does not
    /// exist.
    pub(crate) fn take_thread(&self) -> Option<JoinHandle<()>> {
        self.state.lock().thread.take().map(|own| own.thread)
    }

    /// Called by the own thread: wait for its next task. `None` if it has to end, because the
    /// machine is closed, another thread has replaced it, or it has been idle for [`IDLE_LIMIT`].
    pub(super) fn next(&self, number: u64) -> Option<Task> {
        let mut state = self.state.lock();
        let mut idle = Instant::now() + IDLE_LIMIT;
        loop {
            if state.command == VcpuCommand::Exit || !state.belongs_to(number) {
                return None;
            }
            let completes = state.command == VcpuCommand::Complete;
            // In `run_here`, the caller's thread follows the command to run.
            let is_mine = completes || state.here.is_none();
            if state.command != VcpuCommand::Park
                && is_mine
                && let Some(vcpu) = state.vcpu.take()
            {
                if completes {
                    state.command = VcpuCommand::Park;
                }
                state.runner = Some(this_thread());
                return Some(Task { vcpu, completes, mask: state.mask.take() });
            }
            if state.is_in_run || state.command != VcpuCommand::Park {
                self.changed.wait(&mut state);
                idle = Instant::now() + IDLE_LIMIT;
            } else if self.changed.wait_until(&mut state, idle) && state.is_idle(number) {
                // Dropped, not joined: no thread waits for it.
                state.thread = None;
                return None;
            }
        }
    }

    /// Put the vCPU to rest. If it stopped `by_itself`, it rests until the next run, even if the
    /// machine is paused and resumed in between; the caller reports why, then calls
    /// [`Self::reported`].
    pub(super) fn put_back(&self, mut vcpu: Vcpu, by_itself: bool) {
        // Without the lock: a device or hook that has been removed may end with its copy.
        drop(std::mem::take(&mut vcpu.cache));
        let mut state = self.state.lock();
        // A vCPU that got the command to run while it completed its last exit continues.
        let goes_on = state.is_completing && !by_itself;
        if state.command == VcpuCommand::Run && !goes_on {
            state.command = VcpuCommand::Park;
            state.runs_on_resume = true;
        }
        state.runs_on_resume &= !by_itself;
        state.is_reporting = by_itself;
        self.rest(state, vcpu);
    }

    /// Have the vCPU's own thread complete the last exit. When KVM_RUN is called from another
    /// thread than before, KVM waits for an RCU grace period, which takes milliseconds before Linux
    /// 6.13. Returns whether there is such a thread.
    pub(super) fn complete_on_own_thread(&self, state: &mut HandleState) -> bool {
        let is_there = state.thread.is_some() && state.here.is_none();
        if !is_there || state.command != VcpuCommand::Park {
            return false;
        }
        state.command = VcpuCommand::Complete;
        state.is_completing = true;
        self.changed.notify_all();
        true
    }

    /// Note that the reason for the rest has been reported to the run state and the exit handler.
    pub(crate) fn reported(&self) {
        let mut state = self.state.lock();
        (state.is_completing, state.is_reporting) = (false, false);
        self.changed.notify_all();
    }

    /// Mark the vCPU as lost in a panic of its thread.
    pub(super) fn mark_lost(&self) {
        let mut state = self.state.lock();
        state.is_lost = true;
        state.runner = None;
        self.changed.notify_all();
    }
}

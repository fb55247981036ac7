//! A vCPU's own thread as its handle sees it: when there is one, what it is to do, and what it
//! brings back. What it does with the vCPU is in `thread.rs`. It outlives the run, and ends with
//! its machine or when it has had nothing to do for a while.

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
    /// Complete what the last exit has left, instead of running the guest.
    pub(super) completes: bool,
    pub(super) mask: Option<SignalMask>,
}

impl VcpuHandle {
    /// A run begins, with the vCPU at rest until it is sent off. `spawn` starts a thread, which
    /// gets its number, where there is none or it has a stack of another size than the program
    /// wants now.
    ///
    /// # Errors
    /// As for [`Self::begin`]; what `spawn` returns.
    pub(super) fn begin_run(
        &self,
        spawn: impl FnOnce(u64) -> Result<JoinHandle<()>>,
    ) -> Result<()> {
        let stack_size = stack::size();
        let mut state = self.begin(None)?;
        state.mask = Some(SignalMask::of_this_thread());
        // One in a callback goes on with the stack that it has.
        let is_usable = |own: &OwnThread| own.stack_size == stack_size || state.vcpu.is_none();
        if state.thread.as_ref().is_some_and(is_usable) {
            return Ok(());
        }
        let number = state.threads + 1;
        let thread = spawn(number)?;
        state.threads = number;
        // One that was there before sees that it has been replaced, and ends by itself.
        state.thread = Some(OwnThread { thread, number, stack_size });
        self.changed.notify_all();
        Ok(())
    }

    /// Have the thread enter the guest, at once or when it comes up; one that is to end does not.
    pub(super) fn run(&self) {
        let mut state = self.state.lock();
        self.send_off(&mut state);
        // A thread in `run_here` waits in its loop. Fails in a forked child alone.
        state.here.iter().for_each(|event_manager| drop(event_manager.kick()));
    }

    /// The command to enter the guest.
    pub(super) fn send_off(&self, state: &mut HandleState) {
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

    /// Have a vCPU that [`Self::stop_with`] has brought to rest enter its guest again. One that
    /// rested before stays at rest.
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

    /// The run ends: bring the vCPU out of its guest, where it rests until the next run. Returns
    /// before it is out.
    pub(crate) fn end_run(&self) {
        self.stop_with(VcpuCommand::Park);
        let mut state = self.state.lock();
        (state.is_in_run, state.here) = (false, None);
        state.runs_on_resume = false;
        self.changed.notify_all();
    }

    /// The vCPU's own thread, which is to end, to be joined. In a forked child it does not exist
    /// and is to be forgotten.
    pub(crate) fn take_thread(&self) -> Option<JoinHandle<()>> {
        self.state.lock().thread.take().map(|own| own.thread)
    }

    /// The own thread's side: what it does next; `None` if it is to end, because the machine is
    /// closed, another thread has replaced it, or nobody has run the machine for a while.
    pub(super) fn next(&self, number: u64) -> Option<Task> {
        let mut state = self.state.lock();
        let mut idle = Instant::now() + IDLE_LIMIT;
        loop {
            if state.command == VcpuCommand::Exit || !state.belongs_to(number) {
                return None;
            }
            let completes = state.command == VcpuCommand::Complete;
            // A thread in `run_here` follows the command to run.
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
                // Dropped, not joined: nobody waits for it.
                state.thread = None;
                return None;
            }
        }
    }

    /// The vCPU comes to rest. `by_itself`: it stays there until the next run, even if the machine
    /// is paused and resumed meanwhile. Then the caller reports why, and calls [`Self::reported`].
    pub(super) fn put_back(&self, vcpu: Vcpu, by_itself: bool) {
        let mut state = self.state.lock();
        // One that was sent off while its last exit was completed goes on.
        let goes_on = state.is_completing && !by_itself;
        if state.command == VcpuCommand::Run && !goes_on {
            state.command = VcpuCommand::Park;
            state.runs_on_resume = true;
        }
        state.runs_on_resume &= !by_itself;
        state.is_reporting = by_itself;
        self.rest(&mut state, vcpu);
    }

    /// Have the vCPU's own thread complete what its last exit has left: KVM waits for all readers
    /// of a vCPU's thread when another one enters the guest, which takes milliseconds before Linux
    /// 6.13. Whether there is such a thread.
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

    /// What brought the vCPU to rest is reported: the machine's state and its exit handler say it.
    pub(crate) fn reported(&self) {
        let mut state = self.state.lock();
        (state.is_completing, state.is_reporting) = (false, false);
        self.changed.notify_all();
    }

    /// The vCPU is lost with its thread.
    pub(super) fn mark_lost(&self) {
        let mut state = self.state.lock();
        state.is_lost = true;
        state.runner = None;
        self.changed.notify_all();
    }
}

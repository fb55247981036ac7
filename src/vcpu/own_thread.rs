//! The handle's side of a vCPU's own thread: starts it, gives it commands, and takes the vCPU back.
//! `commands.rs` decides which command is followed, and `thread.rs` follows it. The thread outlives
//! a run. It ends with its machine, or when it has been idle for a while.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::commands::{Next, VcpuCommand};
use super::handle::{HandleState, OwnThread, VcpuHandle};
use super::kick::ImmediateExit;
use super::signal::SignalMask;
use super::stack;
use super::thread_id::ThreadId;
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
        let mut state = self.begin(None)?;
        self.provide_thread(&mut state, spawn)
    }

    /// Have the vCPU's own thread follow its commands from here on, instead of the thread in
    /// `run_here`, which has put the vCPU to rest and gets no more ticks. `spawn` as for
    /// [`Self::begin_run`].
    ///
    /// # Errors
    /// The error of `spawn`.
    pub(super) fn hand_over(
        &self,
        spawn: impl FnOnce(u64) -> Result<JoinHandle<()>>,
    ) -> Result<()> {
        let mut state = self.state.lock();
        self.provide_thread(&mut state, spawn)?;
        state.here = None;
        // A vCPU in a callback of an earlier run is its own thread's already.
        if state.commands.vcpu.is_some() {
            // A last tick may have set the flag. Kick, point 8: a kick that came meanwhile has set
            // the word first.
            self.page.set(self.stop.is_set());
        }
        self.changed.notify_all();
        Ok(())
    }

    fn provide_thread(
        &self,
        state: &mut HandleState,
        spawn: impl FnOnce(u64) -> Result<JoinHandle<()>>,
    ) -> Result<()> {
        let stack_size = stack::size();
        state.mask = Some(SignalMask::of_this_thread());
        // A thread in a callback keeps its stack.
        let is_away = state.commands.vcpu.is_none();
        let is_usable = |own: &OwnThread| own.stack_size == stack_size || is_away;
        if state.thread.as_ref().is_some_and(is_usable) {
            return Ok(());
        }
        let number = state.commands.next_thread();
        let thread = spawn(number)?;
        state.commands.replace_thread(number);
        state.thread = Some(OwnThread { thread, stack_size });
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
        if state.commands.run(|| self.stop.clear(&*self.page)) {
            self.changed.notify_all();
        }
    }

    /// Have a vCPU that [`Self::stop_with`] has stopped enter its guest again. A vCPU that was at
    /// rest before stays at rest.
    pub(crate) fn resume(&self) {
        let runs = self.state.lock().commands.runs_on_resume;
        if runs {
            self.run();
        }
    }

    /// Have the vCPU enter its guest when it is resumed.
    pub(super) fn run_on_resume(&self) {
        self.state.lock().commands.runs_on_resume = true;
    }

    /// End the run: bring the vCPU out of its guest; it rests until the next run. Returns before it
    /// is out.
    pub(crate) fn end_run(&self) {
        self.stop_with(VcpuCommand::Park);
        let mut state = self.state.lock();
        state.commands.end_run();
        state.here = None;
        self.changed.notify_all();
    }

    /// Take the vCPU's own thread. The caller joins it, except in a forked child, where it does not
    /// exist.
    pub(crate) fn take_thread(&self) -> Option<JoinHandle<()>> {
        let mut state = self.state.lock();
        state.commands.forget_thread();
        state.thread.take().map(|own| own.thread)
    }

    /// Called by the own thread: wait for its next task. `None` if it has to end, because the
    /// machine is closed, another thread has replaced it, or it has been idle for [`IDLE_LIMIT`].
    pub(super) fn next(&self, number: u64) -> Option<Task> {
        let mut state = self.state.lock();
        let mut idle = Instant::now() + IDLE_LIMIT;
        loop {
            let is_here = state.here.is_some();
            let (vcpu, completes) = match state.commands.next(number, is_here) {
                Next::Enter(vcpu) => (vcpu, false),
                Next::Complete(vcpu) => (vcpu, true),
                Next::Wait => {
                    self.changed.wait(&mut state);
                    idle = Instant::now() + IDLE_LIMIT;
                    continue;
                }
                Next::WaitIdle => {
                    if self.changed.wait_until(&mut state, idle) && state.commands.expire(number) {
                        // Dropped, not joined: no thread waits for it.
                        state.thread = None;
                        return None;
                    }
                    continue;
                }
                Next::End => return None,
            };
            state.runner = Some(ThreadId::current());
            return Some(Task { vcpu, completes, mask: state.mask.take() });
        }
    }

    /// Put the vCPU to rest. If it stopped `by_itself`, it rests until the next run, even if the
    /// machine is paused and resumed in between; the caller reports why, then calls
    /// [`Self::reported`].
    pub(super) fn put_back(&self, mut vcpu: Vcpu, by_itself: bool) {
        // Without the lock: a device or hook that has been removed may end with its copy.
        drop(std::mem::take(&mut vcpu.cache));
        let mut state = self.state.lock();
        state.commands.stopped(by_itself);
        self.rest(state, vcpu);
    }

    /// Have the vCPU's own thread complete the last exit. When KVM_RUN is called from another
    /// thread than before, KVM waits for an RCU grace period, which takes milliseconds before Linux
    /// 6.13. Returns whether there is such a thread.
    pub(super) fn complete_on_own_thread(&self, state: &mut HandleState) -> bool {
        let completes = state.here.is_none() && state.commands.complete();
        if completes {
            self.changed.notify_all();
        }
        completes
    }

    /// Note that the reason for the rest has been reported to the run state and the exit handler.
    pub(crate) fn reported(&self) {
        let mut state = self.state.lock();
        state.commands.reported();
        self.changed.notify_all();
    }

    /// Mark the vCPU as lost in a panic of its thread.
    pub(super) fn mark_lost(&self) {
        let mut state = self.state.lock();
        state.commands.is_lost = true;
        state.runner = None;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Weak};
    use std::time::Duration;

    use super::*;
    use crate::config::{Boot, Code, FlatBoot, VmmConfig};
    use crate::cpu::CpuMode;
    use crate::devices::{Access, Device};
    use crate::exit_handler::Outcome;
    use crate::vcpu::ticked::{FLAG, HAS_TICKED};
    use crate::vmm::Vmm;

    /// Stops its vCPU in a write, and removes itself. The vCPU has the last reference and drops it
    /// when it has seen the stop, just before it comes to rest.
    #[derive(Debug)]
    struct Resumes {
        vmm: Weak<Vmm>,
        vcpu: Arc<VcpuHandle>,
        /// Whether a write on a thread with a timer takes until its tick.
        outlasts_tick: bool,
    }

    impl Device for Resumes {
        fn read(&self, _offset: u64, _data: &mut [u8]) -> Outcome {
            Outcome::Continue
        }
        fn write(&self, _offset: u64, _data: &[u8]) -> Outcome {
            self.vmm.upgrade().unwrap().remove_device(Access::Pio, 0x80).unwrap();
            self.vcpu.pause();
            while self.outlasts_tick && !FLAG.get().is_null() && !HAS_TICKED.get() {
                std::thread::yield_now();
            }
            Outcome::Continue
        }
    }

    impl Drop for Resumes {
        fn drop(&mut self) {
            self.vcpu.resume();
        }
    }

    fn check_runs_on(outlasts_tick: bool) {
        if crate::kvm::open_kvm().is_err() {
            return;
        }
        // out 0x80, al; mov al, 7; out 0xf4, al
        let code = Code::Bytes(vec![0xe6, 0x80, 0xb0, 7, 0xe6, 0xf4]);
        let mode = CpuMode::Protected32;
        let boot = Boot::Flat(FlatBoot { code, address: 0x1000, entry: None, mode });
        let mut config = VmmConfig { boot, ..VmmConfig::default() };
        config.memory.size_mib = 1;
        let vmm = Arc::new(Vmm::try_from(config).unwrap());
        let vcpu = vmm.vcpus().unwrap().remove(0);
        let device = Resumes { vmm: Arc::downgrade(&vmm), vcpu, outlasts_tick };
        vmm.add_device(Access::Pio, 0x80, 1, Arc::new(device)).unwrap();
        let turn = |next| vmm.event_manager()?.run_until(next, None).map(drop);
        assert_eq!(vmm.run(Some(Duration::from_secs(60)), turn).unwrap().code, Some(7));
    }

    #[test]
    fn a_vcpu_that_is_resumed_while_it_comes_to_rest_runs_on() {
        check_runs_on(false);
    }

    #[test]
    fn a_tick_beside_the_stop_changes_nothing() {
        check_runs_on(true);
    }
}

//! Runs a vCPU on the caller's thread instead of its own, until the guest ends, the vCPU is called
//! out, or a tick comes. On the thread that is in `run_here`.

use std::sync::Arc;
use std::time::Instant;

use super::current::CurrentVcpuGuard;
use super::handle::{HandleState, VcpuHandle};
use super::kick::ImmediateExit;
use super::run::{complete_pending_io, step};
use super::thread::{MAX_STEPS_AT_STOP, PanicGuard, Shared};
use super::thread_id::ThreadId;
use super::tick::Ticks;
use super::vcpu::Vcpu;
use crate::error::Result;
use crate::event::EventManager;
use crate::exit_handler::{Exit, ExitHandler, Outcome};
use crate::sync::{MutexGuard, rank};

/// Why the vCPU is out of its guest, at rest in its handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeaveReason {
    /// The guest has ended. The machine has its `Exit`.
    Ended,
    /// A callback or a device has ended the run.
    Stopped,
    /// The machine is paused or quiesced.
    CalledOut,
    /// The tick has come.
    Ticked,
    /// A device has no room for the guest's last write.
    Waits,
    /// This thread has received a signal.
    Signalled,
    /// The exit needs code of the program, which this thread does not call.
    NeedsProgram,
    /// The vCPU's own thread has it: a callback of an earlier run has not returned yet.
    Busy,
}

/// A vCPU that this thread runs.
pub(crate) struct HereRun<'a, EH: ExitHandler> {
    handle: &'a Arc<VcpuHandle>,
    shared: &'a Shared<EH>,
    ticks: Ticks<'a>,
}

/// Begin a run of a vCPU on this thread, and `prepare` the vCPU for it. If it `is_held`, the vCPU
/// stays at rest, and this thread waits in its event loop, which is kicked when the vCPU may
/// continue.
///
/// # Errors
/// If there is no timer or no kick signal; the error of `prepare`.
pub(crate) fn begin<'a, EH: ExitHandler>(
    handle: &'a Arc<VcpuHandle>,
    shared: &'a Shared<EH>,
    event_manager: &Arc<EventManager>,
    is_held: bool,
    prepare: Option<impl FnOnce(&mut Vcpu) -> Result<()>>,
) -> Result<HereRun<'a, EH>> {
    let ticks = Ticks::begin(&handle.page)?;
    drop(handle.begin(Some(Arc::clone(event_manager)))?);
    prepare.map_or(Ok(()), |prepare| handle.with_vcpu(prepare))?;
    if is_held {
        handle.run_on_resume();
    } else {
        handle.command_run(&mut handle.state.lock());
    }
    Ok(HereRun { handle, shared, ticks })
}

impl<EH: ExitHandler> HereRun<'_, EH> {
    /// Run the guest until this thread has something else to do, but not beyond this time.
    pub(crate) fn run(&self, until: Instant) -> LeaveReason {
        self.run_vcpu(until, false)
    }

    /// [`Self::run`], but without calls of the program's devices and hooks: an exit that needs one
    /// stays pending.
    pub(crate) fn run_without_calls(&self, until: Instant) -> LeaveReason {
        self.run_vcpu(until, true)
    }

    fn run_vcpu(&self, until: Instant, calls_nobody: bool) -> LeaveReason {
        let mut vcpu = match self.take() {
            Ok(vcpu) => vcpu,
            Err(reason) => return reason,
        };
        let (handle, shared) = (&**self.handle, self.shared);
        let guard = PanicGuard { handle, shared };
        let current = CurrentVcpuGuard::enter(self.handle, shared.id());
        vcpu.notify_of_pause();
        vcpu.is_interrupted = false;
        // A tick of an earlier call may have left the flag set. Kick, point 8.
        self.ticks.page().set(handle.stop.is_set());
        self.ticks.arm(until);
        vcpu.calls_nobody = calls_nobody;
        let (left, end, running) = self.run_until_left(&mut vcpu);
        vcpu.calls_nobody = false;
        drop(current);
        std::mem::forget(guard);
        match (running, end) {
            // The command to run stays: this thread takes the vCPU again after it has run its event
            // loop.
            (Some(state), _) => handle.rest(state, vcpu),
            (None, Outcome::Continue | Outcome::Wait) => handle.put_back(vcpu, false),
            (None, end) => {
                handle.put_back(vcpu, true);
                if let Outcome::End(exit) = end {
                    shared.note_end(Exit { vcpu: Some(handle.id()), ..*exit });
                }
                // No wake-up is needed: this thread runs the vCPU, and the caller checks the
                // result.
                handle.reported();
            }
        }
        left
    }

    /// Run the guest until this thread has to leave it. If the command to run stays, also returns
    /// the state in which it does.
    fn run_until_left(
        &self,
        vcpu: &mut Vcpu,
    ) -> (LeaveReason, Outcome, Option<MutexGuard<'_, HandleState, rank::Vcpu>>) {
        loop {
            let (left, end) = self.run_guest(vcpu);
            if matches!(left, LeaveReason::Ended | LeaveReason::Stopped | LeaveReason::CalledOut) {
                return (left, end, None);
            }
            let state = self.handle.state.lock();
            if !state.commands.is_held() {
                return (left, end, Some(state));
            }
            // Called out beside a tick: it has to complete its exit.
        }
    }

    /// Take the vCPU, unless it has to stay at rest or another thread has it.
    fn take(&self) -> std::result::Result<Vcpu, LeaveReason> {
        let mut state = self.handle.state.lock();
        if state.commands.is_held() {
            return Err(LeaveReason::CalledOut);
        }
        let vcpu = state.commands.vcpu.take().ok_or(LeaveReason::Busy)?;
        state.runner = Some(ThreadId::current());
        Ok(vcpu)
    }

    fn run_guest(&self, vcpu: &mut Vcpu) -> (LeaveReason, Outcome) {
        let handle = self.handle;
        let mut is_stopped = false;
        while !handle.stop.is_set() {
            if !vcpu.has_room() {
                return (LeaveReason::Waits, Outcome::Continue);
            }
            let outcome = step(vcpu, handle);
            match outcome {
                Outcome::Continue => {}
                Outcome::Wait => return (LeaveReason::NeedsProgram, outcome),
                Outcome::Stop => {
                    // Also if a pause has set the stop word meanwhile.
                    is_stopped = true;
                    break;
                }
                Outcome::End(_) => {
                    vcpu.complete();
                    return (LeaveReason::Ended, outcome);
                }
            }
            let is_interrupted = std::mem::take(&mut vcpu.is_interrupted);
            if self.ticks.take_tick() {
                // Kick, point 8: a kick that came meanwhile has set the word first.
                self.ticks.page().set(handle.stop.is_set());
                return (LeaveReason::Ticked, Outcome::Continue);
            }
            if is_interrupted && !handle.stop.is_set() {
                return (LeaveReason::Signalled, Outcome::Continue);
            }
        }
        let end = complete_pending_io(vcpu, handle, MAX_STEPS_AT_STOP);
        match end {
            Outcome::Continue | Outcome::Wait if is_stopped => {
                (LeaveReason::Stopped, Outcome::Stop)
            }
            Outcome::Continue | Outcome::Wait => (LeaveReason::CalledOut, Outcome::Continue),
            end => (LeaveReason::Stopped, end),
        }
    }
}

//! `VcpuHandle`: what everybody but the thread that runs a vCPU has of it. The vCPU lies in here
//! while it is at rest; its thread takes it out to run it. Commands and waits are here, looking
//! into it is in `host_access.rs`, running it by hand in `by_hand.rs`.

use std::ptr::NonNull;
use std::sync::Arc;

use super::kick::{StopWord, interrupt, this_thread};
use super::run_page::RunPage;
use super::vcpu::Vcpu;
use crate::devices::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::process::ProcessTag;
use crate::sync::{Condvar, Mutex, MutexGuard, rank};

/// A vCPU, at rest in here or out with the thread that runs it.
#[derive(Debug)]
pub struct VcpuHandle {
    id: u64,
    pub(super) page: Arc<RunPage>,
    pub(super) stop: StopWord,
    pub(super) state: Mutex<HandleState, rank::Vcpu>,
    pub(super) changed: Condvar,
    process_tag: ProcessTag,
}

#[derive(Debug)]
pub(super) struct HandleState {
    /// None while a thread has it.
    pub(super) vcpu: Option<Vcpu>,
    /// That thread's vCPU, while it calls the program's code.
    pub(super) host_access: Option<HostAccess>,
    /// The thread that has it.
    pub(super) runner: Option<libc::pthread_t>,
    /// The device that this thread waits for.
    waits_for: Option<Arc<dyn Device>>,
    /// It was lost in a panic on the thread.
    is_lost: bool,
    pub(super) command: VcpuCommand,
    /// A kick for `run_once` that has not ended one yet.
    pub(super) is_kicked: bool,
    /// How often the vCPU has come to rest.
    rests: u64,
    /// How often it has come to rest or left: if the count has changed since somebody asked it to
    /// stop, it was at rest in between.
    transitions: u64,
    /// It was running when it was stopped, and [`VcpuHandle::resume`] sends it off again.
    runs_on_resume: bool,
    /// Its machine is closed.
    pub(super) is_closed: bool,
}

/// The vCPU of a thread that calls the program's code.
#[derive(Debug)]
pub(super) struct HostAccess(pub(super) NonNull<Vcpu>);

// SAFETY: a vCPU may be used from any thread, one at a time: here under the lock of the handle's
// state.
unsafe impl Send for HostAccess {}

/// What its own thread does with a vCPU at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum VcpuCommand {
    /// Leave it there.
    Park,
    /// Enter its guest.
    Run,
    /// Leave it there and end.
    Exit,
}

pub(super) fn closed() -> Error {
    Error::closed("machine")
}

impl HandleState {
    /// There is nothing to wait for: it is out of its guest, and does not go back by itself.
    fn is_at_rest(&self) -> bool {
        let is_held = self.host_access.is_some() && self.is_held();
        self.vcpu.is_some() || is_held || self.is_lost || self.is_closed
    }

    /// Its thread has not been sent into the guest. A vCPU that has counts as running, even if the
    /// thread has not taken it yet.
    pub(super) fn is_held(&self) -> bool {
        self.command != VcpuCommand::Run
    }
}

impl VcpuHandle {
    pub(super) fn new(id: u64, page: Arc<RunPage>, vcpu: Vcpu) -> Self {
        let state = HandleState {
            vcpu: Some(vcpu),
            host_access: None,
            runner: None,
            waits_for: None,
            is_lost: false,
            command: VcpuCommand::Park,
            is_kicked: false,
            rests: 0,
            transitions: 0,
            runs_on_resume: false,
            is_closed: false,
        };
        let (stop, changed) = (StopWord::default(), Condvar::new());
        let state = Mutex::numbered(id, state);
        Self { id, page, stop, state, changed, process_tag: ProcessTag::current() }
    }

    /// The vCPU's number.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn running(&self) -> Error {
        let at = format!("vcpu_{}", self.id);
        Error::new(ErrorKind::State, at, "its guest is running").hint("pause the machine first")
    }

    /// # Errors
    /// In a forked child: the run page is shared with its parent.
    pub(crate) fn check_process(&self) -> Result<()> {
        self.process_tag.check("vCPU")
    }

    /// Wait for a vCPU that is on its way to rest.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when this thread is the one that answers its exit.
    pub(crate) fn wait_while_leaving(&self) -> Result<()> {
        self.rested().map(drop)
    }

    pub(super) fn rested(&self) -> Result<MutexGuard<'_, HandleState, rank::Vcpu>> {
        self.check_process()?;
        let mut state = self.state.lock();
        while state.vcpu.is_none() && state.is_held() && !state.is_lost && !state.is_closed {
            if state.runner == Some(this_thread()) {
                let (at, detail) = (format!("vcpu_{}", self.id), "its exit is not answered yet");
                let error = Error::new(ErrorKind::State, at, detail);
                return Err(error.hint("let the callback return first"));
            }
            self.changed.wait(&mut state);
        }
        if state.is_closed { Err(closed()) } else { Ok(state) }
    }

    /// Have a vCPU that its thread runs come to rest after the exit that is answered now, until
    /// somebody stops it and resumes it.
    #[cfg(test)]
    pub(crate) fn park(&self) {
        self.bring_out(&self.state.lock());
    }

    /// Points 1 to 3 of the kick.
    pub(super) fn bring_out(&self, state: &HandleState) {
        self.stop.kick(&*self.page, || {
            // In a callback the thread needs no signal: it looks at the stop word before it enters
            // its guest again. Signals of a storm of pauses would queue up there, and keep it from
            // the GIL that others wait for behind it.
            let runner = state.runner.filter(|_| state.host_access.is_none());
            // The runner needs this lock before it can end.
            if let Some(thread) = runner {
                // SAFETY: the thread takes itself out of the state before it ends, and we hold the
                // state's lock.
                unsafe { interrupt(thread) };
            }
        });
        state.waits_for.iter().for_each(|device| device.wake());
    }

    /// Before the guest is entered: wait until the device has room that its last access found full.
    /// False when the vCPU is brought out first; then it waits again before the next entry.
    pub(super) fn wait_for_room(&self, vcpu: &mut Vcpu) -> bool {
        let Some(device) = vcpu.waits_for.take() else { return true };
        self.state.lock().waits_for = Some(Arc::clone(&device));
        let has_room = device.wait_for_room(&|| self.stop.is_set());
        self.state.lock().waits_for = None;
        if !has_room {
            vcpu.waits_for = Some(device);
        }
        has_room
    }

    /// Have the thread enter the guest, at once or when it comes up; one that is to end does not.
    pub(super) fn run(&self) {
        let mut state = self.state.lock();
        if state.command == VcpuCommand::Exit {
            return;
        }
        self.stop.clear(&*self.page); // Kick, point 7.
        state.command = VcpuCommand::Run;
        state.runs_on_resume = false;
        state.transitions += 1;
        self.changed.notify_all();
    }

    /// Have a vCPU that [`Self::stop_with`] has brought to rest enter its guest again. One that
    /// rested before stays at rest.
    pub(super) fn resume(&self) {
        let runs = self.state.lock().runs_on_resume;
        if runs {
            self.run();
        }
    }

    /// Have the vCPU enter its guest when it is resumed.
    pub(super) fn run_on_resume(&self) {
        self.state.lock().runs_on_resume = true;
    }

    /// Bring the vCPU out of its guest and give its thread another command, in place of one that it
    /// has not followed yet. The command to end stays.
    pub(super) fn stop_with(&self, command: VcpuCommand) {
        let mut state = self.state.lock();
        state.runs_on_resume |= state.command == VcpuCommand::Run;
        if state.command != VcpuCommand::Exit {
            state.command = command;
        }
        self.bring_out(&state);
        self.changed.notify_all();
    }

    /// There is no thread: the next one waits for its first command.
    pub(super) fn reset(&self) {
        let mut state = self.state.lock();
        state.command = VcpuCommand::Park;
        state.runs_on_resume = false;
    }

    /// The machine is closed: the vCPU can no longer be looked into, and its descriptor is closed,
    /// at once or when its thread is done with it.
    pub(crate) fn close(&self) {
        let vcpu = {
            let mut state = self.state.lock();
            state.is_closed = true;
            self.changed.notify_all();
            state.vcpu.take()
        };
        drop(vcpu);
    }

    /// Whether its thread is to end.
    pub(crate) fn is_leaving(&self) -> bool {
        self.state.lock().command == VcpuCommand::Exit
    }

    /// Whether there is nothing to wait for: a vCPU that was lost in a panic is at rest for ever.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.state.lock().is_at_rest()
    }

    /// How often the vCPU has come to rest by now.
    pub(crate) fn rests(&self) -> u64 {
        self.state.lock().rests
    }

    /// How often it has come to rest or left by now, for [`Self::wait_for_rest`].
    pub(crate) fn transitions(&self) -> u64 {
        self.state.lock().transitions
    }

    /// Wait until the vCPU is at rest, or has been since it was counted: another thread may have
    /// sent it off again.
    pub(crate) fn wait_for_rest(&self, counted: u64) {
        let mut state = self.state.lock();
        while !state.is_at_rest() && state.transitions == counted {
            self.changed.wait(&mut state);
        }
    }

    /// The thread's side: a vCPU to run, or none when the thread is to end.
    pub(super) fn next(&self) -> Option<Vcpu> {
        let mut state = self.state.lock();
        loop {
            match state.command {
                VcpuCommand::Exit => return None,
                VcpuCommand::Run if state.vcpu.is_some() => {
                    state.runner = Some(this_thread());
                    return state.vcpu.take();
                }
                VcpuCommand::Run | VcpuCommand::Park => self.changed.wait(&mut state),
            }
        }
    }

    /// The vCPU comes to rest. `by_itself`: it stays there until the next run, even if the machine
    /// is paused and resumed meanwhile.
    pub(super) fn put_back(&self, vcpu: Vcpu, by_itself: bool) {
        let mut state = self.state.lock();
        if state.command == VcpuCommand::Run {
            state.command = VcpuCommand::Park;
            state.runs_on_resume = true;
        }
        state.runs_on_resume &= !by_itself;
        self.rest(&mut state, vcpu);
    }

    pub(super) fn rest(&self, state: &mut HandleState, mut vcpu: Vcpu) {
        state.rests += 1;
        state.transitions += 1;
        state.runner = None;
        vcpu.rests = state.rests;
        state.vcpu = Some(vcpu);
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

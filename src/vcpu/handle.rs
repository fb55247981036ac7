//! `VcpuHandle`: what everybody but the thread that runs a vCPU has of it. The vCPU lies in here
//! while it is at rest; its thread takes it out to run it. Kicks and pauses are here, its own
//! thread's side is in `own_thread.rs`, waiting for it in `rest.rs`, looking into it in
//! `host_access.rs`, and running it by hand in `by_hand.rs`.

use std::ptr::NonNull;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::kick::{StopWord, interrupt};
use super::run_page::RunPage;
use super::signal::SignalMask;
use super::vcpu::{Place, Vcpu};
use crate::devices::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
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
    /// The vCPU's own thread, which outlives the run.
    pub(super) thread: Option<OwnThread>,
    /// How many such threads there have been.
    pub(super) threads: u64,
    /// The signal mask of the thread that has started the run, until the own thread has taken it.
    pub(super) mask: Option<SignalMask>,
    /// Between the start of a run and its end the own thread stays, however long the vCPU rests.
    pub(super) is_in_run: bool,
    /// The loop of the thread in `run_here`, which runs the vCPU in place of one of its own.
    pub(super) here: Option<Arc<EventManager>>,
    /// That thread's vCPU, while it calls the program's code.
    pub(super) host_access: Option<HostAccess>,
    /// The thread that has it.
    pub(super) runner: Option<libc::pthread_t>,
    /// That thread is in `run_once`.
    pub(super) is_in_run_once: bool,
    /// The device that this thread waits for.
    pub(super) waits_for: Option<Arc<dyn Device>>,
    /// It was lost in a panic on the thread.
    pub(super) is_lost: bool,
    pub(super) command: VcpuCommand,
    /// A kick for `run_once` that has not ended one yet.
    pub(super) is_kicked: bool,
    /// How often the vCPU has come to rest.
    pub(super) rests: u64,
    /// How often it has come to rest or left: if the count has changed since somebody asked it to
    /// stop, it was at rest in between.
    pub(super) transitions: u64,
    /// It was running when it was stopped, and [`VcpuHandle::resume`] sends it off again.
    pub(super) runs_on_resume: bool,
    /// Its machine is closed.
    pub(super) is_closed: bool,
    /// Its own thread completes what the last exit has left, and reports what that came to.
    pub(super) is_completing: bool,
    /// The thread that had it reports why it rests, which may call the program's exit handler.
    pub(super) is_reporting: bool,
}

/// The thread that runs a vCPU for its machine.
#[derive(Debug)]
pub(super) struct OwnThread {
    pub(super) thread: JoinHandle<()>,
    /// Tells it from one that it has replaced.
    pub(super) number: u64,
    pub(super) stack_size: usize,
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
    /// Complete what its last exit has left, and rest.
    Complete,
    /// Leave it there and end.
    Exit,
}

pub(super) fn closed() -> Error {
    Error::closed("machine")
}

impl HandleState {
    /// There is nothing to wait for: it is out of its guest, and does not go back by itself.
    pub(super) fn is_at_rest(&self) -> bool {
        let is_held = self.host_access.is_some() && self.is_held();
        self.vcpu.is_some() || is_held || self.is_lost || self.is_closed
    }

    /// A thread has it, and brings it to rest without another command. One that was lost in a panic
    /// is not waited for.
    pub(super) fn is_leaving(&self) -> bool {
        let is_out = self.vcpu.is_none() || self.is_completing;
        is_out && self.is_held() && !self.is_lost && !self.is_closed
    }

    /// Whether nothing is left of its last exit: it is not on its way to rest, and why it rests is
    /// reported.
    pub(super) fn is_settled(&self) -> bool {
        !self.is_leaving() && !self.is_reporting
    }

    pub(super) fn belongs_to(&self, number: u64) -> bool {
        self.thread.as_ref().is_some_and(|own| own.number == number)
    }

    /// The own thread has nothing to wait for.
    pub(super) fn is_idle(&self, number: u64) -> bool {
        self.command == VcpuCommand::Park && !self.is_in_run && self.belongs_to(number)
    }

    /// A run begins, with the vCPU kept at rest until it is sent off. Somebody waits for an exit
    /// that is to be completed: that command stays until the vCPU is sent off, which completes it
    /// too. `here` is the loop of a thread that runs it in place of one of its own.
    fn begin_run(&mut self, here: Option<Arc<EventManager>>) {
        if self.command != VcpuCommand::Complete {
            self.command = VcpuCommand::Park;
        }
        self.runs_on_resume = false;
        (self.is_in_run, self.here) = (true, here);
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
            thread: None,
            threads: 0,
            mask: None,
            is_in_run: false,
            here: None,
            host_access: None,
            runner: None,
            is_in_run_once: false,
            waits_for: None,
            is_lost: false,
            command: VcpuCommand::Park,
            is_kicked: false,
            rests: 0,
            transitions: 0,
            runs_on_resume: false,
            is_closed: false,
            is_completing: false,
            is_reporting: false,
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

    /// A run begins, on a thread of the vCPU's own or `here`. The vCPU may still be in a callback,
    /// or complete an exit for a snapshot.
    ///
    /// # Errors
    /// [`ErrorKind::State`] while a thread is in `run_once`.
    pub(super) fn begin(
        &self,
        here: Option<Arc<EventManager>>,
    ) -> Result<MutexGuard<'_, HandleState, rank::Vcpu>> {
        let mut state = self.state.lock();
        if state.is_in_run_once {
            return Err(self.running());
        }
        state.begin_run(here);
        Ok(state)
    }

    pub(super) fn running(&self) -> Error {
        let at = Place(self.id).to_string();
        Error::new(ErrorKind::State, at, "its guest is running").hint("pause the machine first")
    }

    /// # Errors
    /// In a forked child: the run page is shared with its parent.
    pub(crate) fn check_process(&self) -> Result<()> {
        self.process_tag.check("vCPU")
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

    /// Bring the vCPU out of the guest and keep it out. Returns before it is out.
    pub(crate) fn pause(&self) {
        self.stop_with(VcpuCommand::Park);
    }

    /// Bring the vCPU out of the guest and have its thread end. Returns before it has.
    pub(crate) fn leave(&self) {
        self.stop_with(VcpuCommand::Exit);
    }

    /// Bring the vCPU out of its guest and give its thread another command, in place of one that it
    /// has not followed yet. The command to end stays.
    pub(super) fn stop_with(&self, command: VcpuCommand) {
        let mut state = self.state.lock();
        state.runs_on_resume |= state.command == VcpuCommand::Run;
        let comes_first = match state.command {
            VcpuCommand::Exit => true,
            VcpuCommand::Complete => command == VcpuCommand::Park,
            VcpuCommand::Park | VcpuCommand::Run => false,
        };
        if !comes_first {
            state.command = command;
        }
        self.bring_out(&state);
        self.changed.notify_all();
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

    pub(super) fn rest(&self, state: &mut HandleState, mut vcpu: Vcpu) {
        state.rests += 1;
        state.transitions += 1;
        state.runner = None;
        vcpu.rests = state.rests;
        state.vcpu = Some(vcpu);
        self.changed.notify_all();
    }
}

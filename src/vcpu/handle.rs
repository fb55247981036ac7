//! `VcpuHandle`: the access of all other threads to a vCPU. It holds the vCPU at rest; the vCPU's
//! thread takes it out to run it. Kicks and pauses are here. `own_thread.rs` has the side of the
//! vCPU's own thread, `rest.rs` waits for a vCPU, `host_access.rs` reads and changes one at rest,
//! and `run_once.rs` runs one on the calling thread.

use std::ptr::NonNull;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::kick::{StopWord, interrupt};
use super::run_page::RunPage;
use super::signal::SignalMask;
use super::vcpu::{Vcpu, VcpuName};
use crate::devices::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
use crate::process::ProcessTag;
use crate::sync::{Condvar, Mutex, MutexGuard, rank};

/// A vCPU, either at rest in here or taken by the thread that runs it.
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
    /// `None` while a thread has it.
    pub(super) vcpu: Option<Vcpu>,
    /// The vCPU's own thread, which outlives the run.
    pub(super) thread: Option<OwnThread>,
    /// How many such threads have been started.
    pub(super) threads: u64,
    /// The signal mask of the thread that started the run, until the own thread has adopted it.
    pub(super) mask: Option<SignalMask>,
    /// Between the start and the end of a run, the own thread does not end when it is idle.
    pub(super) is_in_run: bool,
    /// The event loop of the thread in `run_here`, which replaces the vCPU's own thread.
    pub(super) here: Option<Arc<EventManager>>,
    /// Access to the vCPU of that thread while it is in a callback.
    pub(super) host_access: Option<HostAccess>,
    /// The thread that has the vCPU.
    pub(super) runner: Option<libc::pthread_t>,
    /// Whether that thread is in `run_once`.
    pub(super) is_in_run_once: bool,
    /// The device that this thread waits for.
    pub(super) waits_for: Option<Arc<dyn Device>>,
    /// Whether the vCPU was lost in a panic on its thread.
    pub(super) is_lost: bool,
    pub(super) command: VcpuCommand,
    /// A kick for `run_once` that has not ended one yet.
    pub(super) is_kicked: bool,
    /// How often the vCPU has come to rest.
    pub(super) rests: u64,
    /// How often it has come to rest or left. If the count has changed since a request to stop, the
    /// vCPU was at rest in between.
    pub(super) transitions: u64,
    /// Whether [`VcpuHandle::resume`] makes it enter its guest: it was running when it was stopped.
    pub(super) runs_on_resume: bool,
    /// Whether its machine is closed.
    pub(super) is_closed: bool,
    /// Whether its own thread is completing the last exit and reporting the outcome.
    pub(super) is_completing: bool,
    /// Whether the thread that had it is reporting why it rests, which may call an exit handler in
    /// Python.
    pub(super) is_reporting: bool,
}

/// The thread that runs a vCPU for its machine.
#[derive(Debug)]
pub(super) struct OwnThread {
    pub(super) thread: JoinHandle<()>,
    /// Distinguishes it from a thread that it has replaced.
    pub(super) number: u64,
    pub(super) stack_size: usize,
}

/// The vCPU of a thread in a callback.
#[derive(Debug)]
pub(super) struct HostAccess(pub(super) NonNull<Vcpu>);

// SAFETY: a vCPU may be used from any thread, one at a time: here under the lock of the handle's
// state.
unsafe impl Send for HostAccess {}

/// What the vCPU's own thread does with the vCPU at rest.
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
    /// Whether it is at rest: out of its guest, and it does not enter again without a command.
    pub(super) fn is_at_rest(&self) -> bool {
        let is_held = self.host_access.is_some() && self.is_held();
        self.vcpu.is_some() || is_held || self.is_lost || self.is_closed
    }

    /// Whether a thread has it and brings it to rest without another command. False for a vCPU that
    /// was lost in a panic.
    pub(super) fn is_leaving(&self) -> bool {
        let is_out = self.vcpu.is_none() || self.is_completing;
        is_out && self.is_held() && !self.is_lost && !self.is_closed
    }

    /// Whether its last exit is finished: it is not leaving its guest, and why it rests has been
    /// reported.
    pub(super) fn is_settled(&self) -> bool {
        !self.is_leaving() && !self.is_reporting
    }

    pub(super) fn belongs_to(&self, number: u64) -> bool {
        self.thread.as_ref().is_some_and(|own| own.number == number)
    }

    /// Whether the own thread has nothing to do.
    pub(super) fn is_idle(&self, number: u64) -> bool {
        self.command == VcpuCommand::Park && !self.is_in_run && self.belongs_to(number)
    }

    /// Begin a run, with the vCPU at rest until [`VcpuHandle::run`]. A pending command to complete
    /// its last exit stays, because another thread waits for it; entering the guest completes the
    /// exit too. `here` is the event loop of a thread that replaces the own thread.
    fn begin_run(&mut self, here: Option<Arc<EventManager>>) {
        if self.command != VcpuCommand::Complete {
            self.command = VcpuCommand::Park;
        }
        self.runs_on_resume = false;
        (self.is_in_run, self.here) = (true, here);
    }

    /// Whether its thread has no command to enter the guest. With such a command the vCPU counts as
    /// running, even before the thread has taken it.
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

    /// Begin a run, on the vCPU's own thread or `here`. The vCPU may still be in a callback, or
    /// completing an exit for a snapshot.
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
        let at = VcpuName(self.id).to_string();
        Error::new(ErrorKind::State, at, "its guest is running").hint("pause the machine first")
    }

    /// # Errors
    /// In a forked child: its parent shares the run page.
    pub(crate) fn check_process(&self) -> Result<()> {
        self.process_tag.check("vCPU")
    }

    /// Have a running vCPU come to rest after the exit that is being answered, until it is stopped
    /// and resumed.
    #[cfg(test)]
    pub(crate) fn park(&self) {
        self.bring_out(&self.state.lock());
    }

    /// Points 1 to 3 of the kick.
    pub(super) fn bring_out(&self, state: &HandleState) {
        self.stop.kick(&*self.page, || {
            // In a callback the thread needs no signal: it checks the stop word before it enters
            // its guest again. With many pauses, signals would queue up there and delay the thread,
            // which may hold the GIL.
            let runner = state.runner.filter(|_| state.host_access.is_none());
            // The runner needs this lock before it can end.
            if let Some(thread) = runner {
                // SAFETY: the thread removes itself from the state before it ends, and this holds
                // the state's lock.
                unsafe { interrupt(thread) };
            }
        });
        state.waits_for.iter().for_each(|device| device.wake());
    }

    /// Before an entry: if the last access found its device full, wait until the device has room.
    /// Returns false if the vCPU is called out first; it waits again before the next entry then.
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

    /// Bring the vCPU out of its guest and keep it out. Returns before it is out.
    pub(crate) fn pause(&self) {
        self.stop_with(VcpuCommand::Park);
    }

    /// Bring the vCPU out of its guest and end its thread. Returns before the thread has ended.
    pub(crate) fn leave(&self) {
        self.stop_with(VcpuCommand::Exit);
    }

    /// Bring the vCPU out of its guest and give its thread a command, which replaces a pending one.
    /// The command to end is never replaced.
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

    /// Close the vCPU: it can no longer be accessed. Its descriptor is closed, at once or when its
    /// thread returns it.
    pub(crate) fn close(&self) {
        let vcpu = {
            let mut state = self.state.lock();
            state.is_closed = true;
            self.changed.notify_all();
            state.vcpu.take()
        };
        drop(vcpu);
    }

    /// Whether it is at rest. A vCPU that was lost in a panic is.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.state.lock().is_at_rest()
    }

    /// How often the vCPU has come to rest by now.
    pub(crate) fn rests(&self) -> u64 {
        self.state.lock().rests
    }

    /// How often it has come to rest or left by now. [`Self::wait_for_rest`] takes this number.
    pub(crate) fn transitions(&self) -> u64 {
        self.state.lock().transitions
    }

    /// The vCPU comes to rest. If the machine has been closed meanwhile, that closes its
    /// descriptor.
    pub(super) fn rest(&self, mut state: MutexGuard<'_, HandleState, rank::Vcpu>, mut vcpu: Vcpu) {
        state.rests += 1;
        state.transitions += 1;
        state.runner = None;
        vcpu.rests = state.rests;
        let last = if state.is_closed { Some(vcpu) } else { state.vcpu.replace(vcpu) };
        self.changed.notify_all();
        drop(state);
        // Without the lock: it may hold the last reference to a device of the program's.
        drop(last);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::config::{Boot, Code, FlatBoot, VmmConfig};
    use crate::cpu::CpuMode;
    use crate::devices::Access;
    use crate::exit_handler::{Outcome, WrappedExitHandler};
    use crate::vm::KvmVm;
    use crate::vmm::Vmm;

    /// Closes its machine in a write.
    #[derive(Debug)]
    struct Closes(Arc<KvmVm<WrappedExitHandler>>);

    impl Device for Closes {
        fn read(&self, _offset: u64, _data: &mut [u8]) -> Outcome {
            Outcome::Continue
        }
        fn write(&self, _offset: u64, _data: &[u8]) -> Outcome {
            self.0.close();
            Outcome::Stop
        }
        fn may_block(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_vcpu_whose_callback_closes_the_machine_is_released_when_it_returns() {
        if crate::kvm::open_kvm().is_err() {
            return;
        }
        let code = Code::Bytes(vec![0xe6, 0x80]); // out 0x80, al
        let mode = CpuMode::Protected32;
        let boot = Boot::Flat(FlatBoot { code, address: 0x1000, entry: None, mode });
        let mut config = VmmConfig { boot, ..VmmConfig::default() };
        config.memory.size_mib = 1;
        let vmm = Vmm::try_from(config).unwrap();
        let handle = vmm.vcpus().unwrap().remove(0);
        // One in here, the other in the vCPU.
        assert_eq!(Arc::strong_count(&handle.page), 2);
        vmm.add_device(Access::Pio, 0x80, 1, Arc::new(Closes(vmm.vm().unwrap()))).unwrap();
        let turn = |until| vmm.event_manager()?.run_until(until, None).map(drop);
        vmm.run(Some(Duration::from_secs(60)), turn).unwrap();
        let give_up = Instant::now() + Duration::from_secs(60);
        while Arc::strong_count(&handle.page) > 1 {
            assert!(Instant::now() < give_up, "its descriptor is kept");
            std::thread::yield_now();
        }
    }
}

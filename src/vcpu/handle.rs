//! `VcpuHandle`: the access of all other threads to a vCPU. It holds the vCPU at rest; the vCPU's
//! thread takes it out to run it. Kicks and pauses are here. `commands.rs` has the commands to the
//! vCPU's own thread, `own_thread.rs` the side of that thread, `rest.rs` waits for a vCPU,
//! `host_access.rs` reads and changes one at rest, and `run_once.rs` runs one on the caller's
//! thread.

use std::ptr::NonNull;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::commands::{Commands, VcpuCommand};
use super::kick::{StopWord, interrupt};
use super::run_page::RunPage;
use super::signal::SignalMask;
use super::thread_id::ThreadId;
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
    /// The vCPU at rest, and the command to its own thread.
    pub(super) commands: Commands<Vcpu>,
    /// That thread, if `commands` has one.
    pub(super) thread: Option<OwnThread>,
    /// The signal mask of the thread that started the run, until the own thread has adopted it.
    pub(super) mask: Option<SignalMask>,
    /// The event loop of the thread in `run_here`, which replaces the vCPU's own thread.
    pub(super) here: Option<Arc<EventManager>>,
    /// Access to the vCPU of that thread while it is in a callback.
    pub(super) host_access: Option<HostAccess>,
    /// The thread that has the vCPU.
    pub(super) runner: Option<ThreadId>,
    /// Whether that thread is in `run_once`.
    pub(super) is_in_run_once: bool,
    /// The device that this thread waits for.
    pub(super) waits_for: Option<Arc<dyn Device>>,
    /// A kick for `run_once` that has not ended one yet.
    pub(super) is_kicked: bool,
    /// How often the vCPU has come to rest.
    pub(super) rests: u64,
}

/// The thread that runs a vCPU for its machine.
#[derive(Debug)]
pub(super) struct OwnThread {
    pub(super) thread: JoinHandle<()>,
    pub(super) stack_size: usize,
}

/// The vCPU of a thread in a callback.
#[derive(Debug)]
pub(super) struct HostAccess(pub(super) NonNull<Vcpu>);

// SAFETY: a vCPU may be used from any thread, one at a time: here under the lock of the handle's
// state.
unsafe impl Send for HostAccess {}

pub(super) fn closed() -> Error {
    Error::closed("machine")
}

impl HandleState {
    /// Whether another thread, which is not in a callback, is about to put it to rest.
    pub(super) fn comes_to_rest(&self) -> bool {
        self.commands.vcpu.is_none()
            && self.host_access.is_none()
            && !self.is_in_run_once
            && self.commands.is_leaving()
            && self.runner != Some(ThreadId::current())
    }

    /// Whether it is at rest: out of its guest, and it does not enter again without a command.
    pub(super) fn is_at_rest(&self) -> bool {
        self.commands.is_at_rest(self.host_access.is_some())
    }
}

impl VcpuHandle {
    pub(super) fn new(id: u64, page: Arc<RunPage>, vcpu: Vcpu) -> Self {
        let state = HandleState {
            commands: Commands::new(vcpu),
            thread: None,
            mask: None,
            here: None,
            host_access: None,
            runner: None,
            is_in_run_once: false,
            waits_for: None,
            is_kicked: false,
            rests: 0,
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
        state.commands.begin_run();
        state.here = here;
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
        state.commands.stop(command);
        self.bring_out(&state);
        self.changed.notify_all();
    }

    /// Close the vCPU: it can no longer be accessed. Its descriptor is closed, at once or when its
    /// thread returns it.
    pub(crate) fn close(&self) {
        let vcpu = {
            let mut state = self.state.lock();
            state.commands.is_closed = true;
            self.changed.notify_all();
            state.commands.vcpu.take()
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
        self.state.lock().commands.transitions
    }

    /// The vCPU comes to rest. If the machine has been closed meanwhile, that closes its
    /// descriptor.
    pub(super) fn rest(&self, mut state: MutexGuard<'_, HandleState, rank::Vcpu>, mut vcpu: Vcpu) {
        state.rests += 1;
        state.runner = None;
        vcpu.rests = state.rests;
        let last = state.commands.rest(vcpu);
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
        let turn = |next| vmm.event_manager()?.run_until(next, None).map(drop);
        vmm.run(Some(Duration::from_secs(60)), turn).unwrap();
        let give_up = Instant::now() + Duration::from_secs(60);
        while Arc::strong_count(&handle.page) > 1 {
            assert!(Instant::now() < give_up, "its descriptor is kept");
            std::thread::yield_now();
        }
    }
}

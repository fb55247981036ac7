//! A vCPU and the thread that runs it, `vcpu_{id}`. Whatever happens on that thread, it ends by kicking the
//! exit handler and notifying `VmRunState::Exiting`, unless it was the host that stopped it.

use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use parking_lot::Mutex;

use super::kick::{StopWord, block_other_signals};
use super::run::{Step, step};
use super::run_page::RunPage;
use super::state::{RunState, VmRunState};
use crate::devices::Buses;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::{Exit, ExitHandler, ExitReason};

/// One virtual processor.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) id: u64,
    pub(crate) fd: VcpuFd,
    pub(crate) page: Arc<RunPage>,
}

/// What the vCPUs of one machine share.
#[derive(Debug)]
pub(crate) struct Shared<EH> {
    pub(crate) buses: Arc<Buses>,
    pub(crate) exit_handler: EH,
    pub(crate) run_state: RunState,
    /// How the guest ended: the first vCPU to say so.
    pub(crate) exit: Mutex<Option<Exit>>,
}

impl<EH: ExitHandler> Shared<EH> {
    /// A vCPU's guest has ended, or the vCPU failed.
    fn vcpu_ended(&self, exit: Exit) {
        self.exit.lock().get_or_insert(exit);
        // Its failure leaves nothing to tell: the state below is what the loop looks at next.
        let _ = self.exit_handler.kick();
        let _ = self.run_state.set_and_notify(VmRunState::Exiting);
    }
}

/// A vCPU as its machine holds it: at rest, or on its thread.
#[derive(Debug)]
pub(crate) struct Handle {
    id: u64,
    page: Arc<RunPage>,
    stop: Arc<StopWord>,
    /// Empty while the thread has it; for ever empty after a panic there.
    vcpu: Arc<Mutex<Option<Vcpu>>>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    pub(crate) fn new(id: u64, fd: VcpuFd) -> Result<Self> {
        let page = Arc::new(RunPage::new(&fd)?);
        let vcpu = Vcpu { id, fd, page: Arc::clone(&page) };
        Ok(Self {
            id,
            page,
            stop: Arc::default(),
            vcpu: Arc::new(Mutex::new(Some(vcpu))),
            thread: None,
        })
    }

    /// Start the thread, and `prepare` the vCPU while it comes up. When that fails the thread ends at once.
    pub(crate) fn start<EH>(
        &mut self,
        shared: &Arc<Shared<EH>>,
        prepare: impl FnOnce(&mut Vcpu) -> Result<()>,
    ) -> Result<()>
    where
        EH: ExitHandler + Send + Sync + 'static,
    {
        self.stop.clear(&self.page);
        // The thread waits for this lock before it takes the vCPU.
        let mut slot = self.vcpu.lock();
        let Some(vcpu) = slot.as_mut() else {
            let detail = "its thread has panicked";
            return Err(Error::new(ErrorKind::State, format!("vcpu_{}", self.id), detail));
        };
        self.thread = Some(self.spawn(Arc::clone(shared))?);
        prepare(vcpu).inspect_err(|_| self.stop.kick(&self.page, || None))
    }

    fn spawn<EH>(&self, shared: Arc<Shared<EH>>) -> Result<JoinHandle<()>>
    where
        EH: ExitHandler + Send + Sync + 'static,
    {
        let (slot, stop) = (Arc::clone(&self.vcpu), Arc::clone(&self.stop));
        let name = format!("vcpu_{}", self.id);
        let run = move || {
            block_other_signals();
            run_to_end(&slot, &stop, &shared);
        };
        std::thread::Builder::new()
            .name(name.clone())
            .spawn(run)
            .map_err(|e| Error::os(ErrorKind::Kvm, name, &e))
    }

    /// Bring the vCPU out of the guest. Returns before it is out.
    pub(crate) fn kick(&self) {
        self.stop.kick(&self.page, || self.thread.as_ref().filter(|_| !self.is_at_rest()));
    }

    /// Whether the thread has not taken the vCPU yet, or has put it back.
    fn is_at_rest(&self) -> bool {
        self.vcpu.try_lock().is_some_and(|slot| slot.is_some())
    }

    /// Wait until the thread is gone.
    pub(crate) fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic there has been told by its guard.
            let _ = thread.join();
        }
    }

    /// Forget the thread: in a forked child it does not exist.
    pub(crate) fn forget_thread(&mut self) {
        std::mem::forget(self.thread.take());
    }
}

/// The vCPU's thread: turn until the guest ends or the host stops it.
fn run_to_end<EH: ExitHandler>(slot: &Mutex<Option<Vcpu>>, stop: &StopWord, shared: &Shared<EH>) {
    let Some(mut vcpu) = slot.lock().take() else {
        return;
    };
    let id = vcpu.id;
    let guard = PanicGuard { id, shared };
    let exit = turn_until_end(&mut vcpu, stop, &shared.buses);
    std::mem::forget(guard);
    *slot.lock() = Some(vcpu);
    if let Some(exit) = exit {
        shared.vcpu_ended(Exit { vcpu: Some(id), ..exit });
    }
}

fn turn_until_end(vcpu: &mut Vcpu, stop: &StopWord, buses: &Buses) -> Option<Exit> {
    while !stop.is_set() {
        match step(vcpu, buses) {
            Step::Continue | Step::Interrupted => {}
            Step::End(exit) => return Some(exit),
        }
    }
    None
}

/// A panic on a vCPU's thread is a fault of ours, but the run ends all the same.
struct PanicGuard<'a, EH: ExitHandler> {
    id: u64,
    shared: &'a Shared<EH>,
}

impl<EH: ExitHandler> Drop for PanicGuard<'_, EH> {
    fn drop(&mut self) {
        let fault = Some("a panic on the vCPU's thread: please report it".to_owned());
        self.shared.vcpu_ended(Exit {
            vcpu: Some(self.id),
            fault,
            ..Exit::new(ExitReason::VcpuError)
        });
    }
}

//! A vCPU and the thread that runs it, `vcpu_{id}`. Whatever happens on that thread, it ends by
//! kicking the exit handler and setting `VmRunState::Exiting`, unless the host has stopped it.

use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

use super::current::set_current;
use super::handle::{VcpuCommand, VcpuHandle};
use super::router::ExitRouter;
use super::run::{complete_pending_io, step};
use super::run_page::RunPage;
use super::signal::{kick_signal, unblock_kicks};
use super::stack;
use super::state::{RunState, VmRunState};
use super::vcpu::Vcpu;
use crate::error::Result;
use crate::exit_handler::{Exit, ExitHandler, ExitReason, Outcome};
use crate::hop::hop;
use crate::memory::GuestMemory;
use crate::sync::{Mutex, rank};

/// How many accesses of a repeated instruction a stop completes at most.
const MOST_STEPS_AT_STOP: usize = 1024;

/// What the vCPUs of one machine share.
#[derive(Debug)]
pub(crate) struct Shared<EH> {
    pub(crate) exit_handler: EH,
    pub(crate) run_state: RunState,
    /// How the guest ended, by the first vCPU that ended.
    pub(crate) exit: Mutex<Option<Exit>, rank::GuestExit>,
}

impl<EH> Shared<EH> {
    /// Identifies its machine for as long as one of its threads lives.
    pub(crate) fn id(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

impl<EH: ExitHandler> Shared<EH> {
    /// A vCPU's guest has ended, or the vCPU failed.
    pub(crate) fn vcpu_ended(&self, exit: Exit) {
        self.exit.lock().get_or_insert(exit);
        // A failure needs no report: the loop checks the state below next.
        let _ = self.exit_handler.kick();
        let _ = self.run_state.set_and_notify(VmRunState::Exiting);
    }
}

/// A vCPU as its machine holds it: its handle, and the thread of the run in progress.
#[derive(Debug)]
pub(crate) struct VcpuThread {
    handle: Arc<VcpuHandle>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    pub(crate) fn new(
        id: u64,
        fd: VcpuFd,
        router: Arc<ExitRouter>,
        memory: GuestMemory,
    ) -> Result<Self> {
        let page = Arc::new(RunPage::new(&fd)?);
        let vcpu = Vcpu::new(id, fd, Arc::clone(&page), router, memory);
        Ok(Self { handle: Arc::new(VcpuHandle::new(id, page, vcpu)), thread: None })
    }

    pub(crate) fn handle(&self) -> &Arc<VcpuHandle> {
        &self.handle
    }

    pub(crate) fn has_thread(&self) -> bool {
        self.thread.is_some()
    }

    /// Start the thread, and `prepare` the vCPU while it comes up. When that fails the vCPU stays
    /// at rest, as it does for as long as `is_held` says so.
    pub(crate) fn start<EH>(
        &mut self,
        shared: &Arc<Shared<EH>>,
        is_held: bool,
        prepare: impl FnOnce(&mut Vcpu) -> Result<()>,
    ) -> Result<()>
    where
        EH: ExitHandler + Send + Sync + 'static,
    {
        self.handle.reset();
        self.thread = Some(self.spawn(Arc::clone(shared))?);
        self.handle.with_vcpu(prepare)?;
        if is_held {
            self.handle.run_on_resume();
        } else {
            self.handle.run();
        }
        Ok(())
    }

    fn spawn<EH>(&self, shared: Arc<Shared<EH>>) -> Result<JoinHandle<()>>
    where
        EH: ExitHandler + Send + Sync + 'static,
    {
        let handle = Arc::clone(&self.handle);
        let name = format!("vcpu_{}", handle.id());
        kick_signal()?; // without one nothing could bring the guest out
        let run = move || {
            // Cannot fail: the signal was there when the thread was made.
            let _ = unblock_kicks();
            set_current(&handle, shared.id());
            serve(&handle, &shared);
        };
        stack::spawn(name, run)
    }

    /// Bring the vCPU out of the guest and keep it out. Returns before it is out.
    pub(crate) fn pause(&self) {
        self.handle.stop_with(VcpuCommand::Park);
    }

    /// Enter the guest again, from rest.
    pub(crate) fn resume(&self) {
        self.handle.resume();
    }

    /// Have the thread end. Returns before it has.
    pub(crate) fn leave(&self) {
        self.handle.stop_with(VcpuCommand::Exit);
    }

    /// A thread that is to end and was not joined, because the command came from one of the
    /// machine's own threads.
    pub(crate) fn take_ending(&mut self) -> Option<JoinHandle<()>> {
        if self.handle.is_leaving() { self.take_thread() } else { None }
    }

    /// The thread, to be joined; in a forked child it does not exist and is to be forgotten.
    pub(crate) fn take_thread(&mut self) -> Option<JoinHandle<()>> {
        self.thread.take()
    }
}

/// The vCPU's thread: follow the commands of its handle until the one to end.
fn serve<EH: ExitHandler>(handle: &VcpuHandle, shared: &Shared<EH>) {
    hop!();
    while let Some(mut vcpu) = handle.next() {
        let guard = PanicGuard { handle, shared };
        vcpu.notify_of_pause();
        let end = turn_until_end(&mut vcpu, handle);
        std::mem::forget(guard);
        handle.put_back(vcpu, matches!(end, Outcome::Stop | Outcome::End(_)));
        match end {
            Outcome::End(exit) => shared.vcpu_ended(Exit { vcpu: Some(handle.id()), ..exit }),
            // A failure needs no report: the loop finds what stopped it within a turn.
            Outcome::Stop => drop(shared.exit_handler.kick()),
            Outcome::Continue | Outcome::Wait => {}
        }
    }
}

/// Until the guest ends, a device or a hook ends the run, or the stop word is set.
fn turn_until_end(vcpu: &mut Vcpu, handle: &VcpuHandle) -> Outcome {
    let mut last = Outcome::Continue;
    while !handle.stop.is_set() {
        if !handle.wait_for_room(vcpu) {
            continue; // called out: the stop word is set
        }
        last = step(vcpu, handle);
        match last {
            Outcome::Continue | Outcome::Wait => {}
            Outcome::Stop => break,
            Outcome::End(_) => return last,
        }
    }
    // Whoever looks into it is to see the registers after the instruction.
    match complete_pending_io(vcpu, handle, MOST_STEPS_AT_STOP) {
        Outcome::Continue | Outcome::Wait => last,
        end => end,
    }
}

/// Ends the run if the vCPU's thread panics, which is a bug of pyvmm.
struct PanicGuard<'a, EH: ExitHandler> {
    handle: &'a VcpuHandle,
    shared: &'a Shared<EH>,
}

impl<EH: ExitHandler> Drop for PanicGuard<'_, EH> {
    fn drop(&mut self) {
        let fault = Some("a panic on the vCPU's thread: please report it".to_owned());
        self.handle.mark_lost();
        self.shared.vcpu_ended(Exit {
            vcpu: Some(self.handle.id()),
            fault,
            ..Exit::new(ExitReason::VcpuError)
        });
    }
}

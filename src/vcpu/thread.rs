//! A vCPU and the thread that runs it, `vcpu_{id}`. Whatever happens on that thread, it ends by
//! kicking the exit handler and notifying `VmRunState::Exiting`, unless it was the host that
//! stopped it.

use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

use super::cell::{Cell, Order, set_current};
use super::dispatch::Dispatch;
use super::registers::Vcpu;
use super::run::{settle, step};
use super::run_page::RunPage;
use super::signal::{kick_signal, unblock_kicks};
use super::stack;
use super::state::{RunState, VmRunState};
use crate::error::Result;
use crate::exit_handler::{Exit, ExitHandler, ExitReason, Outcome};
use crate::memory::GuestMemory;
use crate::sync::{Mutex, rank};

/// How many accesses of a repeated instruction a stop completes at most.
const SETTLE_STEPS: usize = 1024;

/// What the vCPUs of one machine share.
#[derive(Debug)]
pub(crate) struct Shared<EH> {
    pub(crate) exit_handler: EH,
    pub(crate) run_state: RunState,
    /// How the guest ended: the first vCPU to say so.
    pub(crate) exit: Mutex<Option<Exit>, rank::GuestExit>,
}

impl<EH> Shared<EH> {
    /// Tells its machine from every other for as long as one of its threads lives.
    pub(crate) fn id(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

impl<EH: ExitHandler> Shared<EH> {
    /// A vCPU's guest has ended, or the vCPU failed.
    pub(crate) fn vcpu_ended(&self, exit: Exit) {
        self.exit.lock().get_or_insert(exit);
        // Its failure leaves nothing to tell: the state below is what the loop looks at next.
        let _ = self.exit_handler.kick();
        let _ = self.run_state.set_and_notify(VmRunState::Exiting);
    }
}

/// A vCPU as its machine holds it: the vCPU, and the thread of the run in progress.
#[derive(Debug)]
pub(crate) struct Handle {
    cell: Arc<Cell>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    pub(crate) fn new(
        id: u64,
        fd: VcpuFd,
        dispatch: Arc<Dispatch>,
        memory: GuestMemory,
    ) -> Result<Self> {
        let page = Arc::new(RunPage::new(&fd)?);
        let vcpu = Vcpu::new(id, fd, Arc::clone(&page), dispatch, memory);
        Ok(Self { cell: Arc::new(Cell::new(id, page, vcpu)), thread: None })
    }

    pub(crate) fn cell(&self) -> &Arc<Cell> {
        &self.cell
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
        self.cell.reset();
        self.thread = Some(self.spawn(Arc::clone(shared))?);
        self.cell.with_vcpu(prepare)?;
        if is_held {
            self.cell.go_when_let_go();
        } else {
            self.cell.go();
        }
        Ok(())
    }

    fn spawn<EH>(&self, shared: Arc<Shared<EH>>) -> Result<JoinHandle<()>>
    where
        EH: ExitHandler + Send + Sync + 'static,
    {
        let cell = Arc::clone(&self.cell);
        let name = format!("vcpu_{}", cell.id());
        kick_signal()?; // without one nothing could bring the guest out
        let run = move || {
            // Nothing to say where it fails: the signal was there when the thread was made.
            let _ = unblock_kicks();
            set_current(&cell, shared.id());
            serve(&cell, &shared);
        };
        stack::spawn(name, run)
    }

    /// Bring the vCPU out of the guest and keep it out. Returns before it is out.
    pub(crate) fn pause(&self) {
        self.cell.hold(Order::Rest);
    }

    /// Enter the guest again, from rest.
    pub(crate) fn resume(&self) {
        self.cell.let_go();
    }

    /// Have the thread end. Returns before it has.
    pub(crate) fn leave(&self) {
        self.cell.hold(Order::Leave);
    }

    /// A thread that has been told to end and was not joined, because a thread of the machine's own
    /// told it.
    pub(crate) fn take_ending(&mut self) -> Option<JoinHandle<()>> {
        if self.cell.is_leaving() { self.take_thread() } else { None }
    }

    /// The thread, to be joined; in a forked child it does not exist and is to be forgotten.
    pub(crate) fn take_thread(&mut self) -> Option<JoinHandle<()>> {
        self.thread.take()
    }
}

/// The vCPU's thread: enter the guest whenever it is told to, until it is told to end.
fn serve<EH: ExitHandler>(cell: &Cell, shared: &Shared<EH>) {
    while let Some(mut vcpu) = cell.next() {
        let guard = PanicGuard { cell, shared };
        vcpu.tell_of_pause();
        let end = turn_until_end(&mut vcpu, cell);
        std::mem::forget(guard);
        cell.put_back(vcpu, matches!(end, Outcome::Stop | Outcome::End(_)));
        match end {
            Outcome::End(exit) => shared.vcpu_ended(Exit { vcpu: Some(cell.id()), ..exit }),
            // Its failure leaves nothing to tell: the loop looks at what stopped it within a turn.
            Outcome::Stop => drop(shared.exit_handler.kick()),
            Outcome::Continue | Outcome::Wait => {}
        }
    }
}

/// Until the guest ends, a device or a hook ends the run, or the stop word is set.
fn turn_until_end(vcpu: &mut Vcpu, cell: &Cell) -> Outcome {
    let mut last = Outcome::Continue;
    while !cell.stop.is_set() {
        if !cell.wait_for_room(vcpu) {
            continue; // called out: the stop word is set
        }
        last = step(vcpu, cell);
        match last {
            Outcome::Continue | Outcome::Wait => {}
            Outcome::Stop => break,
            Outcome::End(_) => return last,
        }
    }
    // Looked into, it shall show the registers after the instruction.
    match settle(vcpu, cell, SETTLE_STEPS) {
        Outcome::Continue | Outcome::Wait => last,
        end => end,
    }
}

/// A panic on a vCPU's thread is a fault of ours, but the run ends all the same.
struct PanicGuard<'a, EH: ExitHandler> {
    cell: &'a Cell,
    shared: &'a Shared<EH>,
}

impl<EH: ExitHandler> Drop for PanicGuard<'_, EH> {
    fn drop(&mut self) {
        let fault = Some("a panic on the vCPU's thread: please report it".to_owned());
        self.cell.give_up();
        self.shared.vcpu_ended(Exit {
            vcpu: Some(self.cell.id()),
            fault,
            ..Exit::new(ExitReason::VcpuError)
        });
    }
}

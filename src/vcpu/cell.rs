//! A vCPU between the thread that runs it and whoever looks into it, pauses it or drives it by
//! hand.

use std::cell::RefCell;
use std::ptr::NonNull;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::exit::{VcpuExit, run_once};
use super::kick::{StopWord, interrupt, this_thread};
use super::registers::Vcpu;
use super::run::settle_for_good;
use super::run_page::RunPage;
use super::signal::unblock_kicks;
use crate::devices::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::Outcome;
use crate::process::Birthplace;
use crate::sync::{Condvar, MappedMutexGuard, Mutex, MutexGuard, rank};

/// A vCPU, at rest here or out with the thread that runs it.
#[derive(Debug)]
pub struct Cell {
    id: u64,
    page: Arc<RunPage>,
    pub(super) stop: StopWord,
    slot: Mutex<Slot, rank::Vcpu>,
    changed: Condvar,
    birthplace: Birthplace,
}

#[derive(Debug)]
struct Slot {
    /// Empty while a thread has it.
    vcpu: Option<Vcpu>,
    /// Where that thread has it, while it waits for the program's code.
    lent: Option<Lent>,
    /// The thread that has it.
    runner: Option<libc::pthread_t>,
    /// The device whose room that thread waits for.
    waits_for: Option<Arc<dyn Device>>,
    /// A panic on the thread took it along.
    is_lost: bool,
    order: Order,
    /// A kick for `run_once` that none has seen.
    is_kicked: bool,
    /// How often the vCPU has come to rest.
    rests: u64,
    /// How often it has come to rest, or has been sent off from there: a count that has gone up
    /// since somebody asked it to stop says that it was at rest meanwhile.
    stays: u64,
    /// It was on its way when it was held, and goes on when it is let go.
    goes_on: bool,
    /// Its machine is closed.
    is_closed: bool,
}

#[derive(Debug)]
struct Lent(NonNull<Vcpu>);

// SAFETY: a vCPU may be used from any thread, one at a time: here under the slot's lock.
unsafe impl Send for Lent {}

thread_local! {
    /// The vCPU whose thread this is.
    static CURRENT: RefCell<Weak<Cell>> = RefCell::default();
    /// The machine that this thread runs a vCPU of: what `Shared::id` says of it.
    static MACHINE: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Whether this thread runs a vCPU of that machine: it is in one of its callbacks then.
pub(crate) fn is_thread_of(machine: usize) -> bool {
    // Fails when the thread's own values are gone: then it runs no callback any more.
    MACHINE.try_with(|current| current.get() == machine).unwrap_or(false)
}

/// The vCPU whose exit is answered on this thread.
#[must_use]
pub fn current() -> Option<Arc<Cell>> {
    CURRENT.with_borrow(Weak::upgrade)
}

/// This thread is the vCPU's from here on.
pub(super) fn set_current(cell: &Arc<Cell>, machine: usize) {
    CURRENT.set(Arc::downgrade(cell));
    MACHINE.set(machine);
}

/// What its own thread is to do with a vCPU at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Leave it there.
    Rest,
    /// Enter its guest.
    Go,
    /// Leave it there and end.
    Leave,
}

fn closed() -> Error {
    Error::new(ErrorKind::State, "vcpu", "the machine is closed")
}

impl Slot {
    /// Nobody has to wait for it: it is out of its guest, and will not go back by itself.
    fn is_at_rest(&self) -> bool {
        let is_held = self.lent.is_some() && self.order != Order::Go;
        self.vcpu.is_some() || is_held || self.is_lost || self.is_closed
    }
}

impl Cell {
    pub(super) fn new(id: u64, page: Arc<RunPage>, vcpu: Vcpu) -> Self {
        let slot = Slot {
            vcpu: Some(vcpu),
            lent: None,
            runner: None,
            waits_for: None,
            is_lost: false,
            order: Order::Rest,
            is_kicked: false,
            rests: 0,
            stays: 0,
            goes_on: false,
            is_closed: false,
        };
        let (stop, changed) = (StopWord::default(), Condvar::new());
        Self {
            id,
            page,
            stop,
            slot: Mutex::numbered(id, slot),
            changed,
            birthplace: Birthplace::here(),
        }
    }

    /// The vCPU's number.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Look into the vCPU, which stays at rest meanwhile. On its own thread that is possible while
    /// it is lent.
    ///
    /// # Errors
    /// [`ErrorKind::State`] while its guest runs, and in a forked child; what `look` returns.
    pub fn with_vcpu<T>(&self, look: impl FnOnce(&mut Vcpu) -> Result<T>) -> Result<T> {
        self.check_process()?;
        self.look_in(&mut self.slot.lock(), look)
    }

    /// [`Self::with_vcpu`] for a thread that must not wait for longer than this.
    ///
    /// # Errors
    /// Gives `look` back when another thread looks into the vCPU for that long.
    pub fn try_with_vcpu<T, F>(&self, limit: Duration, look: F) -> std::result::Result<Result<T>, F>
    where
        F: FnOnce(&mut Vcpu) -> Result<T>,
    {
        // In a forked child the lock may be held by a thread that is not there.
        if let Err(error) = self.check_process() {
            return Ok(Err(error));
        }
        let slot =
            if limit.is_zero() { self.slot.try_lock() } else { self.slot.try_lock_for(limit) };
        match slot {
            Some(mut slot) => Ok(self.look_in(&mut slot, look)),
            None => Err(look),
        }
    }

    fn look_in<T>(&self, slot: &mut Slot, look: impl FnOnce(&mut Vcpu) -> Result<T>) -> Result<T> {
        let is_held = slot.order != Order::Go;
        let is_own = slot.runner == Some(this_thread());
        if slot.is_closed {
            return Err(closed());
        }
        match slot {
            // One that has been sent off is running, even if its thread has not come for it yet.
            Slot { vcpu: Some(vcpu), .. } if is_held => look(vcpu),
            Slot { lent: Some(Lent(vcpu)), .. } if is_held || is_own => {
                // SAFETY: the thread that lent it waits in `lend`, which takes it back under the
                // lock that we hold.
                look(unsafe { vcpu.as_mut() })
            }
            _ => Err(self.running()),
        }
    }

    /// The vCPU, which stays at rest for as long as this is held.
    ///
    /// # Errors
    /// [`ErrorKind::State`] while its guest runs or its exit is answered, and in a forked child.
    pub(crate) fn at_rest(&self) -> Result<MappedMutexGuard<'_, Vcpu, rank::Vcpu>> {
        self.birthplace.check("vCPU")?;
        let slot = self.slot.lock();
        let is_held = slot.order != Order::Go;
        MutexGuard::try_map(slot, |slot| slot.vcpu.as_mut().filter(|_| is_held))
            .ok_or_else(|| self.running())
    }

    /// Bring a vCPU that is on its way to rest there, and complete for good what its last exit
    /// began: with all that a repeated instruction does before it can be left. What that came to,
    /// which nobody has been told.
    ///
    /// # Errors
    /// [`ErrorKind::State`] while its guest runs, or when this thread is the one that answers its
    /// exit; when it reads and nobody has answered.
    pub(crate) fn settle(&self) -> Result<Outcome> {
        let mut vcpu = {
            let mut slot = self.rested()?;
            let is_held = slot.order != Order::Go;
            let vcpu = slot.vcpu.as_mut().filter(|_| is_held).ok_or_else(|| self.running())?;
            vcpu.check_answered()?;
            match slot.vcpu.take_if(|vcpu| vcpu.has_pending_access()) {
                Some(vcpu) => {
                    slot.runner = Some(this_thread());
                    vcpu
                }
                None => return Ok(Outcome::Continue),
            }
        };
        let step = settle_for_good(&mut vcpu, self);
        self.put_back(vcpu, matches!(step, Outcome::Stop | Outcome::End(_)));
        Ok(step)
    }

    /// Wait for a vCPU that is on its way to rest.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when this thread is the one that answers its exit.
    pub(crate) fn wait_while_leaving(&self) -> Result<()> {
        self.rested().map(drop)
    }

    fn rested(&self) -> Result<MutexGuard<'_, Slot, rank::Vcpu>> {
        self.birthplace.check("vCPU")?;
        let mut slot = self.slot.lock();
        while slot.vcpu.is_none() && slot.order != Order::Go && !slot.is_lost && !slot.is_closed {
            if slot.runner == Some(this_thread()) {
                let (at, detail) = (format!("vcpu_{}", self.id), "its exit is not answered yet");
                let error = Error::new(ErrorKind::State, at, detail);
                return Err(error.hint("let the callback return first"));
            }
            self.changed.wait(&mut slot);
        }
        if slot.is_closed { Err(closed()) } else { Ok(slot) }
    }

    /// Call the program's code from the thread that runs the vCPU. Meanwhile that code may look
    /// into the vCPU, and who pauses the machine finds it at rest, from where it does not go back
    /// to its guest.
    pub(super) fn lend<T>(&self, vcpu: &mut Vcpu, call: impl FnOnce() -> T) -> T {
        struct TakeBack<'a>(&'a Cell, NonNull<Vcpu>);
        impl Drop for TakeBack<'_> {
            fn drop(&mut self) {
                self.0.slot.lock().lent = None;
                // SAFETY: the vCPU of our caller, which nobody else can reach any more.
                unsafe { self.1.as_mut() }.is_lent = false;
            }
        }
        vcpu.is_lent = true;
        let vcpu = NonNull::from(vcpu);
        let _take_back = TakeBack(self, vcpu);
        {
            let mut slot = self.slot.lock();
            slot.lent = Some(Lent(vcpu));
            self.changed.notify_all();
        }
        call()
    }

    fn running(&self) -> Error {
        let at = format!("vcpu_{}", self.id);
        Error::new(ErrorKind::State, at, "its guest is running").hint("pause the machine first")
    }

    /// Enter the guest on this thread and come back with its next exit, which nobody has answered,
    /// or because of [`Self::kick`]; none for a signal to this thread that is the program's.
    ///
    /// # Errors
    /// [`ErrorKind::State`] while its guest runs already, or when there is no signal for kicks;
    /// what KVM_RUN fails with.
    pub fn run_once(&self) -> Result<Option<VcpuExit>> {
        self.check_process()?;
        unblock_kicks()?;
        let mut vcpu = {
            let mut slot = self.slot.lock();
            if std::mem::take(&mut slot.is_kicked) {
                return Ok(Some(VcpuExit::Interrupted));
            }
            if slot.is_closed {
                return Err(closed());
            }
            let is_sent_off = slot.order == Order::Go;
            let vcpu = slot.vcpu.take_if(|_| !is_sent_off).ok_or_else(|| self.running())?;
            self.stop.clear(&*self.page); // Kick, point 7.
            slot.runner = Some(this_thread());
            vcpu
        };
        let exit = run_once(&mut vcpu, &self.stop);
        let mut slot = self.slot.lock();
        if matches!(exit, Ok(Some(VcpuExit::Interrupted))) {
            slot.is_kicked = false;
        }
        self.rest(&mut slot, vcpu);
        exit
    }

    /// Bring `run_once` back, the one in progress or the next. From any thread.
    pub fn kick(&self) {
        let mut slot = self.slot.lock();
        slot.is_kicked = true;
        // One that a thread of its own runs is no business of `run_once`, and would stay at rest.
        if slot.order != Order::Go {
            self.bring_out(&slot);
        }
    }

    /// Have a vCPU that its thread runs come to rest behind the exit that is answered now, until
    /// somebody holds it and lets it go.
    #[cfg(test)]
    pub(crate) fn park(&self) {
        self.bring_out(&self.slot.lock());
    }

    /// Points 1 to 3 of the kick.
    fn bring_out(&self, slot: &Slot) {
        self.stop.kick(&*self.page, || {
            // The runner needs this lock before it can end.
            if let Some(thread) = slot.runner {
                // SAFETY: the thread takes itself out of the slot before it ends, and we hold the
                // slot's lock.
                unsafe { interrupt(thread) };
            }
        });
        slot.waits_for.iter().for_each(|device| device.wake());
    }

    /// Before the guest is entered: wait for the room that its last access has left none of. False
    /// when the vCPU is called out first; then it waits again the next time.
    pub(super) fn wait_for_room(&self, vcpu: &mut Vcpu) -> bool {
        let Some(device) = vcpu.waits_for.take() else { return true };
        self.slot.lock().waits_for = Some(Arc::clone(&device));
        let has_room = device.wait_for_room(&|| self.stop.is_set());
        self.slot.lock().waits_for = None;
        if !has_room {
            vcpu.waits_for = Some(device);
        }
        has_room
    }

    /// Have the thread enter the guest, at once or when it comes up. One that is to end stays away.
    pub(super) fn go(&self) {
        let mut slot = self.slot.lock();
        if slot.order == Order::Leave {
            return;
        }
        self.stop.clear(&*self.page); // Kick, point 7.
        slot.order = Order::Go;
        slot.goes_on = false;
        slot.stays += 1;
        self.changed.notify_all();
    }

    /// Have a vCPU that [`Self::hold`] has brought to rest enter its guest again. One that rested
    /// before goes on resting.
    pub(super) fn let_go(&self) {
        let goes_on = self.slot.lock().goes_on;
        if goes_on {
            self.go();
        }
    }

    /// Have the vCPU enter its guest when it is let go.
    pub(super) fn go_when_let_go(&self) {
        self.slot.lock().goes_on = true;
    }

    /// Bring the vCPU out of the guest and take back an order that the thread has not followed yet.
    pub(super) fn hold(&self, order: Order) {
        let mut slot = self.slot.lock();
        slot.goes_on |= slot.order == Order::Go;
        if slot.order != Order::Leave {
            slot.order = order;
        }
        self.bring_out(&slot);
        self.changed.notify_all();
    }

    /// There is no thread: the next one waits for its first order.
    pub(super) fn reset(&self) {
        let mut slot = self.slot.lock();
        slot.order = Order::Rest;
        slot.goes_on = false;
    }

    /// The machine is closed: nobody looks into the vCPU any more, and its descriptor goes, at once
    /// or when its thread is done with it.
    pub(crate) fn close(&self) {
        let vcpu = {
            let mut slot = self.slot.lock();
            slot.is_closed = true;
            self.changed.notify_all();
            slot.vcpu.take()
        };
        drop(vcpu);
    }

    /// Whether its thread is to end.
    pub(crate) fn is_leaving(&self) -> bool {
        self.slot.lock().order == Order::Leave
    }

    /// Whether nobody has to wait for it: a vCPU that a panic took along rests for ever.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.slot.lock().is_at_rest()
    }

    /// How often the vCPU has come to rest by now.
    pub(crate) fn rests(&self) -> u64 {
        self.slot.lock().rests
    }

    /// # Errors
    /// In a forked child: the run page is shared with its parent.
    pub(crate) fn check_process(&self) -> Result<()> {
        self.birthplace.check("vCPU")
    }

    /// How often it has been at rest by now, for [`Self::wait_for_rest`].
    pub(crate) fn stays(&self) -> u64 {
        self.slot.lock().stays
    }

    /// Wait until the vCPU is at rest, or has been since it was counted: somebody may have sent it
    /// off again.
    pub(crate) fn wait_for_rest(&self, counted: u64) {
        let mut slot = self.slot.lock();
        while !slot.is_at_rest() && slot.stays == counted {
            self.changed.wait(&mut slot);
        }
    }

    /// The thread's side: a vCPU to run, or none when it is to end.
    pub(super) fn next(&self) -> Option<Vcpu> {
        let mut slot = self.slot.lock();
        loop {
            match slot.order {
                Order::Leave => return None,
                Order::Go if slot.vcpu.is_some() => {
                    slot.runner = Some(this_thread());
                    return slot.vcpu.take();
                }
                Order::Go | Order::Rest => self.changed.wait(&mut slot),
            }
        }
    }

    /// The vCPU comes to rest. `by_itself`: it stays there until the next run, whoever pauses and
    /// resumes meanwhile.
    pub(super) fn put_back(&self, vcpu: Vcpu, by_itself: bool) {
        let mut slot = self.slot.lock();
        if slot.order == Order::Go {
            slot.order = Order::Rest;
            slot.goes_on = true;
        }
        slot.goes_on &= !by_itself;
        self.rest(&mut slot, vcpu);
    }

    fn rest(&self, slot: &mut Slot, mut vcpu: Vcpu) {
        slot.rests += 1;
        slot.stays += 1;
        slot.runner = None;
        vcpu.rests = slot.rests;
        slot.vcpu = Some(vcpu);
        self.changed.notify_all();
    }

    /// The vCPU is lost with its thread.
    pub(super) fn give_up(&self) {
        let mut slot = self.slot.lock();
        slot.is_lost = true;
        slot.runner = None;
        self.changed.notify_all();
    }
}

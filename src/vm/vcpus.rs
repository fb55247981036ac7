//! The vCPUs of one machine and their threads: started, paused, resumed and stopped together.

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::error::{Error, ErrorKind, Result};
use crate::sync::{MappedMutexGuard, Mutex, MutexGuard, assert_unlocked, rank};
use crate::vcpu::{Cell, Handle, Vcpu};

/// All vCPUs of a machine. The lock orders those who start and stop them; a vCPU's own thread never needs it to get out of
/// its guest, and nobody waits for a thread with it held.
#[derive(Debug, Default)]
pub(super) struct Vcpus(Mutex<List, rank::Vcpus>);

#[derive(Debug, Default)]
struct List {
    handles: Vec<Handle>,
    /// How many callers of `stop` wait for threads to end.
    stopping: usize,
}

/// A vCPU that somebody waits for, and how often it had come to rest before.
type Awaited = (Arc<Cell>, u64);

fn awaited(handle: &Handle) -> Awaited {
    (Arc::clone(handle.cell()), handle.cell().rests())
}

fn join(thread: JoinHandle<()>) {
    assert_unlocked("the end of a vCPU's thread is waited for");
    // A panic there has been told by its guard.
    let _ = thread.join();
}

fn wait_for(vcpus: &[Awaited]) {
    vcpus.iter().for_each(|(cell, counted)| cell.wait_for_rest(*counted));
}

impl Vcpus {
    pub(super) fn new(handles: Vec<Handle>) -> Self {
        Self(Mutex::new(List { handles, stopping: 0 }))
    }

    pub(super) fn cells(&self) -> Vec<Arc<Cell>> {
        self.0.lock().handles.iter().map(|handle| Arc::clone(handle.cell())).collect()
    }

    /// Add the vCPU that `make` makes.
    pub(super) fn add(&self, make: impl FnOnce() -> Result<Handle>) -> Result<Arc<Cell>> {
        let mut list = self.0.lock();
        let handle = make()?;
        let cell = Arc::clone(handle.cell());
        list.handles.push(handle);
        Ok(cell)
    }

    /// `start` each, once `enter` has found that they may be, given whether they have threads. Nobody else starts, pauses or
    /// resumes them meanwhile.
    pub(super) fn start(
        &self,
        enter: impl FnOnce(bool) -> Result<()>,
        start: impl FnMut(&mut Handle) -> Result<()>,
    ) -> Result<()> {
        let mut list = self.0.lock();
        if list.stopping > 0 {
            let detail = "the machine is being shut down";
            return Err(Error::new(ErrorKind::State, "run", detail));
        }
        // Shut down from a callback of its own, a thread has not been waited for.
        let ending: Vec<_> = list.handles.iter_mut().filter_map(Handle::take_ending).collect();
        MutexGuard::unlocked(&mut list, || ending.into_iter().for_each(join));
        enter(list.handles.iter().any(Handle::has_thread))?;
        list.handles.iter_mut().try_for_each(start)
    }

    /// Bring them out of their guests, once `enter` allows it, and wait until each has been out.
    pub(super) fn pause(&self, enter: impl FnOnce() -> Result<()>) -> Result<()> {
        let all: Vec<Awaited> = {
            let list = self.0.lock();
            enter()?;
            let all = list.handles.iter().map(awaited).collect();
            list.handles.iter().for_each(Handle::pause);
            all
        };
        // Without the lock: a vCPU on its way out may be in a callback that needs it.
        wait_for(&all);
        Ok(())
    }

    /// Let them go on where they rest, once `enter` allows it, given whether each has its thread; nothing when they run.
    pub(super) fn resume(
        &self,
        is_running: impl Fn() -> bool,
        enter: impl FnOnce(bool) -> Result<()>,
    ) -> Result<()> {
        let mut list = self.0.lock();
        while !is_running() {
            // A pause from another thread may not have seen them at rest yet.
            let Some(handle) = list.handles.iter().find(|handle| !handle.cell().is_at_rest())
            else {
                enter(list.handles.iter().all(Handle::has_thread))?;
                list.handles.iter().for_each(Handle::resume);
                break;
            };
            let one = [awaited(handle)];
            MutexGuard::unlocked(&mut list, || wait_for(&one));
        }
        Ok(())
    }

    /// Do something to each, which nobody starts meanwhile.
    pub(super) fn each(&self, act: impl FnMut(&Handle) -> Result<()>) -> Result<()> {
        self.0.lock().handles.iter().try_for_each(act)
    }

    /// Hold all at rest for as long as `act` takes.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when one is running; what `act` returns.
    pub(super) fn at_rest<T>(
        &self,
        act: impl FnOnce(&mut [MappedMutexGuard<'_, Vcpu, rank::Vcpu>]) -> Result<T>,
    ) -> Result<T> {
        let list = self.0.lock();
        let held: Result<Vec<_>> = list.handles.iter().map(|h| h.cell().at_rest()).collect();
        act(&mut held?)
    }

    /// Bring them out of their guests, have their threads end, and wait for that. All are kicked before any is waited
    /// for: their ways out overlap.
    pub(super) fn stop(&self) {
        let (all, threads): (Vec<Awaited>, Vec<_>) = {
            let mut list = self.0.lock();
            list.stopping += 1;
            let all = list.handles.iter().map(awaited).collect();
            list.handles.iter().for_each(Handle::leave);
            let others = list.handles.iter_mut().filter(|handle| !handle.is_this_thread());
            (all, others.filter_map(Handle::take_thread).collect())
        };
        // One that is driven by hand has another thread.
        wait_for(&all);
        threads.into_iter().for_each(join);
        self.0.lock().stopping -= 1;
    }

    /// Whether this is the thread of one of them.
    pub(super) fn has_this_thread(&self) -> bool {
        self.0.lock().handles.iter().any(Handle::is_this_thread)
    }

    /// In a forked child the threads do not exist.
    pub(super) fn forget(&mut self) {
        let threads = self.0.get_mut().handles.iter_mut().filter_map(Handle::take_thread);
        threads.for_each(std::mem::forget);
    }
}

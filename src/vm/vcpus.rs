//! The vCPUs of one machine and their threads: started, held, let go and stopped together.

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::error::{Error, ErrorKind, Result};
use crate::hop::hop;
use crate::sync::{Condvar, MappedMutexGuard, Mutex, MutexGuard, assert_unlocked, rank};
use crate::vcpu::{Vcpu, VcpuHandle, VcpuThread, VmRunState, left};

/// All vCPUs of a machine. The lock orders those who start and stop them; a vCPU's own thread never
/// needs it to get out of its guest, and nobody waits for a thread with it held.
#[derive(Debug, Default)]
pub(super) struct Vcpus(Mutex<List, rank::Vcpus>, Condvar);

#[derive(Debug, Default)]
struct List {
    vcpus: Vec<VcpuThread>,
    /// How many callers of `stop` wait for threads to end.
    stopping: usize,
    /// How many hold the vCPUs at rest for a moment; who pauses the machine is told by its state.
    holds: usize,
    is_closed: bool,
}

/// A vCPU that somebody waits for, and how often it had been at rest before.
type Awaited = (Arc<VcpuHandle>, u64);

fn awaited(vcpu: &VcpuThread) -> Awaited {
    (Arc::clone(vcpu.handle()), vcpu.handle().transitions())
}

fn join(thread: JoinHandle<()>) {
    assert_unlocked("the end of a vCPU's thread is waited for");
    // A panic there has been told by its guard.
    let _ = thread.join();
}

fn wait_for(vcpus: &[Awaited]) {
    vcpus.iter().for_each(|(handle, counted)| handle.wait_for_rest(*counted));
}

impl List {
    fn check_open(&self, what: &str) -> Result<()> {
        match (self.is_closed, self.stopping) {
            (true, _) => Err(Error::closed("machine")),
            (false, 1..) => {
                Err(Error::new(ErrorKind::State, what, "the machine is being shut down"))
            }
            (false, 0) => Ok(()),
        }
    }
}

impl Vcpus {
    pub(super) fn new(vcpus: Vec<VcpuThread>) -> Self {
        Self(Mutex::new(List { vcpus, ..List::default() }), Condvar::new())
    }

    pub(super) fn handles(&self) -> Vec<Arc<VcpuHandle>> {
        self.0.lock().vcpus.iter().map(|vcpu| Arc::clone(vcpu.handle())).collect()
    }

    /// Add the vCPU that `make` makes.
    pub(super) fn add(&self, make: impl FnOnce() -> Result<VcpuThread>) -> Result<Arc<VcpuHandle>> {
        let mut list = self.0.lock();
        list.check_open("create_vcpu")?;
        let vcpu = make()?;
        let handle = Arc::clone(vcpu.handle());
        list.vcpus.push(vcpu);
        Ok(handle)
    }

    /// `start` each, once `enter` has found that they may be, given whether they have threads.
    /// `start` is told whether they are held. Nobody else starts, pauses or resumes them meanwhile.
    pub(super) fn start(
        &self,
        enter: impl FnOnce(bool) -> Result<()>,
        mut start: impl FnMut(&mut VcpuThread, bool) -> Result<()>,
    ) -> Result<()> {
        let mut list = self.0.lock();
        list.check_open("run")?;
        // Shut down from a callback of the machine's own, they have not been waited for.
        let ending: Vec<_> = list.vcpus.iter_mut().filter_map(VcpuThread::take_ending).collect();
        MutexGuard::unlocked(&mut list, || ending.into_iter().for_each(join));
        list.check_open("run")?;
        enter(list.vcpus.iter().any(VcpuThread::has_thread))?;
        let is_held = list.holds > 0;
        list.vcpus.iter_mut().try_for_each(|vcpu| start(vcpu, is_held))
    }

    /// Bring them out of their guests, once `enter` allows it, and wait until each has been out.
    pub(super) fn pause(&self, enter: impl FnOnce() -> Result<()>) -> Result<()> {
        let all: Vec<Awaited> = {
            let list = self.0.lock();
            enter()?;
            let all = list.vcpus.iter().map(awaited).collect();
            list.vcpus.iter().for_each(VcpuThread::pause);
            all
        };
        // Without the lock: a vCPU on its way out may be in a callback that needs it.
        wait_for(&all);
        Ok(())
    }

    /// Let those that a pause has stopped go on, unless somebody holds them: then they go on when
    /// that one lets go. `enter` says whether they may, given whether each has its thread, and that
    /// nothing is to be done where they run already.
    pub(super) fn resume(&self, mut enter: impl FnMut(bool, bool) -> Result<bool>) -> Result<()> {
        let mut list = self.0.lock();
        loop {
            let stays = |vcpu: &VcpuThread| vcpu.has_thread() && !vcpu.handle().is_leaving();
            let has_threads = list.vcpus.iter().all(stays);
            // A pause from another thread may not have seen them at rest yet.
            let late = list.vcpus.iter().find(|vcpu| !vcpu.handle().is_at_rest()).map(awaited);
            if !enter(has_threads, late.is_none())? {
                return Ok(());
            }
            let Some(late) = late else { break };
            MutexGuard::unlocked(&mut list, || wait_for(&[late]));
        }
        if list.holds == 0 {
            list.vcpus.iter().for_each(VcpuThread::resume);
        }
        Ok(())
    }

    /// Bring them out of their guests for as long as somebody needs that, and wait until each is
    /// out. A pause and a resume meanwhile count when the last hold ends.
    pub(super) fn hold(&self) -> Result<()> {
        hop!();
        let all: Vec<Awaited> = {
            let mut list = self.0.lock();
            if list.is_closed {
                return Err(Error::closed("machine"));
            }
            list.holds += 1;
            // One without a thread is at rest, or driven by hand.
            let threads = list.vcpus.iter().filter(|vcpu| vcpu.has_thread());
            let all: Vec<Awaited> = threads.clone().map(awaited).collect();
            threads.for_each(VcpuThread::pause);
            all
        };
        wait_for(&all);
        Ok(())
    }

    /// The end of a hold: the last one lets the vCPUs go, if the machine is running.
    pub(super) fn let_go(&self, state: impl FnOnce() -> VmRunState) {
        let mut list = self.0.lock();
        list.holds -= 1;
        if list.holds == 0 && list.stopping == 0 && state() == VmRunState::Running {
            list.vcpus.iter().filter(|vcpu| vcpu.has_thread()).for_each(VcpuThread::resume);
        }
    }

    /// Do something to each, which nobody starts meanwhile.
    pub(super) fn each(&self, act: impl FnMut(&VcpuThread) -> Result<()>) -> Result<()> {
        self.0.lock().vcpus.iter().try_for_each(act)
    }

    /// Keep all at rest for as long as `act` takes.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when one is running; what `act` returns.
    pub(super) fn at_rest<T>(
        &self,
        act: impl FnOnce(&mut [MappedMutexGuard<'_, Vcpu, rank::Vcpu>]) -> Result<T>,
    ) -> Result<T> {
        let list = self.0.lock();
        let held: Result<Vec<_>> = list.vcpus.iter().map(|h| h.handle().at_rest()).collect();
        act(&mut held?)
    }

    /// Bring them out of their guests, have their threads end, and wait for that. All are kicked
    /// before any is waited for: their ways out overlap. A thread of the machine's own (`is_own`)
    /// waits for none of them to end: two would wait for each other. `stopped` is called when the
    /// last caller is done, before anybody can start them again.
    pub(super) fn stop(&self, is_own: bool, stopped: impl FnOnce()) {
        let (all, threads): (Vec<Awaited>, Vec<_>) = {
            let mut list = self.0.lock();
            list.stopping += 1;
            let all = list.vcpus.iter().map(awaited).collect();
            list.vcpus.iter().for_each(VcpuThread::leave);
            let ends = list.vcpus.iter_mut().filter(|_| !is_own);
            (all, ends.filter_map(VcpuThread::take_thread).collect())
        };
        // One that is driven by hand has another thread. One in a callback of the program's is at
        // rest.
        wait_for(&all);
        threads.into_iter().for_each(join);
        let mut list = self.0.lock();
        list.stopping -= 1;
        if list.stopping == 0 {
            stopped();
        }
        self.1.notify_all();
        // Another caller may have taken the threads.
        while list.stopping > 0 && !is_own {
            self.1.wait(&mut list);
        }
    }

    /// Whether somebody has begun to stop them for good.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the binding"))]
    pub(super) fn are_closed(&self) -> bool {
        self.0.lock().is_closed
    }

    /// Whether `stop` would wait for a thread.
    pub(super) fn are_busy(&self) -> bool {
        let list = self.0.lock();
        let is_busy = |vcpu: &VcpuThread| vcpu.has_thread() || !vcpu.handle().is_at_rest();
        list.stopping > 0 || list.vcpus.iter().any(is_busy)
    }

    /// Stop them for good, and give back what they hold of KVM.
    pub(super) fn close(&self, is_own: bool, stopped: impl FnOnce()) {
        self.0.lock().is_closed = true;
        self.stop(is_own, stopped);
        self.handles().iter().for_each(|handle| handle.close());
    }

    /// The machine goes. A thread that was not joined is one of its own, in a callback, or knows of
    /// one.
    pub(super) fn leave(&mut self) {
        self.0.get_mut().vcpus.iter_mut().filter_map(VcpuThread::take_thread).for_each(left::leave);
    }

    /// In a forked child the threads do not exist.
    pub(super) fn forget(&mut self) {
        let threads = self.0.get_mut().vcpus.iter_mut().filter_map(VcpuThread::take_thread);
        threads.for_each(std::mem::forget);
    }
}

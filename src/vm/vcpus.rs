//! Starts, quiesces, resumes and stops all vCPUs of one machine together. Any thread.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crate::devices::QuiescedDevices;
use crate::error::{Error, ErrorKind, Result};
use crate::hop::hop;
use crate::limit::Limit;
use crate::sync::{Condvar, MappedMutexGuard, Mutex, MutexGuard, assert_unlocked, rank};
use crate::vcpu::{Vcpu, VcpuHandle, VcpuName, VmRunState, unjoined};

/// All vCPUs of a machine. The lock serializes starts and stops. A vCPU's own thread does not take
/// it to leave its guest, and no thread is waited for with it held.
#[derive(Debug, Default)]
pub(super) struct Vcpus(Mutex<List, rank::Vcpus>, Condvar);

#[derive(Debug, Default)]
struct List {
    vcpus: Vec<Arc<VcpuHandle>>,
    /// Between the start of a run and its end.
    is_in_run: bool,
    /// How many callers of `stop` and `close` wait for the vCPUs.
    stopping: usize,
    /// How many callers of `quiesce` keep the vCPUs at rest. A pause is in the machine's state.
    quiesced: usize,
    /// How many callers of `pause` have made or found the machine paused since it last ran.
    pauses: usize,
    /// Counts the times that all pauses have ended: by a resume, a start or the end of a run.
    epoch: PauseEpoch,
    /// The devices that the pause has quiesced.
    paused_devices: Option<QuiescedDevices>,
    is_closed: bool,
}

/// Tells a pause from one that came after a resume, a start or the end of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PauseEpoch(u64);

/// A vCPU to wait for, and its count of transitions before the wait.
type Awaited = (Arc<VcpuHandle>, u64);

/// vCPUs that are leaving their guests. A vCPU in a callback has left its guest.
#[derive(Debug)]
pub(super) struct LeavingVcpus(Vec<Awaited>);

impl LeavingVcpus {
    /// Wait until each has left. No lock may be held: a vCPU may be in a callback that needs it.
    ///
    /// # Errors
    /// The error of `limit`, which ends the wait.
    pub(super) fn wait(self, limit: &Limit<'_>) -> Result<()> {
        self.0.iter().try_for_each(|(handle, counted)| {
            limit.wait(VcpuName(handle.id()), |until| handle.wait_for_rest(*counted, Some(until)))
        })
    }
}

fn awaited(vcpu: &Arc<VcpuHandle>) -> Awaited {
    (Arc::clone(vcpu), vcpu.transitions())
}

fn join(thread: JoinHandle<()>) {
    assert_unlocked("the end of a vCPU's thread is waited for");
    // Its guard has reported a panic.
    let _ = thread.join();
}

/// Wait until each has left its guest, microseconds after a kick. Does not wait for callbacks.
fn wait_for(vcpus: &[Awaited]) {
    vcpus.iter().for_each(|(handle, counted)| {
        handle.wait_for_rest(*counted, None);
    });
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

    /// See [`Vcpus::quiesce`].
    fn quiesce(&mut self, enter: impl FnOnce() -> Result<()>) -> Result<LeavingVcpus> {
        if self.is_closed {
            return Err(Error::closed("machine"));
        }
        enter()?;
        self.quiesced += 1;
        // Outside a run they are at rest, or `run_once` drives them.
        let running = self.vcpus.iter().filter(|_| self.is_in_run);
        let all = running.clone().map(awaited).collect();
        running.for_each(|vcpu| vcpu.pause());
        Ok(LeavingVcpus(all))
    }

    /// End all pauses. The caller resumes the returned devices with no lock held.
    fn end_pauses(&mut self) -> Option<QuiescedDevices> {
        self.pauses = 0;
        self.epoch.0 += 1;
        self.paused_devices.take()
    }

    /// Have the vCPUs that a pause or a quiesce stopped enter their guests, unless another hold
    /// remains.
    fn release(&self, state: VmRunState) {
        let is_running = self.is_in_run && self.stopping == 0 && state == VmRunState::Running;
        if is_running && self.quiesced == 0 && !self.is_closed {
            self.vcpus.iter().for_each(|vcpu| vcpu.resume());
        }
    }
}

impl Vcpus {
    pub(super) fn handles(&self) -> Vec<Arc<VcpuHandle>> {
        self.0.lock().vcpus.clone()
    }

    /// Add the vCPU that `make` returns.
    pub(super) fn add(
        &self,
        make: impl FnOnce() -> Result<Arc<VcpuHandle>>,
    ) -> Result<Arc<VcpuHandle>> {
        let mut list = self.0.lock();
        list.check_open("create_vcpu")?;
        let vcpu = make()?;
        list.vcpus.push(Arc::clone(&vcpu));
        Ok(vcpu)
    }

    /// Call `start` for each vCPU, if `enter` allows it. `enter` gets whether a run is in progress;
    /// `start` gets whether the vCPUs are held at rest. No other thread can start, pause or resume
    /// them during the call.
    pub(super) fn start(
        &self,
        enter: impl FnOnce(bool) -> Result<()>,
        mut start: impl FnMut(&Arc<VcpuHandle>, bool) -> Result<()>,
    ) -> Result<()> {
        let mut list = self.0.lock();
        list.check_open("run")?;
        enter(list.is_in_run)?;
        list.is_in_run = true;
        // Returns no devices: those of a pause in the last run were resumed at its end.
        list.end_pauses();
        let is_held = list.quiesced > 0;
        list.vcpus.iter().try_for_each(|vcpu| start(vcpu, is_held))
    }

    /// If `enter` allows it, bring the vCPUs out of their guests and hold them out until
    /// [`Self::release`]. Holds are counted. A pause or resume in between takes effect when the
    /// last hold is released. Returns before the vCPUs are out.
    pub(super) fn quiesce(&self, enter: impl FnOnce() -> Result<()>) -> Result<LeavingVcpus> {
        hop!();
        self.0.lock().quiesce(enter)
    }

    /// [`Self::quiesce`] for a pause, which outlasts the hold.
    pub(super) fn pause(
        &self,
        enter: impl FnOnce() -> Result<()>,
    ) -> Result<(LeavingVcpus, PauseEpoch)> {
        let mut list = self.0.lock();
        let leaving = list.quiesce(enter)?;
        list.pauses += 1;
        Ok((leaving, list.epoch))
    }

    /// Keep the devices that a pause has quiesced until it ends. Returns devices that the caller
    /// resumes with no lock held: those of an earlier pause, or these if the pause or the run has
    /// already ended.
    pub(super) fn keep_paused(
        &self,
        epoch: PauseEpoch,
        devices: QuiescedDevices,
        is_paused: impl FnOnce() -> bool,
    ) -> Option<QuiescedDevices> {
        let mut list = self.0.lock();
        if list.epoch == epoch && list.is_in_run && is_paused() {
            list.paused_devices.replace(devices)
        } else {
            Some(devices)
        }
    }

    /// The wait for a pause has failed: `undo` it, unless it has ended already or another caller
    /// has paused the machine too.
    pub(super) fn undo_pause(&self, epoch: PauseEpoch, undo: impl FnOnce()) {
        let mut list = self.0.lock();
        if list.epoch != epoch {
            return;
        }
        list.pauses = list.pauses.saturating_sub(1);
        if list.pauses == 0 && list.stopping == 0 {
            undo();
            list.release(VmRunState::Running);
        }
    }

    /// Undo a [`Self::quiesce`]. If this was the last hold and the machine runs, the vCPUs enter
    /// their guests.
    pub(super) fn release(&self, state: impl FnOnce() -> VmRunState) {
        let mut list = self.0.lock();
        list.quiesced -= 1;
        list.release(state());
    }

    /// Continue the vCPUs that a pause has stopped, unless they are held at rest. `enter` gets
    /// whether a run is in progress and whether all vCPUs are at rest; it fails if they may not
    /// continue, and returns false if they run already. Returns the devices that the pause has
    /// quiesced.
    pub(super) fn resume(
        &self,
        mut enter: impl FnMut(bool, bool) -> Result<bool>,
    ) -> Result<Option<QuiescedDevices>> {
        let mut list = self.0.lock();
        loop {
            let stays = list.is_in_run && list.stopping == 0;
            // A pause from another thread may still be waiting for them to come to rest.
            let late = list.vcpus.iter().find(|vcpu| !vcpu.is_at_rest()).map(awaited);
            if !enter(stays, late.is_none())? {
                return Ok(None);
            }
            let Some(late) = late else { break };
            MutexGuard::unlocked(&mut list, || wait_for(&[late]));
        }
        let devices = list.end_pauses();
        list.release(VmRunState::Running);
        Ok(devices)
    }

    /// Call `act` for each vCPU. None can be started during the call.
    pub(super) fn each(&self, act: impl FnMut(&Arc<VcpuHandle>) -> Result<()>) -> Result<()> {
        self.0.lock().vcpus.iter().try_for_each(act)
    }

    /// Keep all vCPUs at rest during `act`. First waits for vCPUs that are completing an exit for
    /// another thread.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if a vCPU is running; the error of `limit`, which ends the wait; the
    /// error of `act`.
    pub(super) fn at_rest<T>(
        &self,
        limit: &Limit<'_>,
        act: impl FnOnce(&mut [MappedMutexGuard<'_, Vcpu, rank::Vcpu>]) -> Result<T>,
    ) -> Result<T> {
        loop {
            let all = {
                let list = self.0.lock();
                let held: Result<Vec<_>> = list.vcpus.iter().map(|vcpu| vcpu.at_rest()).collect();
                match held {
                    Ok(mut held) => return act(&mut held),
                    Err(_) if list.vcpus.iter().all(|vcpu| vcpu.stays_out()) => list.vcpus.clone(),
                    Err(error) => return Err(error),
                }
            };
            all.iter().try_for_each(|vcpu| vcpu.wait_while_leaving(limit))?;
        }
    }

    /// End the run: bring the vCPUs out of their guests; they rest until the next run. Does not
    /// wait for callbacks in progress. The last concurrent caller calls `stopped`, before the vCPUs
    /// can be started again, and gets the devices that a pause has quiesced. The other callers wait
    /// for the last one as long as `limit` allows.
    pub(super) fn stop(
        &self,
        is_own: bool,
        limit: &Limit<'_>,
        stopped: impl FnOnce(),
    ) -> (Option<QuiescedDevices>, Result<()>) {
        let end_run = |vcpu: &VcpuHandle| {
            vcpu.end_run();
            None
        };
        self.bring_down(is_own, limit, end_run, stopped)
    }

    /// See [`super::KvmVm::begin_close`].
    pub(super) fn begin_close(&self) {
        self.0.lock().is_closed = true;
    }

    /// End the run and the vCPUs' threads. If the caller is one of these threads (`is_own`), it
    /// does not wait for the others: two such callers would wait for each other. Returns the
    /// devices that [`Self::stop`] returns.
    pub(super) fn close(&self, is_own: bool, stopped: impl FnOnce()) -> Option<QuiescedDevices> {
        self.begin_close();
        let leave = |vcpu: &VcpuHandle| {
            vcpu.leave();
            if is_own { None } else { vcpu.take_thread() }
        };
        let (devices, _) = self.bring_down(is_own, &Limit::NONE, leave, stopped);
        self.handles().iter().for_each(|handle| handle.close());
        devices
    }

    /// Kick all vCPUs before waiting for any, so that they leave in parallel. Joins the threads
    /// that `order` returns.
    fn bring_down(
        &self,
        is_own: bool,
        limit: &Limit<'_>,
        mut order: impl FnMut(&VcpuHandle) -> Option<JoinHandle<()>>,
        stopped: impl FnOnce(),
    ) -> (Option<QuiescedDevices>, Result<()>) {
        let (all, threads): (Vec<Awaited>, Vec<_>) = {
            let mut list = self.0.lock();
            list.stopping += 1;
            let all = list.vcpus.iter().map(awaited).collect();
            (all, list.vcpus.iter().filter_map(|vcpu| order(vcpu)).collect())
        };
        // A vCPU in a callback counts as at rest. `run_once` runs a vCPU on a thread that is not
        // joined here.
        wait_for(&all);
        threads.into_iter().for_each(join);
        let mut list = self.0.lock();
        list.stopping -= 1;
        let mut devices = None;
        if list.stopping == 0 {
            list.is_in_run = false;
            devices = list.end_pauses();
            stopped();
        }
        self.1.notify_all();
        drop(list);
        // Another caller may have taken the threads.
        let ended = match is_own {
            true => Ok(()),
            false => limit.wait("machine", |until| self.are_down(until)),
        };
        (devices, ended)
    }

    /// Wait until this time at most for all callers of `stop` and `close` to be done. Whether they
    /// are.
    fn are_down(&self, until: Instant) -> bool {
        let mut list = self.0.lock();
        while list.stopping > 0 {
            if self.1.wait_until(&mut list, until) {
                return list.stopping == 0;
            }
        }
        true
    }

    /// Wait until the callbacks still in progress at the end of a run have returned.
    ///
    /// # Errors
    /// The error of `limit`, which ends the wait.
    pub(super) fn wait_for_callbacks(&self, limit: &Limit<'_>) -> Result<()> {
        self.handles().iter().try_for_each(|vcpu| vcpu.wait_for_callback(limit))
    }

    /// Whether a thread has begun to close them.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the binding"))]
    pub(super) fn are_closed(&self) -> bool {
        self.0.lock().is_closed
    }

    /// Whether `close` would wait for a guest or for a callback.
    pub(super) fn are_busy(&self) -> bool {
        let list = self.0.lock();
        list.stopping > 0 || list.vcpus.iter().any(|vcpu| vcpu.is_in_use())
    }

    /// The machine is dropped. A thread that was not joined is in a callback. The dropping thread
    /// is one of the machine's own, or must not wait for one.
    pub(super) fn leave(&mut self) {
        self.0
            .get_mut()
            .vcpus
            .iter()
            .filter_map(|vcpu| vcpu.take_thread())
            .for_each(unjoined::keep);
    }

    /// In a forked child: drop the threads, which do not exist there.
    pub(super) fn forget(&mut self) {
        let threads = self.0.get_mut().vcpus.iter().filter_map(|vcpu| vcpu.take_thread());
        threads.for_each(std::mem::forget);
    }
}

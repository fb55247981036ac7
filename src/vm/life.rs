//! The life of a `KvmVm`: run, resume, shutdown and close. Any thread.

use std::cell::Cell;
use std::sync::Arc;
#[cfg(feature = "python")]
use std::time::Duration;

use super::KvmVm;
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
use crate::exit_handler::{Exit, ExitHandler};
use crate::limit::Limit;
use crate::vcpu::{self, HereRun, Vcpu, VcpuHandle, VmRunState};

impl<EH: ExitHandler + Send + Sync + 'static> KvmVm<EH> {
    /// Run each vCPU on its own thread `vcpu_{id}`, which is started if it does not exist. With an
    /// address, the vCPUs start there, in the mode of the configuration. Otherwise they continue
    /// where they were stopped.
    ///
    /// When a guest ends, its vCPU kicks the exit handler and the state becomes `Exiting`.
    ///
    /// # Errors
    /// If the machine is running, has ended or is closed, or a thread cannot be started. In all
    /// cases no vCPU runs.
    pub fn run(&self, vcpu_run_addr: Option<u64>) -> Result<()> {
        self.start(|handle, is_held| {
            vcpu::start(handle, &self.shared, is_held, self.start_state(vcpu_run_addr))
        })?;
        self.set_prepared();
        Ok(())
    }

    /// [`Self::run`] for a machine with one vCPU, which the caller's thread runs from here on.
    ///
    /// # Errors
    /// As for [`Self::run`]; [`ErrorKind::State`] if the machine has several vCPUs.
    pub(crate) fn run_here<'a>(
        &'a self,
        handle: &'a Arc<VcpuHandle>,
        event_manager: &Arc<EventManager>,
        vcpu_run_addr: Option<u64>,
    ) -> Result<HereRun<'a, EH>> {
        let mut here = None;
        self.start(|_, is_held| {
            let prepare = self.start_state(vcpu_run_addr);
            here = Some(vcpu::begin_here(handle, &self.shared, event_manager, is_held, prepare)?);
            Ok(())
        })?;
        self.set_prepared();
        here.ok_or_else(|| Error::new(ErrorKind::State, "run_here", "the machine has no vCPU"))
    }

    /// Have the vCPU's own thread continue a run that [`Self::run_here`] began.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(crate) fn hand_over(&self, handle: &Arc<VcpuHandle>) -> Result<()> {
        vcpu::hand_over(handle, &self.shared)
    }

    /// Answer the next exit of the first vCPU `count` times, and return how long that took. For
    /// benchmarks.
    ///
    /// # Errors
    /// As for [`VcpuHandle::time_answers`].
    #[cfg(feature = "python")]
    pub(crate) fn time_answers(&self, count: u32) -> Result<Duration> {
        let handles = self.handles();
        let handle = handles.first().ok_or_else(|| {
            Error::new(ErrorKind::State, "time_answers", "the machine has no vCPU")
        })?;
        handle.time_answers(self.id(), count)
    }

    /// Returns what sets a vCPU's registers for a start at this address. Without one, the registers
    /// stay.
    fn start_state(
        &self,
        address: Option<u64>,
    ) -> Option<impl FnOnce(&mut Vcpu) -> Result<()> + '_> {
        address.map(|address| move |vcpu: &mut Vcpu| self.set_start_state(vcpu, address))
    }

    /// Start the vCPUs with `start`, which gets whether they are held at rest.
    fn start(&self, start: impl FnMut(&Arc<VcpuHandle>, bool) -> Result<()>) -> Result<()> {
        self.check_process()?;
        if self.has_this_thread() {
            let detail = "a callback on a vCPU's thread cannot start the machine it belongs to";
            return Err(Error::new(ErrorKind::State, "run", detail));
        }
        let is_started = Cell::new(false);
        let enter = |is_in_run| {
            if is_in_run && self.state() == VmRunState::Paused {
                let error = Error::new(ErrorKind::State, "run", "the machine is paused");
                return Err(error.hint("resume it"));
            }
            self.enter(VmRunState::Running)?;
            is_started.set(true);
            Ok(())
        };
        self.vcpus.start(enter, start).inspect_err(|_| {
            if is_started.get() {
                // A running machine becomes `Paused`. After a first run that failed, another can be
                // tried.
                self.stop();
            }
        })
    }

    /// Continue the vCPUs that `pause` stopped. Does nothing if they are running.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if no run is in progress, or the guest has ended.
    pub fn resume(&self) -> Result<()> {
        self.check_process()?;
        let devices = self.vcpus.resume(|is_in_run, are_at_rest| {
            let state = if self.exit().is_some() { VmRunState::Exiting } else { self.state() };
            match state {
                VmRunState::Running => return Ok(false),
                VmRunState::Paused if is_in_run && !are_at_rest => return Ok(true),
                VmRunState::Paused if is_in_run => {}
                _ => return Err(self.not_running("resume", state)),
            }
            let entered = self.shared.run_state.set_and_notify(VmRunState::Running);
            entered.map(|_| true).map_err(|state| self.not_running("resume", state))
        })?;
        self.resume_devices(devices);
        Ok(())
    }

    fn enter(&self, next: VmRunState) -> Result<()> {
        self.shared.run_state.set_and_notify(next).map(|_| ()).map_err(|state| self.refused(state))
    }

    /// Whether a `run` would start now.
    ///
    /// # Errors
    /// [`ErrorKind::State`], with the reason, if it would not.
    pub fn check_may_run(&self) -> Result<()> {
        self.check_process()?;
        let state = self.state();
        if state.may_become(VmRunState::Running) { Ok(()) } else { Err(self.refused(state)) }
    }
}

impl<EH: ExitHandler> KvmVm<EH> {
    /// The error of a call that needs a run in progress.
    pub(super) fn not_running(&self, what: &str, state: VmRunState) -> Error {
        // After a breakpoint the state is `Exiting` until the run has returned.
        if state == VmRunState::Exiting && self.can_continue() {
            return Error::new(ErrorKind::State, what, "the run is ending");
        }
        not_running(what, state)
    }

    fn refused(&self, state: VmRunState) -> Error {
        if state == VmRunState::Exiting && self.can_continue() {
            let error = Error::new(ErrorKind::State, "run", "the last run has not been shut down");
            return error.hint("shutdown() the machine first");
        }
        refused(state)
    }

    /// Whether a guest that has stopped can continue after the end of the run.
    fn can_continue(&self) -> bool {
        self.exit().is_none_or(|exit| exit.reason.resumable())
    }

    /// The error of a call that is impossible once the guest has ended.
    pub(crate) fn has_ended(&self, what: &str) -> Error {
        not_running(what, VmRunState::Exiting)
    }

    /// The vCPUs have stopped. The caller prevents a new start, so the state belongs to this run.
    fn set_stopped(&self) {
        let _ = self.shared.run_state.set_and_notify(VmRunState::Paused);
    }

    /// End the run: bring every vCPU out of its guest. Callbacks in progress continue, and their
    /// vCPUs come to rest when they return. If the guest has not ended, `run(None)` continues it.
    pub fn stop(&self) {
        // Cannot fail without a limit.
        let _ = self.stop_within(&Limit::NONE);
    }

    /// [`Self::stop`]. If another thread closes the machine, that may wait for callbacks in
    /// progress; `limit` limits how long this waits for that thread.
    fn stop_within(&self, limit: &Limit<'_>) -> Result<()> {
        if self.is_forked_child() {
            return Ok(());
        }
        let (devices, ended) =
            self.vcpus.stop(self.has_this_thread(), limit, || self.set_stopped());
        self.resume_devices(devices);
        ended
    }

    /// How the run ended, once its vCPUs are at rest. After a breakpoint or a single step, this
    /// makes the guest able to continue.
    pub(crate) fn take_exit(&self) -> Option<Exit> {
        let exit = self.exit()?;
        if exit.reason.resumable() {
            *self.shared.exit.lock() = None;
            self.shared.run_state.revive();
        }
        Some(exit)
    }

    /// [`Self::stop`], then wait for callbacks in progress. A vCPU's own thread does not wait for
    /// itself.
    ///
    /// # Errors
    /// The error of `limit`, which ends the wait. The run has ended in any case.
    pub fn shutdown(&self, limit: &Limit<'_>) -> Result<()> {
        self.stop_within(limit)?;
        self.wait_for_callbacks(limit)?;
        self.take_exit();
        Ok(())
    }

    /// Wait until no callback of an ended run is in progress.
    ///
    /// # Errors
    /// The error of `limit`, which ends the wait.
    pub(crate) fn wait_for_callbacks(&self, limit: &Limit<'_>) -> Result<()> {
        if self.is_forked_child() || self.has_this_thread() {
            return Ok(());
        }
        self.vcpus.wait_for_callbacks(limit)
    }

    /// Stop the vCPUs and end their threads. Afterwards no guest and no callback runs, except a
    /// callback that made this call. Later calls fail with [`ErrorKind::State`].
    pub fn close(&self) {
        if self.is_forked_child() {
            return;
        }
        self.resume_devices(self.vcpus.close(self.has_this_thread(), || self.set_stopped()));
        // A callback that closes the machine does not wait for a concurrent caller to stop the
        // vCPUs.
        self.set_stopped();
        let _ = self.shared.run_state.set_and_notify(VmRunState::Closed);
    }

    /// Begin to close it, without a wait: from now on its vCPUs are neither started nor resumed.
    pub(crate) fn begin_close(&self) {
        if !self.is_forked_child() {
            self.vcpus.begin_close();
        }
    }

    /// Whether a thread has begun to close it.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the binding"))]
    pub(crate) fn is_closing(&self) -> bool {
        !self.is_forked_child() && self.vcpus.are_closed()
    }

    /// Whether `close` would wait for another thread, which may be in a callback. If it has begun
    /// to close, it does not become busy any more.
    pub(crate) fn is_busy(&self) -> bool {
        !self.is_forked_child() && !self.has_this_thread() && self.vcpus.are_busy()
    }
}

fn not_running(what: &str, state: VmRunState) -> Error {
    let detail = match state {
        VmRunState::Created => "the machine has not been started",
        VmRunState::Exiting => "the guest has ended",
        VmRunState::Closed => return Error::closed("machine"),
        VmRunState::Running | VmRunState::Paused => "no run is in progress",
    };
    let error = Error::new(ErrorKind::State, what, detail);
    match state {
        VmRunState::Exiting => error.hint(AFTER_THE_END),
        _ => error,
    }
}

/// The hint of errors that occur because the guest has ended.
const AFTER_THE_END: &str = "reset() it to a snapshot, or make a new machine";

fn refused(state: VmRunState) -> Error {
    let detail = match state {
        VmRunState::Exiting => "its guest has ended",
        VmRunState::Running => "the machine is running already",
        _ => return Error::closed("machine"),
    };
    let error = Error::new(ErrorKind::State, "run", detail);
    match state {
        VmRunState::Exiting => error.hint(AFTER_THE_END),
        _ => error,
    }
}

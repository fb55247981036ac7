//! The life of a `KvmVm`: run, pause, resume, a hold for a moment, shutdown and close. From any
//! thread.

use std::cell::Cell;

use super::KvmVm;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::ExitHandler;
use crate::vcpu::{VcpuThread, VmRunState};

impl<EH: ExitHandler + Send + Sync + 'static> KvmVm<EH> {
    /// Start a thread `vcpu_{id}` for each vCPU. With an address the vCPUs start there, in the mode
    /// of the configuration; without one they go on where they were stopped.
    ///
    /// When a guest ends, its vCPU kicks the exit handler and the state becomes `Exiting`.
    ///
    /// # Errors
    /// When the machine is running, has ended or is closed, or a thread cannot be started: then
    /// none runs.
    pub fn run(&self, vcpu_run_addr: Option<u64>) -> Result<()> {
        self.check_process()?;
        if self.has_this_thread() {
            let detail = "a callback on a vCPU's thread cannot start the machine it belongs to";
            return Err(Error::new(ErrorKind::State, "run", detail));
        }
        let is_started = Cell::new(false);
        let enter = |has_threads| {
            if has_threads && self.state() == VmRunState::Paused {
                let error = Error::new(ErrorKind::State, "run", "the machine is paused");
                return Err(error.hint("resume it"));
            }
            self.enter(VmRunState::Running)?;
            is_started.set(true);
            Ok(())
        };
        let start = |handle: &mut VcpuThread, is_held| {
            handle.start(&self.shared, is_held, |vcpu| match vcpu_run_addr {
                Some(address) => self.set_start_state(vcpu, address),
                None => Ok(()),
            })
        };
        self.vcpus.start(enter, start).inspect_err(|_| {
            if is_started.get() {
                // From Running a machine leaves to Paused; a first run that failed may be tried
                // again.
                self.vcpus.stop(false, || self.set_stopped());
            }
        })
    }

    /// Bring the vCPUs of the run in progress out of the guest and wait until they are at rest.
    /// Does nothing when they are paused already.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is not running.
    pub fn pause(&self) -> Result<()> {
        self.check_process()?;
        self.vcpus.pause(|| match self.shared.run_state.set_and_notify(VmRunState::Paused) {
            Ok(_) | Err(VmRunState::Paused) => Ok(()),
            Err(state) => Err(not_running("pause", state)),
        })
    }

    /// Let the vCPUs that `pause` stopped go on. Does nothing when they are running.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when no run is in progress, or the guest has ended.
    pub fn resume(&self) -> Result<()> {
        self.check_process()?;
        self.vcpus.resume(|has_threads, are_at_rest| {
            let state = if self.exit().is_some() { VmRunState::Exiting } else { self.state() };
            match state {
                VmRunState::Running => return Ok(false),
                VmRunState::Paused if has_threads && !are_at_rest => return Ok(true),
                VmRunState::Paused if has_threads => {}
                _ => return Err(not_running("resume", state)),
            }
            let entered = self.shared.run_state.set_and_notify(VmRunState::Running);
            entered.map(|_| true).map_err(|state| not_running("resume", state))
        })
    }

    fn enter(&self, next: VmRunState) -> Result<()> {
        self.shared.run_state.set_and_notify(next).map(|_| ()).map_err(refused)
    }

    /// Whether a `run` would start now.
    ///
    /// # Errors
    /// [`ErrorKind::State`], with the reason, when it would not.
    pub fn check_may_run(&self) -> Result<()> {
        self.check_process()?;
        let state = self.state();
        if state.may_become(VmRunState::Running) { Ok(()) } else { Err(refused(state)) }
    }
}

impl<EH: ExitHandler> KvmVm<EH> {
    /// The error of a call that a guest's end has made impossible.
    pub(crate) fn has_ended(&self, what: &str) -> Error {
        not_running(what, VmRunState::Exiting)
    }

    /// The vCPUs are stopped, and nobody starts them meanwhile: a state that came later would be a
    /// next run's.
    fn set_stopped(&self) {
        let _ = self.shared.run_state.set_and_notify(VmRunState::Paused);
    }

    /// Stop the vCPUs and wait for their threads. A guest that had not ended can go on with
    /// `run(None)`.
    pub fn shutdown(&self) {
        if self.is_forked_child() {
            return;
        }
        self.vcpus.stop(self.has_this_thread(), || self.set_stopped());
    }

    /// Stop the vCPUs for good: no guest and no callback goes on behind this, but the callback that
    /// calls it. Everything else that a caller still tries raises [`ErrorKind::State`].
    pub fn close(&self) {
        if self.is_forked_child() {
            return;
        }
        self.vcpus.close(self.has_this_thread(), || self.set_stopped());
        // A callback that closes does not wait for the last to stop them.
        self.set_stopped();
        let _ = self.shared.run_state.set_and_notify(VmRunState::Closed);
    }

    /// Whether a thread has begun to close it.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the binding"))]
    pub(crate) fn is_closing(&self) -> bool {
        !self.is_forked_child() && self.vcpus.are_closed()
    }

    /// Whether a shutdown would wait for another thread, which may be in a callback.
    pub(crate) fn is_busy(&self) -> bool {
        !self.is_forked_child() && !self.has_this_thread() && self.vcpus.are_busy()
    }

    /// Bring every vCPU to rest until the result is dropped, whether the machine runs or not. Its
    /// state stays as it is; who pauses and resumes it meanwhile is obeyed when the last hold ends.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is closed, or in a forked child.
    pub(crate) fn hold(&self) -> Result<Hold<'_, EH>> {
        self.check_process()?;
        self.vcpus.hold().map(|()| Hold(self))
    }
}

/// A machine whose vCPUs rest for as long as this lives.
#[derive(Debug)]
pub(crate) struct Hold<'a, EH: ExitHandler>(&'a KvmVm<EH>);

impl<EH: ExitHandler> Drop for Hold<'_, EH> {
    fn drop(&mut self) {
        // A child that a callback has forked holds nothing of its parent's.
        if !self.0.is_forked_child() {
            self.0.vcpus.let_go(|| self.0.state());
        }
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

/// What helps where a guest has ended.
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

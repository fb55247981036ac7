//! The life of a machine from outside its run: start, stop, pause, resume and close. From any thread.

use std::sync::Arc;
use std::thread::ThreadId;

use super::Vmm;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::{ExitHandler, WrappedExitHandler};
use crate::vcpu::VmRunState;
use crate::vm::KvmVm;

/// Who is inside `run`.
#[derive(Debug, Default)]
pub(super) struct Runner {
    thread: Option<ThreadId>,
    /// `start` was called, and nobody has waited to the end.
    pub(super) is_started: bool,
    /// `close` was called from inside: it happens when the run ends.
    close_at_end: bool,
}

impl Vmm {
    /// Start the vCPUs and return; [`Self::wait`] turns the event loop for them.
    ///
    /// # Errors
    /// [`ErrorKind::State`] as for `run`.
    pub fn start(&self) -> Result<()> {
        let vm = self.vm()?;
        let running = self.enter_run("start", false)?;
        self.start_vcpus(&vm)?;
        self.runner.lock().is_started = true;
        drop(running);
        Ok(())
    }

    /// End the run in progress, or the next one if there is none. It may go on later. From any thread.
    ///
    /// # Errors
    /// When the exit event cannot be written, or in a forked child.
    pub fn stop(&self) -> Result<()> {
        self.exit_handler.check_process()?;
        self.exit_handler.kick().map_err(|e| Error::os(ErrorKind::Event, "stop", &e))
    }

    /// Stop, wait for the run to end, and release everything. Does nothing the second time. Called from
    /// inside a run, it takes effect when that run ends.
    pub fn close(&self) {
        if self.exit_handler.is_foreign() {
            return; // the run in progress, if any, is the parent's
        }
        let Ok(vm) = self.vm() else { return };
        let is_inside = vm.has_this_thread();
        drop(vm);
        let mut runner = self.runner.lock();
        if is_inside {
            // Of a machine that was started, whoever waits for it closes it.
            runner.close_at_end = true;
            let _ = self.stop();
            return;
        }
        while let Some(thread) = runner.thread {
            let _ = self.stop();
            if thread == std::thread::current().id() {
                runner.close_at_end = true;
                return;
            }
            self.run_ended.wait(&mut runner);
        }
        let vm = self.vm.lock().take();
        drop(runner);
        self.release(vm);
    }

    /// Release what the machine was made of. Without a lock: its threads are waited for, and devices may be the program's.
    fn release(&self, vm: Option<Arc<KvmVm<WrappedExitHandler>>>) {
        let subscribers = std::mem::take(&mut *self.own_subscribers.lock());
        for id in subscribers {
            // Fails when the program has removed it already.
            let _ = self.event_manager.remove_subscriber(id);
        }
        drop(vm);
        self.dispatch.close();
    }

    /// Bring the vCPUs of the run in progress out of the guest and wait until they are at rest. From any thread or
    /// callback; the loop goes on turning.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is not running.
    pub fn pause(&self) -> Result<()> {
        let vm = self.vm()?;
        *self.is_paused.lock() = true;
        vm.pause()
    }

    /// Let the vCPUs that `pause` stopped go on.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when no run is in progress, or the guest has ended.
    pub fn resume(&self) -> Result<()> {
        let vm = self.vm()?;
        *self.is_paused.lock() = false;
        vm.resume()
    }

    pub(crate) fn enter_run(&self, what: &str, for_started: bool) -> Result<Running<'_>> {
        let mut runner = self.runner.lock();
        let detail = match (&runner.thread, runner.is_started, for_started) {
            (Some(_), _, _) => "the machine is running already: one run at a time",
            (None, true, false) => "the machine has been started: wait() for it",
            (None, false, true) if self.state() == VmRunState::Exiting => {
                "its guest has ended, and the run is over: reset() it to a snapshot, or make a new machine"
            }
            (None, false, true) => "the machine has not been started: start() or run() it",
            (None, _, _) => {
                runner.thread = Some(std::thread::current().id());
                return Ok(Running(self));
            }
        };
        Err(Error::new(ErrorKind::State, what, detail))
    }

    /// Whether vCPU threads are there, or somebody is inside `run`.
    pub(crate) fn is_in_run(&self) -> bool {
        let runner = self.runner.lock();
        runner.thread.is_some() || runner.is_started
    }
}

/// While it lives, its thread is the one inside `run`.
pub(crate) struct Running<'a>(&'a Vmm);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if self.0.exit_handler.is_foreign() {
            return;
        }
        let mut runner = self.0.runner.lock();
        runner.thread = None;
        let is_closing = std::mem::take(&mut runner.close_at_end);
        let vm = if is_closing { self.0.vm.lock().take() } else { None };
        drop(runner);
        if is_closing {
            self.0.release(vm);
        }
        self.0.run_ended.notify_all();
    }
}

//! The life of a machine from outside its run: start, stop, pause, resume and close. From any
//! thread.

use std::sync::Arc;

use super::machine::{InLoop, Vmm};
use super::runner::{Life, Runner, closed};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
use crate::exit_handler::{ExitHandler, WrappedExitHandler};
use crate::limit::Limit;
use crate::vcpu::{self, VmRunState};
use crate::vm::KvmVm;

/// What a thread that closes a machine does next.
enum ToClose {
    /// It is closed, or will be without this thread.
    Nothing,
    /// Stop the vCPUs: this is the thread of one, and nobody waits for the machine.
    Shutdown,
    /// Wait for the thread that runs or closes it.
    Wait,
    /// Release what it is made of.
    Release,
}

impl Vmm {
    /// Start the vCPUs and return; [`Self::wait`] turns the event loop for them.
    ///
    /// # Errors
    /// [`ErrorKind::State`] as for `run`.
    pub fn start(&self) -> Result<()> {
        let running = self.enter_run("start", false)?;
        running.start_vcpus()?;
        self.runner.lock().is_started = true;
        drop(running);
        Ok(())
    }

    /// End the run in progress, or the next one if there is none. It may go on later. From any
    /// thread.
    ///
    /// # Errors
    /// When the exit event cannot be written, or in a forked child.
    pub fn stop(&self) -> Result<()> {
        self.process_tag.check("vmm")?;
        let Ok(exit_handler) = self.exit_handler() else { return Ok(()) }; // closed: nothing runs
        exit_handler.kick().map_err(|e| Error::os(ErrorKind::Event, "stop", &e))
    }

    /// Stop, wait for the run to end, and release everything. No guest and no callback goes on
    /// behind it. Does nothing the second time, but wait for the first. Called from inside a run,
    /// it takes effect when that run ends; from a callback of a machine that was started and that
    /// nobody waits for, the vCPUs stop, and the rest is up to the next `wait` or `close`.
    pub fn close(&self) {
        self.close_or_tell(false);
    }

    /// [`Self::close`], but only if it waits for no other thread. Whether it did so.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the binding"))]
    pub(crate) fn close_without_wait(&self) -> bool {
        self.close_or_tell(true)
    }

    /// Whether a thread closes it, which waits for callbacks at most.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the binding"))]
    pub(crate) fn is_closing(&self) -> bool {
        !self.process_tag.is_forked_child() && matches!(self.runner.lock().life, Life::Closing(_))
    }

    fn close_or_tell(&self, is_hurried: bool) -> bool {
        if self.process_tag.is_forked_child() {
            return true; // the run in progress, if any, is the parent's
        }
        let mut runner = self.runner.lock();
        loop {
            match self.next_to_close(&mut runner) {
                ToClose::Nothing => return true,
                ToClose::Shutdown => {
                    drop(runner);
                    self.vm().iter().for_each(|vm| vm.stop());
                    return true;
                }
                ToClose::Release if is_hurried && self.vm().is_ok_and(|vm| vm.is_busy()) => {
                    return false;
                }
                ToClose::Release => break,
                ToClose::Wait if is_hurried => return false,
                ToClose::Wait => self.run_ended.wait(&mut runner),
            }
        }
        runner.life = Life::Closing(std::thread::current().id());
        drop(runner);
        self.release();
        true
    }

    /// What this thread does next to close the machine. A run in progress is told to end.
    fn next_to_close(&self, runner: &mut Runner) -> ToClose {
        let this = std::thread::current().id();
        let is_on_vcpu = vcpu::is_thread_of(self.vm_id);
        match (runner.life, runner.thread) {
            (Life::Closed, _) => ToClose::Nothing,
            // Whoever closes it waits for this callback.
            (Life::Closing(_), _) if is_on_vcpu => ToClose::Nothing,
            (Life::Closing(closer), _) if closer == this => ToClose::Nothing,
            (Life::Closing(_), _) => ToClose::Wait,
            (Life::Open, None) if !is_on_vcpu => ToClose::Release,
            (Life::Open, thread) => {
                // Fails only in a forked child.
                let _ = self.stop();
                let is_inside = is_on_vcpu || thread == Some(this);
                runner.close_at_end |= is_inside;
                match thread {
                    Some(_) if is_inside => ToClose::Nothing,
                    Some(_) => ToClose::Wait,
                    None => ToClose::Shutdown,
                }
            }
        }
    }

    /// Release what the machine was made of. Without a lock: its threads are waited for, and
    /// devices may be the program's.
    fn release(&self) {
        let in_loop = self.in_loop.lock().take();
        for InLoop { event_manager, subscribers, .. } in in_loop.iter() {
            for id in subscribers {
                // Fails when the program has removed it already.
                let _ = event_manager.remove_subscriber(*id);
            }
        }
        let vm = self.vm.lock().take();
        // Others may hold it for as long as a call of theirs takes.
        vm.iter().for_each(|vm| vm.close());
        drop((vm, in_loop));
        self.router.close();
        self.runner.lock().life = Life::Closed;
        self.run_ended.notify_all();
    }

    /// Nobody is left to use it: a callback of its own that holds the last reference does not wait
    /// for itself.
    pub(super) fn release_last(&self) {
        if self.process_tag.is_forked_child() || self.runner.lock().life == Life::Closed {
            return;
        }
        self.release();
    }

    /// Bring the vCPUs of the run in progress out of the guest and wait until they are at rest.
    /// From any thread or callback; the loop goes on turning.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is not running; what `limit` ends the wait with, and
    /// then the machine runs on.
    pub fn pause(&self, limit: &Limit<'_>) -> Result<()> {
        self.vm()?.pause(limit)
    }

    /// Let the vCPUs that `pause` stopped go on.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when no run is in progress, or the guest has ended.
    pub fn resume(&self) -> Result<()> {
        self.vm()?.resume()
    }

    /// Become the thread that is inside `run`, with the machine to run.
    pub(crate) fn enter_run(&self, what: &str, for_started: bool) -> Result<Running<'_>> {
        let mut runner = self.runner.lock();
        let vm = match runner.life {
            Life::Open => self.vm()?,
            Life::Closing(_) | Life::Closed => return Err(closed()),
        };
        let (event_manager, exit_handler) = (self.event_manager()?, self.exit_handler()?);
        let detail = match (runner.thread, runner.is_started, for_started) {
            _ if vm.has_this_thread() => {
                "a callback on a vCPU's thread cannot run the machine it belongs to"
            }
            (Some(_), _, _) => "the machine is running already: one run at a time",
            (None, true, false) => "the machine has been started: wait() for it",
            (None, false, true) => match vm.state() {
                VmRunState::Exiting => return Err(vm.has_ended(what)),
                VmRunState::Paused => "its last run is over: start() or run() it again",
                _ => "the machine has not been started: start() or run() it",
            },
            (None, _, _) => {
                runner.thread = Some(std::thread::current().id());
                return Ok(Running { vmm: self, vm, event_manager, exit_handler });
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
pub(crate) struct Running<'a> {
    pub(super) vmm: &'a Vmm,
    /// The machine, which is not closed meanwhile.
    pub(super) vm: Arc<KvmVm<WrappedExitHandler>>,
    pub(super) event_manager: Arc<EventManager>,
    pub(super) exit_handler: WrappedExitHandler,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if self.vmm.process_tag.is_forked_child() {
            return;
        }
        let is_closing = {
            let mut runner = self.vmm.runner.lock();
            runner.thread = None;
            let is_closing = std::mem::take(&mut runner.close_at_end);
            if is_closing {
                runner.life = Life::Closing(std::thread::current().id());
            }
            is_closing
        };
        if is_closing {
            self.vmm.release();
        } else {
            self.vmm.run_ended.notify_all();
        }
    }
}

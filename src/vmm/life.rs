//! Start, stop, pause, resume and close a machine, outside of its `run`. From any thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::machine::{LoopParts, Vmm};
use super::parts::Vm;
use super::runner::{Life, Runner, closed};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
use crate::exit_handler::{ExitHandler, WrappedExitHandler};
use crate::limit::Limit;
use crate::vcpu::{self, VmRunState};
use crate::virtio::Attached;

/// The next step of a thread that closes a machine.
enum CloseStep {
    /// The machine is closed, or another thread will close it.
    Nothing,
    /// Stop the vCPUs: this is the thread of one of them, and no thread is in `run` or `wait`.
    Shutdown,
    /// Wait for the thread that runs or closes the machine.
    Wait,
    /// Release the machine's parts.
    Release,
}

/// How a thread enters a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entering {
    /// The vCPUs must not be running.
    New,
    /// They must be running.
    Started,
    /// They may be running if a watch of the console has started them.
    Either,
}

impl Vmm {
    /// Start the vCPUs and return. [`Self::wait`] runs the event loop for them.
    ///
    /// # Errors
    /// [`ErrorKind::State`] as for `run`.
    pub fn start(&self) -> Result<()> {
        {
            let mut runner = self.runner.lock();
            if runner.life == Life::Open && runner.is_started && runner.is_joinable {
                runner.is_joinable = false;
                return Ok(());
            }
        }
        let running = self.enter_run("start", Entering::New)?;
        running.start_vcpus()?;
        let mut runner = self.runner.lock();
        (runner.is_started, runner.is_joinable) = (true, false);
        drop(runner);
        drop(running);
        Ok(())
    }

    /// End the run in progress, or the next one if there is none. A later run continues it. From
    /// any thread.
    ///
    /// # Errors
    /// If the exit event cannot be written, or in a forked child.
    pub fn stop(&self) -> Result<()> {
        self.process_tag.check("vmm")?;
        let Ok(exit_handler) = self.exit_handler() else { return Ok(()) }; // closed: no run is in progress
        // Relaxed: the wake-up below releases it.
        self.is_stop_requested.store(true, Ordering::Relaxed);
        exit_handler.kick().map_err(|e| Error::os(ErrorKind::Event, "stop", &e))?;
        // In a shared loop the thread of the run may wait for this thread's iteration.
        self.event_manager().iter().for_each(|event_manager| event_manager.wake_waiting());
        Ok(())
    }

    /// Stop, wait for the run to end, and release everything. No guest and no callback runs
    /// afterwards. A second call waits for the first and does nothing else. A call from inside a
    /// run takes effect when that run ends. A call from a callback on a vCPU's thread, while no
    /// thread is in `wait`, stops the vCPUs; the next `wait` or `close` releases the rest.
    pub fn close(&self) {
        self.close_unless_busy(false);
    }

    /// [`Self::close`], but only if it need not wait for another thread. Returns whether it closed.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the binding"))]
    pub(crate) fn close_without_wait(&self) -> bool {
        self.close_unless_busy(true)
    }

    /// Whether a thread is closing it. That thread waits only for callbacks.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the binding"))]
    pub(crate) fn is_closing(&self) -> bool {
        !self.process_tag.is_forked_child() && matches!(self.runner.lock().life, Life::Closing(_))
    }

    fn close_unless_busy(&self, is_hurried: bool) -> bool {
        if self.process_tag.is_forked_child() {
            return true; // a run in progress belongs to the parent
        }
        let mut runner = self.runner.lock();
        loop {
            match self.next_close_step(&mut runner) {
                CloseStep::Nothing => return true,
                CloseStep::Shutdown => {
                    drop(runner);
                    self.vm().iter().for_each(|vm| vm.stop());
                    return true;
                }
                CloseStep::Release if is_hurried && self.begin_close() => return false,
                CloseStep::Release => break,
                CloseStep::Wait if is_hurried => return false,
                CloseStep::Wait => self.run_ended.wait(&mut runner),
            }
        }
        runner.life = Life::Closing(std::thread::current().id());
        drop(runner);
        self.release();
        true
    }

    /// Begin to close the machine: its guest does not run any more. Returns whether a callback is
    /// in progress, which the close has to wait for.
    fn begin_close(&self) -> bool {
        self.vm().is_ok_and(|vm| {
            vm.begin_close();
            vm.is_busy()
        })
    }

    /// Whether a callback has closed the machine, and the run has ended while another callback was
    /// in progress. Then the caller of the run closes the machine, which may take long.
    #[must_use]
    pub fn is_close_due(&self) -> bool {
        self.runner.lock().is_close_due
    }

    /// The next step of this thread to close the machine. Ends a run in progress.
    fn next_close_step(&self, runner: &mut Runner) -> CloseStep {
        let this = std::thread::current().id();
        let is_on_vcpu = vcpu::is_thread_of(self.vm_id);
        match (runner.life, runner.thread) {
            (Life::Closed, _) => CloseStep::Nothing,
            // The closing thread waits for this callback.
            (Life::Closing(_), _) if is_on_vcpu => CloseStep::Nothing,
            (Life::Closing(closer), _) if closer == this => CloseStep::Nothing,
            (Life::Closing(_), _) => CloseStep::Wait,
            (Life::Open, None) if !is_on_vcpu => CloseStep::Release,
            (Life::Open, thread) => {
                // This fails only in a forked child.
                let _ = self.stop();
                let is_inside = is_on_vcpu || thread == Some(this);
                runner.close_at_end |= is_inside;
                match thread {
                    Some(_) if is_inside => CloseStep::Nothing,
                    Some(_) => CloseStep::Wait,
                    None => CloseStep::Shutdown,
                }
            }
        }
    }

    /// Release the machine's parts, with no lock held: this waits for its threads, and devices may
    /// be implemented in Python.
    fn release(&self) {
        let loop_parts = self.loop_parts.lock().take();
        for LoopParts { event_manager, subscribers, .. } in loop_parts.iter() {
            for id in subscribers {
                // Fails if the program has removed it already.
                let _ = event_manager.remove_subscriber(*id);
            }
        }
        let vm = self.vm.lock().take();
        // Other threads may hold it until their calls return.
        vm.iter().for_each(|vm| vm.close());
        loop_parts.iter().flat_map(|own| &own.virtio).for_each(Attached::close);
        drop((vm, loop_parts));
        self.router.close();
        self.runner.lock().life = Life::Closed;
        self.run_ended.notify_all();
        self.tell_watches();
    }

    /// The last reference may be dropped in one of the machine's callbacks, which must not wait for
    /// itself.
    pub(super) fn release_last(&self) {
        if self.process_tag.is_forked_child() || self.runner.lock().life == Life::Closed {
            return;
        }
        self.release();
    }

    /// Bring the vCPUs of the run in progress out of the guest and wait until they are at rest.
    /// From any thread or callback. The event loop continues.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the machine is not running; the error of `limit`, which ends the
    /// wait. The machine continues to run then.
    pub fn pause(&self, limit: &Limit<'_>) -> Result<()> {
        self.vm()?.pause(limit)
    }

    /// Continue the vCPUs that `pause` stopped.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if no run is in progress, or the guest has ended.
    pub fn resume(&self) -> Result<()> {
        self.vm()?.resume()
    }

    /// Become the only thread inside `run`. Returns the machine to run.
    pub(crate) fn enter_run(&self, what: &str, entering: Entering) -> Result<Running<'_>> {
        self.enter_run_as(what, entering, false)
    }

    /// [`Self::enter_run`]; the thread `yields` to others that want to run the loop.
    pub(super) fn enter_run_as(
        &self,
        what: &str,
        entering: Entering,
        yields: bool,
    ) -> Result<Running<'_>> {
        let mut runner = self.runner.lock();
        let vm = match runner.life {
            Life::Open if !runner.is_close_due => self.vm()?,
            Life::Open | Life::Closing(_) | Life::Closed => return Err(closed()),
        };
        let (event_manager, exit_handler) = (self.event_manager()?, self.exit_handler()?);
        let is_joined = runner.is_started && entering != Entering::New;
        let detail = match (runner.thread, runner.is_started, entering) {
            _ if vm.has_this_thread() => {
                "a callback on a vCPU's thread cannot run the machine it belongs to"
            }
            (Some(_), _, _) => "the machine is running already: one run at a time",
            (None, true, Entering::New) => "the machine has been started: wait() for it",
            (None, true, Entering::Either) if !runner.is_joinable => {
                "the machine has been started: wait() for it"
            }
            (None, false, Entering::Started) => match vm.state() {
                VmRunState::Exiting => return Err(vm.has_ended(what)),
                VmRunState::Paused => "its last run is over: start() or run() it again",
                _ => "the machine has not been started: start() or run() it",
            },
            (None, _, _) => {
                runner.thread = Some(std::thread::current().id());
                runner.yields = yields;
                if entering == Entering::Either {
                    runner.is_started = false;
                }
                return Ok(Running { vmm: self, vm, event_manager, exit_handler, is_joined });
            }
        };
        Err(Error::new(ErrorKind::State, what, detail))
    }

    /// Whether the machine has been started or a thread is inside `run`.
    pub(crate) fn is_in_run(&self) -> bool {
        let runner = self.runner.lock();
        runner.thread.is_some() || runner.is_started
    }
}

/// While it lives, its thread is the only one inside `run`.
pub(crate) struct Running<'a> {
    pub(super) vmm: &'a Vmm,
    /// The machine, which cannot be closed while this lives.
    pub(super) vm: Arc<Vm>,
    pub(super) event_manager: Arc<EventManager>,
    pub(super) exit_handler: WrappedExitHandler,
    /// Whether the vCPUs were running already.
    pub(super) is_joined: bool,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if self.vmm.process_tag.is_forked_child() {
            return;
        }
        let is_closing = {
            let mut runner = self.vmm.runner.lock();
            (runner.thread, runner.yields) = (None, false);
            let is_closing = std::mem::take(&mut runner.close_at_end);
            runner.is_close_due = is_closing && self.vmm.begin_close();
            if is_closing && !runner.is_close_due {
                runner.life = Life::Closing(std::thread::current().id());
            }
            is_closing && !runner.is_close_due
        };
        if is_closing {
            self.vmm.release();
        } else {
            self.vmm.run_ended.notify_all();
            self.vmm.tell_watches();
        }
    }
}

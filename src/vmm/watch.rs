//! Waits for the output of a machine: by running its loop, if no other thread does. On the caller's
//! thread.

use std::time::Instant;

use event_manager::SubscriberId;

use super::life::{Entering, Running};
use super::machine::Vmm;
use crate::devices::OutputWatch;
use crate::error::{Error, ErrorKind, Result};
use crate::event::NextTurn;
use crate::exit_handler::Exit;
use crate::limit::{Interrupted, Limit};
use crate::vcpu::{self, VmRunState};

/// How a thread waits for output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watcher {
    /// Beside the thread that runs the machine. If there is none, it runs the loop itself, and
    /// leaves it to any thread that wants to.
    Beside,
    /// It is the thread that runs the machine.
    Alone,
}

/// What a thread that waits for output has to do.
pub(crate) enum Turn<'a> {
    /// Run the loop.
    Drive(Driving<'a>),
    /// Wait for the watch alone: another thread runs the loop, or is about to.
    Stand {
        /// Whether the machine is running.
        is_running: bool,
    },
    /// The run is over, with this result. `None` if it was an error.
    Over(Option<Exit>),
}

impl Vmm {
    /// What this thread has to do to wait for output. `may_start`: start a machine that is not
    /// running.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the machine is closed, this thread is in one of its callbacks, or
    /// [`Watcher::Alone`] is impossible because another thread runs it.
    pub(crate) fn begin_watch(&self, watcher: Watcher, may_start: bool) -> Result<Turn<'_>> {
        let is_started = {
            let runner = self.runner.lock();
            let is_inside = runner.thread == Some(std::thread::current().id());
            if is_inside || vcpu::is_thread_of(self.vm_id) {
                let detail = "a callback of the machine cannot wait for its output";
                return Err(Error::new(ErrorKind::State, "console", detail));
            }
            let is_beside = watcher == Watcher::Beside;
            let is_taken = runner.thread.is_some() || (is_beside && runner.wanted > 0);
            if is_taken && is_beside && runner.life == super::runner::Life::Open {
                let is_running = runner.thread.is_some() || runner.is_started;
                return Ok(Turn::Stand { is_running });
            }
            if !is_taken && !runner.is_started {
                let has_ended = self.vm().is_ok_and(|vm| vm.state() == VmRunState::Exiting);
                if has_ended || (!may_start && runner.life == super::runner::Life::Open) {
                    return Ok(Turn::Over(runner.last.clone()));
                }
            }
            runner.is_started
        };
        let entering = if is_started { Entering::Started } else { Entering::New };
        match self.enter_run_as("console", entering, watcher == Watcher::Beside) {
            Ok(running) => Ok(Turn::Drive(Driving { running, must_start: !is_started, watcher })),
            // Another thread came first, and notifies the watch when it leaves.
            Err(error) if error.kind == ErrorKind::State && watcher == Watcher::Beside => {
                Ok(Turn::Stand { is_running: false })
            }
            Err(error) => Err(error),
        }
    }

    /// Ask a thread that runs the loop only to wait for output to leave it to this thread, and wait
    /// until it has left. No other such thread begins while the result lives.
    ///
    /// # Errors
    /// The error of `interrupted`, which ends the wait.
    pub(crate) fn want_loop(&self, interrupted: Interrupted<'_>) -> Result<LoopWanted<'_>> {
        let is_callback = |thread| thread == Some(std::thread::current().id());
        let must_wait = {
            let mut runner = self.runner.lock();
            runner.wanted += 1;
            runner.yields && !is_callback(runner.thread) && !vcpu::is_thread_of(self.vm_id)
        };
        let wanted = LoopWanted(self);
        if must_wait {
            self.tell_watches();
            Limit::new(None, interrupted).wait("run", |until| {
                let mut runner = self.runner.lock();
                while runner.yields && !self.run_ended.wait_until(&mut runner, until) {}
                !runner.yields
            })?;
        }
        Ok(wanted)
    }

    fn is_loop_wanted(&self) -> bool {
        self.runner.lock().wanted > 0
    }
}

/// See [`Vmm::want_loop`].
pub(crate) struct LoopWanted<'a>(&'a Vmm);

impl Drop for LoopWanted<'_> {
    fn drop(&mut self) {
        if self.0.process_tag.is_forked_child() {
            return;
        }
        self.0.runner.lock().wanted -= 1;
        self.0.tell_watches();
    }
}

/// A thread that runs the loop of a machine to wait for its output.
pub(crate) struct Driving<'a> {
    running: Running<'a>,
    must_start: bool,
    watcher: Watcher,
}

impl Driving<'_> {
    /// Whether the machine is not running yet.
    pub(crate) fn must_start(&self) -> bool {
        self.must_start
    }

    /// Start the machine if necessary, and run its loop until the watch is notified, the deadline
    /// has passed or another thread wants the loop: `None` then, and the guest continues. Otherwise
    /// how the run has ended.
    ///
    /// # Errors
    /// As for `Vmm::wait`.
    pub(crate) fn drive<E: From<Error>>(
        &self,
        watch: &OutputWatch,
        deadline: Option<Instant>,
        interrupted: Interrupted<'_>,
        mut turn: impl FnMut(NextTurn) -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Exit>, E> {
        let Self { running, must_start, watcher } = self;
        if *must_start {
            running.start_vcpus()?;
            let mut runner = running.vmm.runner.lock();
            (runner.is_started, runner.is_joinable) = (true, true);
        }
        let _told = Told::new(running, watch);
        let is_enough =
            || watch.is_told() || (*watcher == Watcher::Beside && running.vmm.is_loop_wanted());
        running.attend(deadline, interrupted, &mut turn, &is_enough)
    }
}

/// Notifies the watch in the machine's loop while it lives.
struct Told<'a> {
    running: &'a Running<'a>,
    id: SubscriberId,
}

impl<'a> Told<'a> {
    fn new(running: &'a Running<'a>, watch: &OutputWatch) -> Self {
        Self { running, id: running.event_manager.add_subscriber(watch.subscriber()) }
    }
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        // Fails in a forked child, whose loop belongs to the parent.
        let _ = self.running.event_manager.remove_subscriber(self.id);
    }
}

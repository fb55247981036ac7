//! `run` and `wait`: run the event loop until the exit handler ends it, then shut the machine down.
//! On the caller's thread.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::begin::Begun;
use super::halt_watch::HaltWatch;
use super::life::{Entering, Running};
use super::machine::Vmm;
use crate::error::{Error, ErrorKind, Result};
use crate::event::NextTurn;
use crate::exit_handler::{Exit, ExitHandler, ExitReason};
use crate::hop::hop;
use crate::limit::{Interrupted, Limit, deadline_of};
use crate::trace;

/// How long the end of a run waits for a reader to take the guest's last output.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a run waits for callbacks in progress after a time limit or an error.
const CALLBACK_GRACE: Duration = Duration::from_millis(50);

impl Vmm {
    /// Run until the guest ends, `stop` is called, or the deadline passes. `turn` runs one
    /// iteration of the event loop, as `EventManager::run_until` does. An error of `turn` ends the
    /// run.
    ///
    /// Callbacks in progress on vCPU threads have returned when this returns, with one exception:
    /// after a timeout or an error they have 50 ms. A callback that takes longer continues, and its
    /// vCPU comes to rest when it returns.
    ///
    /// After a stop, a timeout or an error, another `run` continues where this one ended.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if another thread is in `run`, the guest has ended or the machine is
    /// closed; [`ErrorKind::Io`] if a stream of the serial port fails; the error of `turn`.
    pub fn run<E: From<Error>>(
        &self,
        timeout: Option<Duration>,
        turn: impl FnMut(NextTurn) -> std::result::Result<(), E>,
    ) -> std::result::Result<Exit, E> {
        let result = self.run_interruptibly(timeout, &|| Ok(()), turn);
        if self.is_close_due() {
            self.close();
        }
        result
    }

    /// [`Self::run`]; an error of `interrupted` ends the wait for callbacks. Afterwards the caller
    /// closes the machine if [`Self::is_close_due`] returns true.
    ///
    /// # Errors
    /// As for [`Self::run`]; the error of `interrupted`.
    pub fn run_interruptibly<E: From<Error>>(
        &self,
        timeout: Option<Duration>,
        interrupted: Interrupted<'_>,
        mut turn: impl FnMut(NextTurn) -> std::result::Result<(), E>,
    ) -> std::result::Result<Exit, E> {
        hop!();
        let running = self.enter_run("run", Entering::Either)?;
        let deadline = deadline_of(timeout);
        let begun = if running.is_joined { Ok(Begun::Runs) } else { running.begin(deadline) };
        let ended = match begun {
            Ok(Begun::Runs) => running.turn_until(deadline, &mut turn, &|| false),
            Ok(Begun::HasEnded) => {
                running.deliver_ready(deadline, &mut turn).map(|()| Some(ExitReason::Stopped))
            }
            Err(error) => Err(error.into()),
        };
        running.conclude(ended, deadline, interrupted, &mut turn)
    }

    /// [`Self::run`] for a machine that has been started. Returns `None` after the timeout; the
    /// guest continues then.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the machine has not been started or another thread waits; otherwise
    /// as for `run`.
    pub fn wait<E: From<Error>>(
        &self,
        timeout: Option<Duration>,
        interrupted: Interrupted<'_>,
        mut turn: impl FnMut(NextTurn) -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Exit>, E> {
        let running = self.enter_run("wait", Entering::Started)?;
        let deadline = deadline_of(timeout);
        running.attend(deadline, interrupted, &mut turn, &|| false)
    }
}

impl Running<'_> {
    pub(super) fn check_may_run(&self) -> Result<()> {
        // A callback that outlasted the last run may have met a breakpoint since.
        self.vm.take_exit();
        self.vm.check_may_run()
    }

    pub(super) fn start_vcpus(&self) -> Result<()> {
        hop!();
        let vm = &self.vm;
        if self.forget_last()? {
            vm.run(vm.first_address(self.vmm.entry))?;
        }
        Ok(())
    }

    /// Forget the result of the last run. Returns false if a stop from before this run ends it: the
    /// guest is not started then.
    ///
    /// # Errors
    /// As for [`Self::check_may_run`].
    pub(super) fn forget_last(&self) -> Result<bool> {
        self.check_may_run()?;
        self.vmm.runner.lock().last = None;
        Ok(!self.exit_handler.is_kicked())
    }

    /// Run the loop of a started machine until its run ends. `None` at the deadline, or once
    /// `is_enough`; the guest continues then.
    pub(super) fn attend<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        interrupted: Interrupted<'_>,
        turn: &mut impl FnMut(NextTurn) -> std::result::Result<(), E>,
        is_enough: &dyn Fn() -> bool,
    ) -> std::result::Result<Option<Exit>, E> {
        let ended = self.turn_until(deadline, turn, is_enough);
        if matches!(ended, Ok(None)) {
            return Ok(None);
        }
        if ended.is_ok() || !self.vm.is_forked_child() {
            self.vmm.runner.lock().is_started = false;
        }
        self.conclude(ended, deadline, interrupted, turn).map(Some)
    }

    /// Run the loop until the exit handler ends it; `None` at the deadline, or once `is_enough`.
    pub(super) fn turn_until<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        turn: &mut impl FnMut(NextTurn) -> std::result::Result<(), E>,
        is_enough: &dyn Fn() -> bool,
    ) -> std::result::Result<Option<ExitReason>, E> {
        let mut watch = HaltWatch::new(&self.vm);
        loop {
            let due = watch.as_ref().map(HaltWatch::due);
            let until = deadline.into_iter().chain(due).min();
            let next = self.event_manager.next_turn().until(until);
            if !self.exit_handler.keep_running() || self.is_stopped_beside_turn() {
                return Ok(Some(ExitReason::Stopped));
            }
            if is_enough() || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(None);
            }
            watch.iter_mut().for_each(HaltWatch::look);
            self.turn(next, turn)?;
        }
    }

    /// Whether a stop is pending while another thread performs an iteration, whose callback may
    /// wait for the end of this run.
    fn is_stopped_beside_turn(&self) -> bool {
        // Relaxed: `next_turn` has acquired what was stored before a wake-up.
        self.vmm.is_stop_requested.load(Ordering::Relaxed)
            && self.event_manager.is_in_turn()
            && self.exit_handler.is_kicked()
    }

    /// End a run and shut the machine down, except in a child that was forked in a callback: there
    /// the run belongs to the parent.
    pub(super) fn conclude<E: From<Error>>(
        &self,
        ended: std::result::Result<Option<ExitReason>, E>,
        deadline: Option<Instant>,
        interrupted: Interrupted<'_>,
        turn: &mut impl FnMut(NextTurn) -> std::result::Result<(), E>,
    ) -> std::result::Result<Exit, E> {
        let reason = match ended {
            Err(error) if self.vm.is_forked_child() => return Err(error),
            ended => ended.map(|reason| reason.unwrap_or(ExitReason::Timeout)),
        };
        self.finish(reason, deadline, interrupted, turn)
    }

    /// End a run: shut the machine down and flush the guest's last output.
    fn finish<E: From<Error>>(
        &self,
        reason: std::result::Result<ExitReason, E>,
        deadline: Option<Instant>,
        interrupted: Interrupted<'_>,
        turn: &mut impl FnMut(NextTurn) -> std::result::Result<(), E>,
    ) -> std::result::Result<Exit, E> {
        self.vm.stop();
        let is_over = matches!(reason, Ok(ExitReason::Stopped));
        let waited = self.wait_for_callbacks(is_over, deadline, interrupted);
        self.vmm.is_stop_requested.store(false, Ordering::Relaxed);
        // A callback may have ended the run after the deadline: its result is not lost.
        let mut is_stopped = self.exit_handler.take_stop();
        let reason = reason?;
        waited?;
        if self.vmm.backlog() > 0 {
            self.drain_serial(deadline, turn)?;
            is_stopped |= self.exit_handler.take_stop();
        }
        let reason = if is_stopped { ExitReason::Stopped } else { reason };
        let exit = self.vm.take_exit().unwrap_or_else(|| Exit::new(reason));
        self.vmm.runner.lock().last = Some(exit.clone());
        Ok(exit)
    }

    /// Wait for callbacks in progress: until the deadline if the run `is_over`, otherwise for
    /// [`DRAIN_TIMEOUT`]. Results of callbacks that return later belong to the next run or to
    /// `close`.
    pub(super) fn wait_for_callbacks(
        &self,
        is_over: bool,
        deadline: Option<Instant>,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let limit = match is_over {
            true => Limit::new(left.map(|left| left.max(CALLBACK_GRACE)), interrupted),
            false => Limit::new(Some(CALLBACK_GRACE), &|| Ok(())),
        };
        match self.vm.wait_for_callbacks(&limit) {
            Err(error) if error.kind != ErrorKind::Timeout => Err(error),
            _ => Ok(()),
        }
    }

    /// Deliver the events of a guest that has ended on this thread, as if another thread had then
    /// kicked the exit handler: after the events that are ready now, which may take several
    /// iterations. An iteration of another thread may have fetched some of them.
    pub(super) fn deliver_ready<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        turn: &mut impl FnMut(NextTurn) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        if !self.event_manager.is_in_turn() && !self.event_manager.is_ready()? {
            return Ok(());
        }
        self.exit_handler.kick().map_err(|e| Error::os(ErrorKind::Event, "run", &e))?;
        self.turn_until(deadline, turn, &|| false).map(drop)
    }

    /// One iteration of the event loop. `next` is from before the caller checked its requests.
    pub(super) fn turn<E: From<Error>>(
        &self,
        next: NextTurn,
        turn: &mut impl FnMut(NextTurn) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let recording = self.event_manager.recorders.recording();
        turn(next)?;
        if recording.is_some() {
            trace::flush();
        }
        let Some(failure) = self.vmm.take_failure() else { return Ok(()) };
        // Relaxed: it is read after this run.
        self.vmm.has_failed.store(true, Ordering::Relaxed);
        Err(failure.into())
    }

    /// Flush the guest's last output. After a stop, at the deadline, or if a reader takes nothing
    /// for a while, the rest stays for the next run or for
    /// [`Serial::take_output`](crate::devices::Serial::take_output).
    fn drain_serial<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        turn: &mut impl FnMut(NextTurn) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let mut next = self.event_manager.next_turn();
        let mut left = self.vmm.backlog();
        let mut drain_end = Instant::now() + DRAIN_TIMEOUT;
        while left > 0 && self.exit_handler.keep_running() {
            let until = deadline.map_or(drain_end, |deadline| deadline.min(drain_end));
            self.turn(next.until(Some(until)), turn)?;
            next = self.event_manager.next_turn();
            let now = self.vmm.backlog();
            if now < left {
                drain_end = Instant::now() + DRAIN_TIMEOUT;
            } else if Instant::now() >= until {
                break;
            }
            left = now;
        }
        Ok(())
    }
}

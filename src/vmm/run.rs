//! `run` and `wait`: turn the event loop until the exit handler says stop, and shut the machine
//! down. On the caller's thread.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::life::Running;
use super::machine::Vmm;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::{Exit, ExitReason};
use crate::hop::hop;
use crate::limit::{Interrupted, Limit, deadline_of};
use crate::trace;

/// The longest wait where another loop may take what this one waits for.
const SLICE: Duration = Duration::from_millis(50);

/// How long the end of a run waits for somebody to take the guest's last output.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long a run that a time limit or an error has ended waits for callbacks in progress.
const CALLBACK_GRACE: Duration = Duration::from_millis(50);

impl Vmm {
    /// Run until the guest ends, `stop` is called, or the time passes. `turn` turns the event loop
    /// once, waiting until the time it is given at most; its error ends the run.
    ///
    /// Callbacks in progress on vCPU threads have returned when this returns. There is one
    /// exception: if the time has passed or a call has failed they have 50 ms. A callback that is
    /// left goes on, and its vCPU comes to rest after it.
    ///
    /// After a stop, a timeout or an error another `run` goes on where this one ended.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when another thread is in `run`, the
    /// guest has ended or the machine is closed; [`ErrorKind::Io`]
    /// when a stream of the serial port fails; what `turn` returns.
    pub fn run<E: From<Error>>(
        &self,
        timeout: Option<Duration>,
        turn: impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Exit, E> {
        self.run_interruptibly(timeout, &|| Ok(()), turn)
    }

    /// [`Self::run`], whose wait for callbacks `interrupted` may end with an error.
    ///
    /// # Errors
    /// As for [`Self::run`]; what `interrupted` returns.
    pub fn run_interruptibly<E: From<Error>>(
        &self,
        timeout: Option<Duration>,
        interrupted: Interrupted<'_>,
        mut turn: impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Exit, E> {
        hop!();
        let running = self.enter_run("run", false)?;
        let deadline = deadline_of(timeout);
        let ended = running
            .start_vcpus()
            .map_err(E::from)
            .and_then(|()| running.turn_until(deadline, &mut turn));
        running.conclude(ended, deadline, interrupted, &mut turn)
    }

    /// What `run` does, for a machine that has been started; none when the time passed: then the
    /// guest goes on.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine has not been started,
    /// or another thread waits; else as for `run`.
    pub fn wait<E: From<Error>>(
        &self,
        timeout: Option<Duration>,
        interrupted: Interrupted<'_>,
        mut turn: impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Exit>, E> {
        let running = self.enter_run("wait", true)?;
        let deadline = deadline_of(timeout);
        let ended = running.turn_until(deadline, &mut turn);
        if matches!(ended, Ok(None)) {
            return Ok(None);
        }
        if ended.is_ok() || !running.vm.is_forked_child() {
            self.runner.lock().is_started = false;
        }
        running.conclude(ended, deadline, interrupted, &mut turn).map(Some)
    }
}

impl Running<'_> {
    pub(super) fn start_vcpus(&self) -> Result<()> {
        hop!();
        let vm = &self.vm;
        vm.check_may_run()?;
        // After a stop from before this run the guest does not start for nothing.
        if !self.exit_handler.is_kicked() {
            vm.run(vm.first_address(self.vmm.entry))?;
        }
        Ok(())
    }

    /// Turn the loop until the exit handler says stop; none when the deadline came first.
    pub(super) fn turn_until<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        turn: &mut impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<ExitReason>, E> {
        while self.exit_handler.keep_running() {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(None);
            }
            self.turn(deadline, turn)?;
        }
        Ok(Some(ExitReason::Stopped))
    }

    /// The end of a run: shut the machine down, except in a child that a callback has forked. There
    /// the run is the parent's.
    pub(super) fn conclude<E: From<Error>>(
        &self,
        ended: std::result::Result<Option<ExitReason>, E>,
        deadline: Option<Instant>,
        interrupted: Interrupted<'_>,
        turn: &mut impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Exit, E> {
        let reason = match ended {
            Err(error) if self.vm.is_forked_child() => return Err(error),
            ended => ended.map(|reason| reason.unwrap_or(ExitReason::Timeout)),
        };
        self.finish(reason, deadline, interrupted, turn)
    }

    /// The end of a run: shut the machine down and bring out what the guest printed last.
    fn finish<E: From<Error>>(
        &self,
        reason: std::result::Result<ExitReason, E>,
        deadline: Option<Instant>,
        interrupted: Interrupted<'_>,
        turn: &mut impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Exit, E> {
        self.vm.stop();
        let is_over = matches!(reason, Ok(ExitReason::Stopped));
        let waited = self.wait_for_callbacks(is_over, deadline, interrupted);
        // One that came when the time had passed already: a callback's result is not lost.
        let mut is_stopped = self.exit_handler.take_stop();
        let reason = reason?;
        waited?;
        if self.vmm.serial.backlog() > 0 {
            self.drain_serial(deadline, turn)?;
            is_stopped |= self.exit_handler.take_stop();
        }
        let reason = if is_stopped { ExitReason::Stopped } else { reason };
        Ok(self.vm.exit().unwrap_or_else(|| Exit::new(reason)))
    }

    /// Wait for callbacks in progress. If the run `is_over`, until the deadline; otherwise for a
    /// moment. What they do later is for the next run, or for `close`.
    fn wait_for_callbacks(
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

    /// One turn of the event loop.
    pub(super) fn turn<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        turn: &mut impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let slice = self.exit_handler.is_in_several_loops().then(|| Instant::now() + SLICE);
        let until = slice
            .map_or(deadline, |slice| Some(deadline.map_or(slice, |deadline| deadline.min(slice))));
        let recording = self.event_manager.recorders.recording();
        turn(until)?;
        if recording.is_some() {
            trace::flush();
        }
        let Some(failure) = self.vmm.serial.take_failure() else { return Ok(()) };
        // Relaxed: looked at when this run is over.
        self.vmm.has_failed.store(true, Ordering::Relaxed);
        Err(failure.into())
    }

    /// Bring out what the guest printed last. A stop, the deadline, or a reader that takes nothing
    /// for a while leaves the rest for another run or
    /// [`Serial::take_output`](crate::devices::Serial::take_output).
    fn drain_serial<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        turn: &mut impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let mut left = self.vmm.serial.backlog();
        let mut patience = Instant::now() + PATIENCE;
        while left > 0 && self.exit_handler.keep_running() {
            let until = deadline.map_or(patience, |deadline| deadline.min(patience));
            self.turn(Some(until), turn)?;
            let now = self.vmm.serial.backlog();
            if now < left {
                patience = Instant::now() + PATIENCE;
            } else if Instant::now() >= until {
                break;
            }
            left = now;
        }
        Ok(())
    }
}

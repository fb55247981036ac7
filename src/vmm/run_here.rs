//! `run_here`: the caller's thread enters the guest itself and runs the event loop in between. No
//! other thread has to be started, woken or waited for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::life::{Entering, Running};
use super::machine::Vmm;
use crate::error::{Error, ErrorKind};
use crate::event::NextTurn;
use crate::exit_handler::{Exit, ExitReason};
use crate::limit::{CHECK_INTERVAL, Interrupted, deadline_of};
use crate::vcpu::LeaveReason;

/// How long a guest runs at most before this thread checks its event loop.
const TICK: Duration = Duration::from_millis(2);

impl Vmm {
    /// [`Self::run`] for a machine with one vCPU, on the caller's thread alone. Devices and hooks
    /// are called there too. Events of the loop are dispatched within 2 ms.
    ///
    /// # Errors
    /// As for [`Self::run_interruptibly`]; [`ErrorKind::State`] if the machine has several vCPUs.
    pub fn run_here<E: From<Error>>(
        &self,
        timeout: Option<Duration>,
        interrupted: Interrupted<'_>,
        mut turn: impl FnMut(NextTurn) -> std::result::Result<(), E>,
    ) -> std::result::Result<Exit, E> {
        let running = self.enter_run("run_here", Entering::Either)?;
        let deadline = deadline_of(timeout);
        let ended = running.run_guest(deadline, interrupted, &mut turn);
        running.conclude(ended, deadline, interrupted, &mut turn)
    }
}

impl Running<'_> {
    /// Run the guest until the run ends, or until the deadline: `None` then.
    // Long because it is one loop, with everything that may interrupt it in one place.
    fn run_guest<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        interrupted: Interrupted<'_>,
        turn: &mut impl FnMut(NextTurn) -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<ExitReason>, E> {
        let vm = &self.vm;
        if self.is_joined {
            // The vCPU's own thread has run the guest until now, which may have ended.
            vm.stop();
            self.wait_for_callbacks(false, deadline, interrupted)?;
        }
        if !(self.is_joined && self.exit_handler.is_kicked()) {
            self.check_may_run()?;
            self.vmm.runner.lock().last = None;
        }
        if self.exit_handler.is_kicked() {
            return self.turn_until(deadline, turn, &|| false);
        }
        let handle = match vm.handles().as_slice() {
            [handle] => Arc::clone(handle),
            others => return Err(several(others.len()).into()),
        };
        let here = vm.run_here(&handle, &self.event_manager, vm.first_address(self.vmm.entry))?;
        // For signals that were delivered to another thread of the process.
        let mut next_check = Instant::now() + CHECK_INTERVAL;
        loop {
            let next = self.event_manager.next_turn();
            if !self.exit_handler.keep_running() {
                break;
            }
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                return Ok(None);
            }
            let tick = now + TICK;
            let until = deadline.map_or(tick, |deadline| deadline.min(tick));
            match here.run(until) {
                LeaveReason::Ended | LeaveReason::Stopped => {
                    self.deliver_ready(deadline, turn)?;
                    break;
                }
                LeaveReason::Busy => return Err(busy().into()),
                // A resume wakes the loop.
                LeaveReason::CalledOut => self.turn(next.until(deadline), turn)?,
                LeaveReason::Waits => self.turn(next.until(Some(until)), turn)?,
                LeaveReason::Signalled => interrupted()?,
                LeaveReason::Ticked if now >= next_check => {
                    interrupted()?;
                    next_check = now + CHECK_INTERVAL;
                }
                LeaveReason::Ticked | LeaveReason::NeedsProgram => {}
            }
            if self.event_manager.is_ready()? {
                self.turn(next.until(Some(now)), turn)?;
            }
        }
        Ok(Some(ExitReason::Stopped))
    }
}

fn busy() -> Error {
    let detail = "a callback of an earlier run has not returned yet";
    Error::new(ErrorKind::State, "run_here", detail).hint("use run()")
}

fn several(vcpus: usize) -> Error {
    let detail = format!("one thread runs one vCPU, and the machine has {vcpus}");
    Error::new(ErrorKind::State, "run_here", detail).hint("use run()")
}

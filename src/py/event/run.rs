//! Turns of a loop: `EventManager.run` and its kind, and the turn that a machine's run makes. Each
//! waits and dispatches without the GIL, then delivers with it.

use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::delivery::deliver;
use super::manager::PyEventManager;
use super::queue::QueuedEvent;
use crate::event::EventManager;
use crate::py::enter::attach;
use crate::py::pending_outcome::PendingOutcome;
use crate::py::wakeup;
use crate::trace;

/// Turns of a loop from one call of a Python function to the next.
const TURNS_PER_HANDOVER: u32 = 16;

/// Wait until this time at most and dispatch; returns how many events were fetched: none also after
/// a kick or a signal. Without the GIL.
fn wait(core: &EventManager, deadline: Option<Instant>) -> PyResult<usize> {
    let fetched =
        wakeup::wait(deadline, |until, interrupt| core.wait_until(until, interrupt).transpose())?;
    Ok(fetched.unwrap_or(Ok(0))?)
}

/// A turn of a machine's loop: wait until this time at most, dispatch and deliver, or wait until
/// the thread of another machine has done so; then raise what vCPU threads have left, and run
/// Python's signal handlers. Without the GIL.
pub(crate) fn turn(
    manager: &Py<PyEventManager>,
    pending: &PendingOutcome,
    deadline: Option<Instant>,
) -> PyResult<()> {
    let this = manager.get();
    let guard = this.turn_lock().begin();
    let fetched = match &guard {
        Some(_) => wait(this.core(), deadline)?,
        None => {
            this.turn_lock().wait(deadline);
            0
        }
    };
    attach(|py| {
        if guard.is_some() {
            PyEventManager::deliver_fetched(manager.bind(py), fetched)?;
            drop(guard);
        }
        pending.check(py)?;
        py.check_signals()
    })
}

/// Gives other threads and signal handlers their turn beside a loop that never waits, though its
/// callbacks may run no Python code.
#[derive(Debug)]
pub(crate) struct Pace<'py> {
    turns: u32,
    breathe: Bound<'py, PyAny>,
}

impl<'py> Pace<'py> {
    pub(crate) fn new(py: Python<'py>) -> PyResult<Self> {
        // Compiled here: an import would need a file descriptor.
        Ok(Self { turns: 0, breathe: py.eval(c"lambda: None", None, None)? })
    }

    /// After a turn, call a Python function now and then: the interpreter hands the GIL over
    /// between two instructions of Python code, if another thread has waited for its switch
    /// interval. Letting the GIL go from here would wake such a thread, and so start its interval
    /// again: it might never get its turn.
    pub(crate) fn turned(&mut self) -> PyResult<()> {
        self.turns += 1;
        if self.turns < TURNS_PER_HANDOVER {
            return Ok(());
        }
        self.turns = 0;
        self.breathe.call0().map(drop)
    }
}

impl PyEventManager {
    /// Take the events fetched and not yet delivered.
    fn swap_fetched(&self, batch: &mut Vec<QueuedEvent>) {
        batch.clear();
        // SAFETY: under the lock that guards them.
        self.core().locked(|| unsafe { self.event_queue().swap(batch) });
    }

    /// Dispatch once, waiting until this time at most; returns how many events were dispatched.
    fn turn(
        slf: &Bound<'_, Self>,
        deadline: Option<Instant>,
        batch: &mut Vec<QueuedEvent>,
    ) -> PyResult<usize> {
        let recording = slf.get().core().recorders.recording();
        let result = Self::fetch_and_deliver(slf, deadline, batch);
        if recording.is_some() {
            slf.py().detach(trace::flush);
        }
        result
    }

    fn fetch_and_deliver(
        slf: &Bound<'_, Self>,
        deadline: Option<Instant>,
        batch: &mut Vec<QueuedEvent>,
    ) -> PyResult<usize> {
        let this = slf.get();
        batch.clear();
        // SAFETY: `try_dispatch` calls it under the lock that guards them.
        let take = || unsafe { this.event_queue().swap(batch) };
        // What is ready is fetched without letting the GIL go: that costs less than the fetching.
        let Some(_guard) = this.turn_lock().begin() else {
            // A machine's thread makes a turn.
            slf.py().detach(|| this.turn_lock().wait(deadline));
            return Ok(0);
        };
        if let Some(fetched) = this.core().try_dispatch(take)? {
            return Self::deliver(slf, fetched, batch);
        }
        let fetched = slf.py().detach(|| wait(this.core(), deadline))?;
        this.swap_fetched(batch);
        Self::deliver(slf, fetched, batch)
    }

    /// Deliver what a wait has fetched.
    pub(crate) fn deliver_fetched(slf: &Bound<'_, Self>, fetched: usize) -> PyResult<usize> {
        let this = slf.get();
        this.with_batch(|batch| {
            this.swap_fetched(batch);
            Self::deliver(slf, fetched, batch)
        })
    }

    /// Hand over what was fetched; returns how many events were dispatched.
    fn deliver(slf: &Bound<'_, Self>, fetched: usize, batch: &[QueuedEvent]) -> PyResult<usize> {
        let delivered = deliver(slf, batch, fetched)?;
        slf.get().stats().count_turn(delivered);
        Ok(delivered)
    }
}

#[pymethods]
impl PyEventManager {
    /// Wait for events, dispatch them once, and return how many there were.
    ///
    /// The first exception of a callback ends the dispatch and is raised here. The next run reports
    /// the remaining events again.
    ///
    /// Raises:
    ///     StateError: `run` is in progress in another thread, or further up in this one.
    fn run(slf: &Bound<'_, Self>) -> PyResult<usize> {
        Self::run_with_timeout(slf, -1)
    }

    /// Like `run`, but wait at most this long, and return 0 after the timeout. A negative number
    /// means no limit.
    fn run_with_timeout(slf: &Bound<'_, Self>, milliseconds: i32) -> PyResult<usize> {
        slf.get().check()?;
        let _ownership = slf.get().owners().claim("this event manager", None)?;
        let limit = u64::try_from(milliseconds).ok().map(Duration::from_millis);
        let deadline = limit.map(|limit| Instant::now() + limit);
        slf.get().with_batch(|batch| {
            loop {
                let dispatched = Self::turn(slf, deadline, batch)?;
                if dispatched > 0 || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    return Ok(dispatched);
                }
                slf.py().check_signals()?;
            }
        })
    }

    /// Dispatch until `stop` is called or a callback raises. Raises the same exceptions as `run`.
    fn run_forever(slf: &Bound<'_, Self>) -> PyResult<()> {
        let this = slf.get();
        this.check()?;
        let _ownership = this.owners().claim("this event manager", None)?;
        let mut pace = Pace::new(slf.py())?;
        this.with_batch(|batch| {
            while !this.calls().take_stop() {
                if Self::turn(slf, None, batch)? == 0 {
                    slf.py().check_signals()?;
                }
                pace.turned()?;
            }
            Ok(())
        })
    }
}

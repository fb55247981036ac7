//! Iterations of a loop: `EventManager.run` and its variants, and the iterations of a machine's
//! run. Each waits and dispatches without the GIL, then delivers with the GIL.

use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::delivery::deliver;
use super::manager::PyEventManager;
use super::queue::QueuedEvent;
use crate::event::{EventManager, NextTurn};
use crate::py::depth;
use crate::py::enter::attach;
use crate::py::pending_outcome::PendingOutcome;
use crate::py::wakeup;
use crate::trace;

/// The number of iterations between two calls of a Python function.
const TURNS_PER_HANDOVER: u32 = 16;

/// Wait until this time at most and dispatch, without the GIL. Returns the number of fetched
/// events, which is 0 after a kick or a signal.
fn wait(core: &EventManager, deadline: Option<Instant>) -> PyResult<usize> {
    let fetched =
        wakeup::wait(deadline, |until, interrupt| core.wait_until(until, interrupt).transpose())?;
    Ok(fetched.unwrap_or(Ok(0))?)
}

/// Wait until another thread's iteration has ended, without the GIL. Python's main thread also
/// returns when it has to check for signals, which cannot end this wait.
fn await_turn(core: &EventManager, next: NextTurn) -> PyResult<()> {
    core.await_turn(next.until(wakeup::until_check(next.until)?));
    Ok(())
}

/// An iteration of a machine's loop: wait until this time at most, dispatch and deliver, or wait
/// until the thread of another machine has done so. Then raise the pending exceptions of vCPU
/// threads, and run Python's signal handlers. Called without the GIL.
pub(crate) fn turn(
    manager: &Py<PyEventManager>,
    pending: &PendingOutcome,
    next: NextTurn,
) -> PyResult<()> {
    depth::check()?;
    let this = manager.get();
    let guard = this.core().begin_turn();
    let fetched = match &guard {
        Some(guard) => wait(this.core(), guard.until(next))?,
        None => {
            await_turn(this.core(), next)?;
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

/// Lets other threads and signal handlers run while a loop never waits, even if its callbacks run
/// no Python code.
#[derive(Debug)]
pub(crate) struct GilHandover<'py> {
    turns: u32,
    python_call: Bound<'py, PyAny>,
}

impl<'py> GilHandover<'py> {
    pub(crate) fn new(py: Python<'py>) -> PyResult<Self> {
        // Compiled here, because an import would need a file descriptor.
        Ok(Self { turns: 0, python_call: py.eval(c"lambda: None", None, None)? })
    }

    /// After some iterations, call a Python function. The interpreter hands the GIL over between
    /// two instructions of Python code if another thread has waited for its switch interval.
    /// Releasing the GIL here would wake such a thread and restart its interval, so it might never
    /// get the GIL.
    pub(crate) fn turned(&mut self) -> PyResult<()> {
        self.turns += 1;
        if self.turns < TURNS_PER_HANDOVER {
            return Ok(());
        }
        self.turns = 0;
        self.python_call.call0().map(drop)
    }
}

impl PyEventManager {
    /// Take the fetched events that are not yet delivered.
    fn swap_fetched(&self, batch: &mut Vec<QueuedEvent>) {
        batch.clear();
        // SAFETY: with the lock held that protects them.
        self.core().locked(|| unsafe { self.event_queue().swap(batch) });
    }

    /// Wait and dispatch once, or wait until another thread has. Returns the number of events that
    /// this thread has dispatched.
    fn turn(
        slf: &Bound<'_, Self>,
        next: NextTurn,
        batch: &mut Vec<QueuedEvent>,
    ) -> PyResult<usize> {
        let Some(_recording) = slf.get().core().recorders.recording() else {
            return Self::fetch_and_deliver(slf, next, batch);
        };
        let result = Self::fetch_and_deliver(slf, next, batch);
        slf.py().detach(trace::flush);
        result
    }

    fn fetch_and_deliver(
        slf: &Bound<'_, Self>,
        next: NextTurn,
        batch: &mut Vec<QueuedEvent>,
    ) -> PyResult<usize> {
        let this = slf.get();
        batch.clear();
        // SAFETY: `try_dispatch` calls it with the lock held that protects them.
        let take = || unsafe { this.event_queue().swap(batch) };
        // Ready events are fetched without releasing the GIL, because releasing it costs more than
        // the fetch.
        let Some(guard) = this.core().begin_turn() else {
            // A machine's thread performs an iteration.
            slf.py().detach(|| await_turn(this.core(), next))?;
            return Ok(0);
        };
        if let Some(fetched) = this.core().try_dispatch(take)? {
            return Self::deliver(slf, fetched, batch);
        }
        let fetched = slf.py().detach(|| wait(this.core(), guard.until(next)))?;
        this.swap_fetched(batch);
        Self::deliver(slf, fetched, batch)
    }

    /// Deliver the events that a wait has fetched.
    pub(crate) fn deliver_fetched(slf: &Bound<'_, Self>, fetched: usize) -> PyResult<usize> {
        let this = slf.get();
        this.with_batch(|batch| {
            this.swap_fetched(batch);
            Self::deliver(slf, fetched, batch)
        })
    }

    /// Deliver the fetched events. Returns the number of dispatched events.
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
        depth::check()?;
        let _ownership = slf.get().owners().claim("this event manager", None)?;
        let limit = u64::try_from(milliseconds).ok().map(Duration::from_millis);
        let deadline = limit.map(|limit| Instant::now() + limit);
        slf.get().with_batch(|batch| {
            loop {
                let next = slf.get().core().next_turn().until(deadline);
                let dispatched = Self::turn(slf, next, batch)?;
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
        depth::check()?;
        let _ownership = this.owners().claim("this event manager", None)?;
        let mut handover = GilHandover::new(slf.py())?;
        this.with_batch(|batch| {
            loop {
                let next = this.core().next_turn();
                if this.calls().take_stop() {
                    return Ok(());
                }
                if Self::turn(slf, next, batch)? == 0 {
                    slf.py().check_signals()?;
                }
                handover.turned()?;
            }
        })
    }
}

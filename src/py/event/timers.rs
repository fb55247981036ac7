//! Scheduled calls: a heap for each event manager, with one timer for all of them. They are
//! scheduled and cancelled from any thread; `call_later.rs` makes the calls.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::context::Context;
use crate::event::{EventManager, Expiry, TimerFd};
use crate::py::descriptor::os_error;
use crate::py::gil_cell::GilCell;

/// A time that no clock reaches. The timer is not armed for it.
pub(crate) const NEVER: Duration = Duration::from_secs(1 << 32);

/// Up to this many cancelled calls may stay in the heap, unless they are the majority.
const MAX_CANCELLED: usize = 64;

/// See the module. No Python code runs while it is accessed.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    state: GilCell<State>,
    /// Whether the timer has expired since calls were last made.
    has_expired: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct State {
    /// Sorted by the time of the monotonic clock, then by the order in which they were scheduled.
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    /// The calls that were not cancelled.
    calls: HashMap<u64, ScheduledCall>,
    last: u64,
    timer: Option<Arc<TimerFd>>,
    /// The time for which the timer is armed.
    set_to: Option<Duration>,
}

#[derive(Debug)]
pub(crate) struct ScheduledCall {
    pub(crate) due: Duration,
    pub(crate) function: Py<PyAny>,
    pub(crate) arguments: Py<PyTuple>,
    pub(crate) context: Context,
}

/// Represents the timer in the crate's manager.
struct Expired(Arc<AtomicBool>);

impl MutEventSubscriber for Expired {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // Relaxed: the dispatching thread reads it later. The timer is not read, because arming it
        // again makes it not ready.
        self.0.store(true, Ordering::Relaxed);
    }

    fn init(&mut self, _ops: &mut EventOps) {}
}

pub(crate) fn now() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a timespec that lives through the call, which knows this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), nanoseconds)
}

impl State {
    /// Arm the timer for the first call.
    fn set_timer(&mut self) -> io::Result<()> {
        while let Some(Reverse((_, number))) = self.queue.peek() {
            if self.calls.contains_key(number) {
                break;
            }
            self.queue.pop();
        }
        let first = self.queue.peek().map(|Reverse((due, _))| *due).filter(|due| *due < NEVER);
        self.set_to = first;
        match (&self.timer, first) {
            (Some(timer), Some(due)) => timer.set(Expiry::At(due), Duration::ZERO),
            (Some(timer), None) => timer.clear(),
            (None, _) => Ok(()),
        }
    }

    /// Take the next call that is due at this time and was scheduled no later than `last`.
    fn pop_due(&mut self, at: Duration, last: u64) -> Option<ScheduledCall> {
        while let Some(Reverse((due, number))) = self.queue.peek().copied() {
            if due > at || number > last {
                return None;
            }
            self.queue.pop();
            if let Some(later) = self.calls.remove(&number) {
                return Some(later);
            }
        }
        None
    }
}

impl Timers {
    /// Whether the timer has expired since the last call.
    pub(crate) fn take_expired(&self) -> bool {
        // Relaxed: as in `process`.
        self.has_expired.load(Ordering::Relaxed) && self.has_expired.swap(false, Ordering::Relaxed)
    }

    /// The number of the last scheduled call.
    pub(crate) fn last(&self, py: Python<'_>) -> u64 {
        self.state.with(py, |state| state.last)
    }

    /// Take the next call that is due at this time and was scheduled no later than `last`.
    pub(crate) fn pop_due(&self, py: Python<'_>, at: Duration, last: u64) -> Option<ScheduledCall> {
        self.state.with(py, |state| state.pop_due(at, last))
    }

    /// Arm the timer for the first remaining call.
    pub(crate) fn set_timer(&self, py: Python<'_>) -> PyResult<()> {
        self.state.with(py, State::set_timer).map_err(|e| os_error(&e))
    }

    /// The timer, created and registered on first use.
    pub(crate) fn ensure_timer(&self, py: Python<'_>, core: &EventManager) -> PyResult<()> {
        if self.state.with(py, |state| state.timer.is_some()) {
            return Ok(());
        }
        let timer = Arc::new(TimerFd::new().map_err(|e| os_error(&e))?);
        // With the GIL held, so that no other thread creates a second one. A thread that holds the
        // manager's lock does not need the GIL.
        let id = core.add_unrecorded(Box::new(Expired(Arc::clone(&self.has_expired))));
        if let Err(error) = core.add(id, Events::new(&*timer, EventSet::IN)) {
            let _ = core.remove_subscriber(id);
            return Err(error.into());
        }
        self.state.with(py, |state| state.timer = Some(timer));
        Ok(())
    }

    pub(crate) fn schedule(&self, py: Python<'_>, call: ScheduledCall) -> PyResult<u64> {
        self.state.with(py, |state| {
            state.last += 1;
            let (number, due) = (state.last, call.due);
            state.queue.push(Reverse((due, number)));
            state.calls.insert(number, call);
            if state.set_to.is_none_or(|set_to| due < set_to) {
                state.set_timer().map_err(|e| os_error(&e))?;
            }
            Ok(number)
        })
    }

    pub(crate) fn cancel(&self, py: Python<'_>, number: u64) -> bool {
        let cancelled = self.state.with(py, |state| {
            let cancelled = state.calls.remove(&number);
            if state.queue.len() > MAX_CANCELLED && state.queue.len() > 2 * state.calls.len() {
                let calls = &state.calls;
                state.queue.retain(|Reverse((_, number))| calls.contains_key(number));
            }
            cancelled
        });
        // Outside the cell, because dropping it may run Python code.
        cancelled.is_some()
    }

    /// Take all of them, to be dropped where Python code may run.
    pub(crate) fn take_all(&self, py: Python<'_>) -> impl Sized + use<> {
        self.state.with(py, |state| std::mem::take(&mut state.calls))
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        // SAFETY: the collector holds the GIL.
        let visited = unsafe {
            self.state.peek(|state| {
                state.calls.values().try_for_each(|later| {
                    visit.call(&later.function)?;
                    visit.call(&later.arguments)?;
                    visit.call(later.context.object())
                })
            })
        };
        visited.unwrap_or(Ok(()))
    }
}

//! What a person can see of a loop: how often it has turned, and its slowest callback. On the
//! thread that turns it, and read from any.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::ending::import;
use super::event_manager::PyEventManager;
use super::exit::timeout as as_timeout;
use crate::sync::{Mutex, rank};

/// Turns of a loop from one call of a Python function to the next.
const TURNS: u32 = 16;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Watch {
    dispatched: AtomicU64,
    turns: AtomicU64,
    /// Nanoseconds above which a callback is logged; 0 for none.
    slow_callback: AtomicU64,
    slowest: Mutex<(Duration, String), rank::SlowestCallback>,
}

/// Relaxed, and not in one step: with the GIL held, and a figure for a person.
fn count(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}

impl Watch {
    /// The loop has turned.
    pub(super) fn count_turn(&self, dispatched: usize) {
        count(&self.turns, 1);
        count(&self.dispatched, dispatched as u64);
    }

    /// Count from nothing again.
    pub(super) fn forget(&self) {
        self.turns.store(0, Ordering::Relaxed);
        self.dispatched.store(0, Ordering::Relaxed);
        *self.slowest.lock() = Default::default();
    }

    pub(super) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    pub(super) fn dispatched(&self) -> u64 {
        self.dispatched.load(Ordering::Relaxed)
    }

    /// How long a callback may take before it is logged.
    pub(super) fn slow_callback(&self) -> Option<Duration> {
        match self.slow_callback.load(Ordering::Relaxed) {
            0 => None,
            nanoseconds => Some(Duration::from_nanos(nanoseconds)),
        }
    }

    pub(super) fn set_slow_callback(&self, threshold: Option<Duration>) {
        let nanoseconds = threshold
            .map_or(0, |threshold| u64::try_from(threshold.as_nanos()).unwrap_or(u64::MAX).max(1));
        self.slow_callback.store(nanoseconds, Ordering::Relaxed);
    }

    pub(super) fn slowest(&self) -> (Duration, String) {
        self.slowest.lock().clone()
    }

    /// Call, and time that where callbacks are timed; also a call that raises.
    pub(super) fn timed<T>(
        &self,
        py: Python<'_>,
        name: impl FnOnce() -> PyResult<String>,
        call: impl FnOnce() -> PyResult<T>,
    ) -> PyResult<T> {
        if self.slow_callback().is_none() {
            return call();
        }
        let start = Instant::now();
        let result = call();
        let noted = self.note(py, name, start.elapsed());
        match (result, noted) {
            (Ok(value), noted) => noted.map(|()| value),
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(failure)) => {
                failure.write_unraisable(py, None);
                Err(error)
            }
        }
    }

    /// Note a callback that took the longest so far, and log one that took longer than the
    /// threshold.
    pub(super) fn note(
        &self,
        py: Python<'_>,
        name: impl FnOnce() -> PyResult<String>,
        took: Duration,
    ) -> PyResult<()> {
        let is_slow = self.slow_callback().is_some_and(|threshold| took > threshold);
        let is_slowest = self.slowest.lock().0 < took;
        if !is_slow && !is_slowest {
            return Ok(());
        }
        let name = name()?;
        if is_slowest {
            *self.slowest.lock() = (took, name.clone());
        }
        if is_slow {
            let callbacks = import(py, "pyvmm.callbacks")?;
            callbacks.call_method1("warn_slow", (&name, took.as_secs_f64()))?;
        }
        Ok(())
    }
}

/// Gives other threads and signal handlers their turn beside a loop that never waits, though its
/// callbacks may run no Python code.
#[derive(Debug)]
pub(super) struct Pace<'py> {
    turns: u32,
    breathe: Bound<'py, PyAny>,
}

impl<'py> Pace<'py> {
    pub(super) fn new(py: Python<'py>) -> PyResult<Self> {
        // Compiled here: an import would need a file descriptor.
        Ok(Self { turns: 0, breathe: py.eval(c"lambda: None", None, None)? })
    }

    /// After a turn, call a Python function now and then: the interpreter hands the GIL over
    /// between two instructions of Python code, if another thread has waited for its switch
    /// interval. Letting the GIL go from here would wake such a thread, and so start its interval
    /// again: it might never get its turn.
    pub(super) fn turned(&mut self) -> PyResult<()> {
        self.turns += 1;
        if self.turns < TURNS {
            return Ok(());
        }
        self.turns = 0;
        self.breathe.call0().map(drop)
    }
}

#[pymethods]
impl PyEventManager {
    /// Seconds above which a callback is logged with its name, as a warning of the logger "pyvmm";
    /// None for none.
    ///
    /// Raises:
    ///     ValueError: set to a negative number or NaN.
    #[getter(slow_callback_duration)]
    fn threshold(&self) -> PyResult<Option<f64>> {
        self.check()?;
        Ok(self.watch().slow_callback().map(|threshold| threshold.as_secs_f64()))
    }

    #[setter(slow_callback_duration)]
    fn set_threshold(&self, seconds: Option<f64>) -> PyResult<()> {
        self.check()?;
        self.watch().set_slow_callback(as_timeout(seconds)?);
        Ok(())
    }

    /// The name of the callback that took longest and its seconds; None before one was timed.
    ///
    /// Callbacks are timed while `slow_callback_duration` is set.
    #[getter]
    fn slowest_callback(&self) -> PyResult<Option<(String, f64)>> {
        self.check()?;
        let (took, name) = self.watch().slowest();
        Ok((!name.is_empty()).then_some((name, took.as_secs_f64())))
    }

    /// How often the loop has turned.
    #[getter]
    fn turns(&self) -> PyResult<u64> {
        self.check()?;
        Ok(self.watch().turns())
    }

    /// How many events it has dispatched.
    #[getter]
    fn dispatched(&self) -> PyResult<u64> {
        self.check()?;
        Ok(self.watch().dispatched())
    }
}

//! Statistics of a loop: its iterations and its slowest callback. Written by the loop's thread,
//! read from any thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::py::ending::import;
use crate::sync::{Mutex, rank};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct LoopStats {
    dispatched: AtomicU64,
    turns: AtomicU64,
    /// The nanoseconds above which a callback is logged; 0 disables this.
    slow_callback: AtomicU64,
    slowest: Mutex<(Duration, String), rank::SlowestCallback>,
}

/// Relaxed, and not one atomic step: the GIL is held, and the number is only informative.
fn count(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}

impl LoopStats {
    /// Count an iteration.
    pub(crate) fn count_turn(&self, dispatched: usize) {
        count(&self.turns, 1);
        count(&self.dispatched, dispatched as u64);
    }

    /// Reset the counts.
    pub(crate) fn forget(&self) {
        self.turns.store(0, Ordering::Relaxed);
        self.dispatched.store(0, Ordering::Relaxed);
        *self.slowest.lock() = Default::default();
    }

    pub(crate) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    pub(crate) fn dispatched(&self) -> u64 {
        self.dispatched.load(Ordering::Relaxed)
    }

    /// How long a callback may take before it is logged.
    pub(crate) fn slow_callback(&self) -> Option<Duration> {
        match self.slow_callback.load(Ordering::Relaxed) {
            0 => None,
            nanoseconds => Some(Duration::from_nanos(nanoseconds)),
        }
    }

    pub(crate) fn set_slow_callback(&self, threshold: Option<Duration>) {
        let nanoseconds = threshold
            .map_or(0, |threshold| u64::try_from(threshold.as_nanos()).unwrap_or(u64::MAX).max(1));
        self.slow_callback.store(nanoseconds, Ordering::Relaxed);
    }

    pub(crate) fn slowest(&self) -> (Duration, String) {
        self.slowest.lock().clone()
    }

    /// Make a call, and time it if callbacks are timed, even if it raises.
    pub(crate) fn timed<T>(
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

    /// Record the slowest callback, and log a callback that exceeds the threshold.
    pub(crate) fn note(
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

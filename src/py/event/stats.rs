//! What a person can see of a loop: how often it has turned, and its slowest callback. On the
//! thread that turns it, and read from any.

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
    /// Nanoseconds above which a callback is logged; 0 for none.
    slow_callback: AtomicU64,
    slowest: Mutex<(Duration, String), rank::SlowestCallback>,
}

/// Relaxed, and not in one step: with the GIL held, and a figure for a person.
fn count(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}

impl LoopStats {
    /// The loop has turned.
    pub(crate) fn count_turn(&self, dispatched: usize) {
        count(&self.turns, 1);
        count(&self.dispatched, dispatched as u64);
    }

    /// Count from nothing again.
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

    /// Call, and time that where callbacks are timed; also a call that raises.
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

    /// Note a callback that took the longest so far, and log one that took longer than the
    /// threshold.
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

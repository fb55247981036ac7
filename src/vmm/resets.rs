//! Detects a reset during a call that reads the whole machine. From any thread.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// Counts the resets of a machine.
#[derive(Debug, Default)]
pub(super) struct Resets {
    /// How many resets have begun, and how many of them have ended.
    counts: [AtomicU64; 2],
}

impl Resets {
    /// # Errors
    /// [`ErrorKind::State`] if a reset is in progress, or has begun since the count was this.
    pub(super) fn check(&self, before: Option<u64>) -> Result<u64> {
        // Acquire: a thread that counts a reset as ended finds its effects. The ends are read
        // first, so that a reset which ends in between counts as begun.
        let [begun, over] = &self.counts;
        let (over, begun) = (over.load(Ordering::Acquire), begun.load(Ordering::Acquire));
        if begun == over && before.is_none_or(|before| before == begun) {
            return Ok(begun);
        }
        let detail = "the machine was reset during the snapshot";
        Err(Error::new(ErrorKind::State, "snapshot", detail))
    }

    pub(super) fn reset<T>(&self, act: impl FnOnce() -> T) -> T {
        // Release, as above.
        let [begun, over] = &self.counts;
        begun.fetch_add(1, Ordering::Release);
        let result = act();
        over.fetch_add(1, Ordering::Release);
        result
    }
}

//! The end of a backend: why it came, and how many frames were dropped. Any thread.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Ending {
    reason: OnceLock<String>,
    dropped: AtomicU64,
}

impl Ending {
    /// It has ended because of an error.
    pub(super) fn end(&self, error: &io::Error) {
        // The first reason counts.
        let _ = self.reason.set(error.to_string());
    }

    pub(super) fn reason(&self) -> Option<String> {
        self.reason.get().cloned()
    }

    /// Whether it has ended, so that these frames are dropped.
    pub(super) fn drops(&self, frames: usize) -> bool {
        let has_ended = self.reason.get().is_some();
        if has_ended {
            self.drop(frames);
        }
        has_ended
    }

    /// These frames are dropped.
    pub(super) fn drop(&self, frames: usize) {
        // Relaxed: a count.
        self.dropped.fetch_add(frames as u64, Ordering::Relaxed);
    }

    pub(super) fn dropped(&self) -> u64 {
        // Relaxed: a count.
        self.dropped.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays_and_frames_are_dropped_from_then_on() {
        let ending = Ending::default();
        assert!(!ending.drops(3));
        ending.end(&io::Error::other("first"));
        ending.end(&io::Error::other("second"));
        assert!(ending.drops(2));
        ending.drop(1);
        assert_eq!((ending.reason().as_deref(), ending.dropped()), (Some("first"), 3));
    }
}

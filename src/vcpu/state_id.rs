//! Identifies what a vCPU was set to.

use std::sync::atomic::{AtomicU64, Ordering};

/// Identifies the whole state of a vCPU. No two states of a process have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StateId(u64);

impl StateId {
    pub(crate) fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        // Relaxed: only the number counts.
        Self(LAST.fetch_add(1, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_states_are_the_same() {
        assert_ne!(StateId::new(), StateId::new());
    }
}

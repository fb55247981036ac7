//! Whether the host may have written the tables that a guest starts with: descriptors, page tables
//! and the code of exceptions. Any thread.

use std::sync::atomic::{AtomicBool, Ordering};

use super::ranges::overlap;
use crate::layout;

/// Whether a range contains a part of the tables.
pub(super) fn has_tables(address: u64, length: u64) -> bool {
    overlap((address, address.saturating_add(length)), layout::TABLES)
}

/// Set before each such write.
#[derive(Debug, Default)]
pub(super) struct Touched(AtomicBool);

impl Touched {
    /// Before the host writes a range.
    pub(super) fn note(&self, address: u64, length: u64) {
        if has_tables(address, length) {
            // Release: the reset that finds no write is before this one.
            self.0.store(true, Ordering::Release);
        }
    }

    /// Whether there was a write since the last call.
    pub(super) fn take(&self) -> bool {
        // Acquire and release: as in `note`.
        self.0.swap(false, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_next_to_the_tables_does_not_count() {
        let touched = Touched::default();
        touched.note(layout::SYSTEM_AREA - 8, 8);
        touched.note(layout::EBDA_START, 8);
        assert!(!touched.take());
        for (address, length) in
            [(layout::SYSTEM_AREA - 8, 9), (layout::EBDA_START - 1, 1), (0, u64::MAX)]
        {
            touched.note(address, length);
            assert!(touched.take() && !touched.take());
        }
    }
}

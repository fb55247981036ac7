//! The log of written pages: the guest's writes, which KVM logs, and the host's. Any thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::slots::Slots;
use super::table::Table;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::PAGE;

/// The pages of one slot that have been written since the log was last read: one bit per page of
/// 4 KiB, the first page in the lowest bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    /// Guest-physical start of the slot.
    pub start: u64,
    /// Its bitmap, with as many words as its pages need.
    pub bitmap: Vec<u64>,
}

impl DirtyPages {
    /// Start and size of each run of written pages.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (word, base) in self.bitmap.iter().zip((self.start..).step_by(64 * 4096)) {
            let mut left = *word;
            while left != 0 {
                let bit = left.trailing_zeros();
                let run = (left >> bit).trailing_ones();
                let (start, length) = (base + u64::from(bit) * PAGE, u64::from(run) * PAGE);
                match ranges.last_mut() {
                    Some((first, bytes)) if *first + *bytes == start => *bytes += length,
                    _ => ranges.push((start, length)),
                }
                left &= !(u64::MAX >> (64 - run) << bit);
            }
        }
        ranges
    }
}

impl Slots {
    pub(super) fn log_dirty(&self, is_on: bool) -> Result<()> {
        let mut table = self.table.lock();
        if table.is_logging == is_on {
            return Ok(());
        }
        let set_regions = |table: &Table, is_on| {
            let mut all = table.entries.iter();
            all.try_for_each(|e| self.set_region(e.region(e.slot.size, is_on)))
        };
        let set = |table: &mut Table, is_on| {
            table.entries.iter_mut().for_each(|entry| entry.set_log(is_on));
            table.is_logging = is_on;
            let mmap = Arc::clone(&self.map().mmap);
            *self.map.write() = table.map(mmap);
            // Release: pairs with the acquire of `note_write`.
            self.is_logging.store(is_on, Ordering::Release);
        };
        // The host's writes are logged whenever the guest's may be: the host's log starts first and
        // stops last.
        if is_on {
            set(&mut table, true);
        }
        if let Err(error) = set_regions(&table, is_on) {
            let _ = set_regions(&table, !is_on);
            set(&mut table, !is_on);
            return Err(error);
        }
        if !is_on {
            set(&mut table, false);
        }
        Ok(())
    }

    /// Return and clear the log.
    pub(super) fn take_dirty(&self) -> Result<Vec<DirtyPages>> {
        let table = self.table.lock();
        if !table.is_logging {
            let error = Error::new(ErrorKind::State, "dirty", "dirty pages are not logged");
            return Err(error.hint("set memory.log_dirty to True first"));
        }
        let map = self.map();
        self.views.note(&map);
        let mut all = Vec::new();
        for entry in &table.entries {
            let size = usize::try_from(entry.slot.size).unwrap_or(0);
            let written = entry.written.as_deref().unwrap_or(&[]);
            let mut bitmap = match self.vm.get() {
                Some(vm) => vm
                    .get_dirty_log(entry.slot.number, size)
                    .map_err(|e| Error::kvm("KVM_GET_DIRTY_LOG", e))?,
                None => vec![0; written.len()],
            };
            for (word, written) in bitmap.iter_mut().zip(written) {
                // Relaxed: as where the bit is set.
                *word |= written.swap(0, Ordering::Relaxed);
            }
            all.push(DirtyPages { start: entry.slot.start, bitmap });
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_have_the_bits_of_the_bitmap(bitmap in prop::collection::vec(
            prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..4,
        )) {
            let pages = DirtyPages { start: 0x1000, bitmap };
            let mut bits = vec![0; pages.bitmap.len()];
            let mut behind = 0;
            for (start, length) in pages.ranges() {
                prop_assert!(start > behind, "sorted, and joined where they touch");
                behind = start + length;
                for page in (start - 0x1000) / PAGE..(start + length - 0x1000) / PAGE {
                    bits[usize::try_from(page / 64).unwrap()] |= 1u64 << (page % 64);
                }
            }
            prop_assert_eq!(bits, pages.bitmap);
        }
    }
}

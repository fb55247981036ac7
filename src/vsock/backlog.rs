//! Bytes of the guest that the host has not taken yet. The credit of the connection bounds them.
//! Pure data.

use vm_memory::VolatileSlice;

/// An empty backlog keeps no more memory than this.
const KEPT: usize = 16 << 10;

#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    taken: usize,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.taken == self.bytes.len()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(self.taken..).unwrap_or_default()
    }

    /// Add what the pieces contain after `skipped` bytes.
    pub(super) fn add(&mut self, pieces: &[VolatileSlice<'_>], mut skipped: usize) {
        if self.taken > self.bytes.len() / 2 {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        for piece in pieces {
            let skip = skipped.min(piece.len());
            skipped -= skip;
            let Ok(rest) = piece.offset(skip) else { continue };
            let old = self.bytes.len();
            self.bytes.resize(old + rest.len(), 0);
            if let Some(room) = self.bytes.get_mut(old..) {
                rest.copy_to(room);
            }
        }
    }

    /// The host has taken bytes from the front.
    pub(super) fn take(&mut self, count: usize) {
        self.taken = self.bytes.len().min(self.taken + count);
        if self.is_empty() {
            self.clear();
        }
    }

    /// Drop everything. Returns how many bytes that was.
    pub(super) fn clear(&mut self) -> usize {
        let count = self.bytes().len();
        self.bytes.clear();
        self.bytes.shrink_to(KEPT);
        self.taken = 0;
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn it_is_a_queue(steps in prop::collection::vec((0usize..200, 0usize..200, 0usize..5), 0..100)) {
            let (mut backlog, mut model) = (Backlog::default(), VecDeque::<u8>::new());
            let (mut next, mut most) = (0u8, 0);
            for (add, take, skip) in steps {
                let mut bytes: Vec<u8> = (0..add).map(|_| { next = next.wrapping_add(1); next }).collect();
                let skip = skip.min(bytes.len());
                model.extend(&bytes[skip..]);
                let (one, other) = bytes.split_at_mut(add / 3);
                backlog.add(&[VolatileSlice::from(one), VolatileSlice::from(other)], skip);
                most = most.max(model.len());
                let take = take.min(model.len());
                model.drain(..take);
                backlog.take(take);
                prop_assert_eq!(backlog.bytes(), model.make_contiguous());
                prop_assert!(backlog.bytes.len() <= 2 * most + 200);
            }
            prop_assert_eq!(backlog.clear(), model.len());
            prop_assert!(backlog.is_empty());
        }
    }
}

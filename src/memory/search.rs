//! Searches guest memory for bytes. Any thread.

use memchr::memmem;

use super::access::to_usize;
use super::guest::GuestMemory;
use crate::error::{Error, ErrorKind, Result};

/// How many bytes a search copies at a time.
const SEARCH_CHUNK: usize = 1 << 20;

impl GuestMemory {
    /// The first address of some bytes, at or after `start` and entirely before `end`.
    ///
    /// # Errors
    /// If `wanted` is empty.
    pub fn find(&self, wanted: &[u8], start: u64, end: u64) -> Result<Option<u64>> {
        if wanted.is_empty() {
            let detail = "no bytes to search for";
            return Err(Error::new(ErrorKind::Memory, "find", detail));
        }
        let finder = memmem::Finder::new(wanted);
        let overlap = wanted.len() - 1;
        let mut chunk = Vec::new();
        for (first, last) in connected(&self.ranges()) {
            let (mut at, last) = (first.max(start), last.min(end));
            while at < last && last - at > overlap as u64 {
                let most = SEARCH_CHUNK.saturating_add(overlap) as u64;
                let length = to_usize((last - at).min(most))?;
                chunk.resize(length, 0);
                self.read(at, &mut chunk)?;
                if let Some(found) = finder.find(&chunk) {
                    return Ok(Some(at + found as u64));
                }
                at += (length - overlap) as u64;
            }
        }
        Ok(None)
    }
}

/// Merge ranges that touch. Returns first and end addresses.
fn connected(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for (start, length) in ranges {
        let end = start.saturating_add(*length);
        match all.last_mut() {
            Some(last) if last.1 == *start => last.1 = end,
            _ => all.push((*start, end)),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, anonymous};
    use proptest::prelude::*;

    #[test]
    fn ranges_that_touch_are_searched_as_one() {
        assert_eq!(connected(&[(0, 2), (2, 3), (8, 1)]), [(0, 5), (8, 9)]);
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.add(1 << 20, anonymous(4096).unwrap(), Backing::default()).unwrap();
        memory.write((1 << 20) - 2, b"over").unwrap();
        assert_eq!(memory.find(b"over", 0, u64::MAX).unwrap(), Some((1 << 20) - 2));
        assert_eq!(memory.find(b"over", 0, (1 << 20) + 1).unwrap(), None);
    }

    proptest! {
        #[test]
        fn find_agrees_with_a_look_at_a_copy(
            spots in prop::collection::vec((0u64..3 * 4096 - 4, any::<[u8; 2]>()), 0..8),
            wanted in prop::collection::vec(0u8..2, 1..4), start in 0u64..4 * 4096, end in 0u64..4 * 4096,
        ) {
            let memory = GuestMemory::empty();
            memory.add(0, anonymous(3 * 4096).unwrap(), Backing::default()).unwrap();
            spots.iter().for_each(|(at, bytes)| memory.write(*at, bytes).unwrap());
            let mut all = vec![0; 3 * 4096];
            memory.read(0, &mut all).unwrap();
            let from = usize::try_from(start).unwrap();
            let to = usize::try_from(end).unwrap().min(all.len());
            let expected = all.get(from..to).and_then(|part| {
                part.windows(wanted.len()).position(|window| window == wanted)
            });
            prop_assert_eq!(memory.find(&wanted, start, end).unwrap(), expected.map(|at| start + at as u64));
        }
    }
}

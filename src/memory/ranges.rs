//! Sorted lists of byte ranges, counted from the start of a mapping. Pure data.

use crate::layout::PAGE;

/// The most runs of changed pages in a layer. If there are more, neighbours are merged with the
/// unchanged pages between them: each run is one mapping in every fork, and the kernel allows a
/// process 65,530 mappings.
const MAX_RUNS: usize = 256;

/// Start and end, in bytes.
pub(crate) type ByteRange = (u64, u64);

/// Append a range; it is merged with the last one if they touch.
pub(crate) fn push(ranges: &mut Vec<ByteRange>, range: ByteRange) {
    match ranges.last_mut() {
        Some(last) if last.1 == range.0 => last.1 = range.1,
        _ => ranges.push(range),
    }
}

/// Whether two ranges have bytes in common.
pub(crate) fn overlap(a: ByteRange, b: ByteRange) -> bool {
    a.0 < b.1 && b.0 < a.1
}

/// The bytes in all of these ranges.
pub(crate) fn size(ranges: &[ByteRange]) -> u64 {
    ranges.iter().map(|(start, end)| end - start).sum()
}

/// The union of two lists, each sorted and without overlaps.
pub(super) fn union(mut a: Vec<ByteRange>, b: Vec<ByteRange>) -> Vec<ByteRange> {
    if b.is_empty() {
        return a;
    }
    a.extend(b);
    a.sort_unstable();
    let mut all: Vec<ByteRange> = Vec::new();
    for range in a {
        match all.last_mut() {
            Some(last) if range.0 <= last.1 => last.1 = last.1.max(range.1),
            _ => all.push(range),
        }
    }
    all
}

/// At most [`MAX_RUNS`] ranges that cover these.
pub(crate) fn coalesce(mut ranges: Vec<ByteRange>) -> Vec<ByteRange> {
    let mut gap = PAGE;
    while ranges.len() > MAX_RUNS {
        let mut fewer: Vec<ByteRange> = Vec::new();
        for range in ranges {
            match fewer.last_mut() {
                Some(last) if range.0 - last.1 <= gap => last.1 = range.1,
                _ => fewer.push(range),
            }
        }
        (ranges, gap) = (fewer, gap * 2);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn coalesced_ranges_cover_all_and_are_few(pages in prop::collection::btree_set(0u64..100_000, 0..4000)) {
            let mut ranges = Vec::new();
            pages.iter().for_each(|page| push(&mut ranges, (page * PAGE, (page + 1) * PAGE)));
            let fewer = coalesce(ranges.clone());
            prop_assert!(fewer.len() <= MAX_RUNS);
            let covers = |range: &ByteRange| fewer.iter().any(|f| f.0 <= range.0 && range.1 <= f.1);
            prop_assert!(ranges.iter().all(covers));
        }
    }
}

//! The memory map that a kernel gets: RAM below the EBDA, the EBDA and ROMs as reserved, and RAM
//! from 1 MiB on, without the gap.

use crate::layout;

/// The types of ACPI's address ranges, which every boot protocol uses.
pub(super) const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) size: u64,
    pub(super) kind: u32,
}

/// The map for this much memory.
pub(super) fn memory_map(size: u64) -> Vec<Range> {
    let mut map = vec![
        Range { start: 0, size: layout::EBDA_START, kind: RAM },
        Range {
            start: layout::EBDA_START,
            size: layout::HIGH_MEMORY - layout::EBDA_START,
            kind: RESERVED,
        },
    ];
    for (start, size) in layout::ram_ranges(size) {
        let from = start.max(layout::HIGH_MEMORY);
        if start + size > from {
            map.push(Range { start: from, size: start + size - from, kind: RAM });
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_leaves_out_the_gap() {
        let map: Vec<_> = memory_map(4 << 30).iter().map(|r| (r.start, r.size, r.kind)).collect();
        assert_eq!(map[..2], [(0, 0x9_fc00, 1), (0x9_fc00, 0x6_0400, 2)]);
        assert_eq!(map[2..], [(1 << 20, (3 << 30) - (1 << 20), 1), (4 << 30, 1 << 30, 1)]);
        assert_eq!(memory_map(1 << 20).len(), 2);
    }
}

//! The memory map that a kernel gets: RAM below the EBDA, the EBDA and ROMs as reserved with ACPI's
//! tables among them, and RAM from 1 MiB on, without the gap.

use crate::layout;

/// The types of ACPI's address ranges, which every boot protocol uses.
pub(super) const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// Tables, which the kernel can overwrite once it has read them.
const ACPI: u32 = 3;
/// What ACPI keeps using.
const ACPI_NVS: u32 = 4;

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) size: u64,
    pub(super) kind: u32,
}

/// The map for this much memory.
pub(super) fn memory_map(size: u64, has_acpi: bool) -> Vec<Range> {
    let range = |start, end, kind| Range { start, size: end - start, kind };
    let mut map = vec![range(0, layout::EBDA_START, RAM)];
    if has_acpi {
        map.extend([
            range(layout::EBDA_START, layout::ACPI_FACS, RESERVED),
            range(layout::ACPI_FACS, layout::ACPI_TABLES, ACPI_NVS),
            range(layout::ACPI_TABLES, layout::ACPI_END, ACPI),
        ]);
    } else {
        map.push(range(layout::EBDA_START, layout::HIGH_MEMORY, RESERVED));
    }
    for (start, size) in layout::ram_ranges(size) {
        let from = start.max(layout::HIGH_MEMORY);
        if start + size > from {
            map.push(range(from, start + size, RAM));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_leaves_out_the_gap() {
        let map: Vec<_> =
            memory_map(4 << 30, false).iter().map(|r| (r.start, r.size, r.kind)).collect();
        assert_eq!(map[..2], [(0, 0x9_fc00, 1), (0x9_fc00, 0x6_0400, 2)]);
        assert_eq!(map[2..], [(1 << 20, (3 << 30) - (1 << 20), 1), (4 << 30, 1 << 30, 1)]);
        assert_eq!(memory_map(1 << 20, false).len(), 2);
    }
    #[test]
    fn acpis_tables_have_their_own_ranges_and_nothing_is_left_out() {
        let map = memory_map(8 << 20, true);
        let end = map.iter().fold(0, |end, range| {
            assert_eq!(range.start, end);
            end + range.size
        });
        assert_eq!(end, 8 << 20);
        assert_eq!(map.iter().map(|r| r.kind).collect::<Vec<_>>(), [1, 2, 4, 3, 1]);
    }
}

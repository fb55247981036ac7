//! Translates guest-virtual addresses through the guest's page tables (Intel SDM volume 3, chapter
//! 5; AMD APM volume 2, chapter 5).
//!
//! Permissions are not checked: a debugger may read memory that the guest's ring may not.

use crate::x86::{
    CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, EFER_LMA, PTE_ADDRESS, PTE_LARGE, PTE_PRESENT,
};
use kvm_bindings::kvm_sregs;

/// How a vCPU translates addresses now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// The number of page table levels; 0 if paging is off.
    levels: u32,
    /// The size of an entry: 4 or 8 bytes.
    entry: u64,
    /// The address of the top table.
    root: u64,
    /// Whether page directory entries may be large pages.
    has_large: bool,
}

impl Paging {
    /// Determine it from the control registers and EFER.
    #[must_use]
    pub fn of(sregs: &kvm_sregs) -> Self {
        let is_set = |value: u64, bit: u64| value & bit != 0;
        let levels = match () {
            () if !is_set(sregs.cr0, CR0_PG) => 0,
            () if !is_set(sregs.cr4, CR4_PAE) => 2,
            () if !is_set(sregs.efer, EFER_LMA) => 3,
            () if is_set(sregs.cr4, CR4_LA57) => 5,
            () => 4,
        };
        // The top table of PAE has 32 bytes; the others are pages.
        let mask = if levels == 3 { 0xffff_ffe0 } else { PTE_ADDRESS };
        Self {
            levels,
            entry: if levels == 2 { 4 } else { 8 },
            root: sregs.cr3 & mask,
            has_large: levels != 2 || is_set(sregs.cr4, CR4_PSE),
        }
    }

    /// Translate `address` to a guest-physical address. None if it is not mapped. `read` reads an
    /// entry of 4 or 8 bytes at a guest-physical address; None if there is no memory.
    pub fn translate(&self, address: u64, read: impl Fn(u64, u64) -> Option<u64>) -> Option<u64> {
        if !self.reaches(address) {
            return None;
        }
        let index_bits = if self.entry == 4 { 10 } else { 9 };
        let mut table = self.root;
        for level in (0..self.levels).rev() {
            let shift = 12 + level * index_bits;
            let index = address >> shift & ((1 << index_bits) - 1);
            let entry = read(table.checked_add(index * self.entry)?, self.entry)?;
            if entry & PTE_PRESENT == 0 {
                return None;
            }
            if self.is_large(entry, level) {
                return Some(
                    self.large(entry) & !((1 << shift) - 1) | address & ((1 << shift) - 1),
                );
            }
            table = entry & if self.entry == 4 { 0xffff_f000 } else { PTE_ADDRESS };
        }
        if self.levels == 0 {
            return Some(address);
        }
        Some(table | address & 0xfff)
    }

    /// The page of each table; empty without paging. None if there are more than `most`. `read` is
    /// as in [`Self::translate`].
    pub fn tables(&self, most: usize, read: impl Fn(u64, u64) -> Option<u64>) -> Option<Vec<u64>> {
        let (mut all, mut here) = (Vec::new(), vec![self.root]);
        for level in (0..self.levels).rev() {
            let mut below = Vec::new();
            for table in here {
                all.push(table & PTE_ADDRESS);
                let entries = if self.levels == 3 && level == 2 { 4 } else { 4096 / self.entry };
                let entries = if level == 0 { 0 } else { entries };
                for index in 0..entries {
                    let at = table.checked_add(index * self.entry)?;
                    let entry = read(at, self.entry).unwrap_or(0);
                    if entry & PTE_PRESENT != 0 && !self.is_large(entry, level) {
                        below.push(entry & if self.entry == 4 { 0xffff_f000 } else { PTE_ADDRESS });
                    }
                }
                below.sort_unstable();
                below.dedup();
                if all.len() + below.len() > most {
                    return None;
                }
            }
            here = below;
        }
        Some(all)
    }

    /// Directories contain large pages: of 4 or 2 MiB, and of 1 GiB one level higher.
    fn is_large(&self, entry: u64, level: u32) -> bool {
        let may_be_large = level == 1 || (level == 2 && self.levels > 3);
        may_be_large && self.has_large && entry & PTE_LARGE != 0
    }

    /// Whether a guest in this mode can form the address.
    fn reaches(&self, address: u64) -> bool {
        match self.levels {
            0 => true,
            2 | 3 => address >> 32 == 0,
            levels => {
                let top = 11 + 9 * levels;
                let sign = address >> top;
                sign == 0 || sign == u64::MAX >> top
            }
        }
    }

    /// The address in the entry of a large page.
    fn large(&self, entry: u64) -> u64 {
        match self.entry {
            // PSE-36: bits 13 to 20 are the address's bits 32 to 39.
            4 => entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32,
            _ => entry & PTE_ADDRESS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn paging(cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Paging {
        Paging::of(&kvm_sregs { cr0, cr3, cr4, efer, ..Default::default() })
    }

    fn long(cr3: u64, la57: bool) -> Paging {
        paging(CR0_PG, cr3, CR4_PAE | if la57 { CR4_LA57 } else { 0 }, EFER_LMA)
    }

    fn look(entries: &[(u64, u64)]) -> impl Fn(u64, u64) -> Option<u64> {
        let entries: HashMap<u64, u64> = entries.iter().copied().collect();
        move |at, _| Some(entries.get(&at).copied().unwrap_or(0))
    }

    #[test]
    fn without_paging_an_address_is_itself() {
        assert_eq!(
            paging(0, 0, 0, 0).translate(0x1234_5678_9abc, |_, _| None),
            Some(0x1234_5678_9abc)
        );
    }

    #[test]
    fn every_table_is_found_once_and_no_more_than_asked_for() {
        let entries = [
            (0x1000, 0x2003), // two entries of the top table with the same directory pointers
            (0x1008, 0x2003), //
            (0x2000, 0x3003), // a directory,
            (0x2008, 0x4000_0083), // and a page of 1 GiB
            (0x3000, 0x4003), // a table, whose entries are pages,
            (0x3008, 0x20_0083), // and a page of 2 MiB
            (0x4000, 0x5003),
        ];
        let tables = |most| long(0x1000, false).tables(most, look(&entries));
        assert_eq!(tables(4), Some(vec![0x1000, 0x2000, 0x3000, 0x4000]));
        assert_eq!(tables(3), None);
        assert_eq!(paging(0, 0x1000, 0, 0).tables(4, look(&entries)), Some(Vec::new()));
        let pae = paging(CR0_PG, 0x1020, CR4_PAE, 0);
        assert_eq!(
            pae.tables(4, look(&[(0x1020, 0x2001), (0x1040, 0x3001)])),
            Some(vec![0x1000, 0x2000])
        );
    }

    #[test]
    fn two_levels_and_pages_of_4_mib() {
        let tables =
            [(0x1004, 0x2007), (0x200c, 0x5007), (0x1008, 0x0080_0087), (0x100c, 0xc0_2087)];
        let paging = paging(CR0_PG, 0x1000, CR4_PSE, 0);
        let read = look(&tables);
        assert_eq!(paging.translate(0x40_3123, &read), Some(0x5123));
        assert_eq!(paging.translate(0x92_3456, &read), Some(0x92_3456));
        assert_eq!(paging.translate(0xc0_0004, &read), Some(0x1_00c0_0004), "PSE-36");
        assert_eq!(paging.translate(0x1_0040_3123, &read), None, "beyond 32 bits");
        assert_eq!(paging.translate(0, &read), None);
    }

    #[test]
    fn without_pse_bit_7_of_a_directory_entry_means_nothing() {
        let tables = [(0x1000, 0x2087), (0x2000, 0x5007)];
        assert_eq!(paging(CR0_PG, 0x1000, 0, 0).translate(0x10, look(&tables)), Some(0x5010));
    }

    #[test]
    fn three_levels_with_a_small_top_table() {
        let tables = [
            (0x1028, 0x2001),
            (0x2008, 0x3003),
            (0x3000, 0x8000_0000_0000_7003),
            (0x2010, 0x40_0083),
        ];
        let paging = paging(CR0_PG, 0x1020, CR4_PAE, 0);
        let read = look(&tables);
        assert_eq!(paging.translate(0x4020_0042, &read), Some(0x7042), "with the NX bit");
        assert_eq!(paging.translate(0x4041_2345, &read), Some(0x41_2345));
    }

    #[test]
    fn four_levels_and_pages_of_2_mib_and_1_gib() {
        let tables = [
            (0x1000, 0x2007),
            (0x2000, 0x3007),
            (0x3000, 0x4007),
            (0x4028, 0x9007),
            (0x3008, 0x20_0087),
            (0x2008, 0xc000_0087),
            (0x1ff8, 0x2007),
        ];
        let read = look(&tables);
        let paging = long(0x1018, false);
        assert_eq!(paging.translate(0x5123, &read), Some(0x9123), "CR3's flags are no address");
        assert_eq!(paging.translate(0x20_1234, &read), Some(0x20_1234));
        assert_eq!(paging.translate(0x4005_4321, &read), Some(0xc005_4321));
        assert_eq!(paging.translate(0xffff_ff80_0000_5123, &read), Some(0x9123), "the upper half");
        assert_eq!(paging.translate(0x0000_8000_0000_0000, &read), None, "not canonical");
    }

    #[test]
    fn five_levels() {
        let tables = [
            (0x7018, 0x1007),
            (0x1000, 0x2007),
            (0x2000, 0x3007),
            (0x3000, 0x4007),
            (0x4028, 0x9007),
        ];
        let read = look(&tables);
        assert_eq!(long(0x7000, true).translate((3 << 48) + 0x5123, &read), Some(0x9123));
        assert_eq!(long(0x7000, true).translate(0x5123, &read), None);
        assert_eq!(long(0x7000, true).translate(1 << 56, &read), None, "not canonical");
    }

    proptest! {
        #[test]
        fn no_table_makes_it_panic(cr0 in any::<u64>(), cr3 in any::<u64>(), cr4 in any::<u64>(),
                                   efer in any::<u64>(), address in any::<u64>(), entry in any::<u64>()) {
            let _ = paging(cr0, cr3, cr4, efer).translate(address, |_, _| Some(entry));
        }
    }
}

//! Accesses memory by linear address, as the processor does: through the page tables, with
//! permission checks, accessed and dirty bits, and page faults with their error code (Intel SDM
//! volume 3, sections 5.6 to 5.8).

use super::access::Access;
use super::cpu::{Cpu, Done, Fault, Stop, mask};
use crate::layout::PAGE;
use crate::x86::{
    AC, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PKE, CR4_PSE, CR4_SMAP, EFER_NXE, PAGE_FAULT,
    PTE_ACCESSED, PTE_ADDRESS, PTE_DIRTY, PTE_LARGE, PTE_NO_EXECUTE, PTE_PRESENT, PTE_USER,
    PTE_WRITABLE,
};

/// How often a walk may restart because another processor has changed an entry.
const MAX_WALKS: u32 = 64;

const CODE_PRESENT: u32 = 1;
const CODE_WRITE: u32 = 1 << 1;
const CODE_USER: u32 = 1 << 2;
const CODE_RESERVED: u32 = 1 << 3;
const CODE_KEY: u32 = 1 << 5;

/// The page tables of a mode: the number of levels, the size of an entry, the address of the top
/// table.
struct Tables {
    levels: u32,
    entry: u64,
    root: u64,
}

impl Tables {
    fn index_bits(&self) -> u32 {
        if self.entry == 4 { 10 } else { 9 }
    }

    fn index_mask(&self) -> u64 {
        (1 << self.index_bits()) - 1
    }

    /// The lowest bit of a linear address that selects an entry of a level.
    fn shift(&self, level: u32) -> u32 {
        12 + level * self.index_bits()
    }
}

/// The rights to a page: those of all entries on the way to it, combined.
struct PagePermissions {
    /// The last entry.
    entry: u64,
    may_write: bool,
    is_user: bool,
}

impl PagePermissions {
    fn add(&mut self, entry: u64) {
        self.entry = entry;
        self.may_write &= entry & PTE_WRITABLE != 0;
        self.is_user &= entry & PTE_USER != 0;
    }
}

impl Cpu<'_> {
    /// Read `data` from a linear address.
    pub(crate) fn read_linear(&mut self, linear: u64, data: &mut [u8], access: Access) -> Done<()> {
        let mut rest = data;
        for (address, length) in self.pieces(linear, rest.len(), access)? {
            let (piece, behind) = rest.split_at_mut_checked(length).ok_or(Stop::Unknown)?;
            if !self.platform.read(address, piece) {
                return Err(Stop::Unknown);
            }
            rest = behind;
        }
        Ok(())
    }

    /// Write `data` to a linear address. If it faults, nothing is written.
    pub(crate) fn write_linear(&mut self, linear: u64, data: &[u8], access: Access) -> Done<()> {
        let pieces = self.pieces(linear, data.len(), access)?;
        // If there is no writable memory, KVM's own exit is reported, before anything is written.
        if !pieces.iter().all(|(address, length)| self.platform.is_writable(*address, *length)) {
            return Err(Stop::Unknown);
        }
        let mut rest = data;
        for (address, length) in pieces {
            let (piece, behind) = rest.split_at_checked(length).ok_or(Stop::Unknown)?;
            if !self.platform.write(address, piece) {
                return Err(Stop::Unknown);
            }
            rest = behind;
        }
        Ok(())
    }

    /// The guest-physical pieces of a range, page by page.
    pub(crate) fn pieces(
        &mut self,
        linear: u64,
        length: usize,
        access: Access,
    ) -> Done<Vec<(u64, usize)>> {
        let mut pieces = Vec::with_capacity(2);
        let (mut at, mut left) = (linear, length);
        while left > 0 {
            let here = usize::try_from(PAGE - at % PAGE).unwrap_or(left).min(left);
            pieces.push((self.walk(at, access)?, here));
            left -= here;
            at = at.wrapping_add(u64::try_from(here).unwrap_or(0));
            if !self.is_64_bit() {
                at &= mask(4);
            }
        }
        Ok(pieces)
    }

    fn tables(&self) -> Option<Tables> {
        let s = &self.sregs;
        if s.cr0 & CR0_PG == 0 {
            return None;
        }
        let (levels, entry, root) = match (s.cr4 & CR4_PAE != 0, self.is_long()) {
            (false, _) => (2, 4, s.cr3 & 0xffff_f000),
            (true, false) => (3, 8, s.cr3 & 0xffff_ffe0),
            (true, true) if s.cr4 & CR4_LA57 != 0 => (5, 8, s.cr3 & PTE_ADDRESS),
            (true, true) => (4, 8, s.cr3 & PTE_ADDRESS),
        };
        Some(Tables { levels, entry, root })
    }

    /// Translate a linear address to a guest-physical one.
    pub(crate) fn walk(&mut self, linear: u64, access: Access) -> Done<u64> {
        for _ in 0..MAX_WALKS {
            if let Some(address) = self.walk_once(linear, access)? {
                return Ok(address);
            }
        }
        Err(Stop::Unknown)
    }

    /// One walk through the tables. None if an entry has changed meanwhile.
    fn walk_once(&mut self, linear: u64, access: Access) -> Done<Option<u64>> {
        let Some(tables) = self.tables() else { return Ok(Some(linear)) };
        let mut rights = PagePermissions { entry: 0, may_write: true, is_user: true };
        let mut table = tables.root;
        for level in (0..tables.levels).rev() {
            let shift = tables.shift(level);
            let at = table + (linear >> shift & tables.index_mask()) * tables.entry;
            let entry = self.entry(at, tables.entry)?;
            self.check_entry(linear, access, &tables, entry)?;
            // The top table of PAE has neither rights nor an accessed bit.
            let is_pointer = tables.levels == 3 && level == 2;
            if !is_pointer {
                rights.add(entry);
            }
            if self.is_leaf(&tables, level, entry) {
                self.check(linear, access, &rights)?;
                let dirty = if access.is_write { PTE_DIRTY } else { 0 };
                if !self.note(at, tables.entry, entry, PTE_ACCESSED | dirty) {
                    return Ok(None);
                }
                let within = (1 << shift) - 1;
                let start = leaf_address(entry, tables.entry, level) & !within;
                return Ok(Some(start | linear & within));
            }
            if !is_pointer && !self.note(at, tables.entry, entry, PTE_ACCESSED) {
                return Ok(None);
            }
            table = entry & if tables.entry == 4 { 0xffff_f000 } else { PTE_ADDRESS };
        }
        Err(Stop::Unknown)
    }

    /// An entry must be present, and its reserved bits must be zero.
    fn check_entry(&self, linear: u64, access: Access, tables: &Tables, entry: u64) -> Done<()> {
        if entry & PTE_PRESENT == 0 {
            return self.page_fault(linear, access, 0);
        }
        if tables.entry == 8 && self.sregs.efer & EFER_NXE == 0 && entry & PTE_NO_EXECUTE != 0 {
            return self.page_fault(linear, access, CODE_PRESENT | CODE_RESERVED);
        }
        Ok(())
    }

    /// Whether an entry maps a page, not another table.
    fn is_leaf(&self, tables: &Tables, level: u32, entry: u64) -> bool {
        let may_be_large = level == 1 || (level == 2 && tables.levels > 3);
        let has_large = tables.levels != 2 || self.sregs.cr4 & CR4_PSE != 0;
        level == 0 || (may_be_large && has_large && entry & PTE_LARGE != 0)
    }

    fn entry(&mut self, at: u64, size: u64) -> Done<u64> {
        let mut bytes = [0; 8];
        let data = bytes.get_mut(..usize::try_from(size).unwrap_or(8)).ok_or(Stop::Unknown)?;
        if self.platform.read(at, data) {
            Ok(u64::from_le_bytes(bytes))
        } else {
            Err(Stop::Unknown)
        }
    }

    /// Set bits of an entry, unless it has changed since the read.
    fn note(&mut self, at: u64, size: u64, entry: u64, bits: u64) -> bool {
        entry & bits == bits || self.platform.set_bits(at, size, entry, bits)
    }

    fn check(&mut self, linear: u64, access: Access, rights: &PagePermissions) -> Done<()> {
        let s = self.sregs;
        let is_open = !access.is_implicit && self.regs.rflags & AC != 0;
        let is_smap = s.cr4 & CR4_SMAP != 0 && !is_open;
        let is_refused = match access.is_user {
            true => !rights.is_user || access.is_write && !rights.may_write,
            false => {
                rights.is_user && is_smap
                    || access.is_write && !rights.may_write && s.cr0 & CR0_WP != 0
            }
        };
        if is_refused {
            return self.page_fault(linear, access, CODE_PRESENT);
        }
        if s.cr4 & CR4_PKE == 0 || !self.is_long() || !rights.is_user {
            return Ok(());
        }
        let key = rights.entry >> 59 & 15;
        let rights_of_key = self.protection_key_rights()? >> (2 * key) & 3;
        let obeys_write = access.is_user || self.sregs.cr0 & CR0_WP != 0;
        match rights_of_key & 1 != 0 || access.is_write && obeys_write && rights_of_key & 2 != 0 {
            true => self.page_fault(linear, access, CODE_PRESENT | CODE_KEY),
            false => Ok(()),
        }
    }

    fn page_fault<T>(&self, linear: u64, access: Access, code: u32) -> Done<T> {
        let write = if access.is_write { CODE_WRITE } else { 0 };
        let user = if access.is_user { CODE_USER } else { 0 };
        let code = Some(code | write | user);
        Err(Stop::Fault(Fault { vector: PAGE_FAULT, code, address: Some(linear) }))
    }
}

fn leaf_address(entry: u64, size: u64, level: u32) -> u64 {
    match (size, level) {
        (4, 0) => entry & 0xffff_f000,
        // PSE-36: bits 13 to 20 are the address's bits 32 to 39.
        (4, _) => entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32,
        _ => entry & PTE_ADDRESS,
    }
}

#[cfg(test)]
mod tests {
    //! Covers src/fixup/access.rs.

    use super::*;
    use crate::fixup::testing::{Ram, protected, run};
    use kvm_bindings::{kvm_regs, kvm_sregs};

    const POPCNT: [u8; 4] = [0xf3, 0x0f, 0xb8, 0x06]; // popcnt eax, [esi]
    const MOVDIRI: [u8; 4] = [0x0f, 0x38, 0xf9, 0x06]; // movdiri [esi], eax

    /// Two levels: a directory at 0x1000, a table at 0x2000 for the first 4 MiB, page n at its own
    /// address.
    fn machine(ring: u8, entries: &[(usize, u32)]) -> (Ram, kvm_sregs) {
        let mut ram = Ram::new(0x8000);
        ram.put(0x1000, &0x2007_u32.to_le_bytes());
        for (page, flags) in entries {
            let entry = u32::try_from(page << 12).unwrap() | flags;
            ram.put(0x2000 + 4 * page, &entry.to_le_bytes());
        }
        let sregs = kvm_sregs { cr0: CR0_PG | CR0_WP | 0x33, cr3: 0x1000, ..protected(ring) };
        (ram, sregs)
    }

    fn outcome(ring: u8, entry: u32, code: &[u8], cr4: u64, rflags: u64) -> Option<(u32, u64)> {
        let (mut ram, sregs) = machine(ring, &[(4, entry)]);
        let regs = kvm_regs { rsi: 0x4010, rflags, ..Default::default() };
        match run(&mut ram, regs, kvm_sregs { cr4, ..sregs }, code) {
            Ok(_) => None,
            Err(Stop::Fault(fault)) => Some((fault.code.unwrap(), fault.address.unwrap())),
            Err(stop) => panic!("{stop:?}"),
        }
    }

    #[test]
    fn permissions_are_those_of_the_ring() {
        assert_eq!(outcome(0, 3, &POPCNT, 0, 2), None);
        assert_eq!(outcome(0, 0, &POPCNT, 0, 2), Some((0, 0x4010)));
        assert_eq!(outcome(0, 0, &MOVDIRI, 0, 2), Some((2, 0x4010)));
        assert_eq!(outcome(3, 0, &MOVDIRI, 0, 2), Some((6, 0x4010)));
        assert_eq!(outcome(3, 3, &POPCNT, 0, 2), Some((5, 0x4010)), "a supervisor's page");
        assert_eq!(outcome(3, 5, &MOVDIRI, 0, 2), Some((7, 0x4010)), "a page for reading");
        assert_eq!(outcome(0, 1, &MOVDIRI, 0, 2), Some((3, 0x4010)), "CR0.WP");
        assert_eq!(outcome(3, 7, &MOVDIRI, 0, 2), None);
    }

    #[test]
    fn user_pages_are_closed_to_the_kernel_by_smap_until_ac() {
        assert_eq!(outcome(0, 7, &POPCNT, CR4_SMAP, 2), Some((1, 0x4010)));
        assert_eq!(outcome(0, 7, &POPCNT, CR4_SMAP, 2 | AC), None);
        assert_eq!(outcome(3, 7, &POPCNT, CR4_SMAP, 2), None);
    }

    #[test]
    fn accessed_and_dirty_are_noted_in_the_tables() {
        let (mut ram, sregs) = machine(0, &[(4, 3)]);
        let regs = kvm_regs { rsi: 0x4010, ..Default::default() };
        run(&mut ram, regs, sregs, &POPCNT).unwrap();
        assert_eq!((ram.u32(0x1000), ram.u32(0x2010)), (0x2027, 0x4023));
        run(&mut ram, regs, sregs, &MOVDIRI).unwrap();
        assert_eq!((ram.u32(0x1000), ram.u32(0x2010)), (0x2027, 0x4063));
    }

    #[test]
    fn a_write_across_pages_is_whole_or_a_fault() {
        let (mut ram, sregs) = machine(0, &[(4, 3), (5, 0)]);
        let regs = kvm_regs { rsi: 0x4ffe, rax: 0xffff_ffff, ..Default::default() };
        let fault = Fault { vector: PAGE_FAULT, code: Some(2), address: Some(0x5000) };
        assert_eq!(run(&mut ram, regs, sregs, &MOVDIRI).unwrap_err(), Stop::Fault(fault));
        assert_eq!(ram.u32(0x4ffc), 0);
        ram.put(0x2014, &0x6003_u32.to_le_bytes());
        run(&mut ram, regs, sregs, &MOVDIRI).unwrap();
        assert_eq!((ram.u32(0x4ffc), ram.u32(0x6000)), (0xffff_0000, 0xffff));
    }

    #[test]
    fn where_there_is_no_memory_there_is_no_fix_up() {
        let mut ram = Ram::new(0x1000);
        let regs = kvm_regs { rsi: 0x1_0000, ..Default::default() };
        assert_eq!(run(&mut ram, regs, protected(0), &POPCNT).unwrap_err(), Stop::Unknown);
    }

    #[test]
    fn no_execute_is_a_reserved_bit_until_it_is_enabled() {
        let mut ram = Ram::new(0x8000);
        for (at, entry) in
            [(0x1000, 0x2007_u64), (0x2000, 0x3007), (0x3000, 0x4007), (0x4028, 0x6003 | 1 << 63)]
        {
            ram.put(at, &entry.to_le_bytes());
        }
        let mut sregs = kvm_sregs {
            cr0: CR0_PG | 0x33,
            cr3: 0x1000,
            cr4: CR4_PAE,
            efer: 0x500,
            ..protected(0)
        };
        (sregs.cs.l, sregs.cs.db) = (1, 0);
        let regs = kvm_regs { rsi: 0x5010, ..Default::default() };
        let fault = Fault { vector: PAGE_FAULT, code: Some(9), address: Some(0x5010) };
        assert_eq!(run(&mut ram, regs, sregs, &POPCNT).unwrap_err(), Stop::Fault(fault));
        let sregs = kvm_sregs { efer: 0x500 | EFER_NXE, ..sregs };
        run(&mut ram, regs, sregs, &POPCNT).unwrap();
    }
}

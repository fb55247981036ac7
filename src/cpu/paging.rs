//! Page tables of an ELF program: only what it has is mapped, at its own address, with its
//! permissions. Everything else faults. On the thread that makes the machine.

use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;
use crate::x86::{
    PTE_ACCESSED, PTE_ADDRESS, PTE_DIRTY, PTE_LARGE, PTE_NO_EXECUTE, PTE_PRESENT, PTE_USER,
    PTE_WRITABLE,
};

/// With the accessed and dirty bits set, the processor never writes the tables: forks share them,
/// and a reset finds them unchanged.
pub(super) const PRESENT: u64 = PTE_PRESENT | PTE_ACCESSED | PTE_DIRTY;
const ENTRIES: usize = 512;
const LARGE_PAGE: u64 = 2 << 20;
/// What one page of pointers reaches.
const REACH: u64 = 512 << 30;

/// Whole pages, and what may be done with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The first address.
    pub start: u64,
    /// The address after the last.
    pub end: u64,
    /// Whether ring 3 reaches them.
    pub user: bool,
    /// Whether they can be written.
    pub write: bool,
    /// Whether they can be executed.
    pub execute: bool,
}

impl Mapping {
    fn flags(self) -> u64 {
        let flag = |is_set: bool, flag| if is_set { flag } else { 0 };
        PRESENT
            | flag(self.write, PTE_WRITABLE)
            | flag(self.user, PTE_USER)
            | flag(!self.execute, PTE_NO_EXECUTE)
    }
}

/// What the processor needs of an ELF program's machine. Ring 3 reaches none of it, and only the
/// stack is ever written.
pub const SYSTEM: [Mapping; 3] = [
    system(layout::GDT, layout::PML4, false, false),
    system(layout::EXCEPTION_STACK, layout::EXCEPTION_PAGE, true, false),
    system(layout::EXCEPTION_PAGE, layout::PROGRAM_TABLES, false, true),
];

const fn system(start: u64, end: u64, write: bool, execute: bool) -> Mapping {
    Mapping { start, end, user: false, write, execute }
}

/// Write tables in which these pages, which do not overlap, are mapped at their own addresses.
///
/// # Errors
/// [`ErrorKind::Boot`] if a page is beyond 512 GiB, or there is no room for so many tables.
pub fn write(memory: &GuestMemory, mappings: &[Mapping]) -> Result<()> {
    let mut tables = Tables::default();
    for mapping in mappings {
        if mapping.end > REACH {
            let detail = format!("{:#x} is beyond the 512 GiB of an ELF program", mapping.end);
            return Err(Error::new(ErrorKind::Boot, "boot.path", detail));
        }
        tables.map(*mapping)?;
    }
    for (n, table) in (0..).zip(&tables.tables) {
        let bytes: Vec<u8> = table.iter().copied().flat_map(u64::to_le_bytes).collect();
        memory.write(address_of(n), &bytes)?;
    }
    Ok(())
}

/// The address of the table of this number: the first two have places of their own.
fn address_of(n: u64) -> u64 {
    match n {
        0 => layout::PML4,
        1 => layout::PDPT,
        n => layout::PROGRAM_TABLES + (n - 2) * layout::PAGE,
    }
}

fn most_tables() -> u64 {
    2 + (layout::EBDA_START - layout::PROGRAM_TABLES) / layout::PAGE
}

#[derive(Debug, Default)]
struct Tables {
    tables: Vec<[u64; ENTRIES]>,
}

impl Tables {
    fn map(&mut self, mapping: Mapping) -> Result<()> {
        let mut at = mapping.start;
        while at < mapping.end {
            let is_large = at.is_multiple_of(LARGE_PAGE) && mapping.end - at >= LARGE_PAGE;
            let pdpt = self.below(0, 0)?;
            let directory = self.below(pdpt, index(at, 30))?;
            if is_large {
                self.set(directory, index(at, 21), at | mapping.flags() | PTE_LARGE);
                at += LARGE_PAGE;
            } else {
                let table = self.below(directory, index(at, 21))?;
                self.set(table, index(at, 12), at | mapping.flags());
                at += layout::PAGE;
            }
        }
        Ok(())
    }

    /// The number of the table that an entry of another one names, made if there is none.
    fn below(&mut self, table: u64, entry: usize) -> Result<u64> {
        if self.tables.is_empty() {
            self.tables.push([0; ENTRIES]);
        }
        match self.get(table, entry) & PTE_ADDRESS {
            0 => {
                let new = self.tables.len() as u64;
                if new >= most_tables() {
                    let detail = format!("its pages need more than {} page tables", most_tables());
                    return Err(Error::new(ErrorKind::Boot, "boot.path", detail)
                        .hint("link its segments closer together"));
                }
                self.tables.push([0; ENTRIES]);
                self.set(table, entry, address_of(new) | PRESENT | PTE_WRITABLE | PTE_USER);
                Ok(new)
            }
            layout::PDPT => Ok(1),
            at => Ok(2 + (at - layout::PROGRAM_TABLES) / layout::PAGE),
        }
    }

    fn get(&self, table: u64, entry: usize) -> u64 {
        let table = usize::try_from(table).ok().and_then(|table| self.tables.get(table));
        table.and_then(|table| table.get(entry)).copied().unwrap_or(0)
    }

    fn set(&mut self, table: u64, entry: usize, value: u64) {
        let table = usize::try_from(table).ok().and_then(|table| self.tables.get_mut(table));
        if let Some(slot) = table.and_then(|table| table.get_mut(entry)) {
            *slot = value;
        }
    }
}

fn index(address: u64, shift: u32) -> usize {
    usize::try_from(address >> shift).unwrap_or(0) % ENTRIES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::debug::Paging;
    use kvm_bindings::kvm_sregs;

    fn user(start: u64, end: u64) -> Mapping {
        Mapping { start, end, user: true, write: true, execute: false }
    }

    fn translate(memory: &GuestMemory, address: u64) -> Option<u64> {
        let sregs = kvm_sregs {
            cr0: 1 << 31 | 1,
            cr3: layout::PML4,
            cr4: 1 << 5,
            efer: 1 << 10 | 1 << 8,
            ..Default::default()
        };
        Paging::of(&sregs).translate(address, |at, _| memory.load::<u64>(at).ok())
    }

    #[test]
    fn only_what_is_mapped_has_an_address() {
        let memory = GuestMemory::new(64 << 20).unwrap();
        let large = user(0x40_0000, 0xa0_1000);
        write(&memory, &[user(0x20_1000, 0x20_3000), large]).unwrap();
        for (from, to) in [(0x20_1000, 0x20_3000), (0x40_0000, 0xa0_1000)] {
            assert_eq!(translate(&memory, from - 1), None);
            assert_eq!(translate(&memory, from + 0x123), Some(from + 0x123));
            assert_eq!(translate(&memory, to - 1), Some(to - 1));
            assert_eq!(translate(&memory, to), None);
        }
        let entry = memory.load::<u64>(layout::PROGRAM_TABLES + 2 * 8).unwrap();
        assert_eq!(
            entry,
            0x40_0000 | PTE_NO_EXECUTE | PTE_LARGE | PTE_USER | PTE_WRITABLE | PRESENT
        );
    }

    #[test]
    fn nothing_of_the_system_is_for_ring_3_and_only_its_stack_can_be_written() {
        for mapping in SYSTEM {
            assert!(!mapping.user);
            assert_eq!(mapping.write, mapping.start == layout::EXCEPTION_STACK);
        }
    }

    #[test]
    fn pages_that_need_too_many_tables_are_refused() {
        let memory = GuestMemory::new(128 << 20).unwrap();
        let apart: Vec<_> = (1..30).map(|n| user(n << 21, (n << 21) + 0x1000)).collect();
        assert!(write(&memory, &apart).unwrap_err().detail.contains("page tables"));
        write(&memory, apart.get(..20).unwrap()).unwrap();
        assert!(write(&memory, &[user(1 << 39, 1 << 40)]).is_err());
    }
}

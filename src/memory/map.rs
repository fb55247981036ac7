//! Guest memory at one moment: each slot's mapping by guest-physical address, for reads and writes.
//! A change of slots publishes a new map; accesses in progress finish with the old one. Any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice};

use super::mapping::Mapping;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::PAGE;
use crate::sync::{RwLock, rank};

/// One bit per page of a slot: whether the host has written it since the log was last read.
pub(super) type Written = Arc<[AtomicU64]>;

/// A slot's mapping at its address.
#[derive(Clone, Debug)]
pub(super) struct MappedSlot {
    pub(super) start: u64,
    pub(super) mapping: Arc<Mapping>,
    /// Whether the guest cannot write it.
    pub(super) is_rom: bool,
    /// None if the log is off.
    pub(super) written: Option<Written>,
}

impl MappedSlot {
    /// Log a write of the host, as far as its range lies in this slot.
    pub(super) fn note_write(&self, address: u64, length: u64) {
        let Some(written) = &self.written else { return };
        let end = self.start.saturating_add(self.mapping.size());
        let (from, to) = (address.max(self.start), address.saturating_add(length).min(end));
        if from >= to {
            return;
        }
        for page in (from - self.start) / PAGE..(to - self.start).div_ceil(PAGE) {
            let word = usize::try_from(page / 64).ok().and_then(|at| written.get(at));
            // Relaxed: only the bit matters, and readers take it with an atomic swap too.
            word.map(|word| word.fetch_or(1 << (page % 64), Ordering::Relaxed));
        }
    }
}

/// The map as it is now. Reads and writes take a reference to it; a change replaces it.
pub(super) type CurrentMap = RwLock<Arc<Map>, rank::MemoryMap>;

/// All memory at one moment. It does not share a cache line with the count of its references,
/// which every access changes.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Map {
    pub(super) mmap: Arc<GuestMemoryMmap>,
    /// By address.
    pub(super) mapped: Vec<MappedSlot>,
    pub(super) is_logging: bool,
}

impl Map {
    /// The mapping that contains an address.
    pub(super) fn find(&self, address: u64) -> Option<&MappedSlot> {
        let at = self.mapped.partition_point(|mapped| mapped.start <= address).checked_sub(1)?;
        self.mapped.get(at).filter(|mapped| address - mapped.start < mapped.mapping.size())
    }

    /// The bytes of a range that lies in one slot.
    pub(super) fn slice(
        &self,
        address: u64,
        length: u64,
    ) -> Option<(&MappedSlot, VolatileSlice<'_>)> {
        let mapped = self.find(address)?;
        let (offset, length) = (usize::try_from(address - mapped.start), usize::try_from(length));
        let slice = mapped.mapping.region().get_slice(offset.ok()?, length.ok()?);
        Some((mapped, slice.ok()?))
    }

    /// Log a write of the host.
    pub(super) fn note_write(&self, address: u64, length: u64) {
        if self.is_logging {
            self.mapped.iter().for_each(|mapped| mapped.note_write(address, length));
        }
    }

    /// The error for a range that is not entirely memory.
    pub(super) fn outside(&self, address: u64, length: u64) -> Error {
        let detail =
            format!("{length} bytes there are not entirely in guest memory ({})", self.shown());
        Error::new(ErrorKind::Memory, format!("{address:#x}"), detail)
    }

    /// Its ranges, for messages.
    pub(super) fn shown(&self) -> String {
        const MAX: usize = 8;
        let range = |region: &vm_memory::GuestRegionMmap| {
            format!("{:#x} to {:#x}", region.start_addr().0, region.last_addr().0)
        };
        let ranges: Vec<String> = self.mmap.iter().take(MAX).map(range).collect();
        match self.mapped.len() {
            0 => "there is none".into(),
            all if all > MAX => format!("{} and {} more", ranges.join(", "), all - MAX),
            _ => ranges.join(", "),
        }
    }

    /// The size of all memory, in bytes.
    pub(super) fn size(&self) -> u64 {
        self.mapped.iter().map(|mapped| mapped.mapping.size()).sum()
    }
}

/// Check that a slot can have this address and size.
///
/// # Errors
/// If the address or the size is not a multiple of the page size, or the end is beyond the last
/// address.
pub(super) fn check_place(address: u64, size: u64) -> Result<()> {
    let refuse =
        |detail: String| Err(Error::new(ErrorKind::Memory, format!("{address:#x}"), detail));
    if !address.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) {
        return refuse("memory must start and end at a multiple of 4 KiB".into());
    }
    if address.checked_add(size).is_none() {
        return refuse(format!("{size:#x} bytes there extend beyond the last address"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::anonymous;

    #[test]
    fn a_write_is_noted_in_the_slots_that_it_touches() {
        let place = |start: u64| {
            let written = Some((0..1).map(|_| AtomicU64::new(0)).collect());
            MappedSlot {
                start,
                mapping: Mapping::of_own(anonymous(2 * PAGE).unwrap()),
                is_rom: false,
                written,
            }
        };
        let map =
            Map { mapped: vec![place(0), place(2 * PAGE)], is_logging: true, ..Map::default() };
        map.note_write(2 * PAGE - 1, 2);
        let bits = |at: usize| map.mapped[at].written.as_ref().unwrap()[0].load(Ordering::Relaxed);
        assert_eq!((bits(0), bits(1)), (0b10, 0b01));
        assert_eq!(map.find(4 * PAGE - 1).unwrap().start, 2 * PAGE);
        assert!(map.find(4 * PAGE).is_none());
    }

    #[test]
    fn a_place_that_wraps_or_is_no_page_is_refused() {
        check_place(0, 4096).unwrap();
        for (address, size) in [(1, 4096), (0, 100), (u64::MAX - 4095, 4096), (1 << 63, 1 << 63)] {
            assert!(check_place(address, size).is_err(), "{address:#x} {size:#x}");
        }
    }
}

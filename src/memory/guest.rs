//! Guest memory: host mappings by guest-physical address, read and written with every bound
//! checked. A running guest may change the bytes at the same time; all accesses here allow for
//! that.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use memchr::memmem;
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, MmapRegion, VolatileSlice};

use super::backing::{Backing, anonymous};
use super::image::Image;
use super::map::{Map, Placed};
use super::mapping::Mapping;
use super::ram::Ram;
use super::slots::{DirtyPages, Slot, Slots};
use super::view::{View, is_writable};
use crate::error::{Error, ErrorKind, Result};
use crate::hop::hop;
use crate::layout;
use crate::resources::Resources;

/// How much of guest memory a search copies at a time.
const SEARCH_CHUNK: usize = 1 << 20;

/// The memory of one machine, shared by all who hold it; unmapped when the last one lets go.
#[derive(Clone)]
pub struct GuestMemory(Arc<Slots>);

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl GuestMemory {
    /// No memory at all; [`Self::add`] adds some.
    #[must_use]
    pub fn empty() -> Self {
        Self(Arc::default())
    }

    /// Zeroed memory of this many bytes around the MMIO gap. Pages cost nothing until they are
    /// touched.
    ///
    /// # Errors
    /// When it is more than the host's memory, or the mapping fails.
    pub fn new(size: u64) -> Result<Self> {
        let memory = Self::empty();
        for (start, length) in layout::ram_ranges(size) {
            let region =
                anonymous(length).map_err(|e| Error { at: "memory.size_mib".into(), ..e })?;
            memory.add(start, region, Backing::default())?;
        }
        Ok(memory)
    }

    /// What answers where in the machine of this memory.
    #[must_use]
    pub fn resources(&self) -> &Arc<Resources> {
        self.0.resources()
    }

    /// What tells KVM of this memory.
    pub(crate) fn kvm_slots(&self) -> &Slots {
        &self.0
    }

    /// Its memory slots, by address. Waits for a reset or snapshot.
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        self.0.all()
    }

    /// Whether this is the same machine's memory.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Map memory at a guest-physical address, at once for a machine that has been made.
    ///
    /// # Errors
    /// When it overlaps other memory or what else the machine has, is no whole number of pages, or
    /// KVM refuses it.
    pub fn add(&self, address: u64, mapping: MmapRegion, backing: Backing) -> Result<Slot> {
        let is_own = !backing.shared && mapping.flags() & libc::MAP_SHARED != 0;
        let mapping = if is_own { Mapping::of_own(mapping) } else { Mapping::new(mapping) };
        let ram = mapping.own_file().map(|file| Ram::own(Arc::clone(&mapping), file));
        self.0.add(address, mapping, backing, ram)
    }

    /// Memory that holds what it held at a snapshot.
    ///
    /// # Errors
    /// As for `add`, and when a file behind the snapshot has been changed.
    pub(crate) fn add_image(&self, address: u64, image: &Image, read_only: bool) -> Result<Slot> {
        hop!();
        let mapping = Mapping::new(image.map()?);
        let ram = Ram::over(Arc::clone(&mapping), image.clone());
        self.0.add(address, mapping, Backing { read_only, shared: false }, Some(ram))
    }

    /// Take memory away. Views of it keep their mapping.
    ///
    /// # Errors
    /// When there is no such slot, or KVM refuses.
    pub fn remove(&self, slot: &Slot) -> Result<()> {
        self.0.remove(slot)
    }

    /// Have KVM note the pages that the guest writes, and note those written from here; or stop
    /// that.
    ///
    /// # Errors
    /// When KVM refuses; the log is as before then.
    pub fn log_dirty(&self, is_on: bool) -> Result<()> {
        self.0.log_dirty(is_on)
    }

    /// Whether dirty pages are noted.
    #[must_use]
    pub fn is_logging_dirty(&self) -> bool {
        self.0.map().is_logging
    }

    /// The pages written since the last look, slot by slot, and forget them.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when they are not noted; when KVM refuses.
    pub fn take_dirty(&self) -> Result<Vec<DirtyPages>> {
        self.0.take_dirty()
    }

    /// Note a write as dirty. Every write of the host ends with this call.
    pub(crate) fn note_write(&self, address: u64, length: u64) {
        self.0.note_write(address, length);
    }

    /// Bytes of memory.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.map().size()
    }

    /// The mapping itself, for loaders.
    #[must_use]
    pub fn mmap(&self) -> Arc<GuestMemoryMmap> {
        Arc::clone(&self.0.map().mmap)
    }

    /// Guest-physical start and bytes of each range of memory.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let placed = |placed: &Placed| (placed.start, placed.mapping.size());
        self.0.map().placed.iter().map(placed).collect()
    }

    /// Check that a whole range is memory.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`], with what memory there is.
    pub fn check(&self, address: u64, length: u64) -> Result<()> {
        pieces(&self.0.map(), address, length, |_, _| Ok(()))
    }

    /// Fill `data` from guest memory at `address`.
    ///
    /// # Errors
    /// When any byte of the range is outside memory; `data` is as before then.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<()> {
        // SAFETY: the slice is valid for writes of its length.
        unsafe { self.read_raw(address, data.as_mut_ptr(), data.len()) }
    }

    /// Copy `length` bytes at `address` to `data`, which need not be initialised.
    ///
    /// # Errors
    /// As for `read`.
    ///
    /// # Safety
    /// `data` must be valid for writes of `length` bytes.
    pub unsafe fn read_raw(&self, address: u64, data: *mut u8, length: usize) -> Result<()> {
        let mut done = 0;
        pieces(&self.0.map(), address, length as u64, |_, piece| {
            // SAFETY: the caller vouches for `data`, of which the pieces fill one part after the
            // other. It may be guest memory itself: what overlaps is copied right.
            let to = unsafe { VolatileSlice::new(data.add(done), piece.len()) };
            piece.copy_to_volatile_slice(to);
            done += piece.len();
            Ok(())
        })
    }

    /// Write `data` to guest memory at `address`.
    ///
    /// # Errors
    /// When any byte of the range is outside memory or cannot be written; nothing is written then.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<()> {
        // SAFETY: the slice is valid for reads of its length.
        unsafe { self.write_raw(address, data.as_ptr(), data.len()) }
    }

    /// Copy `length` bytes at `data` to `address`.
    ///
    /// # Errors
    /// As for `write`.
    ///
    /// # Safety
    /// `data` must be valid for reads of `length` bytes.
    pub unsafe fn write_raw(&self, address: u64, data: *const u8, length: usize) -> Result<()> {
        let mut done = 0;
        self.change(address, length as u64, |place| {
            // SAFETY: as in `read_raw`. It is read only: that the slice could be written is not
            // used.
            let from = unsafe { VolatileSlice::new(data.add(done).cast_mut(), place.len()) };
            from.copy_to_volatile_slice(place);
            done += place.len();
        })
    }

    /// Set every byte of a range.
    ///
    /// # Errors
    /// As for `write`.
    pub fn fill(&self, address: u64, length: u64, value: u8) -> Result<()> {
        self.change(address, length, |place| {
            let start = place.ptr_guard_mut();
            // SAFETY: the slice has these bytes, which are of no Rust object.
            unsafe { std::ptr::write_bytes(start.as_ptr(), value, place.len()) };
        })
    }

    fn change(
        &self,
        address: u64,
        length: u64,
        mut piece: impl FnMut(VolatileSlice<'_>),
    ) -> Result<()> {
        let map = self.0.map();
        pieces(&map, address, length, |placed, _| check_writable(placed, address))?;
        pieces(&map, address, length, |_, place| {
            piece(place);
            Ok(())
        })?;
        self.note_write(address, length);
        Ok(())
    }

    /// The little-endian number at an address; in one access where it is aligned.
    ///
    /// # Errors
    /// As for `read`.
    pub fn load<T: vm_memory::AtomicAccess>(&self, address: u64) -> Result<T> {
        let (map, at) = (self.0.map(), GuestAddress(address));
        let length = size_of::<T>() as u64;
        let found = if address.is_multiple_of(length) {
            // SeqCst: as the guest's own locked accesses.
            map.mmap.load(at, Ordering::SeqCst)
        } else {
            map.mmap.read_obj(at)
        };
        found.map_err(|_| map.outside(address, length))
    }

    /// Put a number at an address; in one access where it is aligned.
    ///
    /// # Errors
    /// As for `write`.
    pub fn store<T: vm_memory::AtomicAccess>(&self, address: u64, value: T) -> Result<()> {
        let length = size_of::<T>() as u64;
        if !address.is_multiple_of(length) {
            return self.write(address, value.as_slice());
        }
        let map = self.0.map();
        if let Some(placed) = map.find(address) {
            check_writable(placed, address)?;
        }
        // SeqCst: as in `load`.
        let stored = map.mmap.store(value, GuestAddress(address), Ordering::SeqCst);
        stored.map_err(|_| map.outside(address, length))?;
        self.note_write(address, length);
        Ok(())
    }

    /// A piece of memory without a copy. It has to lie in one slot.
    ///
    /// # Errors
    /// When it does not.
    pub fn view(&self, address: u64, length: u64) -> Result<View> {
        let map = self.0.map();
        let Some(placed) = map.find(address) else {
            return Err(map.outside(address, length));
        };
        let offset = address - placed.start;
        if length > placed.mapping.size() - offset {
            self.check(address, length)?;
            let detail = format!("{length} bytes there lie in more than one memory slot");
            return Err(Error::new(ErrorKind::Memory, format!("{address:#x}"), detail));
        }
        Ok(View::of(Arc::clone(&placed.mapping), to_usize(offset)?, to_usize(length)?))
    }

    /// Where some bytes first stand at or after `start` and wholly before `end`.
    ///
    /// # Errors
    /// When nothing is looked for.
    pub fn find(&self, wanted: &[u8], start: u64, end: u64) -> Result<Option<u64>> {
        if wanted.is_empty() {
            let detail = "there is nothing to look for: no bytes";
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

/// Ranges that touch, as one: first address and the one behind the last.
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

/// Call `piece` with each mapping under a range, and the bytes of the range in it. All of the range
/// is checked before the first call.
fn pieces(
    map: &Map,
    address: u64,
    length: u64,
    mut piece: impl FnMut(&Placed, VolatileSlice<'_>) -> Result<()>,
) -> Result<()> {
    let outside = || map.outside(address, length);
    let mut call = |placed: &Placed, offset: u64, here: u64| {
        let slice = placed.mapping.region().get_slice(to_usize(offset)?, to_usize(here)?);
        piece(placed, slice.map_err(|_| outside())?)
    };
    // The usual access lies in one piece: found once.
    if let Some(placed) = map.find(address) {
        let offset = address - placed.start;
        if length <= placed.mapping.size() - offset {
            return call(placed, offset, length);
        }
    }
    let each = |found: &mut dyn FnMut(&Placed, u64, u64) -> Result<()>| {
        let (mut at, mut left) = (address, length);
        loop {
            let placed = map.find(at).ok_or_else(outside)?;
            let offset = at - placed.start;
            let here = left.min(placed.mapping.size() - offset);
            found(placed, offset, here)?;
            left -= here;
            if left == 0 {
                return Ok(());
            }
            at = at.checked_add(here).ok_or_else(outside)?;
        }
    };
    each(&mut |_, _, _| Ok(()))?;
    each(&mut call)
}

fn check_writable(placed: &Placed, address: u64) -> Result<()> {
    if is_writable(placed.mapping.region()) { Ok(()) } else { Err(read_only(address)) }
}

fn read_only(address: u64) -> Error {
    let detail = "the file of this memory is open for reading only";
    Error::new(ErrorKind::Memory, format!("{address:#x}"), detail)
}

fn to_usize(value: u64) -> Result<usize> {
    usize::try_from(value)
        .map_err(|_| Error::new(ErrorKind::Memory, "memory", "too large for this host"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_write_past_the_end_writes_nothing() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        assert_eq!(memory.write(0xf_ffff, b"ab").unwrap_err().kind, ErrorKind::Memory);
        let mut data = [0; 1];
        memory.read(0xf_ffff, &mut data).unwrap();
        assert_eq!(data, [0]);
    }

    #[test]
    fn more_than_the_host_has_is_refused() {
        let error = GuestMemory::new(1 << 50).unwrap_err();
        assert_eq!(error.at, "memory.size_mib");
    }

    #[test]
    fn a_range_over_the_gap_is_refused() {
        let memory = GuestMemory::new(4 << 30).unwrap();
        memory.write(0x1_0000_0000, b"high").unwrap();
        assert!(memory.write(0xbfff_fffe, b"over").is_err());
    }

    #[test]
    fn ranges_that_touch_are_searched_as_one() {
        assert_eq!(connected(&[(0, 2), (2, 3), (8, 1)]), [(0, 5), (8, 9)]);
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.add(1 << 20, anonymous(4096).unwrap(), Backing::default()).unwrap();
        memory.write((1 << 20) - 2, b"over").unwrap();
        assert_eq!(memory.find(b"over", 0, u64::MAX).unwrap(), Some((1 << 20) - 2));
        assert_eq!(memory.find(b"over", 0, (1 << 20) + 1).unwrap(), None);
    }

    #[test]
    fn a_write_that_is_in_progress_when_the_log_begins_is_noted() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        for _ in 0..2 {
            memory.change(0x3000, 8, |_| memory.log_dirty(true).unwrap()).unwrap();
            let found = memory.take_dirty().unwrap()[0].ranges();
            assert_eq!(found, [(0x3000, 0x1000)]);
            memory.log_dirty(false).unwrap();
        }
    }

    proptest! {
        #[test]
        fn check_agrees_with_a_byte_by_byte_look(address in 0u64..(1 << 20) + 64, length in 0u64..64) {
            let memory = GuestMemory::new(1 << 20).unwrap();
            let all = (address..address + length.max(1)).all(|a| layout::in_memory(1 << 20, a));
            prop_assert_eq!(memory.check(address, length).is_ok(), all);
        }

        #[test]
        fn check_never_panics(address in any::<u64>(), length in any::<u64>()) {
            let _ = GuestMemory::new(1 << 20).unwrap().check(address, length);
        }

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

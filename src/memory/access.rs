//! Reads and writes of guest memory by guest-physical address, with every bound checked. A running
//! guest may change the bytes at the same time; all accesses here allow for that. Any thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use super::guest::GuestMemory;
use super::map::{Map, MappedSlot};
use super::view::{View, is_writable};
use crate::error::{Error, ErrorKind, Result};

impl GuestMemory {
    /// Check that a whole range is memory.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] if it is not; the error lists the memory that exists.
    pub fn check(&self, address: u64, length: u64) -> Result<()> {
        self.moment().check(address, length)
    }

    /// Check that the guest may write a whole range. What writes on the guest's behalf, such as a
    /// device's DMA, checks this first: `write` also writes ROM.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] if a part of the range is read-only, or is not memory.
    pub(crate) fn check_guest_writes(&self, address: u64, length: u64) -> Result<()> {
        self.moment().check_guest_writes(address, length)
    }

    /// Fill `data` from guest memory at `address`.
    ///
    /// # Errors
    /// If any byte of the range is outside memory. `data` is unchanged then.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<()> {
        // SAFETY: the slice is valid for writes of its length.
        unsafe { self.read_raw(address, data.as_mut_ptr(), data.len()) }
    }

    /// Copy `length` bytes at `address` to `data`, which need not be initialized.
    ///
    /// # Errors
    /// As for `read`.
    ///
    /// # Safety
    /// `data` must be valid for writes of `length` bytes.
    pub unsafe fn read_raw(&self, address: u64, data: *mut u8, length: usize) -> Result<()> {
        // SAFETY: the caller guarantees it.
        unsafe { self.moment().read_raw(address, data, length) }
    }

    /// Write `data` to guest memory at `address`.
    ///
    /// # Errors
    /// If any byte of the range is outside memory or cannot be written. Nothing is written then.
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
            // SAFETY: as in `read_raw`. The slice is only read.
            let from = unsafe { VolatileSlice::new(data.add(done).cast_mut(), place.len()) };
            from.copy_to_volatile_slice(place);
            done += place.len();
        })
    }

    /// Set every byte of a range to `value`.
    ///
    /// # Errors
    /// As for `write`.
    pub fn fill(&self, address: u64, length: u64, value: u8) -> Result<()> {
        self.change(address, length, |place| {
            let start = place.ptr_guard_mut();
            // SAFETY: the slice has these bytes, and they belong to no Rust object.
            unsafe { std::ptr::write_bytes(start.as_ptr(), value, place.len()) };
        })
    }

    fn change(
        &self,
        address: u64,
        length: u64,
        piece: impl FnMut(VolatileSlice<'_>),
    ) -> Result<()> {
        self.moment().change(address, length, check_writable, piece)
    }

    /// The little-endian number at an address, loaded in one access if it is aligned.
    ///
    /// # Errors
    /// As for `read`.
    pub fn load<T: vm_memory::AtomicAccess>(&self, address: u64) -> Result<T> {
        let (map, at) = (self.map(), GuestAddress(address));
        let length = size_of::<T>() as u64;
        let found = if address.is_multiple_of(length) {
            // SeqCst: orders it with the guest's locked accesses.
            map.mmap.load(at, Ordering::SeqCst)
        } else {
            map.mmap.read_obj(at)
        };
        found.map_err(|_| map.outside(address, length))
    }

    /// Store a number at an address, in one access if it is aligned.
    ///
    /// # Errors
    /// As for `write`.
    pub fn store<T: vm_memory::AtomicAccess>(&self, address: u64, value: T) -> Result<()> {
        let length = size_of::<T>() as u64;
        if !address.is_multiple_of(length) {
            return self.write(address, value.as_slice());
        }
        let map = self.map();
        if let Some(mapped) = map.find(address) {
            check_writable(mapped, address)?;
        }
        self.kvm_slots().note_touch(address, length);
        // SeqCst: as in `load`.
        let stored = map.mmap.store(value, GuestAddress(address), Ordering::SeqCst);
        stored.map_err(|_| map.outside(address, length))?;
        self.note_write(address, length);
        Ok(())
    }

    /// Direct access to a piece of memory, which must lie in one slot. Writes through it are not
    /// logged; [`Self::writable_view`] is for those.
    ///
    /// # Errors
    /// If it does not.
    pub fn view(&self, address: u64, length: u64) -> Result<View> {
        let map = self.map();
        let Some(mapped) = map.find(address) else {
            return Err(map.outside(address, length));
        };
        let offset = address - mapped.start;
        if length > mapped.mapping.size() - offset {
            self.check(address, length)?;
            let detail = format!("{length} bytes there span more than one memory slot");
            return Err(Error::new(ErrorKind::Memory, format!("{address:#x}"), detail));
        }
        Ok(View::of(Arc::clone(&mapped.mapping), to_usize(offset)?, to_usize(length)?))
    }
}

/// Call `piece` with each mapping under a range, and the range's bytes in it. The whole range is
/// checked before the first call.
pub(super) fn pieces<'a>(
    map: &'a Map,
    address: u64,
    length: u64,
    mut piece: impl FnMut(&'a MappedSlot, VolatileSlice<'a>) -> Result<()>,
) -> Result<()> {
    // Most accesses lie in one slot, which is looked up once.
    if let Some((mapped, slice)) = map.slice(address, length) {
        return piece(mapped, slice);
    }
    let outside = || map.outside(address, length);
    let mut call = |mapped: &'a MappedSlot, offset: u64, here: u64| {
        let slice = mapped.mapping.region().get_slice(to_usize(offset)?, to_usize(here)?);
        piece(mapped, slice.map_err(|_| outside())?)
    };
    let each = |found: &mut dyn FnMut(&'a MappedSlot, u64, u64) -> Result<()>| {
        let (mut at, mut left) = (address, length);
        loop {
            let mapped = map.find(at).ok_or_else(outside)?;
            let offset = at - mapped.start;
            let here = left.min(mapped.mapping.size() - offset);
            found(mapped, offset, here)?;
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

fn check_writable(mapped: &MappedSlot, address: u64) -> Result<()> {
    if is_writable(mapped.mapping.region()) { Ok(()) } else { Err(read_only(address)) }
}

pub(super) fn check_guest_writable(mapped: &MappedSlot, address: u64) -> Result<()> {
    if mapped.is_rom {
        let detail = "the guest cannot write this memory";
        return Err(Error::new(ErrorKind::Memory, format!("{address:#x}"), detail));
    }
    check_writable(mapped, address)
}

fn read_only(address: u64) -> Error {
    let detail = "the file of this memory is open for reading only";
    Error::new(ErrorKind::Memory, format!("{address:#x}"), detail)
}

pub(super) fn to_usize(value: u64) -> Result<usize> {
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
    fn a_range_over_the_gap_is_refused() {
        let memory = GuestMemory::new(4 << 30).unwrap();
        memory.write(0x1_0000_0000, b"high").unwrap();
        assert!(memory.write(0xbfff_fffe, b"over").is_err());
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
            let all = (address..address + length.max(1)).all(|a| crate::layout::in_memory(1 << 20, a));
            prop_assert_eq!(memory.check(address, length).is_ok(), all);
        }

        #[test]
        fn check_never_panics(address in any::<u64>(), length in any::<u64>()) {
            let _ = GuestMemory::new(1 << 20).unwrap().check(address, length);
        }
    }
}

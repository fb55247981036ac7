//! Guest memory with the slots of one moment: for accesses that follow each other in a short time,
//! such as those of a device to its queues, which look the current slots up once. Any thread.

use std::iter::FusedIterator;
use std::sync::Arc;

use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{GuestAddress, GuestMemoryError, GuestMemoryMmap, Permissions, VolatileSlice};

use super::access::{check_guest_writable, pieces};
use super::guest::GuestMemory;
use super::map::{Map, MappedSlot};
use super::slots::Slots;
use crate::error::Result;

/// See the module.
#[derive(Debug)]
pub(crate) struct Moment<'a> {
    slots: &'a Slots,
    pub(super) map: Arc<Map>,
}

impl GuestMemory {
    /// Memory with the slots that it has now.
    pub(crate) fn moment(&self) -> Moment<'_> {
        Moment { slots: self.kvm_slots(), map: self.map() }
    }
}

/// As vm-memory has it, for virtio's queues. What is written is noted by [`Moment::note_write`].
impl vm_memory::GuestMemory for Moment<'_> {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, count: usize, _: Permissions) -> bool {
        self.has(address.0, count as u64)
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        _: Permissions,
    ) -> vm_memory::guest_memory::Result<impl GuestMemorySliceIterator<'a, ()>> {
        // Most ranges lie in one slot.
        if let Some((_, slice)) = self.map.slice(address.0, count as u64) {
            return Ok(Each { first: Some(slice), rest: Vec::new().into_iter() });
        }
        let mut rest = Vec::new();
        self.slices(address.0, count, |piece| rest.push(piece));
        if rest.is_empty() {
            return Err(GuestMemoryError::InvalidGuestAddress(address));
        }
        Ok(Each { first: None, rest: rest.into_iter() })
    }
}

/// The pieces of a range: one, unless it crosses slots.
struct Each<'a> {
    first: Option<VolatileSlice<'a>>,
    rest: std::vec::IntoIter<VolatileSlice<'a>>,
}

impl<'a> Iterator for Each<'a> {
    type Item = vm_memory::guest_memory::Result<VolatileSlice<'a>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        self.first.take().or_else(|| self.rest.next()).map(Ok)
    }
}

impl FusedIterator for Each<'_> {}

impl<'a> GuestMemorySliceIterator<'a, ()> for Each<'a> {}

impl Moment<'_> {
    /// Whether a whole range is memory.
    pub(crate) fn has(&self, address: u64, length: u64) -> bool {
        self.check(address, length).is_ok()
    }

    /// Whether the guest may write a whole range.
    pub(crate) fn can_guest_write(&self, address: u64, length: u64) -> bool {
        self.check_guest_writes(address, length).is_ok()
    }

    /// The pieces of a range, which lie in one slot each; none if it is not entirely memory.
    pub(crate) fn slices<'a>(
        &'a self,
        address: u64,
        length: usize,
        mut piece: impl FnMut(VolatileSlice<'a>),
    ) {
        // Fails only if slots have changed.
        let _ = pieces(&self.map, address, length as u64, |_, slice| {
            piece(slice);
            Ok(())
        });
    }

    /// See [`GuestMemory::check`].
    pub(crate) fn check(&self, address: u64, length: u64) -> Result<()> {
        pieces(&self.map, address, length, |_, _| Ok(()))
    }

    /// See [`GuestMemory::check_guest_writes`].
    pub(crate) fn check_guest_writes(&self, address: u64, length: u64) -> Result<()> {
        pieces(&self.map, address, length, |mapped, _| check_guest_writable(mapped, address))
    }

    /// See [`GuestMemory::read`].
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) -> Result<()> {
        // SAFETY: the slice is valid for writes of its length.
        unsafe { self.read_raw(address, data.as_mut_ptr(), data.len()) }
    }

    /// See [`GuestMemory::read_raw`].
    ///
    /// # Safety
    /// `data` must be valid for writes of `length` bytes.
    pub(super) unsafe fn read_raw(&self, address: u64, data: *mut u8, length: usize) -> Result<()> {
        let mut done = 0;
        pieces(&self.map, address, length as u64, |_, piece| {
            // SAFETY: the caller guarantees `data`, and the pieces fill it part by part. It may be
            // guest memory itself: overlapping bytes are copied correctly.
            let to = unsafe { VolatileSlice::new(data.add(done), piece.len()) };
            piece.copy_to_volatile_slice(to);
            done += piece.len();
            Ok(())
        })
    }

    /// Write `data` as the guest would.
    ///
    /// # Errors
    /// As for [`Self::check_guest_writes`]. Nothing is written then.
    pub(crate) fn write_for_guest(&self, address: u64, data: &[u8]) -> Result<()> {
        let mut left = data;
        self.change(address, data.len() as u64, check_guest_writable, |place| {
            let (now, rest) = left.split_at(place.len().min(left.len()));
            place.copy_from(now);
            left = rest;
        })
    }

    /// Change the bytes of a range, once `check` has accepted each slot under it.
    pub(super) fn change(
        &self,
        address: u64,
        length: u64,
        check: fn(&MappedSlot, u64) -> Result<()>,
        mut piece: impl FnMut(VolatileSlice<'_>),
    ) -> Result<()> {
        pieces(&self.map, address, length, |mapped, _| check(mapped, address))?;
        self.slots.note_touch(address, length);
        pieces(&self.map, address, length, |_, place| {
            piece(place);
            Ok(())
        })?;
        self.note_write(address, length);
        Ok(())
    }

    /// Log a finished write of the host.
    pub(crate) fn note_write(&self, address: u64, length: u64) {
        self.slots.note_write(address, length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, anonymous};

    #[test]
    fn it_keeps_the_slots_that_it_began_with_and_logs_in_those_that_there_are() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let before = memory.moment();
        let slot = memory.add(1 << 32, anonymous(4096).unwrap(), Backing::default()).unwrap();
        assert!(before.check(1 << 32, 1).is_err());
        let both = memory.moment();
        both.check_guest_writes(1 << 32, 4096).unwrap();
        memory.log_dirty(true).unwrap();
        before.write_for_guest(0x5000, &[1]).unwrap();
        assert!(before.write_for_guest((1 << 20) - 1, &[1, 2]).is_err());
        let dirty = memory.take_dirty().unwrap();
        assert_eq!(dirty.first().unwrap().ranges(), [(0x5000, 4096)]);
        memory.remove(&slot).unwrap();
        assert!(memory.check(1 << 32, 1).is_err());
        let mut bytes = [9; 2];
        both.read(1 << 32, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 2], "its mapping is kept");
    }
}

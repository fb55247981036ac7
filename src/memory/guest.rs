//! `GuestMemory`, the guest memory of one machine: creates it, and adds and removes slots.
//! `access.rs` reads and writes it, `search.rs` searches it. Any thread.

use std::fmt;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::backing::{Backing, anonymous};
use super::dirty::DirtyPages;
use super::image::Image;
use super::map::{Map, MappedSlot};
use super::mapping::Mapping;
use super::ram::Ram;
use super::slots::Slots;
use super::table::Slot;
use super::view::WritableView;
use crate::error::{Error, Result};
use crate::hop::hop;
use crate::layout;
use crate::resources::Resources;

/// The memory of one machine. Clones share it; it is unmapped when the last one is dropped.
#[derive(Clone)]
pub struct GuestMemory(Arc<Slots>);

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl GuestMemory {
    /// Without any memory; [`Self::add`] adds some.
    #[must_use]
    pub fn empty() -> Self {
        Self(Arc::default())
    }

    /// Zeroed memory of this many bytes around the MMIO gap. Pages are allocated when they are
    /// first touched.
    ///
    /// # Errors
    /// If it is larger than the host's memory, or the mapping fails.
    pub fn new(size: u64) -> Result<Self> {
        let memory = Self::empty();
        for (start, length) in layout::ram_ranges(size) {
            let region =
                anonymous(length).map_err(|e| Error { at: "memory.size_mib".into(), ..e })?;
            memory.add(start, region, Backing::default())?;
        }
        Ok(memory)
    }

    /// The owners of addresses in the machine that has this memory.
    #[must_use]
    pub fn resources(&self) -> &Arc<Resources> {
        self.0.resources()
    }

    /// The current map of memory.
    pub(super) fn map(&self) -> Arc<Map> {
        self.0.map()
    }

    /// Its slots, as KVM and snapshots need them.
    pub(crate) fn kvm_slots(&self) -> &Slots {
        &self.0
    }

    /// Its memory slots, by address. Waits while a reset or snapshot is in progress.
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        self.0.all()
    }

    /// Whether both are handles of the same memory.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Map memory at a guest-physical address. If the machine exists, its guest sees the memory at
    /// once.
    ///
    /// # Errors
    /// If it overlaps other memory or a device, is not a whole number of pages, or KVM refuses it.
    pub fn add(&self, address: u64, mapping: MmapRegion, backing: Backing) -> Result<Slot> {
        let is_own = !backing.shared && mapping.flags() & libc::MAP_SHARED != 0;
        let mapping = if is_own { Mapping::of_own(mapping) } else { Mapping::new(mapping) };
        let ram = mapping.own_file().map(|file| Ram::new(Arc::clone(&mapping), file));
        self.0.add(address, mapping, backing, ram)
    }

    /// Map a snapshot's memory at its address.
    ///
    /// # Errors
    /// As for `add`. If a file behind the snapshot has been changed.
    pub(crate) fn add_image(&self, address: u64, image: &Image, read_only: bool) -> Result<Slot> {
        hop!();
        let mapping = Mapping::new(image.map()?);
        let ram = Ram::from_image(Arc::clone(&mapping), image.clone());
        self.0.add(address, mapping, Backing { read_only, shared: false }, Some(ram))
    }

    /// Remove memory. Views of it keep their mapping.
    ///
    /// # Errors
    /// If there is no such slot, or KVM refuses.
    pub fn remove(&self, slot: &Slot) -> Result<()> {
        self.0.remove(slot)
    }

    /// Start or stop logging the pages that the guest or the host writes.
    ///
    /// # Errors
    /// If KVM refuses. The log is unchanged then.
    pub fn log_dirty(&self, is_on: bool) -> Result<()> {
        self.0.log_dirty(is_on)
    }

    /// Whether written pages are logged.
    #[must_use]
    pub fn is_logging_dirty(&self) -> bool {
        self.map().is_logging
    }

    /// Return and clear the log of written pages, slot by slot.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if the log is off. If KVM refuses.
    pub fn take_dirty(&self) -> Result<Vec<DirtyPages>> {
        self.0.take_dirty()
    }

    /// Log a write. Every write of the host ends with this call.
    pub(crate) fn note_write(&self, address: u64, length: u64) {
        self.0.note_write(address, length);
    }

    /// The size of all slots together, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.map().size()
    }

    /// A view that may be written at any time: while it lives, each read of the log includes its
    /// pages.
    ///
    /// # Errors
    /// As for [`Self::view`].
    pub fn writable_view(&self, address: u64, length: u64) -> Result<WritableView> {
        let view = self.view(address, length)?;
        Ok(WritableView::new(view, address, &self.0.map, &self.0.views))
    }

    /// Guest-physical start and size of each slot.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let mapped = |mapped: &MappedSlot| (mapped.start, mapped.mapping.size());
        self.map().mapped.iter().map(mapped).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writable_view_is_logged_as_long_as_it_lives_and_once_more() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.log_dirty(true).unwrap();
        let logged = || memory.take_dirty().unwrap()[0].ranges();
        let view: WritableView = memory.writable_view(0x2ffe, 4).unwrap();
        let _only_read = memory.view(0x7000, 4).unwrap();
        for _ in 0..2 {
            assert_eq!(logged(), [(0x2000, 0x2000)]);
        }
        drop(view);
        assert_eq!(logged(), [(0x2000, 0x2000)]);
        assert_eq!(logged(), []);
    }

    #[test]
    fn a_view_of_memory_that_was_removed_is_not_logged_in_what_came_there() {
        let memory = GuestMemory::empty();
        let add = || memory.add(0, anonymous(0x2000).unwrap(), Backing::default()).unwrap();
        let slot = add();
        let view = memory.writable_view(0, 4).unwrap();
        memory.remove(&slot).unwrap();
        add();
        memory.log_dirty(true).unwrap();
        assert_eq!(memory.take_dirty().unwrap()[0].ranges(), []);
        drop(view);
        assert_eq!(memory.take_dirty().unwrap()[0].ranges(), []);
    }

    #[test]
    fn a_view_does_not_keep_the_machines_memory() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let slots = Arc::downgrade(&memory.0);
        let view = memory.writable_view(0, 4).unwrap();
        drop(memory);
        assert!(slots.upgrade().is_none());
        assert_eq!(view.view().len(), 4);
    }

    #[test]
    fn more_than_the_host_has_is_refused() {
        let error = GuestMemory::new(1 << 50).unwrap_err();
        assert_eq!(error.at, "memory.size_mib");
    }
}

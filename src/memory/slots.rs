//! Memory slots: what KVM is told of guest memory, one mapping a slot, and the log of written
//! pages.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::backing::Backing;
use super::image::MemoryRange;
use super::map::{Map, Placed, Written, check_place};
use super::mapping::Mapping;
use super::ram::Ram;
use crate::error::{Error, ErrorKind, Result};
use crate::hop::hop;
use crate::layout::PAGE;
use crate::resources::{Kind, Resources};
use crate::sync::{Mutex, RwLock, rank};

/// A memory slot of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// KVM's number for it.
    pub number: u32,
    /// Guest-physical start.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// What stands behind it.
    pub backing: Backing,
}

/// The pages of one slot that have been written since the last look: one bit a page of 4 KiB, the
/// first page lowest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    /// Guest-physical start of the slot.
    pub start: u64,
    /// Its bitmap, with as many words as its pages need.
    pub bitmap: Vec<u64>,
}

impl DirtyPages {
    /// Start and bytes of each run of written pages.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (word, base) in self.bitmap.iter().zip((self.start..).step_by(64 * 4096)) {
            let mut left = *word;
            while left != 0 {
                let bit = left.trailing_zeros();
                let run = (left >> bit).trailing_ones();
                let (start, length) = (base + u64::from(bit) * PAGE, u64::from(run) * PAGE);
                match ranges.last_mut() {
                    Some((first, bytes)) if *first + *bytes == start => *bytes += length,
                    _ => ranges.push((start, length)),
                }
                left &= !(u64::MAX >> (64 - run) << bit);
            }
        }
        ranges
    }
}

#[derive(Debug)]
struct Entry {
    slot: Slot,
    mapping: Arc<Mapping>,
    /// None for memory that others may have too.
    ram: Option<Ram>,
    /// Pages written by the host while the log is on.
    written: Option<Written>,
}

impl Entry {
    fn region(&self, size: u64, is_logging: bool) -> kvm_userspace_memory_region {
        let log = if is_logging { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let read_only = if self.slot.backing.read_only { KVM_MEM_READONLY } else { 0 };
        kvm_userspace_memory_region {
            slot: self.slot.number,
            flags: log | read_only,
            guest_phys_addr: self.slot.start,
            memory_size: size,
            userspace_addr: self.mapping.host(),
        }
    }

    fn words(&self) -> u64 {
        (self.slot.size / PAGE).div_ceil(64)
    }

    fn set_log(&mut self, is_on: bool) {
        let words = || (0..self.words()).map(|_| AtomicU64::new(0)).collect();
        self.written = is_on.then(words);
    }

    fn placed(&self) -> Placed {
        let (mapping, written) = (Arc::clone(&self.mapping), self.written.clone());
        Placed { start: self.slot.start, mapping, written }
    }

    /// Whether it has the place of a snapshot's range, and can be brought back to it.
    fn is_at(&self, range: &MemoryRange) -> bool {
        let Slot { start, size, backing, .. } = self.slot;
        self.ram.is_some()
            && (start, size, backing.read_only)
                == (range.start, range.image.size(), range.read_only)
    }
}

/// The slots of one machine. KVM is told once the machine is there.
///
/// One lock is held from the check to the end of every change: of slots, of the log, and of what
/// the slots hold. So a snapshot is frozen, and a reset put in place, over the mappings that were
/// found. Reading and writing need it not: they work on a map that a change replaces.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    vm: OnceLock<Arc<VmFd>>,
    resources: Arc<Resources>,
    table: Mutex<Table, rank::MemorySlots>,
    /// Changed with the table's lock held.
    map: RwLock<Arc<Map>, rank::MemoryMap>,
}

#[derive(Debug, Default)]
struct Table {
    /// By address.
    entries: Vec<Entry>,
    is_logging: bool,
}

impl Table {
    /// # Errors
    /// [`ErrorKind::State`] when the slots are not those of the snapshot. Memory shared with others
    /// is in no snapshot.
    fn check(&self, ranges: &[MemoryRange]) -> Result<()> {
        let own = self.entries.iter().filter(|entry| entry.ram.is_some());
        if own.clone().count() == ranges.len()
            && own.zip(ranges).all(|(entry, range)| entry.is_at(range))
        {
            return Ok(());
        }
        let detail = "the machine's memory slots are others than the snapshot's";
        let error = Error::new(ErrorKind::State, "reset", detail);
        Err(error.hint("add and remove memory so that they are the same, or fork the snapshot"))
    }

    fn map(&self, mmap: Arc<GuestMemoryMmap>) -> Arc<Map> {
        let placed = self.entries.iter().map(Entry::placed).collect();
        Arc::new(Map { mmap, placed, is_logging: self.is_logging })
    }
}

fn tell(vm: Option<&Arc<VmFd>>, region: kvm_userspace_memory_region) -> Result<()> {
    let Some(vm) = vm else { return Ok(()) };
    // SAFETY: the range is a mapping that its entry owns: the entry goes after this has told KVM
    // that the slot is gone, and all of them after the last hold on the VM descriptor. Ranges do
    // not overlap: the table's owner has checked that.
    unsafe { vm.set_user_memory_region(region) }.map_err(|e| {
        let error = Error::kvm("KVM_SET_USER_MEMORY_REGION", e);
        let (start, size) = (region.guest_phys_addr, region.memory_size);
        Error { detail: format!("{} ({size:#x} bytes at {start:#x})", error.detail), ..error }
            .hint("addresses end with the processor's physical ones, and KVM has a number of slots")
    })
}

impl Slots {
    /// Tell a new machine of every slot.
    ///
    /// # Errors
    /// When it is another machine's memory already, or KVM refuses a slot.
    pub(crate) fn attach(&self, vm: &Arc<VmFd>) -> Result<()> {
        let table = self.table.lock();
        if self.vm.set(Arc::clone(vm)).is_err() {
            let detail = "this memory is another machine's already";
            return Err(Error::new(ErrorKind::State, "memory", detail));
        }
        let region = |entry: &Entry| entry.region(entry.slot.size, table.is_logging);
        table.entries.iter().try_for_each(|entry| tell(Some(vm), region(entry)))
    }

    /// What memory there is now.
    pub(super) fn map(&self) -> Arc<Map> {
        Arc::clone(&self.map.read())
    }

    /// What answers where in the machine.
    pub(crate) fn resources(&self) -> &Arc<Resources> {
        &self.resources
    }

    /// Note a finished write of the host as dirty. The current map is used, not the one that the
    /// write started with: if the log was switched on in between, the write belongs in it.
    pub(super) fn note_write(&self, address: u64, length: u64) {
        self.map.read().note_write(address, length);
    }

    /// # Errors
    /// When it overlaps something, or KVM refuses it; nothing is changed then.
    pub(super) fn add(
        &self,
        address: u64,
        mapping: Arc<Mapping>,
        backing: Backing,
        ram: Option<Ram>,
    ) -> Result<Slot> {
        let size = mapping.size();
        check_place(address, size)?;
        self.resources.claim(Kind::Memory, (address, size), "memory").map_err(|other| {
            let detail = format!("{size:#x} bytes there overlap {other}");
            Error::new(ErrorKind::Memory, format!("{address:#x}"), detail)
                .hint("leave that range out: add memory below and above it")
        })?;
        let added = self.add_claimed(address, mapping, backing, ram);
        if added.is_err() {
            self.resources.release(Kind::Memory, address);
        }
        added
    }

    fn add_claimed(
        &self,
        address: u64,
        mapping: Arc<Mapping>,
        backing: Backing,
        ram: Option<Ram>,
    ) -> Result<Slot> {
        let size = mapping.size();
        let region = GuestRegionMmap::with_arc(Arc::clone(mapping.region()), GuestAddress(address));
        let mut table = self.table.lock();
        let map = self.map();
        let more = region.and_then(|region| map.mmap.insert_region(Arc::new(region)).ok());
        let Some(mmap) = more else {
            let detail = format!("{size:#x} bytes there overlap other memory ({})", map.shown());
            return Err(Error::new(ErrorKind::Memory, format!("{address:#x}"), detail));
        };
        let is_free = |number: &u32| table.entries.iter().all(|e| e.slot.number != *number);
        let number = (0..=u32::from(u16::MAX)).find(is_free).unwrap_or(u32::MAX);
        let slot = Slot { number, start: address, size, backing };
        let mut entry = Entry { slot, mapping, ram, written: None };
        entry.set_log(table.is_logging);
        tell(self.vm.get(), entry.region(size, table.is_logging))?;
        let place = table.entries.partition_point(|entry| entry.slot.start < address);
        table.entries.insert(place, entry);
        *self.map.write() = table.map(Arc::new(mmap));
        Ok(slot)
    }

    pub(super) fn remove(&self, slot: &Slot) -> Result<()> {
        let mut table = self.table.lock();
        let Some(at) = table.entries.iter().position(|e| e.slot == *slot) else {
            let detail = "the machine has no such memory slot, or no longer";
            return Err(Error::new(ErrorKind::Memory, format!("{:#x}", slot.start), detail));
        };
        tell(self.vm.get(), table.entries[at].region(0, false))?;
        let removed = table.entries.remove(at);
        let left = self.map().mmap.remove_region(GuestAddress(slot.start), slot.size);
        let mmap = left.map(|(mmap, _)| mmap).unwrap_or_default();
        let before = std::mem::replace(&mut *self.map.write(), table.map(Arc::new(mmap)));
        drop(table);
        self.resources.release(Kind::Memory, slot.start);
        // Unmapping takes its time: without the lock.
        drop((removed, before));
        Ok(())
    }

    pub(super) fn all(&self) -> Vec<Slot> {
        self.table.lock().entries.iter().map(|e| e.slot).collect()
    }

    pub(super) fn log_dirty(&self, is_on: bool) -> Result<()> {
        let mut table = self.table.lock();
        if table.is_logging == is_on {
            return Ok(());
        }
        let tell_all = |table: &Table, is_on| {
            let mut all = table.entries.iter();
            all.try_for_each(|e| tell(self.vm.get(), e.region(e.slot.size, is_on)))
        };
        let set = |table: &mut Table, is_on| {
            table.entries.iter_mut().for_each(|entry| entry.set_log(is_on));
            table.is_logging = is_on;
            let mmap = Arc::clone(&self.map().mmap);
            *self.map.write() = table.map(mmap);
        };
        // The host's writes are noted for as long as the guest's may be.
        if is_on {
            set(&mut table, true);
        }
        if let Err(error) = tell_all(&table, is_on) {
            let _ = tell_all(&table, !is_on);
            set(&mut table, !is_on);
            return Err(error);
        }
        if !is_on {
            set(&mut table, false);
        }
        Ok(())
    }

    /// What every slot holds, for good: the guest is at rest. Start, image and whether the guest
    /// cannot write it.
    pub(crate) fn freeze(&self) -> Result<Vec<MemoryRange>> {
        hop!();
        let mut table = self.table.lock();
        if let Some(entry) = table.entries.iter().find(|entry| entry.ram.is_none()) {
            let at = format!("memory at {:#x}", entry.slot.start);
            let detail = "it is shared with others, who go on writing it";
            let error = Error::new(ErrorKind::State, at, detail);
            return Err(error.hint("remove that slot before the snapshot, and add it to each fork"));
        }
        let mut all = Vec::new();
        for Entry { slot, ram, .. } in &mut table.entries {
            let image = ram.as_mut().map(Ram::freeze).transpose()?;
            let range =
                |image| MemoryRange { start: slot.start, read_only: slot.backing.read_only, image };
            all.extend(image.map(range));
        }
        Ok(all)
    }

    /// Check that ranges can be brought back now.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine's slots are others.
    pub(crate) fn check(&self, ranges: &[MemoryRange]) -> Result<()> {
        self.table.lock().check(ranges)
    }

    /// Bring ranges back, each to the slot at its address, once `begin` has been called; how many
    /// bytes were changed for it. The slots are checked here: they may have changed since somebody
    /// looked.
    ///
    /// # Errors
    /// As for `check`, and when a file behind them was changed: nothing is changed then. When
    /// memory or a mapping is missing some of the machine's memory is as before.
    pub(crate) fn reset(&self, ranges: &[MemoryRange], begin: impl FnOnce()) -> Result<u64> {
        let mut table = self.table.lock();
        table.check(ranges)?;
        ranges.iter().try_for_each(|range| range.image.check())?;
        begin();
        let mut changed = 0;
        let own = table.entries.iter_mut().filter(|entry| entry.ram.is_some());
        for (entry, range) in own.zip(ranges) {
            let Some(ram) = &mut entry.ram else { continue };
            for (from, to) in ram.reset(&range.image)? {
                changed += to - from;
                entry.placed().note_write(range.start + from, to - from);
            }
        }
        Ok(changed)
    }

    /// What has been written since the last look, and forget it.
    pub(super) fn take_dirty(&self) -> Result<Vec<DirtyPages>> {
        let table = self.table.lock();
        if !table.is_logging {
            let error = Error::new(ErrorKind::State, "dirty", "dirty pages are not logged");
            return Err(error.hint("set memory.log_dirty to True first"));
        }
        let mut all = Vec::new();
        for entry in &table.entries {
            let size = usize::try_from(entry.slot.size).unwrap_or(0);
            let written = entry.written.as_deref().unwrap_or(&[]);
            let mut bitmap = match self.vm.get() {
                Some(vm) => vm
                    .get_dirty_log(entry.slot.number, size)
                    .map_err(|e| Error::kvm("KVM_GET_DIRTY_LOG", e))?,
                None => vec![0; written.len()],
            };
            for (word, written) in bitmap.iter_mut().zip(written) {
                // Relaxed: as where it is set.
                *word |= written.swap(0, Ordering::Relaxed);
            }
            all.push(DirtyPages { start: entry.slot.start, bitmap });
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_have_the_bits_of_the_bitmap(bitmap in prop::collection::vec(
            prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..4,
        )) {
            let pages = DirtyPages { start: 0x1000, bitmap };
            let mut bits = vec![0; pages.bitmap.len()];
            let mut behind = 0;
            for (start, length) in pages.ranges() {
                prop_assert!(start > behind, "sorted, and joined where they touch");
                behind = start + length;
                for page in (start - 0x1000) / PAGE..(start + length - 0x1000) / PAGE {
                    bits[usize::try_from(page / 64).unwrap()] |= 1u64 << (page % 64);
                }
            }
            prop_assert_eq!(bits, pages.bitmap);
        }
    }
}

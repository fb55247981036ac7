//! The memory slots of a machine, and their lock: adds and removes slots, also in KVM. Any thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::backing::Backing;
use super::map::{CurrentMap, Map, check_place};
use super::mapping::Mapping;
use super::ram::Ram;
use super::table::{Entry, Slot, Table};
use super::touched::Touched;
use super::view::WritableViews;
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::resources::{ResourceKind, Resources};
use crate::sync::{Mutex, rank};

/// The slots of one machine. They are set in KVM once the machine exists.
///
/// Every change of the slots, of the log or of the slots' contents holds one lock from its check to
/// its end. So a snapshot freezes, and a reset replaces, exactly the mappings that were checked.
/// Reads and writes do not need the lock: they use a map, which every change of the slots replaces.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    pub(super) vm: OnceLock<Arc<VmFd>>,
    resources: Arc<Resources>,
    pub(super) table: Mutex<Table, rank::MemorySlots>,
    /// Replaced only with the table's lock held.
    pub(super) map: Arc<CurrentMap>,
    /// Views whose pages the log always includes.
    pub(super) views: Arc<WritableViews>,
    /// Writes of the host to the guest's first tables.
    touched: Touched,
    /// Whether the current map logs writes: without a log, a write need not look the map up.
    pub(super) is_logging: AtomicBool,
}

impl Slots {
    /// Set every slot in a new machine.
    ///
    /// # Errors
    /// If the memory belongs to another machine already, or KVM refuses a slot.
    pub(crate) fn attach(&self, vm: &Arc<VmFd>) -> Result<()> {
        let table = self.table.lock();
        if self.vm.set(Arc::clone(vm)).is_err() {
            let detail = "this memory belongs to another machine already";
            return Err(Error::new(ErrorKind::State, "memory", detail));
        }
        let region = |entry: &Entry| entry.region(entry.slot.size, table.is_logging);
        table.entries.iter().try_for_each(|entry| self.set_region(region(entry)))
    }

    /// The current map of memory.
    pub(super) fn map(&self) -> Arc<Map> {
        Arc::clone(&self.map.read())
    }

    /// The owners of the machine's addresses.
    pub(crate) fn resources(&self) -> &Arc<Resources> {
        &self.resources
    }

    /// Log a finished write of the host. This uses the current map, not the one that the write
    /// started with: if the log was switched on in between, the write belongs in it.
    pub(super) fn note_write(&self, address: u64, length: u64) {
        self.touched.note(address, length);
        // Acquire: pairs with the release of `log_dirty`, after which a new write is logged.
        if self.is_logging.load(Ordering::Acquire) {
            self.map.read().note_write(address, length);
        }
    }

    /// A write of the host begins.
    pub(super) fn note_touch(&self, address: u64, length: u64) {
        self.touched.note(address, length);
    }

    /// Whether the host may have changed the guest's first tables since the last call: by a write,
    /// by a view, or by other memory in their place.
    pub(crate) fn take_touched(&self) -> bool {
        // Both are asked: each forgets what it reports.
        self.touched.take() | self.views.take_touched()
    }

    /// Add a slot.
    ///
    /// # Errors
    /// If it overlaps something else, or KVM refuses it. Nothing is changed then.
    pub(super) fn add(
        &self,
        address: u64,
        mapping: Arc<Mapping>,
        backing: Backing,
        ram: Option<Ram>,
    ) -> Result<Slot> {
        let size = mapping.size();
        check_place(address, size)?;
        self.resources.claim(ResourceKind::Memory, (address, size), "memory").map_err(|other| {
            let detail = format!("{size:#x} bytes there overlap {other}");
            Error::new(ErrorKind::Memory, format!("{address:#x}"), detail)
                .hint("leave that range out: add memory below and above it")
        })?;
        let added = self.add_claimed(address, mapping, backing, ram);
        if added.is_err() {
            self.resources.release(ResourceKind::Memory, address);
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
        self.touched.note(address, size);
        self.set_region(entry.region(size, table.is_logging))?;
        let place = table.entries.partition_point(|entry| entry.slot.start < address);
        table.entries.insert(place, entry);
        *self.map.write() = table.map(Arc::new(mmap));
        Ok(slot)
    }

    /// Remove a slot.
    ///
    /// # Errors
    /// If there is no such slot, or KVM refuses.
    pub(super) fn remove(&self, slot: &Slot) -> Result<()> {
        let mut table = self.table.lock();
        let Some(at) = table.entries.iter().position(|e| e.slot == *slot) else {
            let detail = "the machine has no such memory slot";
            return Err(Error::new(ErrorKind::Memory, format!("{:#x}", slot.start), detail));
        };
        self.touched.note(slot.start, slot.size);
        self.set_region(table.entries[at].region(0, false))?;
        let removed = table.entries.remove(at);
        let left = self.map().mmap.remove_region(GuestAddress(slot.start), slot.size);
        let mmap = left.map(|(mmap, _)| mmap).unwrap_or_default();
        let before = std::mem::replace(&mut *self.map.write(), table.map(Arc::new(mmap)));
        drop(table);
        self.resources.release(ResourceKind::Memory, slot.start);
        // Unmapping can take long, so it happens without the lock.
        drop((removed, before));
        Ok(())
    }

    /// Have KVM drop the page tables that it derived from the guest's: it keeps them for as long as
    /// the guest itself does not write its tables. The removal of any slot drops them all.
    ///
    /// # Errors
    /// If KVM refuses.
    pub(crate) fn drop_shadows(&self) -> Result<()> {
        let table = self.table.lock();
        let Some(entry) = table.entries.last() else { return Ok(()) };
        let end = entry.slot.start.saturating_add(entry.slot.size);
        let number = table.entries.iter().map(|entry| entry.slot.number).max().unwrap_or(0) + 1;
        let region = kvm_userspace_memory_region {
            slot: number,
            guest_phys_addr: end.max(layout::MMIO_GAP_END),
            memory_size: layout::PAGE,
            ..entry.region(0, false)
        };
        self.set_region(region)?;
        self.set_region(kvm_userspace_memory_region { memory_size: 0, ..region })
    }

    /// All slots, by address.
    pub(super) fn all(&self) -> Vec<Slot> {
        self.table.lock().entries.iter().map(|e| e.slot).collect()
    }
    /// Set a slot in KVM, if the machine exists.
    pub(super) fn set_region(&self, region: kvm_userspace_memory_region) -> Result<()> {
        let Some(vm) = self.vm.get() else { return Ok(()) };
        // SAFETY: the range is a mapping that its entry owns. An entry is dropped only after its
        // slot has been removed in KVM, or after the VM descriptor. Slots do not overlap: the
        // caller holds the table's lock and has checked that.
        unsafe { vm.set_user_memory_region(region) }.map_err(|e| {
            let error = Error::kvm("KVM_SET_USER_MEMORY_REGION", e);
            let (start, size) = (region.guest_phys_addr, region.memory_size);
            let detail = format!("{} ({size:#x} bytes at {start:#x})", error.detail);
            Error { detail, ..error }
                .hint("the processor limits physical addresses, and KVM the number of memory slots")
        })
    }
}

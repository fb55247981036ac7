//! The table of a machine's memory slots, and the KVM region of each. Used only with the lock of
//! `slots.rs` held.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use vm_memory::GuestMemoryMmap;

use super::backing::Backing;
use super::image::MemoryRange;
use super::map::{Map, MappedSlot, Written};
use super::mapping::Mapping;
use super::ram::Ram;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::PAGE;

/// A memory slot of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its slot number in KVM.
    pub number: u32,
    /// Guest-physical start.
    pub start: u64,
    /// Its size in bytes.
    pub size: u64,
    /// How its pages are backed.
    pub backing: Backing,
}

/// A slot with its mapping.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) slot: Slot,
    pub(super) mapping: Arc<Mapping>,
    /// `None` for memory that is shared with other processes.
    pub(super) ram: Option<Ram>,
    /// The pages written by the host; `None` if the log is off.
    pub(super) written: Option<Written>,
}

impl Entry {
    /// Its KVM region. A size of zero removes the slot.
    pub(super) fn region(&self, size: u64, is_logging: bool) -> kvm_userspace_memory_region {
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

    pub(super) fn set_log(&mut self, is_on: bool) {
        let words = || (0..self.words()).map(|_| AtomicU64::new(0)).collect();
        self.written = is_on.then(words);
    }

    pub(super) fn mapped(&self) -> MappedSlot {
        let (mapping, written) = (Arc::clone(&self.mapping), self.written.clone());
        MappedSlot { start: self.slot.start, mapping, is_rom: self.slot.backing.read_only, written }
    }

    /// Whether a reset can restore a snapshot's range in it.
    fn is_at(&self, range: &MemoryRange) -> bool {
        let Slot { start, size, backing, .. } = self.slot;
        self.ram.is_some()
            && (start, size, backing.read_only)
                == (range.start, range.image.size(), range.read_only)
    }
}

/// All slots of one machine.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// By address.
    pub(super) entries: Vec<Entry>,
    pub(super) is_logging: bool,
}

impl Table {
    /// Check that a reset can restore these ranges. Shared memory is ignored: no snapshot contains
    /// it.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the slots differ from the snapshot's.
    pub(super) fn check(&self, ranges: &[MemoryRange]) -> Result<()> {
        let own = || self.entries.iter().filter(|entry| entry.ram.is_some());
        let added = own().find(|entry| !ranges.iter().any(|range| entry.is_at(range)));
        let removed = ranges.iter().find(|range| !own().any(|entry| entry.is_at(range)));
        let what = match (added, removed) {
            (None, None) => return Ok(()),
            (Some(added), _) => format!("it does not have the one at {:#x}", added.slot.start),
            (_, Some(removed)) => format!("the one at {:#x} is missing", removed.start),
        };
        let detail = format!("the machine's memory slots differ from the snapshot's: {what}");
        let error = Error::new(ErrorKind::State, "reset", detail);
        Err(error.hint("add and remove memory so that they are the same, or fork the snapshot"))
    }

    pub(super) fn map(&self, mmap: Arc<GuestMemoryMmap>) -> Arc<Map> {
        let mapped = self.entries.iter().map(Entry::mapped).collect();
        Arc::new(Map { mmap, mapped, is_logging: self.is_logging })
    }
}

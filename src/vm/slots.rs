//! Memory slots: what KVM is told of guest memory, one mapping a slot, and the log of written pages.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{FileOffset, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::layout::PAGE;
use crate::error::{Error, ErrorKind, Result};
use crate::snapshot::{Image, Ram, memfd};
use crate::sync::{Mutex, rank};

/// What stands behind a slot besides its mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// The guest cannot write it: its writes are MMIO exits.
    pub read_only: bool,
    /// A file or memfd, whose pages others may map too.
    pub shared: bool,
}

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

/// The pages of one slot that have been written since the last look: one bit a page of 4 KiB, the first page lowest.
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
    host: u64,
    /// None for memory that others may have too.
    ram: Option<Ram>,
    /// Pages written by the host while the log is on.
    written: Vec<AtomicU64>,
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
            userspace_addr: self.host,
        }
    }

    fn words(&self) -> u64 {
        (self.slot.size / PAGE).div_ceil(64)
    }

    fn start_log(&mut self) {
        self.written = (0..self.words()).map(|_| AtomicU64::new(0)).collect();
    }
}

/// The slots of one machine. KVM is told once the machine is there.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    vm: OnceLock<Arc<VmFd>>,
    table: Mutex<Table, rank::MemorySlots>,
}

#[derive(Debug, Default)]
struct Table {
    entries: Vec<Entry>,
    is_logging: bool,
}

fn tell(vm: Option<&Arc<VmFd>>, region: kvm_userspace_memory_region) -> Result<()> {
    let Some(vm) = vm else { return Ok(()) };
    // SAFETY: the range is a mapping that the GuestMemory owns for as long as the slot stands: it is taken out of the
    // memory's map after this has told KVM so, and all of them after the last hold on the VM descriptor has gone.
    // Ranges do not overlap: the map has checked that.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|e| Error::kvm("KVM_SET_USER_MEMORY_REGION", e))
}

impl Slots {
    /// Tell a new machine of every slot.
    pub(crate) fn attach(&self, vm: &Arc<VmFd>) -> Result<()> {
        let table = self.table.lock();
        if self.vm.set(Arc::clone(vm)).is_err() {
            let detail = "this memory is another machine's already";
            return Err(Error::new(ErrorKind::State, "memory", detail));
        }
        table
            .entries
            .iter()
            .try_for_each(|e| tell(Some(vm), e.region(e.slot.size, table.is_logging)))
    }

    pub(crate) fn add(
        &self,
        mapping: &GuestRegionMmap,
        backing: Backing,
        ram: Option<Ram>,
    ) -> Result<Slot> {
        let mut table = self.table.lock();
        let is_free = |number: &u32| table.entries.iter().all(|e| e.slot.number != *number);
        let number = (0..=u32::from(u16::MAX)).find(is_free).unwrap_or(u32::MAX);
        let slot = Slot { number, start: mapping.start_addr().0, size: mapping.len(), backing };
        let mut entry = Entry { slot, host: mapping.as_ptr() as u64, ram, written: Vec::new() };
        if table.is_logging {
            entry.start_log();
        }
        tell(self.vm.get(), entry.region(slot.size, table.is_logging))?;
        table.entries.push(entry);
        Ok(slot)
    }

    pub(crate) fn remove(&self, slot: &Slot) -> Result<()> {
        let mut table = self.table.lock();
        let Some(at) = table.entries.iter().position(|e| e.slot == *slot) else {
            let detail = "the machine has no such memory slot, or no longer";
            return Err(Error::new(ErrorKind::Memory, format!("{:#x}", slot.start), detail));
        };
        tell(self.vm.get(), table.entries[at].region(0, false))?;
        table.entries.remove(at);
        Ok(())
    }

    pub(crate) fn all(&self) -> Vec<Slot> {
        let mut slots: Vec<Slot> = self.table.lock().entries.iter().map(|e| e.slot).collect();
        slots.sort_by_key(|slot| slot.start);
        slots
    }

    pub(crate) fn log_dirty(&self, is_on: bool) -> Result<()> {
        let mut table = self.table.lock();
        if table.is_logging == is_on {
            return Ok(());
        }
        for entry in &mut table.entries {
            if is_on {
                entry.start_log();
            } else {
                entry.written = Vec::new();
            }
            tell(self.vm.get(), entry.region(entry.slot.size, is_on))?;
        }
        table.is_logging = is_on;
        Ok(())
    }

    /// The host has written these bytes, which are memory.
    pub(crate) fn note_write(&self, address: u64, length: u64) {
        let table = self.table.lock();
        let last = address.saturating_add(length);
        for entry in table.entries.iter().filter(|entry| !entry.written.is_empty()) {
            let end = entry.slot.start.saturating_add(entry.slot.size);
            let (from, to) = (address.max(entry.slot.start), last.min(end));
            if from >= to {
                continue;
            }
            let pages = (from - entry.slot.start) / PAGE..(to - entry.slot.start).div_ceil(PAGE);
            for page in pages {
                let word = usize::try_from(page / 64).ok().and_then(|at| entry.written.get(at));
                word.map(|word| word.fetch_or(1 << (page % 64), Ordering::Relaxed));
            }
        }
    }

    /// What every slot holds, for good: the guest is at rest. Start, image and whether the guest cannot write it.
    pub(crate) fn freeze(&self) -> Result<Vec<(u64, Image, bool)>> {
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
            all.extend(image.map(|image| (slot.start, image, slot.backing.read_only)));
        }
        all.sort_by_key(|(start, ..)| *start);
        Ok(all)
    }

    /// Whether a slot starts there, with this many bytes, that can be brought back.
    pub(crate) fn has_ram(&self, start: u64, size: u64) -> bool {
        let table = self.table.lock();
        table
            .entries
            .iter()
            .any(|e| e.ram.is_some() && (e.slot.start, e.slot.size) == (start, size))
    }

    /// Bring images back, each to the slot at its address; how many bytes were changed for it.
    pub(crate) fn reset<'a>(&self, images: impl Iterator<Item = (u64, &'a Image)>) -> Result<u64> {
        let mut changed = 0;
        for (start, image) in images {
            let ranges = {
                let mut table = self.table.lock();
                let entry = table.entries.iter_mut().find(|entry| entry.slot.start == start);
                entry
                    .and_then(|entry| entry.ram.as_mut())
                    .map(|ram| ram.reset(image))
                    .transpose()?
            };
            for (from, to) in ranges.into_iter().flatten() {
                changed += to - from;
                self.note_write(start + from, to - from);
            }
        }
        Ok(changed)
    }

    /// What has been written since the last look, and forget it.
    pub(crate) fn take_dirty(&self) -> Result<Vec<DirtyPages>> {
        let table = self.table.lock();
        if !table.is_logging {
            let error = Error::new(ErrorKind::State, "dirty", "dirty pages are not logged");
            return Err(error.hint("set memory.log_dirty to True first"));
        }
        let mut all = Vec::new();
        for entry in &table.entries {
            let size = usize::try_from(entry.slot.size).unwrap_or(0);
            let mut bitmap = match self.vm.get() {
                Some(vm) => vm
                    .get_dirty_log(entry.slot.number, size)
                    .map_err(|e| Error::kvm("KVM_GET_DIRTY_LOG", e))?,
                None => vec![0; entry.written.len()],
            };
            for (word, written) in bitmap.iter_mut().zip(&entry.written) {
                *word |= written.swap(0, Ordering::Relaxed);
            }
            all.push(DirtyPages { start: entry.slot.start, bitmap });
        }
        all.sort_by_key(|pages| pages.start);
        Ok(all)
    }
}

/// Zeroed memory of its own, for [`super::GuestMemory::add`]: a memfd, so that a snapshot need not copy it.
///
/// # Errors
/// When it is more than the host's memory, or the mapping fails.
pub fn anonymous(size: u64) -> Result<MmapRegion> {
    let host = host_memory();
    if size > host {
        let detail = format!("{} MiB is more than the host's {} MiB", size >> 20, host >> 20);
        return Err(Error::new(ErrorKind::Config, "memory", detail));
    }
    let length = whole(size)?;
    let file = FileOffset::new(memfd(size)?, 0);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    MmapRegion::build(Some(file), length, access, flags).map_err(|e| refused(&e))
}

/// Part of a file or memfd, shared with all who map it. One that is open for reading only can be memory that is
/// `read_only`. A memfd is sealed against shrinking if it can be; a file must not shrink while it is mapped.
///
/// # Errors
/// When the file is shorter, or cannot be mapped so.
pub fn shared(
    file: BorrowedFd<'_>,
    offset: u64,
    size: Option<u64>,
    read_only: bool,
) -> Result<MmapRegion> {
    let failed = |e: &io::Error| Error::os(ErrorKind::Memory, "the memory's file", e);
    let file = File::from(file.try_clone_to_owned().map_err(|e| failed(&e))?);
    // SAFETY: no pointers; a file that is no memfd refuses.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
    let length = file.metadata().map_err(|e| failed(&e))?.len();
    let most = length.checked_next_multiple_of(PAGE).and_then(|length| length.checked_sub(offset));
    let size = size.or(most).unwrap_or(0);
    if size == 0 || most.is_none_or(|most| size > most) {
        let detail =
            format!("{size} bytes from offset {offset} are not all in it: it has {length}");
        return Err(Error::new(ErrorKind::Memory, "the memory's file", detail));
    }
    // SAFETY: no pointers.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    let can_write = flags & libc::O_ACCMODE == libc::O_RDWR;
    if !can_write && !read_only {
        let detail = "it is open for reading only: the memory has to be read-only too";
        return Err(Error::new(ErrorKind::Memory, "the memory's file", detail));
    }
    let access = libc::PROT_READ | if can_write { libc::PROT_WRITE } else { 0 };
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    MmapRegion::build(Some(FileOffset::new(file, offset)), whole(size)?, access, flags)
        .map_err(|e| refused(&e))
}

fn whole(size: u64) -> Result<usize> {
    match usize::try_from(size) {
        Ok(size) if size > 0 && size % 4096 == 0 => Ok(size),
        _ => {
            let detail = format!("{size:#x} bytes are no whole pages of 4 KiB");
            Err(Error::new(ErrorKind::Memory, "memory", detail))
        }
    }
}

fn refused(error: &vm_memory::mmap::MmapRegionError) -> Error {
    Error::new(ErrorKind::Memory, "memory", error.to_string())
}

/// Bytes of memory of this host.
pub(crate) fn host_memory() -> u64 {
    static SIZE: OnceLock<u64> = OnceLock::new();
    *SIZE.get_or_init(|| {
        // SAFETY: sysconf takes no pointers.
        let (pages, size) =
            unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
        u64::try_from(pages).unwrap_or(0).saturating_mul(u64::try_from(size).unwrap_or(0))
    })
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

//! Gives pages that the guest does not use back to the host. Any thread.

use vm_memory::VolatileSlice;

use super::access::pieces;
use super::guest::GuestMemory;
use super::map::MappedSlot;
use crate::error::Result;
use crate::layout::PAGE;

impl GuestMemory {
    /// Drop the contents of the whole pages in a range, and with them the host's memory. Afterwards
    /// the guest reads zeros there, or what a snapshot has. Memory that other processes share, and
    /// ROM, keep theirs.
    ///
    /// # Errors
    /// If any byte of the range is outside memory. Nothing is dropped then.
    pub(crate) fn discard(&self, address: u64, length: u64) -> Result<()> {
        self.check(address, length)?;
        // It is memory, so neither sum wraps around.
        let end = address.saturating_add(length) & !(PAGE - 1);
        let start = address.saturating_add(PAGE - 1) & !(PAGE - 1);
        if start >= end {
            return Ok(());
        }
        self.kvm_slots().note_touch(start, end - start);
        pieces(&self.map(), start, end - start, |mapped, piece| {
            if !mapped.is_rom {
                drop_pages(mapped, &piece);
            }
            Ok(())
        })?;
        self.note_write(start, end - start);
        Ok(())
    }

    /// Drop the pages of 4 KiB with these numbers, each four bytes, runs of them together. Numbers
    /// outside memory are left out.
    pub(crate) fn discard_pages(&self, numbers: &[u8]) {
        let mut run = (0, 0);
        let drop_run = |(start, end): (u64, u64)| {
            // Fails only for what is left out.
            let _ = self.discard(start, end - start);
        };
        for number in numbers.chunks_exact(4) {
            let number = number.try_into().map(u32::from_le_bytes).unwrap_or_default();
            let page = u64::from(number) * PAGE;
            run = match run {
                (start, end) if page == end => (start, end + PAGE),
                (start, end) if page + PAGE == start => (page, end),
                other => {
                    drop_run(other);
                    (page, page + PAGE)
                }
            };
        }
        drop_run(run);
    }
}

fn drop_pages(mapped: &MappedSlot, piece: &VolatileSlice<'_>) {
    let is_shared = mapped.mapping.region().flags() & libc::MAP_SHARED != 0;
    if is_shared && mapped.mapping.own_file().is_none() {
        return;
    }
    let (start, length) = (piece.ptr_guard_mut().as_ptr().cast(), piece.len());
    // SAFETY: the pages are guest memory of this process alone, whose bytes belong to no Rust
    // object and may change at any time. The first call is refused once a snapshot has made the
    // mapping private.
    unsafe {
        if libc::madvise(start, length, libc::MADV_REMOVE) != 0 {
            libc::madvise(start, length, libc::MADV_DONTNEED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, shared};
    use std::os::fd::AsFd;

    #[test]
    fn whole_pages_are_dropped_and_logged() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.fill(0, 0x5000, 7).unwrap();
        memory.log_dirty(true).unwrap();
        memory.discard(0x800, 0x3000).unwrap();
        let first = |at| {
            let mut byte = [9];
            memory.read(at, &mut byte).unwrap();
            byte[0]
        };
        assert_eq!([0, 0x1000, 0x2000, 0x3000].map(first), [7, 0, 0, 7]);
        assert_eq!(memory.take_dirty().unwrap()[0].ranges(), [(0x1000, 0x2000)]);
        memory.discard(0x3001, 0x1ffe).unwrap();
        assert_eq!(first(0x3000), 7);
        assert!(memory.discard(0x10_0000 - 0x1000, 0x2000).is_err());
        assert!(memory.discard(u64::MAX, 1).is_err());
    }

    #[test]
    fn memory_of_others_is_left_alone() {
        let file = super::super::memfd(4096).unwrap();
        let memory = GuestMemory::empty();
        let region = shared(file.as_fd(), 0, None, false).unwrap();
        memory.add(0, region, Backing { read_only: false, shared: true }).unwrap();
        memory.write(0, b"theirs").unwrap();
        memory.discard(0, 4096).unwrap();
        let mut bytes = [0; 6];
        memory.read(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"theirs");
    }
}

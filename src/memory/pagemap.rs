//! Finds the pages of a private mapping that have been written: they belong to the process, no
//! longer to the file. The kernel reads this from the page tables, so it covers every writer:
//! guest, host, view or device. Any thread.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::ranges::{ByteRange, push};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::PAGE;
use crate::process::ProcessTag;
use crate::sync::{RwLock, rank};

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`, since Linux 6.7.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// The same bits in /proc/self/pagemap, which has one word per page.
const BIT_PRESENT: u64 = 1 << 63;
const BIT_SWAPPED: u64 = 1 << 62;
const BIT_FILE: u64 = 1 << 61;

/// How many runs of pages one call returns.
const BATCH: usize = 512;

/// The kernel answers for the process that opened the file, so a forked child opens its own.
fn pagemap() -> Result<Arc<File>> {
    static PAGEMAP: RwLock<Option<(ProcessTag, Arc<File>)>, rank::Pagemap> = RwLock::new(None);
    // Never waits: in a forked child a lock that another thread held is never released.
    let known = PAGEMAP.try_read().and_then(|known| known.clone());
    if let Some((_, file)) = known.filter(|(process_tag, _)| !process_tag.is_forked_child()) {
        return Ok(file);
    }
    let file = File::open("/proc/self/pagemap")
        .map_err(|e| Error::os(ErrorKind::Memory, "/proc/self/pagemap", &e))?;
    let file = Arc::new(file);
    if let Some(mut known) = PAGEMAP.try_write() {
        *known = Some((ProcessTag::current(), Arc::clone(&file)));
    }
    Ok(file)
}

/// The pages of the private mapping at `host` that have been written. Before Linux 6.7, zero pages
/// that were only read may be among them.
pub(crate) fn written(host: u64, size: u64) -> Result<Vec<ByteRange>> {
    let file = pagemap()?;
    match scan(&file, host, size) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            read(&file, host, size)
        }
        result => result,
    }
    .map_err(|e| Error::os(ErrorKind::Memory, "/proc/self/pagemap", &e))
}

fn scan(file: &File, host: u64, size: u64) -> io::Result<Vec<ByteRange>> {
    let mut found = vec![PageRegion::default(); BATCH];
    let mut ranges = Vec::new();
    let mut arguments = ScanArguments {
        size: size_of::<ScanArguments>() as u64,
        start: host,
        end: host.saturating_add(size),
        vec: found.as_mut_ptr() as u64,
        vec_len: BATCH as u64,
        category_inverted: PAGE_IS_FILE | PAGE_IS_PFNZERO,
        category_mask: PAGE_IS_FILE | PAGE_IS_PFNZERO,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        ..ScanArguments::default()
    };
    while arguments.start < arguments.end {
        // SAFETY: the argument structure and the vector that it points to, whose length it states,
        // outlive the call.
        let count = unsafe { ioctl_with_mut_ref(file, PAGEMAP_SCAN, &mut arguments) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for region in found.iter().take(count) {
            push(&mut ranges, (region.start - host, region.end - host));
        }
        arguments.start = arguments.walk_end;
    }
    Ok(ranges)
}

fn read(file: &File, host: u64, size: u64) -> io::Result<Vec<ByteRange>> {
    let mut ranges = Vec::new();
    let mut words = vec![0u8; 8 * 4096];
    let pages = size / PAGE;
    let mut page = 0;
    while page < pages {
        let most = usize::try_from((pages - page).min(4096)).unwrap_or(0);
        let (wanted, _) = words.split_at_mut(8 * most);
        file.read_exact_at(wanted, (host / PAGE + page) * 8)?;
        for (word, at) in wanted.chunks_exact(8).zip(page..) {
            let word = word.try_into().map_or(0, u64::from_ne_bytes);
            if word & (BIT_PRESENT | BIT_SWAPPED) != 0 && word & BIT_FILE == 0 {
                push(&mut ranges, (at * PAGE, (at + 1) * PAGE));
            }
        }
        page += most as u64;
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::MmapRegion;

    /// A private mapping of a memfd of this many pages, all allocated.
    fn mapping(pages: usize) -> MmapRegion {
        // SAFETY: the name is NUL-terminated.
        let fd = unsafe { libc::memfd_create(c"test".as_ptr(), 0) };
        // SAFETY: the descriptor is new and owned by nothing else.
        let file: File = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) };
        file.write_all_at(&vec![7; pages * 4096], 0).unwrap();
        let offset = vm_memory::FileOffset::new(file, 0);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        MmapRegion::build(Some(offset), pages * 4096, access, libc::MAP_PRIVATE).unwrap()
    }

    fn touch(mapping: &MmapRegion, page: usize, write: bool) {
        let at = mapping.as_ptr().wrapping_add(page * 4096);
        // SAFETY: the page lies in the mapping.
        unsafe {
            let value = at.read_volatile();
            if write {
                at.write_volatile(value + 1);
            }
        }
    }

    #[test]
    fn pages_that_were_written_are_found_and_those_that_were_read_are_not() {
        let mapping = mapping(64);
        (0..64).for_each(|page| touch(&mapping, page, [3, 4, 5, 40, 63].contains(&page)));
        let expected = [(3 * PAGE, 6 * PAGE), (40 * PAGE, 41 * PAGE), (63 * PAGE, 64 * PAGE)];
        let host = mapping.as_ptr() as u64;
        assert_eq!(written(host, 64 * PAGE).unwrap(), expected);
        assert_eq!(read(&pagemap().unwrap(), host, 64 * PAGE).unwrap(), expected);
    }

    #[test]
    fn more_runs_than_one_call_returns_are_all_found() {
        let mapping = mapping(4 * BATCH);
        (0..4 * BATCH).step_by(2).for_each(|page| touch(&mapping, page, true));
        let found = written(mapping.as_ptr() as u64, 4 * BATCH as u64 * PAGE).unwrap();
        assert_eq!(found.len(), 2 * BATCH);
    }
}

//! The pages behind a memory slot: zeroed memory of its own, or part of a file that other processes
//! may map. Any thread.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{FileOffset, MmapRegion};

use super::layer::memfd;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::PAGE;
use crate::process::OnceBox;

/// How a slot's pages are backed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// The guest's writes become MMIO exits.
    pub read_only: bool,
    /// The pages are those of a file or memfd that other processes may map too.
    pub shared: bool,
}

/// Zeroed memory for [`super::GuestMemory::add`]. It is a memfd, so that a snapshot does not copy
/// it.
///
/// # Errors
/// If it is larger than the host's memory, or the mapping fails.
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

/// Part of a file or memfd, shared with everything else that maps it. A file that is open for
/// reading only can be `read_only` memory. A memfd is sealed against shrinking if possible; a file
/// must not shrink while it is mapped.
///
/// # Errors
/// If the file is too short or cannot be mapped that way.
pub fn shared(
    file: BorrowedFd<'_>,
    offset: u64,
    size: Option<u64>,
    read_only: bool,
) -> Result<MmapRegion> {
    let failed = |e: &io::Error| Error::os(ErrorKind::Memory, AT, e);
    let file = File::from(file.try_clone_to_owned().map_err(|e| failed(&e))?);
    if !offset.is_multiple_of(PAGE) {
        let detail = format!("the offset {offset:#x} is not a multiple of 4 KiB");
        return Err(Error::new(ErrorKind::Memory, AT, detail));
    }
    let size = check_length(&file, offset, size)?;
    let length = whole(size)?;
    // SAFETY: no pointers.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    let can_write = flags & libc::O_ACCMODE == libc::O_RDWR;
    if !can_write && !read_only {
        let detail = "it is open for reading only, so the memory must be read-only";
        return Err(Error::new(ErrorKind::Memory, AT, detail));
    }
    // SAFETY: no pointers. The call fails for a file that is not a memfd.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
    // A sealed memfd keeps its length. It may have shrunk since the first check.
    check_length(&file, offset, Some(size))?;
    let access = libc::PROT_READ | if can_write { libc::PROT_WRITE } else { 0 };
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    MmapRegion::build(Some(FileOffset::new(file, offset)), length, access, flags)
        .map_err(|e| refused(&e))
}

const AT: &str = "the memory's file";

/// The size to map: the one asked for, or everything from the offset on.
fn check_length(file: &File, offset: u64, size: Option<u64>) -> Result<u64> {
    let length = file.metadata().map_err(|e| Error::os(ErrorKind::Memory, AT, &e))?.len();
    let most = length.checked_next_multiple_of(PAGE).and_then(|length| length.checked_sub(offset));
    let size = size.or(most).unwrap_or(0);
    if size == 0 || most.is_none_or(|most| size > most) {
        let detail = format!("{size} bytes at offset {offset} exceed its {length} bytes");
        return Err(Error::new(ErrorKind::Memory, AT, detail));
    }
    Ok(size)
}

fn whole(size: u64) -> Result<usize> {
    match usize::try_from(size) {
        Ok(size) if size > 0 && size % 4096 == 0 => Ok(size),
        _ => {
            let detail = format!("{size:#x} bytes is not a multiple of 4 KiB");
            Err(Error::new(ErrorKind::Memory, "memory", detail))
        }
    }
}

fn refused(error: &vm_memory::mmap::MmapRegionError) -> Error {
    Error::new(ErrorKind::Memory, "memory", error.to_string())
}

/// The size of this host's memory, in bytes.
pub(crate) fn host_memory() -> u64 {
    static SIZE: OnceBox<u64> = OnceBox::new();
    *SIZE.get_or_init(|| {
        // SAFETY: sysconf takes no pointers.
        let (pages, size) =
            unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
        u64::try_from(pages).unwrap_or(0).saturating_mul(u64::try_from(size).unwrap_or(0))
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn seals(file: &File) -> libc::c_int {
        // SAFETY: no pointers.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) }
    }

    #[test]
    fn a_file_that_is_refused_is_left_as_it_was() {
        let file = memfd(8192).unwrap();
        for (offset, size) in [(1, None), (4096, Some(8192)), (8192, None), (0, Some(100))] {
            assert!(shared(file.as_fd(), offset, size, false).is_err(), "{offset} {size:?}");
        }
        assert_eq!(seals(&file), 0);
        shared(file.as_fd(), 4096, None, false).unwrap();
        assert_eq!(seals(&file), libc::F_SEAL_SHRINK);
    }
}

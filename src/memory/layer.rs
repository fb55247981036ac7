//! Immutable pages: a sealed memfd, or a snapshot's file that is checked before use. Also creates
//! the memfds behind guest memory. Any thread.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::mapping::part;
use super::ranges::ByteRange;
use crate::error::{Error, ErrorKind, Result};

/// Immutable pages: a sealed memfd, or a snapshot's file.
#[derive(Debug)]
pub struct Layer {
    file: Arc<File>,
    /// Identifies an unchanged file: device, inode, size, mtime in nanoseconds. None for a memfd.
    stamp: Option<[i128; 4]>,
}

impl Layer {
    /// A memfd that is sealed once no writable mapping of it is left.
    pub(crate) fn of_memfd(file: Arc<File>) -> Arc<Self> {
        Arc::new(Self { file, stamp: None })
    }

    /// A memfd without mappings, sealed at once.
    ///
    /// # Errors
    /// If the kernel refuses the seals.
    pub(crate) fn sealed(file: File) -> Result<Arc<Self>> {
        let layer = Self::of_memfd(Arc::new(file));
        if layer.seal()? {
            return Ok(layer);
        }
        Err(os("F_ADD_SEALS", &io::Error::from_raw_os_error(libc::EBUSY)))
    }

    /// Seal the memfd against every change. Returns false if a writable mapping is left or the
    /// kernel is writing to its pages: its contents may still change.
    ///
    /// # Errors
    /// If the kernel refuses the seals for another reason.
    pub(crate) fn seal(&self) -> Result<bool> {
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
        // SAFETY: no pointers.
        let sealed = unsafe {
            libc::fcntl(self.file.as_raw_fd(), libc::F_ADD_SEALS, seals | libc::F_SEAL_SEAL)
        };
        let error = io::Error::last_os_error();
        match (sealed, error.raw_os_error()) {
            (0.., _) => Ok(true),
            (_, Some(libc::EBUSY)) => Ok(false),
            _ => Err(os("F_ADD_SEALS", &error)),
        }
    }

    /// A file that must not change: [`Self::check`] detects a change.
    pub(crate) fn of_file(file: File) -> Result<Arc<Self>> {
        let stamp = Some(stamp(&file)?);
        Ok(Arc::new(Self { file: Arc::new(file), stamp }))
    }

    /// # Errors
    /// [`ErrorKind::Snapshot`] if the file has been changed.
    pub(crate) fn check(&self) -> Result<()> {
        if self.stamp.is_none_or(|known| stamp(&self.file).is_ok_and(|now| now == known)) {
            return Ok(());
        }
        let detail = "the snapshot's file has been written since it was loaded";
        Err(Error::new(ErrorKind::Snapshot, "file", detail)
            .hint("write a new file and rename it over the old one, or load with copy=True"))
    }

    /// Bytes allocated for it, in memory or on disk.
    pub(crate) fn allocated(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// Whether it is a memfd.
    pub(crate) fn is_memory(&self) -> bool {
        self.stamp.is_none()
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The next range between two offsets that is not a hole, in whole pages.
    pub(super) fn next_data(&self, at: u64, end: u64) -> Option<ByteRange> {
        let seek = |from: u64, whence| {
            let from = i64::try_from(from).ok()?;
            // SAFETY: no pointers. Nothing depends on the file position: all reads and writes give
            // offsets.
            u64::try_from(unsafe { libc::lseek(self.file.as_raw_fd(), from, whence) }).ok()
        };
        if at >= end {
            return None;
        }
        let start = seek(at, libc::SEEK_DATA)? & !4095;
        let hole = seek(start.max(at), libc::SEEK_HOLE).unwrap_or(end).next_multiple_of(4096);
        (start < end).then(|| (start.max(at), hole.min(end)))
    }
}

fn stamp(file: &File) -> Result<[i128; 4]> {
    let m = file.metadata().map_err(|e| os("fstat", &e))?;
    let mtime = i128::from(m.mtime()) * 1_000_000_000 + i128::from(m.mtime_nsec());
    Ok([i128::from(m.dev()), i128::from(m.ino()), i128::from(m.size()), mtime])
}

fn os(at: &str, error: &io::Error) -> Error {
    Error::os(ErrorKind::Memory, at, error)
}

/// A new memfd of this size: all zeros, with no page allocated.
///
/// # Errors
/// If the process is out of descriptors or memory.
pub(crate) fn memfd(size: u64) -> Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is NUL-terminated.
    let fd = unsafe { libc::memfd_create(c"pyvmm".as_ptr(), flags) };
    if fd < 0 {
        return Err(os("memfd_create", &io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and owned by nothing else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(|e| os("ftruncate of a memfd", &e))?;
    Ok(file)
}

/// Copy a range of guest memory to the same place in a memfd.
pub(crate) fn copy_to(file: &File, region: &MmapRegion, range: ByteRange) -> Result<()> {
    let mut done = 0;
    while range.0 + done < range.1 {
        let piece = part(region, (range.0 + done, range.1))?;
        let start = piece.ptr_guard();
        let offset = i64::try_from(range.0 + done).unwrap_or(i64::MAX);
        // SAFETY: the kernel reads the slice's bytes. If a host thread changes them at the same
        // time, either value is right.
        let written =
            unsafe { libc::pwrite(file.as_raw_fd(), start.as_ptr().cast(), piece.len(), offset) };
        match u64::try_from(written) {
            Ok(0) => return Err(os("write to a memfd", &io::ErrorKind::WriteZero.into())),
            Ok(written) => done += written,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(os("write to a memfd", &error));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_layer_cannot_be_changed() {
        let layer = Layer::sealed(memfd(4096).unwrap()).unwrap();
        assert!(layer.file().write_all_at(&[2], 0).is_err());
        assert!(layer.file().set_len(0).is_err());
        let offset = vm_memory::FileOffset::new(layer.file().try_clone().unwrap(), 0);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        assert!(<MmapRegion>::build(Some(offset), 4096, access, libc::MAP_SHARED).is_err());
    }

    #[test]
    fn a_file_that_was_written_is_noticed() {
        let path = std::env::temp_dir().join(format!("pyvmm-layer-{}", std::process::id()));
        std::fs::write(&path, [1; 4096]).unwrap();
        let layer = Layer::of_file(File::open(&path).unwrap()).unwrap();
        layer.check().unwrap();
        std::fs::write(&path, [2; 8192]).unwrap();
        assert_eq!(layer.check().unwrap_err().kind, ErrorKind::Snapshot);
        std::fs::remove_file(&path).unwrap();
    }
}

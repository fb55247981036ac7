//! A raw file or a block device: `preadv`, `pwritev`, `fdatasync` and `fallocate`. Any thread.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::backend::{Backend, read_only};
use super::lock::lock;
use super::slices::{self, Slice};
use crate::error::{Error, ErrorKind, Result};

/// The most that `preadv` takes.
const MOST_BUFFERS: usize = 1024;

/// See the module.
#[derive(Debug)]
pub(super) struct Raw {
    file: File,
    path: PathBuf,
    is_device: bool,
    is_read_only: bool,
    block: u32,
    /// Whether the file system can make holes and zeroes, as far as is known.
    has_holes: AtomicBool,
    has_zeroes: AtomicBool,
}

impl Raw {
    /// Open a file, and lock it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if it cannot be opened, [`ErrorKind::Config`] if it is no file or device,
    /// or in use.
    pub(super) fn open(path: &Path, is_written: bool) -> Result<Self> {
        let options = OpenOptions::new()
            .read(true)
            .write(is_written)
            // A FIFO does not block then.
            .custom_flags(libc::O_NONBLOCK)
            .open(path);
        let file = options.map_err(|e| Error::os(ErrorKind::Io, path.to_string_lossy(), &e))?;
        Self::of(file, path, is_written)
    }

    /// Create a file that must not exist yet, and lock it.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let file = file.map_err(|e| Error::os(ErrorKind::Io, path.to_string_lossy(), &e))?;
        Self::of(file, path, true)
    }

    fn of(file: File, path: &Path, is_written: bool) -> Result<Self> {
        let bad = |detail: &str| Error::new(ErrorKind::Config, path.to_string_lossy(), detail);
        let metadata =
            file.metadata().map_err(|e| Error::os(ErrorKind::Io, path.to_string_lossy(), &e))?;
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.is_file() {
            return Err(bad("it is neither a file nor a block device"));
        }
        lock(&file, is_written).map_err(|_| {
            bad("it is in use by a machine of this process, or by another process")
                .hint("open it read_only everywhere, or with an overlay of its own")
        })?;
        let block = u32::try_from(metadata.blksize()).unwrap_or(4096);
        let block = if block.is_power_of_two() { block.clamp(512, 1 << 20) } else { 4096 };
        let (has_holes, has_zeroes) = (AtomicBool::new(true), AtomicBool::new(true));
        let (path, is_read_only) = (path.to_owned(), !is_written);
        Ok(Self { file, path, is_device, is_read_only, block, has_holes, has_zeroes })
    }

    /// The folder that it is in, and its name.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Call `fallocate`. Returns false if the file system has no such thing.
    fn allocate(
        &self,
        mode: i32,
        (offset, length): (u64, u64),
        known: &AtomicBool,
    ) -> io::Result<bool> {
        // Relaxed: to be wrong costs a system call.
        if !known.load(Ordering::Relaxed) || length == 0 {
            return Ok(length == 0);
        }
        let (offset, length) = (signed(offset)?, signed(length)?);
        loop {
            // SAFETY: the descriptor is open; there are no pointers.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, length) } == 0 {
                return Ok(true);
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
                    known.store(false, Ordering::Relaxed);
                    return Ok(false);
                }
                _ => return Err(error),
            }
        }
    }

    fn punch(&self, range: (u64, u64)) -> io::Result<bool> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.allocate(mode, range, &self.has_holes)
    }

    /// Repeat the call until all bytes are through.
    fn all(&self, offset: u64, buffers: &[Slice<'_>], is_write: bool) -> io::Result<()> {
        let (mut done, all) = (0, slices::length(buffers));
        while done < all {
            let mut iovecs = match done {
                0 => slices::iovecs(buffers),
                _ => slices::iovecs(&slices::part(buffers, done, all - done)),
            };
            iovecs.truncate(MOST_BUFFERS);
            let at = signed(offset.saturating_add(done))?;
            // SAFETY: the iovecs are those of slices, which live for this call. Nothing in this
            // process refers to their bytes.
            let moved = unsafe { transfer(&self.file, &iovecs, at, is_write) };
            match u64::try_from(moved) {
                Ok(0) if is_write => return Err(io::ErrorKind::WriteZero.into()),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => done += moved,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

/// One call of `preadv` or `pwritev`. A single buffer needs no vector, and takes less time.
///
/// # Safety
/// The buffers are memory that may be read and written, and the kernel checks only that they are
/// mapped.
unsafe fn transfer(file: &File, iovecs: &[libc::iovec], at: i64, is_write: bool) -> isize {
    let (file, count) = (file.as_raw_fd(), i32::try_from(iovecs.len()).unwrap_or(i32::MAX));
    match (iovecs, is_write) {
        // SAFETY: the caller guarantees it.
        ([one], false) => unsafe { libc::pread(file, one.iov_base, one.iov_len, at) },
        // SAFETY: the caller guarantees it.
        ([one], true) => unsafe { libc::pwrite(file, one.iov_base, one.iov_len, at) },
        // SAFETY: the caller guarantees it.
        (all, false) => unsafe { libc::preadv(file, all.as_ptr(), count, at) },
        // SAFETY: the caller guarantees it.
        (all, true) => unsafe { libc::pwritev(file, all.as_ptr(), count, at) },
    }
}

fn signed(number: u64) -> io::Result<i64> {
    i64::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

impl Backend for Raw {
    fn size(&self) -> io::Result<u64> {
        if !self.is_device {
            return Ok(self.file.metadata()?.len());
        }
        // SAFETY: the descriptor is open. All I/O here names its offset.
        let end = unsafe { libc::lseek(self.file.as_raw_fd(), 0, libc::SEEK_END) };
        u64::try_from(end).map_err(|_| io::Error::last_os_error())
    }

    fn read_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        self.all(offset, buffers, false)
    }

    fn write_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        if self.is_read_only {
            return Err(read_only());
        }
        self.all(offset, buffers, true)
    }

    fn flush(&self) -> io::Result<()> {
        if self.is_read_only { Ok(()) } else { self.file.sync_data() }
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.is_read_only {
            return Err(read_only());
        }
        self.punch((offset, length)).map(drop)
    }

    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        if self.is_read_only {
            return Err(read_only());
        }
        let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        if (may_unmap && self.punch((offset, length))?)
            || self.allocate(mode, (offset, length), &self.has_zeroes)?
        {
            return Ok(());
        }
        const CHUNK: u64 = 64 << 10;
        let zeroes = vec![0; usize::try_from(length.min(CHUNK)).unwrap_or(0)];
        let buffers = slices::of_bytes(&zeroes);
        let mut done = 0;
        while done < length {
            let size = (length - done).min(CHUNK);
            self.write_at(offset + done, &slices::part(&buffers, 0, size))?;
            done += size;
        }
        Ok(())
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        if self.is_read_only {
            return Err(read_only());
        }
        if self.is_device {
            let text = "a block device has a fixed size";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        self.file.set_len(size)
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn best_block(&self) -> u32 {
        self.block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{of_bytes, of_bytes_mut};
    use vmm_sys_util::tempfile::TempFile;

    fn file(bytes: &[u8]) -> TempFile {
        let file = TempFile::new().unwrap();
        std::fs::write(file.as_path(), bytes).unwrap();
        file
    }

    #[test]
    fn a_file_is_read_written_and_has_holes() {
        let file = file(&[1; 100_000]);
        let disk = Raw::open(file.as_path(), true).unwrap();
        assert_eq!(disk.size().unwrap(), 100_000);
        let (mut one, mut two) = ([0; 3], [0; 5]);
        disk.write_at(10, &[of_bytes(&[2; 3])[0], of_bytes(&[3; 4])[0]]).unwrap();
        disk.read_at(9, &[of_bytes_mut(&mut one)[0], of_bytes_mut(&mut two)[0]]).unwrap();
        assert_eq!((one, two), ([1, 2, 2], [2, 3, 3, 3, 3]));
        disk.write_zeroes(10, 50_000, false).unwrap();
        disk.write_zeroes(60_010, 4096, true).unwrap();
        disk.discard(80_000, 10_000).unwrap();
        disk.flush().unwrap();
        let bytes = std::fs::read(file.as_path()).unwrap();
        assert_eq!((bytes.len(), bytes[9], bytes[60_009]), (100_000, 1, 1));
        assert!(bytes[10..50_010].iter().chain(&bytes[60_010..64_106]).all(|byte| *byte == 0));
        disk.resize(200_000).unwrap();
        assert_eq!(disk.size().unwrap(), 200_000);
        assert!(disk.best_block().is_power_of_two());
    }

    #[test]
    fn a_short_read_is_an_error_and_so_is_what_cannot_be_opened() {
        let file = file(&[1; 100]);
        let disk = Raw::open(file.as_path(), false).unwrap();
        let error = disk.read_at(90, &of_bytes_mut(&mut [0; 20])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        for result in
            [disk.write_at(0, &of_bytes(&[1])), disk.discard(0, 1), disk.write_zeroes(0, 1, true)]
        {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EROFS));
        }
        assert!(disk.resize(1).is_err() && disk.is_read_only() && disk.flush().is_ok());
        let error = Raw::open(Path::new("/nowhere/at/all"), true).unwrap_err();
        assert_eq!((error.kind, error.errno), (ErrorKind::Io, Some(libc::ENOENT)));
        let error = Raw::open(Path::new("/dev/null"), false).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Config);
        let error = Raw::open(file.as_path(), true).unwrap_err();
        assert!(error.detail.contains("in use") && error.hint.is_some());
        assert_eq!(Raw::create(file.as_path()).unwrap_err().errno, Some(libc::EEXIST));
    }

    #[test]
    fn a_full_device_says_so() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let disk = Raw { file: full, ..Raw::open(file(&[0]).as_path(), true).unwrap() };
        let error = disk.write_at(0, &of_bytes(&[1; 10])).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }
}

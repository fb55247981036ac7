//! What a disk's contents are read from and written to. Any thread.

use std::fmt::Debug;
use std::io;

use super::slices::Slice;

/// The contents of a disk. Offsets and lengths are in bytes. Callers stay below [`Self::size`].
///
/// Reads may come from several threads at the same time, also during a write. Writes come from one
/// thread at a time. An implementation that calls the program says so by [`Self::may_block`]; it is
/// then called with no lock held.
pub trait Backend: Send + Sync + Debug {
    /// The size in bytes.
    ///
    /// # Errors
    /// If the backend cannot tell.
    fn size(&self) -> io::Result<u64>;

    /// Fill all buffers.
    ///
    /// # Errors
    /// If not every byte could be read.
    fn read_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()>;

    /// Write all buffers.
    ///
    /// # Errors
    /// If not every byte was written. Some may have been.
    fn write_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()>;

    /// Make what was written survive the host's end.
    ///
    /// # Errors
    /// If it may not.
    fn flush(&self) -> io::Result<()>;

    /// The range is no longer needed. It may read as anything afterwards.
    ///
    /// # Errors
    /// If the backend failed. One that cannot discard does nothing.
    fn discard(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    /// Let the range read as zeroes. With `may_unmap`, it may lose its place in the file.
    ///
    /// # Errors
    /// As for `write_at`.
    fn write_zeroes(&self, offset: u64, length: u64, _may_unmap: bool) -> io::Result<()> {
        const CHUNK: u64 = 64 << 10;
        let mut zeroes = vec![0; usize::try_from(length.min(CHUNK)).unwrap_or(0)];
        let mut done = 0;
        while done < length {
            let size = usize::try_from((length - done).min(CHUNK)).unwrap_or(0);
            let chunk = zeroes.get_mut(..size).unwrap_or_default();
            self.write_at(offset + done, &[Slice::from(chunk)])?;
            done += size as u64;
        }
        Ok(())
    }

    /// Change the size.
    ///
    /// # Errors
    /// If this backend cannot.
    fn resize(&self, _size: u64) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this disk has a fixed size"))
    }

    /// Whether it refuses writes.
    fn is_read_only(&self) -> bool {
        false
    }

    /// The unit in which it works best, a power of two from 512.
    fn best_block(&self) -> u32 {
        4096
    }

    /// Whether it calls the program, which may take any time.
    fn may_block(&self) -> bool {
        false
    }

    /// Whether the contents go when the process ends.
    fn is_volatile(&self) -> bool {
        false
    }
}

/// The error of a write to a backend that takes none.
pub(super) fn read_only() -> io::Error {
    io::Error::from_raw_os_error(libc::EROFS)
}

#[cfg(test)]
mod tests {
    use super::super::bytes::Bytes;
    use super::super::overlay::Overlay;
    use super::*;
    use crate::disk::of_bytes_mut;
    use std::sync::Arc;

    /// A backend with nothing but what it must have.
    #[derive(Debug)]
    struct Plain(Overlay);

    impl Backend for Plain {
        fn size(&self) -> io::Result<u64> {
            self.0.size()
        }

        fn read_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
            self.0.read_at(offset, buffers)
        }

        fn write_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
            self.0.write_at(offset, buffers)
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn zeroes_are_written_where_the_backend_has_nothing_better() {
        let plain = Plain(Overlay::new(Arc::new(Bytes::new(vec![1; 200_000]))));
        plain.discard(0, 200_000).unwrap();
        plain.write_zeroes(10, 150_000, true).unwrap();
        let mut bytes = vec![9; 200_000];
        plain.read_at(0, &of_bytes_mut(&mut bytes)).unwrap();
        assert!(bytes[..10].iter().chain(&bytes[150_010..]).all(|byte| *byte == 1));
        assert!(bytes[10..150_010].iter().all(|byte| *byte == 0));
        assert_eq!(plain.resize(1).unwrap_err().kind(), io::ErrorKind::Unsupported);
        assert!(!plain.is_read_only() && !plain.may_block() && !plain.is_volatile());
    }
}

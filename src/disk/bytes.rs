//! A disk's contents as bytes in memory that do not change. An overlay over them takes writes.

use std::io;

use super::backend::{Backend, read_only};
use super::slices::{self, Slice};

/// See the module.
pub(super) struct Bytes(Vec<u8>);

impl Bytes {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({})", self.0.len())
    }
}

impl Backend for Bytes {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        let length = usize::try_from(slices::length(buffers)).unwrap_or(usize::MAX);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = start.checked_add(length).and_then(|end| self.0.get(start..end));
        let found = found.ok_or(io::ErrorKind::UnexpectedEof)?;
        slices::fill(buffers, 0, found);
        Ok(())
    }

    fn write_at(&self, _offset: u64, _buffers: &[Slice<'_>]) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn is_volatile(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{of_bytes, of_bytes_mut};

    #[test]
    fn bytes_are_read_within_their_bounds() {
        let disk = Bytes::new((0..100).collect());
        let mut found = [0; 3];
        disk.read_at(97, &of_bytes_mut(&mut found)).unwrap();
        assert_eq!(found, [97, 98, 99]);
        for offset in [98, u64::MAX] {
            let error = disk.read_at(offset, &of_bytes_mut(&mut found)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
        let error = disk.write_at(0, &of_bytes(&[1])).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        assert_eq!(format!("{disk:?}"), "Bytes(100)");
    }
}

//! Parses saved state from untrusted bytes. Pure data.

use crate::error::{Error, ErrorKind, Result};

/// Takes bytes from the front, and fails if there are too few.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    what: &'a str,
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(what: &'a str, bytes: &'a [u8]) -> Self {
        Self { what, left: bytes }
    }

    pub(crate) fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let Some((first, left)) = self.left.split_first_chunk() else { return Err(self.short()) };
        self.left = left;
        Ok(*first)
    }

    pub(crate) fn u16(&mut self) -> Result<u16> {
        self.take().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// Take this many bytes.
    pub(crate) fn bytes(&mut self, length: usize) -> Result<&'a [u8]> {
        let Some((first, left)) = self.left.split_at_checked(length) else {
            return Err(self.short());
        };
        self.left = left;
        Ok(first)
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.left)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// # Errors
    /// If bytes are left.
    pub(crate) fn end(self) -> Result<()> {
        if self.is_empty() { Ok(()) } else { Err(bad(self.what, "it is longer than expected")) }
    }

    fn short(&self) -> Error {
        bad(self.what, "it is shorter than expected")
    }
}

/// The error for invalid state: a file, a record or a device's bytes.
pub(crate) fn bad(at: &str, detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Snapshot, at, detail)
}

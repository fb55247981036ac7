//! Reads and writes the buffers of a chain, in order and bounded by them. A running guest may
//! change their bytes at the same time. On one thread.

use std::io::{self, Read, Write};

use smallvec::SmallVec;
use vm_memory::VolatileSlice;

use super::access::QueueAccess;
use super::chain::{Chain, Segment, length};

/// A position in some buffers.
#[derive(Clone, Debug)]
struct Cursor<'a> {
    segments: &'a [Segment],
    /// Which buffer, and how much of it is used.
    at: (usize, u32),
    left: u64,
}

impl<'a> Cursor<'a> {
    fn of(access: &QueueAccess<'_>, chain: &'a Chain, segments: fn(&Chain) -> &[Segment]) -> Self {
        let segments = if access.has(chain) { segments(chain) } else { &[] };
        Self { segments, at: (0, 0), left: length(segments) }
    }

    /// The next piece, of at most this many bytes.
    fn take(&mut self, most: usize) -> Option<Segment> {
        let (index, used) = self.at;
        let segment = self.segments.get(index)?;
        let length = (segment.length - used).min(u32::try_from(most).unwrap_or(u32::MAX));
        let address = segment.address + u64::from(used);
        self.at =
            if used + length == segment.length { (index + 1, 0) } else { (index, used + length) };
        self.left -= u64::from(length);
        Some(Segment { address, length })
    }

    fn skip(&mut self, mut count: u64) {
        while count > 0 {
            let most = usize::try_from(count).unwrap_or(usize::MAX);
            let Some(piece) = self.take(most) else { return };
            count -= u64::from(piece.length);
        }
    }
}

/// Pieces of guest memory for a system call such as `preadv`, which must not outlive the access.
pub type Slices<'a> = SmallVec<[VolatileSlice<'a>; 8]>;

/// The next pieces of a cursor, without moving it.
fn slices<'a>(access: &'a QueueAccess<'_>, cursor: &Cursor<'_>, most: usize) -> Slices<'a> {
    let (mut cursor, mut left, mut found) = (cursor.clone(), most, Slices::new());
    while left > 0
        && let Some(Segment { address, length }) = cursor.take(left)
    {
        let length = usize::try_from(length).unwrap_or(0);
        left -= length;
        access.moment().slices(address, length, |piece| found.push(piece));
    }
    found
}

/// Reads what the driver has written for the device.
#[derive(Debug)]
pub struct ChainReader<'a> {
    access: &'a QueueAccess<'a>,
    cursor: Cursor<'a>,
}

impl<'a> ChainReader<'a> {
    /// At the start of the chain's readable buffers. A chain that is void has none.
    #[must_use]
    pub fn new(access: &'a QueueAccess<'_>, chain: &'a Chain) -> Self {
        Self { access, cursor: Cursor::of(access, chain, Chain::readable) }
    }

    /// How many bytes are left.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.cursor.left
    }

    /// Skip bytes, up to the end.
    pub fn skip(&mut self, count: u64) {
        self.cursor.skip(count);
    }

    /// The memory of the next bytes, at most this many. [`Self::skip`] moves on.
    #[must_use]
    pub fn slices(&self, most: usize) -> Slices<'a> {
        slices(self.access, &self.cursor, most)
    }

    /// Read exactly this many bytes. None if there are fewer.
    pub fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes).ok().map(|()| bytes)
    }

    /// The next bytes, at most this many, as a vector.
    pub fn read_vec(&mut self, most: usize) -> Vec<u8> {
        let length = usize::try_from(self.cursor.left).unwrap_or(usize::MAX).min(most);
        let mut bytes = vec![0; length];
        let read = self.read(&mut bytes).unwrap_or(0);
        bytes.truncate(read);
        bytes
    }
}

impl Read for ChainReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty())
            && let Some(Segment { address, length }) = self.cursor.take(rest.len())
        {
            let length = usize::try_from(length).unwrap_or(0).min(rest.len());
            self.access.moment().read(address, &mut rest[..length]).map_err(gone)?;
            done += length;
        }
        Ok(done)
    }
}

/// Writes what the device has for the driver.
#[derive(Debug)]
pub struct ChainWriter<'a> {
    access: &'a QueueAccess<'a>,
    cursor: Cursor<'a>,
    written: u32,
}

impl<'a> ChainWriter<'a> {
    /// At the start of the chain's writable buffers. A chain that is void has none.
    #[must_use]
    pub fn new(access: &'a QueueAccess<'_>, chain: &'a Chain) -> Self {
        Self { access, cursor: Cursor::of(access, chain, Chain::writable), written: 0 }
    }

    /// How many bytes have been written, for [`QueueAccess::complete`].
    #[must_use]
    pub fn written(&self) -> u32 {
        self.written
    }

    /// How many bytes are left.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.cursor.left
    }

    /// The memory of the next bytes, at most this many. [`Self::advance`] moves on.
    #[must_use]
    pub fn slices(&self, most: usize) -> Slices<'a> {
        slices(self.access, &self.cursor, most)
    }

    /// Bytes were written through [`Self::slices`]: log them, and move on.
    pub fn advance(&mut self, count: u64) {
        let mut left = count;
        while left > 0
            && let Some(piece) = self.cursor.take(usize::try_from(left).unwrap_or(usize::MAX))
        {
            self.access.moment().note_write(piece.address, u64::from(piece.length));
            left -= u64::from(piece.length);
        }
        self.count(count - left);
    }

    /// Move on without writing. The bytes count as written only if more follow.
    pub fn skip(&mut self, count: u64) {
        let before = self.cursor.left;
        self.cursor.skip(count);
        self.count(before - self.cursor.left);
    }

    fn count(&mut self, bytes: u64) {
        self.written = self.written.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
    }
}

impl Write for ChainWriter<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = from.get(done..).filter(|rest| !rest.is_empty())
            && let Some(Segment { address, length }) = self.cursor.take(rest.len())
        {
            let length = usize::try_from(length).unwrap_or(0).min(rest.len());
            // Slots may have changed since the chain was checked.
            self.access.moment().write_for_guest(address, &rest[..length]).map_err(gone)?;
            done += length;
        }
        self.count(done as u64);
        Ok(done)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn gone(error: crate::error::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error.to_string())
}

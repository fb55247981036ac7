//! Requests of a disk's driver (virtio 1.2, 5.2.6): what they ask for, and how far they may go.
//! Parsed from bytes of the guest. Pure data.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

/// The unit of all sizes in the protocol.
pub(super) const SECTOR: u64 = 512;
/// The bytes of a request's header.
pub(super) const HEADER: u64 = 16;
/// The most sectors of a segment to discard or to zero: 64 MiB.
pub(super) const MOST_SECTORS: u32 = 1 << 17;
/// The most such segments in a request.
pub(super) const MOST_SEGMENTS: u32 = 16;
/// The most bytes of their description.
pub(super) const MOST_SEGMENT_BYTES: usize = 256;
const SEGMENT: usize = 16;
const UNMAP: u32 = 1;

/// The status that the driver finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    Failed,
    Unsupported,
}

impl Status {
    pub(super) fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            Self::Unsupported => 2,
        }
    }
}

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read {
        offset: u64,
        length: u64,
    },
    Write {
        offset: u64,
        length: u64,
    },
    Flush,
    Id,
    /// The data has the segments.
    Discard,
    /// The data has the segments.
    WriteZeroes,
}

/// A range to discard or to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) may_unmap: bool,
}

impl Request {
    /// Parse a header, with the lengths of the data that the device reads and writes.
    ///
    /// # Errors
    /// The status of a request that is not understood.
    pub(super) fn parse(header: [u8; 16], readable: u64, writable: u64) -> Result<Self, Status> {
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let whole = |length: u64| {
            let offset = sector.checked_mul(SECTOR).filter(|_| length.is_multiple_of(SECTOR));
            offset.ok_or(Status::Failed)
        };
        match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => Ok(Self::Read { offset: whole(writable)?, length: writable }),
            VIRTIO_BLK_T_OUT => Ok(Self::Write { offset: whole(readable)?, length: readable }),
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::Id),
            VIRTIO_BLK_T_DISCARD => Ok(Self::Discard),
            VIRTIO_BLK_T_WRITE_ZEROES => Ok(Self::WriteZeroes),
            _ => Err(Status::Unsupported),
        }
    }

    /// For the report of a failure.
    pub(super) fn describe(self) -> String {
        match self {
            Self::Read { offset, length } => format!("read of {length} bytes at {offset}"),
            Self::Write { offset, length } => format!("write of {length} bytes at {offset}"),
            Self::Flush => "flush".into(),
            Self::Id => "serial number".into(),
            Self::Discard => "discard".into(),
            Self::WriteZeroes => "write of zeroes".into(),
        }
    }

    /// The bytes that it moves, for rate limits.
    pub(super) fn bytes(self) -> u64 {
        match self {
            Self::Read { length, .. } | Self::Write { length, .. } => length,
            _ => 0,
        }
    }
}

/// Parse the segments of a request to discard or to zero.
///
/// # Errors
/// The status of one that a driver must not make.
pub(super) fn ranges(data: &[u8], is_discard: bool) -> Result<Vec<Range>, Status> {
    if data.is_empty() || !data.len().is_multiple_of(SEGMENT) || data.len() > MOST_SEGMENT_BYTES {
        return Err(Status::Failed);
    }
    let (chunks, _) = data.as_chunks::<SEGMENT>();
    chunks.iter().map(|segment| range(*segment, is_discard)).collect()
}

fn range(segment: [u8; SEGMENT], is_discard: bool) -> Result<Range, Status> {
    let [sector @ .., a, b, c, d, e, f, g, h] = segment;
    let count = u32::from_le_bytes([a, b, c, d]);
    let flags = u32::from_le_bytes([e, f, g, h]);
    if flags & !UNMAP != 0 || (is_discard && flags != 0) {
        return Err(Status::Unsupported);
    }
    let offset = u64::from_le_bytes(sector).checked_mul(SECTOR).ok_or(Status::Failed)?;
    if count > MOST_SECTORS {
        return Err(Status::Failed);
    }
    Ok(Range { offset, length: u64::from(count) * SECTOR, may_unmap: flags & UNMAP != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    #[test]
    fn requests_are_whole_sectors() {
        let read = Request::parse(header(0, 3), 0, 1024).unwrap();
        assert_eq!(read, Request::Read { offset: 1536, length: 1024 });
        let write = Request::parse(header(1, 0), 512, 0).unwrap();
        assert_eq!((write, write.bytes()), (Request::Write { offset: 0, length: 512 }, 512));
        assert_eq!(Request::parse(header(0, 3), 0, 100), Err(Status::Failed));
        assert_eq!(Request::parse(header(1, u64::MAX), 512, 0), Err(Status::Failed));
        assert_eq!(Request::parse(header(4, 9), 0, 0).map(Request::bytes), Ok(0));
        assert_eq!(Request::parse(header(99, 0), 0, 0), Err(Status::Unsupported));
    }

    #[test]
    fn segments_are_bounded() {
        let two = [segment(1, 2, 1), segment(5, 0, 0)].concat();
        let (first, second) = (
            Range { offset: 512, length: 1024, may_unmap: true },
            Range { offset: 2560, length: 0, may_unmap: false },
        );
        assert_eq!(ranges(&two, false), Ok(vec![first, second]));
        assert_eq!(ranges(&two, true), Err(Status::Unsupported));
        assert_eq!(ranges(&segment(0, 1, 2), false), Err(Status::Unsupported));
        assert_eq!(ranges(&segment(0, MOST_SECTORS + 1, 0), true), Err(Status::Failed));
        assert_eq!(ranges(&segment(u64::MAX, 1, 0), true), Err(Status::Failed));
        for bad in [vec![], vec![0; 15], vec![0; 17 * 16]] {
            assert_eq!(ranges(&bad, true), Err(Status::Failed));
        }
        assert_eq!(Status::Unsupported.byte(), 2);
        assert_eq!(usize::try_from(MOST_SEGMENTS).unwrap() * SEGMENT, MOST_SEGMENT_BYTES);
    }
}

//! The header of a snapshot's file, byte by byte as docs/snapshot-format.md has it. Pure data.

use crate::bytes::{Reader, bad};
use crate::error::{Error, Result};
use crate::layout::PAGE;

const MAGIC: [u8; 8] = *b"pyvmmsnp";
const VERSION: u32 = 1;
/// The size of the header in bytes; the state follows.
pub(super) const HEADER: usize = 128;
/// The offset of the header's own checksum.
const HEADER_CRC: usize = 12;
/// In place of a run's offset in the file: the pages are those of the base.
pub(super) const OF_BASE: u64 = u64::MAX;
/// The largest state: enough for 254 vCPUs with AMX and a million runs of pages.
pub(super) const MAX_STATE: u64 = 1 << 28;

/// The start of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The size of the whole file in bytes.
    pub file_length: u64,
    /// The size of the state, which follows the header, in bytes.
    pub state_length: u64,
    /// The offset of the pages.
    pub pages: u64,
    /// CRC-32 of the state.
    pub state_crc: u32,
    /// CRC-32 of the pages.
    pub pages_crc: u32,
    /// The snapshot's id.
    pub id: [u8; 16],
    /// The id of the snapshot whose pages it needs; zeros if there is none.
    pub base: [u8; 16],
}

impl Header {
    /// Encode it.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut put = |at: usize, field: &[u8]| {
            bytes.iter_mut().skip(at).zip(field).for_each(|(byte, value)| *byte = *value);
        };
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(16, &self.file_length.to_le_bytes());
        put(24, &self.state_length.to_le_bytes());
        put(32, &self.pages.to_le_bytes());
        put(40, &self.state_crc.to_le_bytes());
        put(44, &self.pages_crc.to_le_bytes());
        put(48, &self.id);
        put(64, &self.base);
        let crc = crc32fast::hash(&bytes).to_le_bytes();
        bytes.iter_mut().skip(HEADER_CRC).zip(crc).for_each(|(byte, value)| *byte = value);
        bytes
    }

    /// Decode the header of a file of this length.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Snapshot`] if it is not the header of such a file.
    pub fn decode(bytes: &[u8; HEADER], length: u64) -> Result<Self> {
        let mut reader = Reader::new("header", bytes);
        if reader.take::<8>()? != MAGIC {
            return Err(bad("file", "it is no snapshot of pyvmm"));
        }
        let version = reader.u32()?;
        if version != VERSION {
            let detail = format!("it has version {version} of the format, this pyvmm {VERSION}");
            return Err(bad("version", detail));
        }
        let crc = reader.u32()?;
        let mut without = *bytes;
        without.iter_mut().skip(HEADER_CRC).take(4).for_each(|byte| *byte = 0);
        if crc32fast::hash(&without) != crc {
            return Err(damaged("header"));
        }
        let header = Self {
            file_length: reader.u64()?,
            state_length: reader.u64()?,
            pages: reader.u64()?,
            state_crc: reader.u32()?,
            pages_crc: reader.u32()?,
            id: reader.take()?,
            base: reader.take()?,
        };
        let state_end = header.state_length.checked_add(HEADER as u64);
        let is_whole = header.file_length == length
            && header.pages.is_multiple_of(PAGE)
            && state_end.is_some_and(|end| end <= header.pages && header.pages - end < PAGE)
            && header.pages <= length
            && header.state_length <= MAX_STATE
            && reader.rest().iter().all(|byte| *byte == 0);
        if is_whole {
            Ok(header)
        } else {
            Err(bad("file", "it is not whole, or longer than it was"))
        }
    }
}

pub(super) fn damaged(at: &str) -> Error {
    bad(at, "its checksum is wrong: the file is damaged")
}

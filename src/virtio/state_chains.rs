//! The chains in a snapshot that the device had taken from a queue and not completed: a restored
//! device takes them again, first. Parsed from untrusted bytes.

use std::collections::VecDeque;

use super::chain::{Buffers, Segment};
use super::queue::{Queue, Taken};
use crate::bytes::{Reader, bad};
use crate::error::Result;
use crate::memory::GuestMemory;

pub(super) fn save(queue: &Queue, bytes: &mut Vec<u8>) {
    let all = || queue.taken.iter().chain(&queue.carried);
    bytes.extend(count(all().count()));
    for taken in all() {
        bytes.extend(taken.head.to_le_bytes());
        for segments in [taken.buffers.readable(), taken.buffers.writable()] {
            bytes.extend(count(segments.len()));
            for segment in segments {
                bytes.extend(segment.address.to_le_bytes());
                bytes.extend(segment.length.to_le_bytes());
            }
        }
    }
}

pub(super) fn count(length: usize) -> [u8; 4] {
    u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes()
}

/// The chains of a queue of this size, and of this maximum size.
pub(super) fn parse(
    name: &str,
    (size, max_size): (u16, u16),
    memory: &GuestMemory,
    reader: &mut Reader<'_>,
) -> Result<VecDeque<Taken>> {
    let taken = reader.u32()?;
    if taken > u32::from(max_size) {
        return Err(bad(name, format!("{taken} chains are more than the queue has")));
    }
    let mut carried = VecDeque::new();
    for _ in 0..taken {
        let head = reader.u16()?;
        if head >= size {
            return Err(bad(name, format!("the queue has no descriptor {head}")));
        }
        let mut buffers = Buffers::default();
        for is_writable in [false, true] {
            parse_segments(name, reader, memory, is_writable, &mut buffers)?;
        }
        carried.push_back(Taken { head, buffers });
    }
    Ok(carried)
}

/// What [`super::chain`] makes sure of is checked again.
fn parse_segments(
    name: &str,
    reader: &mut Reader<'_>,
    memory: &GuestMemory,
    is_writable: bool,
    buffers: &mut Buffers,
) -> Result<()> {
    let count = reader.u32()?;
    if count > u32::from(u16::MAX) {
        return Err(bad(name, format!("{count} buffers are too many for a chain")));
    }
    let check = if is_writable { GuestMemory::check_guest_writes } else { GuestMemory::check };
    let mut total: u32 = 0;
    for _ in 0..count {
        let (address, length) = (reader.u64()?, reader.u32()?);
        check(memory, address, u64::from(length.max(1)))
            .map_err(|error| bad(name, error.to_string()))?;
        total = total
            .checked_add(length)
            .ok_or_else(|| bad(name, "the buffers of a chain have more than 4 GiB"))?;
        buffers
            .push(Segment { address, length }, is_writable)
            .map_err(|error| bad(name, error.to_string()))?;
    }
    Ok(())
}

//! The only walk over descriptor chains. It refuses what a driver must not do: a loop, a readable
//! descriptor after a writable one, an address outside memory or in ROM, an indirect table inside
//! another, more than 4 GiB. What it returns is checked, and accesses nothing else.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use super::abandoned::Abandoned;
use crate::memory::GuestMemory;

/// A buffer of the driver in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes, not zero.
    pub length: u32,
}

/// Buffers in the order of the chain.
pub type Segments = SmallVec<[Segment; 4]>;

/// Why a chain is refused. The device needs a reset then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokenChain {
    /// It has a loop, ends at a descriptor that does not exist or cannot be read, or is longer than
    /// 4 GiB.
    Unfinished,
    /// A readable descriptor follows a writable one.
    Order,
    /// A buffer is outside memory, or in memory that the guest cannot write.
    Address(u64),
    /// The available ring has more entries than the queue, or cannot be read.
    AvailableRing,
    /// The used ring is outside memory, or in memory that the guest cannot write.
    UsedRing,
}

impl fmt::Display for BrokenChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unfinished => f.write_str("a descriptor chain has no end"),
            Self::Order => f.write_str("a readable descriptor follows a writable one"),
            Self::Address(at) => write!(f, "the buffer at {at:#x} is not in memory"),
            Self::AvailableRing => {
                f.write_str("the available ring has more entries than the queue, or is not memory")
            }
            Self::UsedRing => f.write_str("the used ring is not in memory that can be written"),
        }
    }
}

/// A descriptor chain that the device has taken and not yet completed.
/// [`super::QueueAccess::complete`] gives it back to the driver. One that is dropped instead is
/// given back with nothing written.
#[derive(Debug)]
pub struct Chain {
    pub(super) queue: usize,
    pub(super) head: u16,
    /// The queues' epoch at which it was taken.
    pub(super) epoch: u64,
    /// What the device reads.
    pub readable: Segments,
    /// What the device writes.
    pub writable: Segments,
    pub(super) abandoned: Option<Arc<Abandoned>>,
}

impl Chain {
    /// The queue that it is from.
    #[must_use]
    pub fn queue(&self) -> usize {
        self.queue
    }

    /// The bytes that the device can read.
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        length(&self.readable)
    }

    /// The bytes that the device can write.
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        length(&self.writable)
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if let Some(abandoned) = self.abandoned.take() {
            abandoned.add(self.queue, self.head, self.epoch);
        }
    }
}

/// The bytes of some buffers.
pub(super) fn length(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.length)).sum()
}

/// The checked buffers of a chain: readable and writable ones.
pub(super) fn walk(
    chain: DescriptorChain<&GuestMemoryMmap>,
    memory: &GuestMemory,
) -> Result<(Segments, Segments), BrokenChain> {
    let (mut readable, mut writable) = (Segments::new(), Segments::new());
    // The iterator of upstream ends early, without an error, where the chain is broken.
    let mut is_finished = false;
    for descriptor in chain {
        is_finished = !descriptor.has_next();
        let (address, length) = (descriptor.addr().0, descriptor.len());
        if !descriptor.is_write_only() && !writable.is_empty() {
            return Err(BrokenChain::Order);
        }
        let checked = if descriptor.is_write_only() {
            memory.check_guest_writes(address, u64::from(length))
        } else {
            memory.check(address, u64::from(length))
        };
        if length > 0 && checked.is_err() {
            return Err(BrokenChain::Address(address));
        }
        let segments = if descriptor.is_write_only() { &mut writable } else { &mut readable };
        if length > 0 {
            segments.push(Segment { address, length });
        }
    }
    if is_finished { Ok((readable, writable)) } else { Err(BrokenChain::Unfinished) }
}

//! The only walk over descriptor chains. It refuses what a driver must not do: a loop, a readable
//! descriptor after a writable one, an address outside memory or in ROM, an indirect table inside
//! another, more descriptors than the device's queue has, more than 4 GiB. What it returns is
//! checked, and accesses nothing else.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;
use virtio_queue::DescriptorChain;

use super::abandoned::Abandoned;
use crate::memory::Moment;

/// A buffer of the driver in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes, not zero.
    pub length: u32,
}

/// The buffers of a chain: those that the device reads, and then those that it writes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Buffers {
    all: SmallVec<[Segment; 4]>,
    /// How many the device reads.
    readable: usize,
}

impl Buffers {
    /// Add a buffer. One of zero bytes is left out.
    ///
    /// # Errors
    /// [`BrokenChain::Order`] if the device reads it, and writes one before.
    pub(super) fn push(&mut self, segment: Segment, is_writable: bool) -> Result<(), BrokenChain> {
        if !is_writable && self.readable < self.all.len() {
            return Err(BrokenChain::Order);
        }
        if segment.length > 0 {
            self.all.push(segment);
            self.readable += usize::from(!is_writable);
        }
        Ok(())
    }

    /// What the device reads.
    pub(super) fn readable(&self) -> &[Segment] {
        self.all.get(..self.readable).unwrap_or_default()
    }

    /// What the device writes.
    pub(super) fn writable(&self) -> &[Segment] {
        self.all.get(self.readable..).unwrap_or_default()
    }
}

impl Clone for Buffers {
    fn clone(&self) -> Self {
        // Copies the bytes of all at once.
        Self { all: SmallVec::from_slice(&self.all), readable: self.readable }
    }
}

/// Why a chain is refused. The device needs a reset then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokenChain {
    /// It has a loop, ends at a descriptor that does not exist or cannot be read, or is longer than
    /// 4 GiB.
    Unfinished,
    /// It has more descriptors than the device's queue.
    Long,
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
            Self::Long => f.write_str("a descriptor chain is longer than the queue"),
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
    pub(super) buffers: Buffers,
    pub(super) abandoned: Option<Arc<Abandoned>>,
}

impl Chain {
    /// The queue that it is from.
    #[must_use]
    pub fn queue(&self) -> usize {
        self.queue
    }

    /// The epoch of the queues at which it was taken.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What the device reads.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        self.buffers.readable()
    }

    /// What the device writes.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        self.buffers.writable()
    }

    /// The bytes that the device can read.
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        length(self.readable())
    }

    /// The bytes that the device can write.
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        length(self.writable())
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

/// The checked buffers of a chain, which has at most this many descriptors.
pub(super) fn walk(
    chain: DescriptorChain<&Moment<'_>>,
    memory: &Moment<'_>,
    most: u16,
) -> Result<Buffers, BrokenChain> {
    let mut buffers = Buffers::default();
    // The iterator of upstream ends early, without an error, where the chain is broken.
    let mut is_finished = false;
    for (place, descriptor) in chain.enumerate() {
        // An indirect table may be longer than the queue.
        if place >= usize::from(most) {
            return Err(BrokenChain::Long);
        }
        is_finished = !descriptor.has_next();
        let (address, length) = (descriptor.addr().0, descriptor.len());
        let is_writable = descriptor.is_write_only();
        buffers.push(Segment { address, length }, is_writable)?;
        let check = if is_writable { Moment::can_guest_write } else { Moment::has };
        if length > 0 && !check(memory, address, u64::from(length)) {
            return Err(BrokenChain::Address(address));
        }
    }
    if is_finished { Ok(buffers) } else { Err(BrokenChain::Unfinished) }
}

#[cfg(test)]
mod tests {
    //! Drivers that do what virtio forbids.
    //! Covers src/virtio/buffers.rs.

    use proptest::prelude::*;

    use super::super::mock::tests::rng;
    use super::super::mock::{MockDriver, readable, writable};
    use super::super::registers::*;

    const AT: u64 = MockDriver::BUFFERS;

    fn started() -> MockDriver {
        let mut driver = rng();
        driver.start(INDIRECT_DESC);
        driver
    }

    /// The device needs a reset, says why, and works again after it.
    fn fails(mut driver: MockDriver, reason: &str) {
        driver.notify(0);
        driver.turn(0).unwrap();
        assert_eq!(driver.read(STATUS) & 0x40, 0x40);
        assert_eq!(driver.interrupt_status() & CONFIGURATION_CHANGE, CONFIGURATION_CHANGE);
        let failure = driver.attached.transport.queues().failure().unwrap();
        assert!(failure.contains(reason), "{failure}");
        driver.notify(0);
        driver.turn(0).unwrap();
        assert_eq!(driver.used(0), None);
        assert_eq!(driver.start(0), 15);
        assert_eq!(driver.exchange(0, &[writable(AT, 8)]), Some(8));
    }

    #[test]
    fn a_loop_is_refused() {
        let mut driver = started();
        driver.set_descriptor(0, 0, (AT, 8, 3, 1));
        driver.set_descriptor(0, 1, (AT, 8, 3, 0));
        driver.add_head(0, 0);
        fails(driver, "no end");
    }

    #[test]
    fn a_descriptor_that_does_not_exist_is_refused() {
        let mut driver = started();
        driver.set_descriptor(0, 0, (AT, 8, 3, 60_000));
        driver.add_head(0, 0);
        fails(driver, "no end");
        let mut driver = started();
        driver.add_head(0, 60_000);
        fails(driver, "no end");
    }

    #[test]
    fn a_readable_descriptor_after_a_writable_one_is_refused() {
        let mut driver = started();
        driver.add(0, &[writable(AT, 8), readable(AT, 8)]).unwrap();
        fails(driver, "readable descriptor follows");
    }

    #[test]
    fn buffers_outside_memory_are_refused() {
        for (address, length) in
            [(1 << 40, 8), (u64::MAX - 3, 8), ((4 << 20) - 4, 8), (AT, u32::MAX)]
        {
            let mut driver = started();
            driver.add(0, &[writable(address, length)]).unwrap();
            fails(driver, "not in memory");
        }
    }

    #[test]
    fn chains_of_more_than_4_gib_are_refused() {
        let mut driver = started();
        driver.add(0, &[readable(AT, 0x1000), readable(AT, u32::MAX)]).unwrap();
        // The second is outside memory as well; either is a reason.
        driver.notify(0);
        driver.turn(0).unwrap();
        assert_eq!(driver.read(STATUS) & 0x40, 0x40);
    }

    #[test]
    fn an_indirect_table_works_and_one_inside_another_is_refused() {
        let mut driver = started();
        let table: Vec<u8> = [AT.to_le_bytes(), (4u64 | 2 << 32).to_le_bytes()].concat();
        driver.memory.write(AT + 0x100, &table).unwrap();
        driver.set_descriptor(0, 0, (AT + 0x100, 16, 4, 0));
        driver.add_head(0, 0);
        driver.notify(0);
        driver.turn(0).unwrap();
        assert_eq!(driver.used(0), Some((0, 4)));
        let mut driver = started();
        let nested: Vec<u8> = [AT.to_le_bytes(), (16u64 | 4 << 32).to_le_bytes()].concat();
        driver.memory.write(AT + 0x100, &nested).unwrap();
        driver.set_descriptor(0, 0, (AT + 0x100, 16, 4, 0));
        driver.add_head(0, 0);
        fails(driver, "no end");
        let mut driver = started();
        driver.set_descriptor(0, 0, (AT + 0x100, 17, 4, 0));
        driver.add_head(0, 0);
        fails(driver, "no end");
    }

    #[test]
    fn more_entries_than_the_queue_has_are_refused() {
        let driver = started();
        driver.set_available(0, 65);
        fails(driver, "available ring");
    }

    proptest! {
        #[test]
        fn no_rings_make_it_panic_or_spin(
            raw in prop::collection::vec((0u64..0x50_0000, 0u32..0x2000, 0u16..8, 0u16..70), 1..64),
            heads in prop::collection::vec(0u16..70, 1..64),
        ) {
            let mut driver = started();
            for (index, raw) in (0..).zip(raw) {
                driver.set_descriptor(0, index, raw);
            }
            heads.iter().for_each(|head| driver.add_head(0, *head));
            driver.notify(0);
            driver.turn(0).unwrap();
            let mut given_back = 0;
            while driver.used(0).is_some() {
                given_back += 1;
            }
            prop_assert!(given_back <= heads.len());
        }
    }
}

//! One queue of a device: upstream's, with the chains that the device has taken, and the checks of
//! what is written to guest memory. The lock of its place in [`super::Queues`] protects it.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue as Ring, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{BrokenChain, Buffers, walk};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Moment;

/// Head and length of the used ring before its entries, the size of one, and the event index.
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;
const EVENT_INDEX: u64 = 2;

/// What has been taken from the queue and not been completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) head: u16,
    pub(super) buffers: Buffers,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) ring: Ring,
    /// In the order in which they were taken.
    pub(super) taken: Vec<Taken>,
    /// Taken before a snapshot that was restored; the device takes them again, first.
    pub(super) carried: VecDeque<Taken>,
    /// The registers that the driver has given values that the queue cannot have.
    pub(super) refused: BTreeSet<u64>,
    /// Whether the driver notifies, without the event index.
    is_notified: bool,
    /// How many chains were completed since the driver was last interrupted, or was not to be.
    completed: u16,
}

impl Queue {
    /// # Errors
    /// If the size is not a power of two.
    pub(super) fn new(max_size: u16) -> Result<Self> {
        let ring = Ring::new(max_size).map_err(|error| {
            let detail = format!("a queue of {max_size} entries: {error}");
            Error::new(ErrorKind::Config, "virtio", detail)
        })?;
        let (taken, carried) = (Vec::new(), VecDeque::new());
        let refused = BTreeSet::new();
        Ok(Self { ring, taken, carried, refused, is_notified: true, completed: 0 })
    }

    pub(super) fn reset(&mut self) {
        self.ring.reset();
        self.taken.clear();
        self.carried.clear();
        self.refused.clear();
        (self.is_notified, self.completed) = (true, 0);
    }

    /// The driver stops it: nothing is given back any more.
    pub(super) fn stop(&mut self) {
        self.ring.set_ready(false);
        self.taken.clear();
        self.carried.clear();
    }

    fn used_ring_size(&self) -> u64 {
        USED_HEADER + USED_ELEMENT * u64::from(self.ring.size()) + EVENT_INDEX
    }

    /// Whether the rings are in memory, and the used ring in memory that can be written.
    pub(super) fn is_valid(&self, memory: &Moment<'_>) -> bool {
        self.refused.is_empty()
            && self.ring.is_valid(memory)
            && self.check_used_ring(memory).is_ok()
    }

    /// Slots may change while the queue is in use.
    fn check_used_ring(&self, memory: &Moment<'_>) -> std::result::Result<(), BrokenChain> {
        let checked = memory.check_guest_writes(self.ring.used_ring(), self.used_ring_size());
        checked.map_err(|_| BrokenChain::UsedRing)
    }

    fn note_used_ring(&self, memory: &Moment<'_>) {
        memory.note_write(self.ring.used_ring(), self.used_ring_size());
    }

    /// Take the next chain. None if there is none: the driver notifies the device of the next one.
    pub(super) fn pop(
        &mut self,
        memory: &Moment<'_>,
    ) -> std::result::Result<Option<Taken>, BrokenChain> {
        if !self.ring.ready() {
            return Ok(None);
        }
        if let Some(taken) = self.carried.pop_front() {
            self.taken.push(taken.clone());
            return Ok(Some(taken));
        }
        while self.is_empty(memory)? {
            if !self.ask_for_notification(memory)? {
                return Ok(None);
            }
        }
        // A driver that makes a chain available again before it has it back could do so without
        // end.
        if self.taken.len() >= usize::from(self.ring.size()) {
            return Err(BrokenChain::AvailableRing);
        }
        self.decline_notification(memory)?;
        let broken = |_| BrokenChain::AvailableRing;
        let chain = self.ring.iter(memory).map_err(broken)?.next();
        let chain = chain.ok_or(BrokenChain::AvailableRing)?;
        let head = chain.head_index();
        let taken = Taken { head, buffers: walk(chain, memory, self.ring.max_size())? };
        self.taken.push(taken.clone());
        Ok(Some(taken))
    }

    /// Whether the driver has made nothing available that the device has not taken.
    pub(super) fn is_empty(&self, memory: &Moment<'_>) -> std::result::Result<bool, BrokenChain> {
        if !self.ring.ready() {
            return Ok(true);
        }
        if !self.carried.is_empty() {
            return Ok(false);
        }
        // Acquire: the entries up to the index are read after it.
        let index = self.ring.avail_idx(memory, Ordering::Acquire);
        Ok(index.map_err(|_| BrokenChain::AvailableRing)?.0 == self.ring.next_avail())
    }

    /// Undo the last `pop`, whose chain was not touched.
    pub(super) fn push_back(&mut self, head: u16) {
        if let Some(at) = self.taken.iter().rposition(|taken| taken.head == head) {
            let taken = self.taken.remove(at);
            self.carried.push_front(taken);
        }
    }

    /// Ask the driver to notify. Returns whether it has made a chain available meanwhile.
    fn ask_for_notification(
        &mut self,
        memory: &Moment<'_>,
    ) -> std::result::Result<bool, BrokenChain> {
        self.check_used_ring(memory)?;
        self.is_notified = true;
        let found = self.ring.enable_notification(memory);
        self.note_used_ring(memory);
        found.map_err(|_| BrokenChain::UsedRing)
    }

    fn decline_notification(
        &mut self,
        memory: &Moment<'_>,
    ) -> std::result::Result<(), BrokenChain> {
        if self.ring.event_idx_enabled() || !std::mem::take(&mut self.is_notified) {
            return Ok(());
        }
        self.check_used_ring(memory)?;
        let declined = self.ring.disable_notification(memory);
        self.note_used_ring(memory);
        declined.map_err(|_| BrokenChain::UsedRing)
    }

    /// Give chains back to the driver, all at the same moment, each with the number of bytes
    /// written. Those that the device does not have are left out.
    pub(super) fn complete(
        &mut self,
        memory: &Moment<'_>,
        chains: &[(u16, u32)],
    ) -> std::result::Result<(), BrokenChain> {
        let mut ours = Heads::new();
        for (head, length) in chains {
            if let Some(at) = self.taken.iter().position(|taken| taken.head == *head) {
                self.taken.remove(at);
                ours.push((*head, *length));
            }
        }
        let Some(((last, length), first)) = ours.split_last() else { return Ok(()) };
        self.check_used_ring(memory)?;
        let bad = |_| BrokenChain::UsedRing;
        let next = self.ring.next_used();
        for (index, (head, length)) in (next..=u16::MAX).chain(0..=u16::MAX).zip(first) {
            let slot = u64::from(index % self.ring.size());
            let at = self.ring.used_ring() + USED_HEADER + USED_ELEMENT * slot;
            let element = u64::from(*head) | u64::from(*length) << 32;
            memory
                .write_slice(&element.to_le_bytes(), GuestAddress(at))
                .map_err(|_| BrokenChain::UsedRing)?;
        }
        let before = u16::try_from(first.len()).unwrap_or(u16::MAX);
        self.ring.set_next_used(next.wrapping_add(before));
        // This also writes the index: the driver sees all entries at once.
        self.ring.add_used(memory, *last, *length).map_err(bad)?;
        self.completed = self.completed.saturating_add(before).saturating_add(1);
        self.note_used_ring(memory);
        Ok(())
    }

    /// Whether the driver wants an interrupt for the chains completed since the last call.
    pub(super) fn wants_interrupt(&mut self, memory: &Moment<'_>) -> bool {
        let completed = std::mem::take(&mut self.completed);
        if completed == 0 {
            return false;
        }
        let rings = GuestAddress(self.ring.avail_ring());
        // SeqCst: the used index is written before the driver's wish is read.
        fence(Ordering::SeqCst);
        if self.ring.event_idx_enabled() {
            let at = rings.0 + 4 + 2 * u64::from(self.ring.size());
            let Ok(event) = memory.load::<u16>(GuestAddress(at), Ordering::Relaxed) else {
                return true;
            };
            // The index that the driver waits for is among those just completed.
            let since = self.ring.next_used().wrapping_sub(u16::from_le(event)).wrapping_sub(1);
            return since < completed;
        }
        let flags = memory.load::<u16>(rings, Ordering::Relaxed).map(u16::from_le);
        let declined = u16::try_from(VRING_AVAIL_F_NO_INTERRUPT).unwrap_or(1);
        flags.map_or(true, |flags| flags & declined == 0)
    }
}

/// Chains that are given back at once: heads, and the numbers of bytes written. A disk has as many.
pub(super) type Heads = smallvec::SmallVec<[(u16, u32); 16]>;

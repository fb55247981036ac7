//! A device's access to its queues: takes chains, reads and writes their buffers, and gives them
//! back. The end of the access interrupts the driver, if it wants that. On one thread.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::chain::Chain;
use super::queue::{Heads, Queue, Taken};
use super::queues::Queues;
use super::registers;
use crate::memory::{GuestMemory, Moment};
use crate::sync::{MutexGuard, rank};

/// See the module. Not for a thread that waits for anything.
#[derive(Debug)]
pub struct QueueAccess<'a> {
    queues: &'a Queues,
    features: u64,
    epoch: u64,
    memory: Moment<'a>,
    /// One bit for each queue with completed chains.
    completed: Cell<u64>,
    has_failed: Cell<bool>,
}

impl Queues {
    /// Begin to access the queues. None while the driver has not started the device, while the
    /// machine is quiesced, and once the device needs a reset. Does not wait. A reset or a snapshot
    /// waits for the end of the access, so it must be short.
    pub fn access(&self) -> Option<QueueAccess<'_>> {
        self.enter().map(|(features, epoch)| QueueAccess::new(self, features, epoch))
    }

    /// Like [`Self::access`], for a thread other than the loop's: waits while the machine is
    /// quiesced. None if the device was reset since it had this epoch.
    pub fn access_after(&self, epoch: u64) -> Option<QueueAccess<'_>> {
        self.enter_after(epoch).map(|(features, epoch)| QueueAccess::new(self, features, epoch))
    }
}

impl<'a> QueueAccess<'a> {
    fn new(queues: &'a Queues, features: u64, epoch: u64) -> Self {
        let memory = queues.memory.moment();
        let (completed, has_failed) = (Cell::new(0), Cell::new(false));
        let access = Self { queues, features, epoch, memory, completed, has_failed };
        access.give_back_abandoned();
        access
    }

    /// The features that the driver has accepted.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Changes with each reset. A thread that works without access passes it to
    /// [`Queues::access_after`].
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether a chain is the device's: the driver has neither reset the device nor stopped the
    /// queue since the device has taken it.
    #[must_use]
    pub(super) fn has(&self, chain: &Chain) -> bool {
        // Relaxed: a stop waits for accesses in progress.
        let stopped = self.queues.stopped.load(Ordering::Relaxed);
        chain.epoch == self.epoch && stopped & 1 << (chain.queue & 63) == 0
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.queues.memory
    }

    /// Guest memory with the slots that it had when the access began.
    pub(super) fn moment(&self) -> &Moment<'a> {
        &self.memory
    }

    fn queue(&self, queue: usize) -> Option<MutexGuard<'_, Queue, rank::VirtioQueue>> {
        self.queues.all.get(queue).map(|queue| queue.lock())
    }

    /// Take the next chain of a queue. None if there is none, and then the driver notifies the
    /// device of the next; or if the driver's chain is broken, and the device needs a reset.
    pub fn pop(&self, queue: usize) -> Option<Chain> {
        if self.has_failed.get() {
            return None;
        }
        let popped = self.queue(queue)?.pop(&self.memory);
        match popped {
            Ok(taken) => {
                let Taken { head, buffers } = taken?;
                self.queues.counts.taken.fetch_add(1, Ordering::Relaxed);
                let abandoned = Some(Arc::clone(&self.queues.abandoned));
                Some(Chain { queue, head, epoch: self.epoch, buffers, abandoned })
            }
            Err(broken) => {
                self.fail(format!("queue {queue}: {broken}"));
                None
            }
        }
    }

    /// Whether the driver has made nothing available to the device in a queue.
    #[must_use]
    pub fn is_empty(&self, queue: usize) -> bool {
        let found = self.queue(queue).map(|queue| queue.is_empty(&self.memory));
        matches!(found, None | Some(Ok(true) | Err(_)))
    }

    /// Give a chain back untouched, so that the next [`Self::pop`] returns it again.
    pub fn push_back(&self, mut chain: Chain) {
        chain.abandoned = None;
        if chain.epoch == self.epoch
            && let Some(mut queue) = self.queue(chain.queue)
        {
            queue.push_back(chain.head);
            self.queues.counts.taken.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Give a chain back to the driver, with the number of bytes written to it.
    pub fn complete(&self, mut chain: Chain, written: u32) {
        self.complete_all([(&mut chain, written)]);
    }

    /// Give chains of one queue back to the driver, which sees all of them at once. They are not
    /// the device's any more.
    pub(super) fn complete_all<'c>(&self, chains: impl IntoIterator<Item = (&'c mut Chain, u32)>) {
        let (mut at, mut from_guest) = (None, 0);
        let mut heads = Heads::new();
        for (chain, written) in chains {
            chain.abandoned = None;
            if chain.epoch == self.epoch {
                at = Some(chain.queue);
                from_guest += chain.readable_len();
                heads.push((chain.head, written));
            }
        }
        if let Some(at) = at {
            self.queues.counts.bytes_from_guest.fetch_add(from_guest, Ordering::Relaxed);
            self.give_back(at, &heads);
        }
    }

    fn give_back(&self, at: usize, heads: &[(u16, u32)]) {
        let Some(mut queue) = self.queue(at) else { return };
        let completed = queue.complete(&self.memory, heads);
        drop(queue);
        match completed {
            Ok(()) => {
                let counts = &self.queues.counts;
                counts.chains.fetch_add(heads.len() as u64, Ordering::Relaxed);
                let written = heads.iter().map(|(_, written)| u64::from(*written)).sum();
                counts.bytes_to_guest.fetch_add(written, Ordering::Relaxed);
                self.completed.set(self.completed.get() | 1 << (at & 63));
            }
            Err(broken) => self.fail(format!("queue {at}: {broken}")),
        }
    }

    fn give_back_abandoned(&self) {
        for (queue, head, epoch) in self.queues.abandoned.take() {
            if epoch == self.epoch {
                self.give_back(queue, &[(head, 0)]);
            }
        }
    }

    /// The device cannot continue until the driver resets it.
    pub fn fail(&self, reason: impl Into<String>) {
        self.has_failed.set(true);
        self.queues.fail(reason);
    }

    /// Interrupt the driver for what has been completed, if it wants that. The end of the access
    /// does the same.
    pub fn interrupt(&self) {
        let completed = self.completed.replace(0);
        let mut wanted = false;
        for at in (0..self.queues.all.len()).filter(|at| completed & 1 << (at & 63) != 0) {
            wanted |= self.queue(at).is_some_and(|mut queue| queue.wants_interrupt(&self.memory));
        }
        if wanted {
            self.queues.interrupt(registers::USED_BUFFER);
        }
    }
}

impl Drop for QueueAccess<'_> {
    fn drop(&mut self) {
        self.interrupt();
        self.queues.leave();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::counts::CountValues;
    use super::super::mock::tests::rng;
    use super::super::mock::{MockDriver, readable, writable};
    use super::super::registers::*;

    const AT: u64 = MockDriver::BUFFERS;

    #[test]
    fn chains_and_their_bytes_are_counted_once() {
        let mut driver = rng();
        driver.start(0);
        driver.add(0, &[readable(AT, 10), readable(AT, 4), writable(AT, 100)]).unwrap();
        let queues = Arc::clone(driver.attached.transport.queues());
        let access = queues.access().unwrap();
        for _ in 0..3 {
            let chain = access.pop(0).unwrap();
            assert_eq!((queues.counts.values().taken, queues.counts.values().chains), (1, 0));
            access.push_back(chain);
            assert_eq!(queues.counts.values().taken, 0);
        }
        access.complete(access.pop(0).unwrap(), 90);
        drop(access);
        let CountValues { taken, chains, interrupts, bytes_from_guest, bytes_to_guest, .. } =
            queues.counts.values();
        assert_eq!((taken, chains, interrupts), (1, 1, 1));
        assert_eq!((bytes_from_guest, bytes_to_guest), (14, 90));
        // What was taken before a reset of the device is void.
        driver.add(0, &[writable(AT, 8)]).unwrap();
        let chain = queues.access().unwrap().pop(0).unwrap();
        driver.start(0);
        queues.access().unwrap().complete(chain, 8);
        let values = queues.counts.values();
        assert_eq!((values.taken, values.chains, values.bytes_to_guest), (2, 1, 90));
        queues.forget_counts();
        assert_eq!(queues.counts.values(), CountValues::default());
    }

    #[test]
    fn the_event_index_says_which_completions_interrupt() {
        let mut driver = rng();
        driver.start(EVENT_IDX);
        driver.exchange(0, &[writable(AT, 1)]).unwrap();
        assert_eq!(driver.interrupt_status(), USED_BUFFER);
        driver.write(INTERRUPT_ACK, USED_BUFFER);
        // used_event is still 0: the driver has not asked for the second.
        driver.exchange(0, &[writable(AT, 1)]).unwrap();
        assert_eq!(driver.interrupt_status(), 0);
    }
}

//! The frames on their way to a port: a bounded queue in the order of arrival. Senders put frames
//! in on any thread; the port's reader takes those that have arrived. Nobody waits.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use super::counts::{QueueLimit, ReceivedCounts};
use super::lane::Nanos;
use super::parcel::Parcel;
use super::wakeup::Wakeup;
use crate::net::Capture;
use crate::sync::{Mutex, rank};

/// The number of a port of a network. It is not used again.
pub(super) type PortId = u32;

/// When a frame arrives, and which of those that arrive then it is.
pub(super) type Key = (Nanos, u64);

#[derive(Clone, Debug)]
struct Item {
    frame: Parcel,
    from: PortId,
}

#[derive(Debug)]
struct Queue {
    /// Parcels that had arrived when they were put in, in order.
    ready: VecDeque<(Key, Item)>,
    /// Parcels that arrive later.
    later: BTreeMap<Key, Item>,
    /// The number of the next frame.
    next: u64,
    bytes: usize,
    is_closed: bool,
    /// Whether a machine uses the port, and does what frames leave to it.
    is_claimed: bool,
    /// Records the frames that are taken.
    capture: Option<Arc<Capture>>,
    counts: ReceivedCounts,
    wakeup: Wakeup,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Inbox {
    queue: Mutex<Queue, rank::NetworkInbox>,
    pub(super) limit: QueueLimit,
    fd: RawFd,
}

/// The frames of an inbox, for a copy of the network.
#[derive(Clone, Debug)]
pub(super) struct FrozenInbox {
    ready: Vec<(Key, Item)>,
    later: Vec<(Key, Item)>,
    next: u64,
    counts: ReceivedCounts,
    pub(super) limit: QueueLimit,
}

impl Queue {
    fn insert(&mut self, key: Key, item: Item, now: Nanos) {
        self.bytes += item.frame.len();
        if key.0 <= now {
            self.ready.push_back((key, item));
            self.wakeup.raise();
        } else {
            self.later.insert(key, item);
            self.wakeup.expect(key.0);
        }
    }

    /// Take the frame that arrived first.
    fn pop(&mut self, clock: impl FnOnce() -> Nanos) -> Option<Parcel> {
        if self.is_closed {
            return None;
        }
        if self.later.is_empty() {
            let taken = self.ready.pop_front();
            if self.ready.is_empty() {
                self.wakeup.lower(None);
            }
            return taken.map(|(_, item)| item.frame);
        }
        let now = clock();
        let first = self.later.first_key_value().map(|(key, _)| *key);
        let first = first.filter(|(due, _)| *due <= now);
        let front = self.ready.front().map(|(key, _)| *key);
        let item = match (first, front) {
            (Some(later), ready) if ready.is_none_or(|ready| later < ready) => {
                self.later.remove(&later)
            }
            _ => self.ready.pop_front().map(|(_, item)| item),
        };
        self.settle(now);
        item.map(|item| item.frame)
    }

    /// Make the descriptor readable as long as a frame is there.
    fn settle(&mut self, now: Nanos) {
        let next = self.later.first_key_value().map(|((due, _), _)| *due);
        if self.ready.is_empty() && next.is_none_or(|due| due > now) {
            self.wakeup.lower(next);
        }
    }

    fn is_full(&self, limit: QueueLimit, length: usize) -> bool {
        self.ready.len() + self.later.len() >= limit.frames || self.bytes + length > limit.bytes
    }

    fn clear(&mut self) {
        self.counts.discarded += (self.ready.len() + self.later.len()) as u64;
        self.ready.clear();
        self.later.clear();
        self.bytes = 0;
        if !self.is_closed {
            self.wakeup.lower(None);
        }
    }
}

impl Inbox {
    /// # Errors
    /// If the process has no file descriptor left.
    pub(super) fn new(limit: QueueLimit) -> io::Result<Self> {
        let wakeup = Wakeup::new()?;
        let fd = wakeup.as_raw_fd();
        let queue = Queue {
            ready: VecDeque::new(),
            later: BTreeMap::new(),
            next: 0,
            bytes: 0,
            is_closed: false,
            is_claimed: false,
            capture: None,
            counts: ReceivedCounts::default(),
            wakeup,
        };
        Ok(Self { queue: Mutex::new(queue), limit, fd })
    }

    /// A frame for this port is dropped on its way.
    pub(super) fn drop_one(&self, reason: impl FnOnce(&mut ReceivedCounts) -> &mut u64) {
        let mut queue = self.queue.lock();
        queue.counts.addressed += 1;
        *reason(&mut queue.counts) += 1;
    }

    pub(super) fn count_reordered(&self) {
        self.queue.lock().counts.reordered += 1;
    }

    /// Put in a frame that arrives at `due`, and copies of it. Returns the key of the first, unless
    /// there is no room.
    pub(super) fn push(
        &self,
        (frame, from): (Parcel, PortId),
        (due, copies): (Nanos, u8),
        now: Nanos,
    ) -> Option<Key> {
        let mut queue = self.queue.lock();
        queue.counts.addressed += 1;
        queue.counts.duplicated += u64::from(copies);
        let mut first = None;
        for _ in 0..=copies {
            if queue.is_closed || (frame.is_incomplete() && !queue.is_claimed) {
                queue.counts.discarded += 1;
            } else if queue.is_full(self.limit, frame.len()) {
                queue.counts.overflowed += 1;
            } else {
                let key = (due, queue.next);
                queue.next += 1;
                queue.insert(key, Item { frame: frame.clone(), from }, now);
                first = first.or(Some(key));
            }
        }
        first
    }

    /// Let a frame arrive at another time, after those that are there. Nothing happens if the
    /// reader has taken it already.
    pub(super) fn put_off(&self, key: Key, due: Nanos, now: Nanos) {
        let mut queue = self.queue.lock();
        if let Some(item) = queue.later.remove(&key) {
            queue.bytes -= item.frame.len();
            let key = (due, queue.next);
            queue.next += 1;
            queue.insert(key, item, now);
            queue.settle(now);
        }
    }

    /// Take the frame that arrived first. The clock is read only if it matters.
    #[inline]
    pub(super) fn pop(&self, clock: impl FnOnce() -> Nanos) -> Option<Parcel> {
        let mut queue = self.queue.lock();
        let frame = queue.pop(clock)?;
        queue.bytes -= frame.len();
        queue.counts.received += 1;
        queue.counts.received_bytes += frame.len() as u64;
        let capture = queue.capture.clone();
        drop(queue);
        if let Some(capture) = capture {
            capture.record(&frame.frame());
            capture.flush();
        }
        Some(frame)
    }

    /// Put the frame back that was taken last.
    pub(super) fn put_back(&self, frame: Parcel) {
        let mut queue = self.queue.lock();
        queue.counts.received -= 1;
        queue.counts.received_bytes -= frame.len() as u64;
        if queue.is_closed {
            queue.counts.discarded += 1;
            return;
        }
        queue.bytes += frame.len();
        queue.ready.push_front(((0, 0), Item { frame, from: PortId::MAX }));
        queue.wakeup.raise();
    }

    /// Let a machine use the port, or no longer. The frames for the last user are dropped. False if
    /// one does already.
    pub(super) fn claim(&self, is_claimed: bool) -> bool {
        let mut queue = self.queue.lock();
        if is_claimed && queue.is_claimed {
            return false;
        }
        queue.is_claimed = is_claimed;
        if !is_claimed {
            queue.clear();
        }
        true
    }

    pub(super) fn is_claimed(&self) -> bool {
        self.queue.lock().is_claimed
    }

    /// Record the frames that are taken from now on.
    pub(super) fn capture(&self, capture: Option<Arc<Capture>>) {
        self.queue.lock().capture = capture;
    }

    /// Drop all frames.
    pub(super) fn clear(&self) {
        self.queue.lock().clear();
    }

    /// Drop the frames from these ports that have not arrived yet.
    pub(super) fn cut(&self, from: &[PortId], now: Nanos) {
        let mut queue = self.queue.lock();
        let Queue { later, bytes, counts, .. } = &mut *queue;
        later.retain(|(due, _), item| {
            let is_kept = *due <= now || !from.contains(&item.from);
            if !is_kept {
                *bytes -= item.frame.len();
                counts.partitioned += 1;
            }
            is_kept
        });
        queue.settle(now);
    }

    /// Drop all frames, and those that still come. From now on the descriptor is readable, so that
    /// a reader notices.
    pub(super) fn close(&self) {
        let mut queue = self.queue.lock();
        queue.is_closed = true;
        queue.clear();
        queue.wakeup.raise();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.queue.lock().is_closed
    }

    pub(super) fn counts(&self) -> ReceivedCounts {
        let queue = self.queue.lock();
        let queued = (queue.ready.len() + queue.later.len()) as u64;
        ReceivedCounts { queued, ..queue.counts }
    }

    pub(super) fn freeze(&self) -> FrozenInbox {
        let queue = self.queue.lock();
        let later = queue.later.iter().map(|(key, item)| (*key, item.clone())).collect();
        let (ready, next) = (queue.ready.iter().cloned().collect(), queue.next);
        FrozenInbox { ready, later, next, counts: queue.counts, limit: self.limit }
    }

    /// Continue from what another inbox has frozen, at another time. It is empty.
    pub(super) fn thaw(&self, frozen: &FrozenInbox, shift: impl Fn(Nanos) -> Nanos) {
        let mut queue = self.queue.lock();
        queue.next = frozen.next;
        queue.counts = frozen.counts;
        for ((due, number), item) in &frozen.ready {
            queue.bytes += item.frame.len();
            queue.ready.push_back(((shift(*due), *number), item.clone()));
            queue.wakeup.raise();
        }
        for ((due, number), item) in &frozen.later {
            queue.bytes += item.frame.len();
            queue.later.insert((shift(*due), *number), item.clone());
            queue.wakeup.expect(shift(*due));
        }
    }
}

impl AsRawFd for Inbox {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

#[cfg(test)]
mod tests {
    //! Covers src/net/switch/wakeup.rs.

    use super::*;

    const LIMIT: QueueLimit = QueueLimit { frames: 4, bytes: 100 };

    fn frame(byte: u8) -> (Parcel, PortId) {
        ([byte; 14].as_slice().into(), u32::from(byte))
    }

    fn all(inbox: &Inbox, now: Nanos) -> Vec<u8> {
        std::iter::from_fn(|| inbox.pop(|| now)).map(|frame| frame[0]).collect()
    }

    fn is_readable(inbox: &Inbox) -> bool {
        let mut poll = libc::pollfd { fd: inbox.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives through the call.
        unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
    }

    #[test]
    fn frames_come_in_the_order_of_arrival() {
        let inbox = Inbox::new(LIMIT).unwrap();
        inbox.push(frame(1), (30, 0), 10);
        inbox.push(frame(2), (10, 0), 10);
        inbox.push(frame(3), (20, 0), 10);
        assert_eq!(all(&inbox, 10), [2]);
        inbox.push(frame(4), (25, 0), 25);
        assert_eq!(all(&inbox, 40), [3, 4, 1]);
        assert!(!is_readable(&inbox));
    }

    #[test]
    fn a_queue_that_nobody_reads_is_bounded_in_frames_and_bytes() {
        let inbox = Inbox::new(LIMIT).unwrap();
        let pushed = (0..9).map(|_| inbox.push(frame(1), (0, 1), 0).is_some());
        assert_eq!(pushed.filter(|is_there| *is_there).count(), 2);
        let counts = inbox.counts();
        assert_eq!((counts.queued, counts.overflowed, counts.duplicated), (4, 14, 9));
        let inbox = Inbox::new(QueueLimit { frames: 99, bytes: 30 }).unwrap();
        (0..9).for_each(|_| _ = inbox.push(frame(1), (0, 0), 0));
        assert_eq!(inbox.counts().queued, 2);
        assert_eq!(all(&inbox, 0).len(), 2);
        assert!(inbox.push(frame(1), (0, 0), 0).is_some(), "there is room again");
    }

    #[test]
    fn a_cut_drops_what_has_not_arrived_from_there() {
        let inbox = Inbox::new(LIMIT).unwrap();
        for (byte, due) in [(1, 10), (2, 10), (1, 5), (1, 0)] {
            inbox.push(frame(byte), (due, 0), 0);
        }
        inbox.cut(&[1], 5);
        assert_eq!(inbox.counts().partitioned, 1);
        assert_eq!(all(&inbox, 10), [1, 1, 2]);
    }

    #[test]
    fn a_frame_that_is_put_off_comes_after_those_that_are_there() {
        let inbox = Inbox::new(LIMIT).unwrap();
        let key = inbox.push(frame(1), (100, 0), 0).unwrap();
        inbox.push(frame(2), (5, 0), 0);
        inbox.put_off(key, 5, 0);
        assert_eq!(all(&inbox, 5), [2, 1]);
        inbox.put_off(key, 6, 5);
        assert!(all(&inbox, 9).is_empty());
    }

    #[test]
    fn a_closed_inbox_keeps_nothing() {
        let inbox = Inbox::new(LIMIT).unwrap();
        inbox.push(frame(1), (0, 0), 0);
        inbox.push(frame(1), (9, 0), 0);
        inbox.close();
        assert!(inbox.push(frame(1), (0, 0), 0).is_none() && all(&inbox, 9).is_empty());
        assert!(is_readable(&inbox) && inbox.is_closed(), "a reader notices");
        assert_eq!((inbox.counts().discarded, inbox.counts().queued), (3, 0));
    }
}

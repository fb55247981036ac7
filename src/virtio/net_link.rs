//! What both directions of a network device share: whether the link is up, the counts, and the
//! capture. Any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::bytes::Reader;
use crate::error::Result;
use crate::net::{Capture, Frame};
use crate::sync::{Mutex, rank};

/// Frames of one direction.
#[derive(Debug, Default)]
pub(super) struct Direction {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

/// Counts of a network device. Received is what the guest has received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounts {
    /// Frames that the guest has received.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames to the guest that were dropped: the link was down, or they fit no buffer.
    pub receive_dropped: u64,
    /// Frames that the guest has sent.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames of the guest that were dropped: the link was down, or they were malformed.
    pub send_dropped: u64,
    /// Frames that the backend has dropped, in both directions.
    pub backend_dropped: u64,
}

impl Direction {
    // Relaxed, here and below: counts.
    pub(super) fn count(&self, frame: &Frame<'_>) {
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(frame.bytes.len() as u64, Ordering::Relaxed);
    }

    pub(super) fn drop(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    fn clear(&self) {
        for count in [&self.frames, &self.bytes, &self.dropped] {
            count.store(0, Ordering::Relaxed);
        }
    }

    fn get(&self) -> (u64, u64, u64) {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (get(&self.frames), get(&self.bytes), get(&self.dropped))
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    /// As the program wants it.
    wanted: AtomicBool,
    /// Whether the backend has ended.
    has_failed: AtomicBool,
    pub(super) received: Direction,
    pub(super) sent: Direction,
    capture: Mutex<Option<Arc<Capture>>, rank::NetCapture>,
    is_captured: AtomicBool,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            wanted: AtomicBool::new(true),
            has_failed: AtomicBool::new(false),
            received: Direction::default(),
            sent: Direction::default(),
            capture: Mutex::default(),
            is_captured: AtomicBool::new(false),
        }
    }
}

impl Link {
    // SeqCst, here and below: rare, and a change is seen by threads that are notified of it.
    pub(super) fn is_up(&self) -> bool {
        self.is_wanted() && !self.has_failed.load(Ordering::SeqCst)
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// Returns whether that changes something.
    pub(super) fn want(&self, is_up: bool) -> bool {
        self.wanted.swap(is_up, Ordering::SeqCst) != is_up
    }

    /// Returns whether that changes something.
    pub(super) fn set_failed(&self, has_failed: bool) -> bool {
        self.has_failed.swap(has_failed, Ordering::SeqCst) != has_failed
    }

    pub(super) fn capture(&self, capture: Option<Arc<Capture>>) -> Option<Arc<Capture>> {
        let mut current = self.capture.lock();
        self.is_captured.store(capture.is_some(), Ordering::SeqCst);
        std::mem::replace(&mut *current, capture)
    }

    /// The capture, for a burst of frames.
    pub(super) fn captured(&self) -> Option<Arc<Capture>> {
        if self.is_captured.load(Ordering::SeqCst) { self.capture.lock().clone() } else { None }
    }

    pub(super) fn forget_counts(&self) {
        self.received.clear();
        self.sent.clear();
    }

    pub(super) fn counts(&self, backend_dropped: u64) -> NetCounts {
        let (received, received_bytes, receive_dropped) = self.received.get();
        let (sent, sent_bytes, send_dropped) = self.sent.get();
        NetCounts {
            received,
            received_bytes,
            receive_dropped,
            sent,
            sent_bytes,
            send_dropped,
            backend_dropped,
        }
    }
}

/// A locally administered address, the same for the same backend and number.
pub(super) fn default_mac(backend: &str, number: usize) -> [u8; 6] {
    // FNV-1a.
    let seed = 0xcbf2_9ce4_8422_2325_u64;
    let bytes = backend.bytes().chain(number.to_le_bytes());
    let hash =
        bytes.fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let [first, second, third, fourth, fifth, ..] = (hash ^ hash >> 32).to_le_bytes();
    [2, first, second, third, fourth, fifth]
}

/// What a network device's `spec` has returned: the address and the MTU.
pub(super) fn parse_spec(spec: &[u8]) -> Result<([u8; 6], Option<u16>)> {
    let mut reader = Reader::new("net", spec);
    let (mac, mtu) = (reader.take()?, reader.u16()?);
    reader.end()?;
    Ok((mac, Some(mtu).filter(|mtu| *mtu > 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_is_up_if_the_program_wants_it_and_the_backend_has_not_ended() {
        let link = Link::default();
        assert!(link.is_up() && !link.want(true));
        assert!(link.set_failed(true) && !link.is_up() && link.is_wanted());
        assert!(link.set_failed(false) && link.want(false) && !link.is_up());
        link.sent.count(&Frame::complete(&[0; 60]));
        link.received.drop();
        let counts: NetCounts = link.counts(5);
        assert_eq!((counts.sent, counts.sent_bytes, counts.receive_dropped), (1, 60, 1));
        assert_eq!(counts.backend_dropped, 5);
        assert!(link.captured().is_none());
    }
}

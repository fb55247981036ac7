//! Frames that a program gives and takes: two bounded queues, each with a file descriptor that is
//! readable while frames wait. The loop's thread is at one end, any thread of the program at the
//! other.

use std::any::Any;
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::{Frame, NetBackend, Watched};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, rank};

/// The bytes of one direction's frames, for each frame that may wait.
const BYTES_PER_FRAME: usize = 2048;

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
}

/// One direction.
#[derive(Debug)]
struct Lane {
    waiting: Mutex<Waiting, rank::NetQueue>,
    /// Readable while frames wait.
    event: EventFd,
    most: usize,
}

impl Lane {
    fn new(most: usize) -> Result<Self> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
            .map_err(|e| Error::os(ErrorKind::Event, "eventfd", &e))?;
        Ok(Self { waiting: Mutex::default(), event, most })
    }

    /// Add as many of these frames as there is room for. Returns how many that is.
    fn add<'a>(&self, frames: impl Iterator<Item = &'a [u8]>) -> usize {
        let mut waiting = self.waiting.lock();
        let (was_empty, mut count) = (waiting.frames.is_empty(), 0);
        for frame in frames {
            let is_full = waiting.frames.len() >= self.most
                || (waiting.bytes + frame.len() > self.most * BYTES_PER_FRAME
                    && !waiting.frames.is_empty());
            if is_full {
                break;
            }
            waiting.bytes += frame.len();
            waiting.frames.push_back(frame.to_vec());
            count += 1;
        }
        if was_empty && count > 0 {
            // Cannot fail: the count is 0 while there are no frames.
            let _ = self.event.write(1);
        }
        count
    }

    /// Take at most this many frames.
    fn take(&self, most: usize) -> Vec<Vec<u8>> {
        let mut waiting = self.waiting.lock();
        let count = waiting.frames.len().min(most);
        let taken: Vec<_> = waiting.frames.drain(..count).collect();
        waiting.bytes -= taken.iter().map(Vec::len).sum::<usize>();
        if waiting.frames.is_empty() {
            // Fails if the count is 0 already.
            let _ = self.event.read();
        }
        taken
    }

    /// Put a frame back that was taken.
    fn put_back(&self, frames: impl DoubleEndedIterator<Item = Vec<u8>>) {
        let mut waiting = self.waiting.lock();
        let was_empty = waiting.frames.is_empty();
        for frame in frames.rev() {
            waiting.bytes += frame.len();
            waiting.frames.push_front(frame);
        }
        if was_empty && !waiting.frames.is_empty() {
            // Cannot fail, as above.
            let _ = self.event.write(1);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct FrameQueue {
    to_guest: Lane,
    to_program: Lane,
    dropped: AtomicU64,
    is_closed: AtomicBool,
}

impl FrameQueue {
    /// With room for this many frames in each direction.
    ///
    /// # Errors
    /// If there is to be no room, or the process is out of descriptors.
    pub fn new(most: usize) -> Result<Arc<Self>> {
        if most == 0 || most > 1 << 20 {
            let detail = format!("{most} frames are not from 1 to 1048576");
            return Err(Error::new(ErrorKind::Config, "queue", detail));
        }
        Ok(Arc::new(Self {
            to_guest: Lane::new(most)?,
            to_program: Lane::new(most)?,
            dropped: AtomicU64::new(0),
            is_closed: AtomicBool::new(false),
        }))
    }

    /// Give the guest a frame. False if there is no room for it, and it is dropped.
    pub fn give(&self, frame: &[u8]) -> bool {
        let has_room = self.to_guest.add(std::iter::once(frame)) == 1;
        if !has_room {
            // Relaxed: a count.
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        has_room
    }

    /// Take at most this many of the guest's frames.
    #[must_use]
    pub fn take(&self, most: usize) -> Vec<Vec<u8>> {
        self.to_program.take(most)
    }

    /// Readable while the guest's frames wait to be taken.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.to_program.event.as_raw_fd()
    }

    /// Whether its machine is closed, or has another backend.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        // Acquire: pairs with `close`.
        self.is_closed.load(Ordering::Acquire)
    }
}

impl NetBackend for FrameQueue {
    fn watched(&self) -> Watched {
        Watched { receive: self.to_guest.event.as_raw_fd(), send: -1 }
    }

    /// A program that takes no frames does not hold up the guest: they are dropped.
    fn send(&self, frames: &[Frame<'_>]) -> usize {
        let taken = self.to_program.add(frames.iter().map(|frame| frame.bytes));
        // Relaxed: a count.
        self.dropped.fetch_add((frames.len() - taken) as u64, Ordering::Relaxed);
        frames.len()
    }

    fn receive(&self, budget: usize, into: &mut dyn FnMut(Frame<'_>) -> bool) {
        let mut frames = self.to_guest.take(budget).into_iter();
        while let Some(frame) = frames.next() {
            if !into(Frame::complete(&frame)) {
                return self.to_guest.put_back(std::iter::once(frame).chain(frames));
            }
        }
    }

    fn dropped(&self) -> u64 {
        // Relaxed: a count.
        self.dropped.load(Ordering::Relaxed)
    }

    fn reset(&self) {
        drop(self.to_guest.take(usize::MAX));
        drop(self.to_program.take(usize::MAX));
    }

    fn close(&self) {
        // Release: pairs with `is_closed`.
        self.is_closed.store(true, Ordering::Release);
    }

    fn describe(&self) -> String {
        "Python".into()
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_readable(fd: RawFd) -> bool {
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives through the call.
        unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
    }

    #[test]
    fn frames_wait_in_both_directions_up_to_the_limit() {
        let net = FrameQueue::new(2).unwrap();
        assert!(!is_readable(net.fd()) && !is_readable(net.watched().receive));
        assert_eq!(net.send(&[Frame::complete(&[1; 14]); 3]), 3);
        assert!(is_readable(net.fd()));
        assert_eq!((net.take(9).len(), net.dropped()), (2, 1));
        assert!(!is_readable(net.fd()));
        assert!(net.give(&[5; 14]) && net.give(&[6; 14]) && !net.give(&[7; 14]));
        assert!(is_readable(net.watched().receive));
        net.receive(9, &mut |_| false);
        let mut given = Vec::new();
        net.receive(9, &mut |frame| {
            given.push(frame.bytes[0]);
            true
        });
        assert_eq!((given, net.dropped()), (vec![5, 6], 2));
        assert!(!is_readable(net.watched().receive));
        net.close();
        assert!(net.is_closed());
    }

    #[test]
    fn its_bytes_are_limited_and_a_reset_empties_it() {
        let net = FrameQueue::new(4).unwrap();
        assert!(net.give(&[0; 60_000]), "a single frame always has room");
        assert!(!net.give(&[0; 14]));
        net.reset();
        assert!(net.give(&[0; 14]) && is_readable(net.watched().receive));
        net.receive(9, &mut |_| true);
        assert!(FrameQueue::new(0).is_err());
    }
}

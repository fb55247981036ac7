//! The frames that wait for the guest to take them. Bounded: TCP waits for room, anything else is
//! dropped. The buffers of frames that were taken are used again.

use std::collections::VecDeque;

use super::frame::{ETHERNET, Frame, MAX_IP};

/// TCP produces no more segments above this many bytes.
const ENOUGH: usize = 512 * 1024;
/// Nothing is queued above this many bytes.
const LIMIT: usize = 2 * ENOUGH;
/// As many frames wait at most. TCP stops at half of it.
const FRAMES: usize = 2048;
/// Buffers for frames up to this size are small ones.
const SMALL: usize = 2048;
const SPARE_SMALL: usize = 256;
const SPARE_LARGE: usize = 16;

/// The queue of frames to the guest.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    frames: VecDeque<Frame>,
    bytes: usize,
    small: Vec<Vec<u8>>,
    large: Vec<Vec<u8>>,
    /// Frames that were dropped because there was no room.
    pub(super) dropped: u64,
}

impl Outbox {
    /// Whether a sender that can wait has to.
    pub(super) fn is_busy(&self) -> bool {
        self.bytes >= ENOUGH || self.frames.len() >= FRAMES / 2
    }

    pub(super) fn is_full(&self) -> bool {
        self.bytes >= LIMIT || self.frames.len() >= FRAMES
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// A frame of this length, to be filled and pushed. Its contents are arbitrary.
    pub(super) fn frame(&mut self, length: usize) -> Frame {
        let (spare, size) = if length <= SMALL {
            (&mut self.small, SMALL)
        } else {
            (&mut self.large, ETHERNET + MAX_IP)
        };
        let buffer = spare.pop().unwrap_or_else(|| vec![0; size.max(length)]);
        Frame { buffer, length, offload: super::frame::Offload::default() }
    }

    pub(super) fn push(&mut self, frame: Frame) {
        if self.is_full() {
            self.dropped += 1;
            return self.recycle(frame);
        }
        self.bytes += frame.length;
        self.frames.push_back(frame);
    }

    pub(super) fn front(&self) -> Option<&Frame> {
        self.frames.front()
    }

    /// Forget the first frame, which the guest has taken.
    pub(super) fn pop(&mut self) {
        if let Some(frame) = self.frames.pop_front() {
            self.bytes -= frame.length;
            self.recycle(frame);
        }
    }

    pub(super) fn clear(&mut self) {
        self.frames.clear();
        self.bytes = 0;
    }

    fn recycle(&mut self, frame: Frame) {
        let buffer = frame.buffer;
        let (spare, most) = if buffer.len() <= SMALL {
            (&mut self.small, SPARE_SMALL)
        } else {
            (&mut self.large, SPARE_LARGE)
        };
        if spare.len() < most {
            spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_bounded_and_the_rest_is_counted() {
        let mut outbox = Outbox::default();
        for _ in 0..3 * FRAMES {
            let frame = outbox.frame(60);
            outbox.push(frame);
        }
        assert_eq!(outbox.frames.len(), FRAMES);
        assert_eq!(outbox.dropped, 2 * FRAMES as u64);
        outbox.clear();
        while !outbox.is_full() {
            let frame = outbox.frame(60_000);
            outbox.push(frame);
        }
        assert!(outbox.bytes < LIMIT + 65_536);
    }

    #[test]
    fn a_frame_of_any_length_has_room() {
        let mut outbox = Outbox::default();
        for length in [0, 60, SMALL, SMALL + 1, ETHERNET + MAX_IP] {
            let frame = outbox.frame(length);
            assert_eq!(frame.bytes().len(), length);
            outbox.push(frame);
            outbox.pop();
        }
        assert!(outbox.is_empty() && outbox.front().is_none());
    }
}

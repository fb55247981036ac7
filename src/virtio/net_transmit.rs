//! The transmit queue of a network device (virtio 1.2, 5.1.6.2): the driver's frames go to the
//! backend. They are copied once, so that a guest that changes them meanwhile confuses only itself.
//! On the loop's thread.

use std::collections::VecDeque;
use std::io::Read;
use std::ops::Range;
use std::sync::Arc;

use super::access::QueueAccess;
use super::buffers::ChainReader;
use super::chain::Chain;
use super::net_link::Link;
use crate::net::header::{HEADER, decode};
use crate::net::offload::{complete, finish};
use crate::net::{Capture, Frame, NetBackend, Offload, Offloads};

pub(super) const TRANSMIT: usize = 1;
/// Frames and bytes that are sent together.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 256 << 10;
/// Batches of a turn, so that other subscribers have theirs.
const BATCHES: usize = 16;

/// How a turn has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The queue is empty.
    Done,
    /// The backend takes no more.
    Full,
    /// There may be more.
    More,
}

/// Frames to be sent.
#[derive(Debug, Default)]
struct Batch {
    /// The bytes of all frames; `used` of them are.
    buffer: Vec<u8>,
    used: usize,
    frames: Vec<(Range<usize>, Offload)>,
    /// The driver's chains, each with the number of frames up to and including its own.
    chains: VecDeque<(Chain, usize)>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Transmit {
    batch: Batch,
    /// Segments of a frame that was sent in part.
    rest: VecDeque<Vec<u8>>,
    scratch: Vec<u8>,
    /// Whether the backend has to have room first.
    pub(super) is_full: bool,
}

impl Batch {
    /// Room for this many bytes after those that are used.
    fn room(&mut self, length: usize) -> Option<&mut [u8]> {
        let end = self.used + length;
        if self.buffer.len() < end {
            self.buffer.resize(end.max(BATCH_BYTES + HEADER + Frame::LONGEST), 0);
        }
        self.buffer.get_mut(self.used..end)
    }

    fn is_full(&self) -> bool {
        self.frames.len() >= BATCH || self.chains.len() >= BATCH || self.used >= BATCH_BYTES
    }

    fn clear(&mut self) {
        self.used = 0;
        self.frames.clear();
    }

    /// Read the frame of a chain. False if it is malformed.
    fn read(
        &mut self,
        access: &QueueAccess<'_>,
        chain: &Chain,
        backend: Offloads,
        scratch: &mut Vec<u8>,
    ) -> bool {
        let mut reader = ChainReader::new(access, chain);
        let mut header = [0; HEADER];
        if reader.read_exact(&mut header).is_err() {
            return false;
        }
        let length = usize::try_from(reader.left()).unwrap_or(usize::MAX);
        if length > Frame::LONGEST {
            return false;
        }
        let start = self.used;
        let Some(room) = self.room(length) else { return false };
        if reader.read_exact(room).is_err() {
            return false;
        }
        let Some(Frame { offload, .. }) = decode(&header, room) else { return false };
        if backend.allow(&offload) {
            self.add(start..start + length, offload);
            return true;
        }
        match offload {
            Offload { checksum: Some(checksum), segmentation: None, .. } => {
                complete(room, checksum);
                self.add(start..start + length, Offload::NONE);
                true
            }
            _ => {
                let whole = room.to_vec();
                let frame = Frame { bytes: &whole, offload };
                let may_pass = |offload: &Offload| backend.allow(offload);
                finish(&frame, may_pass, scratch, |part| self.push(&part))
            }
        }
    }

    /// The frame in this part of the buffer is to be sent.
    fn add(&mut self, range: Range<usize>, offload: Offload) {
        self.used = range.end;
        self.frames.push((range, offload));
    }

    fn push(&mut self, frame: &Frame<'_>) {
        let (start, length) = (self.used, frame.bytes.len());
        if let Some(room) = self.room(length) {
            room.copy_from_slice(frame.bytes);
            self.add(start..start + length, frame.offload);
        }
    }
}

impl Transmit {
    /// Send what the driver has made available.
    pub(super) fn run(
        &mut self,
        backend: &dyn NetBackend,
        access: &QueueAccess<'_>,
        link: &Link,
        capture: Option<&Arc<Capture>>,
    ) -> Progress {
        self.is_full = false;
        let progress = self.batches(backend, access, link, capture);
        self.is_full = progress == Progress::Full || backend.has_unsent();
        progress
    }

    fn batches(
        &mut self,
        backend: &dyn NetBackend,
        access: &QueueAccess<'_>,
        link: &Link,
        capture: Option<&Arc<Capture>>,
    ) -> Progress {
        if !self.send_rest(backend) {
            return Progress::Full;
        }
        for _ in 0..BATCHES {
            self.gather(access, backend.offloads(), link);
            if self.batch.chains.is_empty() {
                return Progress::Done;
            }
            let Batch { buffer, frames, .. } = &self.batch;
            let bytes = |range: &Range<usize>| buffer.get(range.clone()).unwrap_or_default();
            let frames: Vec<Frame<'_>> = frames
                .iter()
                .map(|(range, offload)| Frame { bytes: bytes(range), offload: *offload })
                .collect();
            let sent = if frames.is_empty() { 0 } else { backend.send(&frames).min(frames.len()) };
            for frame in frames.iter().take(sent) {
                link.sent.count(frame);
                capture.iter().for_each(|capture| capture.record(frame));
            }
            let is_full = sent < frames.len();
            self.give_back(access, sent);
            if is_full {
                return Progress::Full;
            }
        }
        Progress::More
    }

    /// Forget what waits. The driver's chains are void.
    pub(super) fn clear(&mut self) {
        self.rest.clear();
        self.is_full = false;
    }

    /// Send what an earlier turn has left. False if the backend is still full.
    fn send_rest(&mut self, backend: &dyn NetBackend) -> bool {
        if backend.has_unsent() {
            backend.send(&[]);
        }
        while let Some(first) = self.rest.front() {
            if backend.send(&[Frame::complete(first)]) == 0 {
                return false;
            }
            self.rest.pop_front();
        }
        true
    }

    /// Take frames of the driver, up to a batch of them.
    fn gather(&mut self, access: &QueueAccess<'_>, backend: Offloads, link: &Link) {
        let batch = &mut self.batch;
        batch.clear();
        while !batch.is_full()
            && let Some(chain) = access.pop(TRANSMIT)
        {
            let is_sent = link.is_up() && batch.read(access, &chain, backend, &mut self.scratch);
            if !is_sent {
                link.sent.drop();
            }
            batch.chains.push_back((chain, batch.frames.len()));
        }
    }

    /// The first frames were sent. Chains of which nothing was sent come again.
    fn give_back(&mut self, access: &QueueAccess<'_>, sent: usize) {
        let Batch { buffer, frames, chains, .. } = &mut self.batch;
        let mut before = 0;
        let mut done = 0;
        for (_, end) in chains.iter() {
            if *end > sent && before >= sent {
                break;
            }
            (before, done) = (*end, done + 1);
        }
        // Of the last chain, the backend may have taken only some segments.
        for (range, _) in frames.get(sent..before.max(sent)).unwrap_or_default() {
            self.rest.push_back(buffer.get(range.clone()).unwrap_or_default().to_vec());
        }
        access.complete_all(chains.iter_mut().take(done).map(|(chain, _)| (chain, 0)));
        chains.drain(..done);
        chains.drain(..).rev().for_each(|(chain, _)| access.push_back(chain));
    }
}

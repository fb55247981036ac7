//! The receive queue of a network device (virtio 1.2, 5.1.6.3): frames of the backend go into the
//! driver's buffers. On the loop's thread.

use std::collections::VecDeque;
use std::io::Write;
use std::mem::take;
use std::sync::Arc;

use smallvec::SmallVec;

use super::access::QueueAccess;
use super::buffers::ChainWriter;
use super::chain::Chain;
use super::net_control::Controlled;
use super::net_features::MRG_RXBUF;
use super::net_link::Link;
use crate::net::header::{HEADER, encode};
use crate::net::offload::finish;
use crate::net::{Capture, Frame, NetBackend};

pub(super) const RECEIVE: usize = 0;
/// Frames of a turn, so that other subscribers have theirs.
const BUDGET: usize = 256;
/// Chains that are given back to the driver together.
const BATCH: usize = 64;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Receive {
    /// Segments of a frame that was cut, for which there was no room.
    rest: VecDeque<Vec<u8>>,
    /// Whether the driver has to make buffers available first.
    pub(super) is_starved: bool,
    /// How many chains were too few, the last time.
    too_few: usize,
    scratch: Vec<u8>,
    filled: Vec<(Chain, u32)>,
}

/// What a turn needs besides the queue.
pub(super) struct Turn<'a> {
    pub(super) link: &'a Link,
    pub(super) controlled: &'a Controlled,
    pub(super) capture: Option<Arc<Capture>>,
}

impl Receive {
    /// Give the guest what the backend has.
    pub(super) fn run(
        &mut self,
        backend: &dyn NetBackend,
        access: &QueueAccess<'_>,
        turn: &Turn<'_>,
    ) {
        self.is_starved = false;
        while let Some(segment) = self.rest.pop_front() {
            if !self.put(access, &Frame::complete(&segment), turn.link) {
                self.rest.push_front(segment);
                self.is_starved = true;
                break;
            }
        }
        if !self.is_starved {
            let mut is_starved = false;
            backend.receive(BUDGET, &mut |frame| {
                let is_taken = !is_starved && self.take(access, &frame, turn);
                is_starved = !is_taken || self.is_starved;
                is_taken
            });
            self.is_starved = is_starved;
        }
        self.give_back(access);
    }

    fn give_back(&mut self, access: &QueueAccess<'_>) {
        access.complete_all(self.filled.iter_mut().map(|(chain, written)| (chain, *written)));
        self.filled.clear();
    }

    /// Forget what waits.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Take a frame of the backend. False if there is no room for it.
    fn take(&mut self, access: &QueueAccess<'_>, frame: &Frame<'_>, turn: &Turn<'_>) -> bool {
        let lengths = Frame::SHORTEST..=Frame::LONGEST;
        if !turn.link.is_up() || !lengths.contains(&frame.bytes.len()) {
            turn.link.received.drop();
            return true;
        }
        let controlled = turn.controlled;
        if !controlled.filter.accepts(controlled.mac, frame.bytes) {
            return true;
        }
        let guest = controlled.guest;
        let is_taken = if guest.allow(&frame.offload) {
            self.put(access, frame, turn.link)
        } else {
            self.put_finished(access, frame, turn)
        };
        if is_taken && let Some(capture) = &turn.capture {
            capture.record(frame);
        }
        is_taken
    }

    /// Do what the frame leaves to its receiver, because the guest does not.
    fn put_finished(
        &mut self,
        access: &QueueAccess<'_>,
        frame: &Frame<'_>,
        turn: &Turn<'_>,
    ) -> bool {
        let (mut scratch, mut first_fits) = (take(&mut self.scratch), None);
        let allowed = |offload: &_| turn.controlled.guest.allow(offload);
        let is_cut = finish(frame, allowed, &mut scratch, |part| {
            if first_fits == Some(false) {
                return;
            }
            let fits = self.rest.is_empty() && self.put(access, &part, turn.link);
            if first_fits.is_some() && !fits {
                self.rest.push_back(part.bytes.to_vec());
            }
            first_fits.get_or_insert(fits);
        });
        self.scratch = scratch;
        self.is_starved = !self.rest.is_empty();
        if !is_cut {
            turn.link.received.drop();
        }
        first_fits != Some(false)
    }

    /// Put a frame into the driver's buffers. False if there are too few.
    fn put(&mut self, access: &QueueAccess<'_>, frame: &Frame<'_>, link: &Link) -> bool {
        let is_mergeable = access.features() & MRG_RXBUF != 0;
        let needed = (HEADER + frame.bytes.len()) as u64;
        let (mut chains, mut room) = (SmallVec::<[Chain; 4]>::new(), 0);
        while room < needed
            && (is_mergeable || chains.is_empty())
            && let Some(chain) = access.pop(RECEIVE)
        {
            room += chain.writable_len();
            chains.push(chain);
        }
        if room < needed {
            let count = chains.len();
            chains.into_iter().rev().for_each(|chain| access.push_back(chain));
            // The driver has been asked for more and has not added any: there is no such room.
            let is_hopeless = count > 0 && (!is_mergeable || count == self.too_few);
            self.too_few = if is_hopeless { 0 } else { count };
            if is_hopeless {
                link.received.drop();
            }
            return is_hopeless;
        }
        self.too_few = 0;
        self.fill(access, frame, chains);
        link.received.count(frame);
        if self.filled.len() >= BATCH {
            self.give_back(access);
        }
        true
    }

    fn fill(&mut self, access: &QueueAccess<'_>, frame: &Frame<'_>, chains: SmallVec<[Chain; 4]>) {
        let buffers = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        let header = encode(&frame.offload, buffers);
        let mut parts = [&header[..], frame.bytes];
        for chain in chains {
            let mut writer = ChainWriter::new(access, &chain);
            for part in &mut parts {
                // Fails only if memory has been removed: the driver gets less.
                let count = writer.write(part).unwrap_or(0);
                *part = part.get(count..).unwrap_or_default();
                if !part.is_empty() {
                    break;
                }
            }
            let written = writer.written();
            self.filled.push((chain, written));
        }
    }
}

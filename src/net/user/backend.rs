//! The user network as a backend of a network device, and what forks of its machine get. On the
//! loop's thread; answers of the program come on any thread.

use std::any::Any;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::{Forward, UserNetConfig};
use super::gateway::{Continued, UserNet};
use super::rules::Question;
use super::{frame, stack};
use crate::error::{Error, ErrorKind, Result};
use crate::net::{
    Checksum, Frame, FrozenNet, NetBackend, Offload, Offloads, Segmentation, Watched,
};
use crate::sync::{Mutex, rank};

/// A user network behind a network device.
#[derive(Debug)]
pub struct UserBackend {
    net: Mutex<State, rank::NetBackend>,
    watched: RawFd,
    /// Readable while there are questions to the program.
    asked: EventFd,
}

#[derive(Debug)]
struct State {
    net: UserNet,
    questions: Vec<Question>,
    failure: Option<String>,
}

impl UserBackend {
    /// # Errors
    /// As [`UserNet::new`].
    pub fn new(config: UserNetConfig) -> Result<Self> {
        Self::with(UserNet::new(config)?)
    }

    fn with(net: UserNet) -> Result<Self> {
        let asked = EventFd::new(EFD_NONBLOCK)
            .map_err(|e| Error::os(ErrorKind::Io, "user network: eventfd", &e))?;
        let watched = net.as_raw_fd();
        let state = State { net, questions: Vec::new(), failure: None };
        Ok(Self { net: Mutex::new(state), watched, asked })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> UserNetConfig {
        self.net.lock().net.config().clone()
    }

    /// The forwarded ports, with the addresses of the host that they really have.
    #[must_use]
    pub fn forwards(&self) -> Vec<Forward> {
        self.net.lock().net.forwards()
    }

    /// How many TCP connections and UDP flows there are.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        self.net.lock().net.counts()
    }

    /// A descriptor that is readable while there are questions to the program.
    #[must_use]
    pub fn asked(&self) -> RawFd {
        self.asked.as_raw_fd()
    }

    /// The questions to the program, each of which is to be answered.
    #[must_use]
    pub fn take_questions(&self) -> Vec<Question> {
        // Fails if there are none.
        let _ = self.asked.read();
        std::mem::take(&mut self.net.lock().questions)
    }

    /// The program's decision.
    pub fn answer(&self, id: u64, is_allowed: bool) {
        self.guarded(|state| {
            state.net.answer(id, is_allowed);
            state.net.rouse();
        });
    }

    /// Call the network. What it does not survive is a failure of the link, not of the process.
    fn guarded<R>(&self, call: impl FnOnce(&mut State) -> R) -> Option<R> {
        let mut state = self.net.lock();
        if state.failure.is_some() {
            return None;
        }
        let result = catch_unwind(AssertUnwindSafe(|| call(&mut state)));
        if result.is_err() {
            state.failure = Some("the user network has failed on a frame of the guest".into());
        }
        let questions = state.net.take_questions();
        if !questions.is_empty() {
            state.questions.extend(questions);
            // Fails only if it is readable already.
            let _ = self.asked.write(1);
        }
        result.ok()
    }
}

/// A frame of the network, as the device sees it.
fn offered(frame: &frame::Frame) -> Frame<'_> {
    let offload = frame.offload;
    let segmentation = (offload.segment_size > 0).then_some(Segmentation {
        is_v6: false,
        size: offload.segment_size,
        header_length: offload.header_length,
        has_ecn: false,
    });
    let checksum = offload.checksum.map(|(start, offset)| Checksum { start, offset });
    let is_verified = checksum.is_none();
    Frame { bytes: frame.bytes(), offload: Offload { checksum, segmentation, is_verified } }
}

impl State {
    /// Give frames until there are no more, `budget` were given, or there is no room.
    fn give(&mut self, budget: usize, into: &mut dyn FnMut(Frame<'_>) -> bool) {
        let mut given = 0;
        loop {
            self.net.poll(Instant::now());
            let before = given;
            while given < budget
                && let Some(frame) = self.net.front()
            {
                if !into(offered(frame)) {
                    return;
                }
                self.net.pop();
                given += 1;
            }
            if given >= budget && (self.net.front().is_some() || self.net.is_stalled()) {
                return self.net.rouse();
            }
            if given == before {
                return;
            }
        }
    }
}

impl NetBackend for UserBackend {
    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: false, ecn: true }
    }

    fn guest_offloads(&self, guest: Offloads) {
        let offloads =
            stack::Offloads { checksum: guest.checksum, segments: guest.checksum && guest.tso4 };
        self.guarded(|state| {
            if let Err(e) = state.net.set_offloads(offloads) {
                state.failure = Some(e.to_string());
            }
        });
    }

    fn guest_mtu(&self, mtu: u16) {
        self.guarded(|state| state.net.set_mtu(mtu));
    }

    fn watched(&self) -> Watched {
        Watched { receive: self.watched, send: -1 }
    }

    fn send(&self, frames: &[Frame<'_>]) -> usize {
        self.guarded(|state| {
            state.net.set_time(Instant::now());
            for frame in frames {
                state.net.input(frame.bytes, frame.offload.checksum.is_some());
            }
            state.net.poll(Instant::now());
        });
        frames.len()
    }

    fn receive(&self, budget: usize, into: &mut dyn FnMut(Frame<'_>) -> bool) {
        self.guarded(|state| state.give(budget, into));
    }

    fn answers(&self) -> bool {
        true
    }

    fn failure(&self) -> Option<String> {
        self.net.lock().failure.clone()
    }

    fn dropped(&self) -> u64 {
        self.net.lock().net.dropped()
    }

    fn mtu(&self) -> Option<u16> {
        Some(self.net.lock().net.config().mtu)
    }

    fn reset(&self) {
        self.guarded(|state| state.net.reset());
    }

    fn freeze(&self) -> Option<Arc<dyn FrozenNet>> {
        let state = self.net.lock();
        Some(Arc::new(FrozenUser { continued: state.net.continued() }))
    }

    fn close(&self) {
        self.guarded(|state| {
            state.net.close();
            state.failure = Some("the machine is closed".into());
        });
    }

    fn describe(&self) -> String {
        let state = self.net.lock();
        let config = state.net.config();
        format!("user network {}/{}", config.gateway, config.prefix)
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// What forks get: a network of their own, whose guest sees resets.
#[derive(Debug)]
struct FrozenUser {
    continued: Continued,
}

impl FrozenNet for FrozenUser {
    fn backend(&self) -> Result<Arc<dyn NetBackend>> {
        let net = UserNet::continuing(&self.continued)?;
        Ok(Arc::new(UserBackend::with(net)?))
    }
}

//! The socket device (virtio 1.2, 5.10): carries packets between the driver and the connections of
//! [`crate::vsock`]. On the loop's thread.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use event_manager::{EventOps, Events};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::access::QueueAccess;
use super::buffers::{ChainReader, ChainWriter};
use super::device::{VirtioDevice, read_space};
use super::queues::Queues;
use crate::bytes::Reader;
use crate::config::VsockConfig;
use crate::error::Result;
use crate::sync::{Mutex, rank};
use crate::vsock::{HEADER_SIZE, Header, Mux, UnixSocket};

pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const EVENT: usize = 2;
/// `VIRTIO_VSOCK_F_STREAM`.
pub(super) const STREAM: u64 = 1;
/// How many packets of a queue are processed before other devices of the loop have their turn.
const BATCH: usize = 256;

/// See the module.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    state: Mutex<State, rank::VirtioDevice>,
}

#[derive(Debug)]
struct State {
    mux: Mux,
    /// The driver has to be told that its connections are gone.
    is_event_due: bool,
    /// Packets of the driver wait until it has taken refusals.
    is_held_up: bool,
    /// The queues, while there is a driver.
    queues: Option<Arc<Queues>>,
}

impl Vsock {
    /// The device of this configuration. Its unix socket listens from now on.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Config`] if the address or the path cannot be used.
    pub fn new(config: &VsockConfig) -> Result<Self> {
        config.check()?;
        let unix = config.uds_path.as_deref().map(UnixSocket::bind).transpose()?;
        let mux = Mux::new(config.cid, unix);
        let state = State { mux, is_event_due: false, is_held_up: false, queues: None };
        Ok(Self { cid: config.cid, state: Mutex::new(state) })
    }

    pub(super) fn from_spec(spec: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("vsock", spec);
        let cid = reader.u64()?;
        reader.end()?;
        Self::new(&VsockConfig { cid, uds_path: None })
    }

    /// The guest's address.
    #[must_use]
    pub fn cid(&self) -> u64 {
        self.cid
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.state.lock().mux.count()
    }

    /// Request a connection to a port of the guest, as [`Mux::connect`]. Any thread.
    ///
    /// # Errors
    /// Those of [`Mux::connect`].
    pub fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        let mut state = self.state.lock();
        let end = state.mux.connect(port)?;
        state.wake();
        Ok(end)
    }

    /// Let the guest connect to a port, as [`Mux::listen`]. Any thread.
    ///
    /// # Errors
    /// Those of [`Mux::listen`].
    pub fn listen(&self, port: u32, listener: OwnedFd) -> io::Result<()> {
        self.state.lock().mux.listen(port, listener)
    }

    /// Undo [`Self::listen`]. Any thread.
    pub fn unlisten(&self, port: u32) {
        self.state.lock().mux.unlisten(port);
    }
}

impl State {
    /// Have the loop's thread process the queues.
    fn wake(&self) {
        self.queues.iter().for_each(|queues| queues.notify(RX));
    }

    fn process(&mut self, queues: &Queues, queue: Option<usize>, ops: &mut EventOps<'_>) {
        if let Some(access) = queues.access() {
            if queue == Some(TX) || self.is_held_up {
                self.take_packets(&access, queues);
            }
            self.give_packets(&access, queues);
            if self.is_held_up && !self.mux.is_congested() {
                queues.notify(TX);
            }
            self.give_event(&access);
        }
        self.mux.update_watches(ops);
    }

    fn take_packets(&mut self, access: &QueueAccess<'_>, queues: &Queues) {
        self.is_held_up = false;
        for _ in 0..BATCH {
            if self.mux.is_congested() {
                self.is_held_up = true;
                return;
            }
            let Some(chain) = access.pop(TX) else { return };
            let mut reader = ChainReader::new(access, &chain);
            let Some(header) = reader.take::<HEADER_SIZE>().map(Header::from) else {
                return access.fail("a packet to send is shorter than its header");
            };
            let length = usize::try_from(header.len).unwrap_or(usize::MAX);
            self.mux.take_from_guest(&header, &reader.slices(length));
            access.complete(chain, 0);
        }
        queues.notify(TX);
    }

    fn give_packets(&mut self, access: &QueueAccess<'_>, queues: &Queues) {
        for _ in 0..BATCH {
            if !self.mux.has_packets() {
                return;
            }
            let Some(chain) = access.pop(RX) else { return };
            let mut writer = ChainWriter::new(access, &chain);
            if writer.left() <= HEADER_SIZE as u64 {
                return access.fail("a buffer to receive is not larger than a header");
            }
            writer.skip(HEADER_SIZE as u64);
            let given = self.mux.give_to_guest(&writer.slices(usize::MAX));
            let Some(header) = given else { return access.push_back(chain) };
            writer.advance(u64::from(header.len));
            let bytes: [u8; HEADER_SIZE] = header.into();
            // Fails only if memory has been removed.
            let _ = ChainWriter::new(access, &chain).write_all(&bytes);
            let written = writer.written();
            access.complete(chain, written);
        }
        queues.notify(RX);
    }

    /// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
    fn give_event(&mut self, access: &QueueAccess<'_>) {
        if !self.is_event_due {
            return;
        }
        let Some(chain) = access.pop(EVENT) else { return };
        let mut writer = ChainWriter::new(access, &chain);
        if writer.left() < 4 {
            return access.fail("a buffer for an event is shorter than an event");
        }
        // Fails only if memory has been removed.
        let _ = writer.write_all(&[0; 4]);
        let written = writer.written();
        access.complete(chain, written);
        self.is_event_due = false;
    }

    fn reset(&mut self) {
        self.mux.reset();
        (self.is_event_due, self.is_held_up) = (false, false);
        // The loop closes the sockets.
        self.wake();
        self.queues = None;
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&self, queues: &Arc<Queues>, _features: u64) {
        let mut state = self.state.lock();
        state.mux.start();
        state.queues = Some(Arc::clone(queues));
    }

    fn reset(&self) {
        self.state.lock().reset();
    }

    fn init(&self, ops: &mut EventOps<'_>) {
        self.state.lock().mux.update_watches(ops);
    }

    fn process_queue(&self, queues: &Arc<Queues>, queue: usize, ops: &mut EventOps<'_>) {
        self.state.lock().process(queues, Some(queue), ops);
    }

    fn process_event(&self, queues: &Arc<Queues>, events: Events, ops: &mut EventOps<'_>) {
        let mut state = self.state.lock();
        state.mux.process_event(events.data(), events.event_set());
        state.process(queues, None, ops);
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        Reader::new("vsock", state).end()?;
        // Its connections are not part of the snapshot.
        self.state.lock().is_event_due = true;
        Ok(())
    }

    fn spec(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    /// No loop watches the sockets any more.
    fn close(&self) {
        let mut state = self.state.lock();
        state.reset();
        state.mux.close();
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }
}

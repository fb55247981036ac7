//! A port of the console device: the stream on the host's side, and what the guest wrote before
//! there was one. On the loop's thread, but for the offer of a stream.

use std::collections::VecDeque;
use std::io::{self, ErrorKind as Kind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use event_manager::{EventOps, EventSet, Events};

use super::access::QueueAccess;
use super::buffers::{ChainReader, ChainWriter};
use super::chain::Chain;
use crate::bytes::Reader;
use crate::config::ConsolePort;
use crate::error::{Error, ErrorKind, Result};

/// The most that is kept of what the guest writes while nobody is connected.
const KEPT: usize = 1 << 20;
/// How much is read or written at a time.
const PIECE: usize = 64 << 10;

/// The host's stream.
#[derive(Debug)]
struct Host {
    stream: UnixStream,
    /// The events that the loop watches. A stream without any is not registered: one that the other
    /// end has closed would always be ready.
    watched: EventSet,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) name: String,
    /// The socket on which it listens, with its path.
    listener: Option<(UnixListener, PathBuf)>,
    /// A stream that the loop has not registered yet.
    offered: Option<UnixStream>,
    host: Option<Host>,
    /// What the guest wrote while nobody was connected, and then what is to be sent first.
    kept: VecDeque<u8>,
    /// The chain that is being sent, and how much of it has been.
    sending: Option<(Chain, u64)>,
    /// The driver has the port.
    pub(super) has_driver: bool,
    /// A program of the guest has opened it.
    pub(super) is_open: bool,
}

impl Port {
    /// # Errors
    /// [`ErrorKind::Config`] if its socket cannot be bound.
    pub(super) fn new(config: &ConsolePort) -> Result<Self> {
        let listener = match &config.path {
            Some(path) => Some((listen(path)?, path.clone())),
            None => None,
        };
        Ok(Self {
            name: config.name.clone(),
            listener,
            offered: None,
            host: None,
            kept: VecDeque::new(),
            sending: None,
            has_driver: false,
            is_open: false,
        })
    }

    pub(super) fn init(&self, ops: &mut EventOps<'_>) {
        // Fails only without memory: nobody can connect then.
        let _ = self.listener.iter().try_for_each(|(l, _)| ops.add(Events::new(l, EventSet::IN)));
    }

    pub(super) fn is_connected(&self) -> bool {
        self.host.is_some() || self.offered.is_some()
    }

    /// Give it a stream. Returns whether it had none.
    pub(super) fn offer(&mut self, stream: UnixStream) -> bool {
        let is_free = !self.is_connected();
        if is_free {
            self.offered = Some(stream);
        }
        is_free
    }

    /// Take a new stream, offered or from the listener. Returns whether the port has been opened.
    pub(super) fn accept(&mut self, ops: &mut EventOps<'_>) -> Option<bool> {
        while let Some((listener, _)) = &self.listener {
            let Ok((stream, _)) = listener.accept() else { break };
            // A second connection is closed at once.
            if !self.is_connected() && stream.set_nonblocking(true).is_ok() {
                self.offered = Some(stream);
            }
        }
        let stream = self.offered.take()?;
        self.host = Some(Host { stream, watched: EventSet::empty() });
        self.watch(EventSet::IN, ops);
        Some(true)
    }

    /// Watch the stream for these events.
    fn watch(&mut self, wanted: EventSet, ops: &mut EventOps<'_>) {
        let Some(host) = &mut self.host else { return };
        if host.watched == wanted {
            return;
        }
        let events = Events::new(&host.stream, wanted);
        let changed = match (host.watched.is_empty(), wanted.is_empty()) {
            (true, _) => ops.add(events),
            (false, true) => ops.remove(events),
            (false, false) => ops.modify(events),
        };
        if changed.is_ok() {
            host.watched = wanted;
        }
    }

    fn watched(&self) -> EventSet {
        self.host.as_ref().map_or(EventSet::empty(), |host| host.watched)
    }

    /// Watch nothing while the queues are closed. Each is notified when they are opened.
    pub(super) fn rest(&mut self, ops: &mut EventOps<'_>) {
        self.watch(EventSet::empty(), ops);
    }

    fn disconnect(&mut self, ops: &mut EventOps<'_>) {
        if let Some(host) = self.host.take() {
            // Fails if it was never registered.
            let _ = ops.remove(Events::empty(&host.stream));
        }
    }

    /// Send what the guest has written: to the stream, or to what is kept if there is none.
    pub(super) fn send(&mut self, access: &QueueAccess<'_>, queue: usize, ops: &mut EventOps<'_>) {
        if !self.send_kept(ops) {
            return;
        }
        while let Some((chain, sent)) =
            self.sending.take().or_else(|| Some((access.pop(queue)?, 0)))
        {
            let mut reader = ChainReader::new(access, &chain);
            reader.skip(sent);
            if self.host.is_none() {
                reader.skip(reader.left().saturating_sub(KEPT as u64));
                self.keep(&reader.read_vec(KEPT));
                access.complete(chain, 0);
                continue;
            }
            let piece = reader.read_vec(PIECE);
            match self.write(&piece) {
                Ok(count) if count as u64 >= piece.len() as u64 + reader.left() => {
                    access.complete(chain, 0);
                }
                Ok(count) => self.sending = Some((chain, sent + count as u64)),
                Err(error) => {
                    self.sending = Some((chain, sent));
                    if error.kind() == Kind::WouldBlock {
                        return self.watch(self.watched() | EventSet::OUT, ops);
                    }
                    self.disconnect(ops);
                }
            }
        }
        self.watch(self.watched() - EventSet::OUT, ops);
    }

    /// Send what was kept. Returns whether the stream may get more.
    fn send_kept(&mut self, ops: &mut EventOps<'_>) -> bool {
        while self.host.is_some() && !self.kept.is_empty() {
            let piece: Vec<u8> = self.kept.iter().take(PIECE).copied().collect();
            match self.write(&piece) {
                Ok(count) => drop(self.kept.drain(..count)),
                Err(error) if error.kind() == Kind::WouldBlock => {
                    self.watch(self.watched() | EventSet::OUT, ops);
                    return false;
                }
                Err(_) => self.disconnect(ops),
            }
        }
        true
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.kept.extend(bytes);
        let excess = self.kept.len().saturating_sub(KEPT);
        self.kept.drain(..excess);
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let Some(host) = &self.host else { return Err(Kind::NotConnected.into()) };
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the pointer and the length are those of one slice, which is only read.
        let sent = unsafe {
            libc::send(host.stream.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags)
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Give the guest what the host has sent. Returns whether the host has disconnected.
    pub(super) fn receive(
        &mut self,
        access: &QueueAccess<'_>,
        queue: usize,
        ops: &mut EventOps<'_>,
    ) -> bool {
        let was_connected = self.host.is_some();
        // A driver drops what comes before a program has opened the port.
        let is_wanted = !self.has_driver || self.is_open;
        while is_wanted
            && self.host.is_some()
            && let Some(chain) = access.pop(queue)
        {
            if !self.fill(access, chain, ops) {
                return false;
            }
        }
        if self.host.is_some() {
            // Until the driver has buffers again.
            self.watch(self.watched() - EventSet::IN, ops);
        }
        was_connected && self.host.is_none()
    }

    /// Read into a chain. Returns whether there may be more to read; if not, the stream is watched.
    fn fill(&mut self, access: &QueueAccess<'_>, chain: Chain, ops: &mut EventOps<'_>) -> bool {
        let most = usize::try_from(chain.writable_len()).unwrap_or(PIECE).min(PIECE);
        let mut bytes = vec![0; most];
        let read = match &mut self.host {
            Some(host) if most > 0 => host.stream.read(&mut bytes),
            _ => Ok(0),
        };
        match read {
            Ok(0) if most == 0 => access.complete(chain, 0),
            Ok(count) if count > 0 => {
                let mut writer = ChainWriter::new(access, &chain);
                let _ = io::Write::write_all(&mut writer, bytes.get(..count).unwrap_or(&[]));
                let written = writer.written();
                access.complete(chain, written);
            }
            Err(error) if error.kind() == Kind::WouldBlock => {
                access.push_back(chain);
                self.watch(self.watched() | EventSet::IN, ops);
                return false;
            }
            _ => {
                access.push_back(chain);
                self.disconnect(ops);
            }
        }
        true
    }

    /// The driver has reset the device.
    pub(super) fn reset(&mut self) {
        self.sending = None;
        (self.has_driver, self.is_open) = (false, false);
    }

    pub(super) fn close(&mut self) {
        (self.host, self.offered, self.sending) = (None, None, None);
        if let Some((_, path)) = self.listener.take() {
            // Somebody else may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }

    pub(super) fn save(&self, bytes: &mut Vec<u8>) {
        bytes.extend([self.has_driver, self.is_open].map(u8::from));
        bytes.extend(u32::try_from(self.kept.len()).unwrap_or(0).to_le_bytes());
        bytes.extend(self.kept.iter());
    }

    pub(super) fn restore(&mut self, reader: &mut Reader<'_>) -> Result<()> {
        let [has_driver, is_open] = reader.take()?.map(|flag: u8| flag != 0);
        let length = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
        self.kept = reader.bytes(length)?.iter().copied().collect();
        (self.has_driver, self.is_open) = (has_driver, is_open);
        Ok(())
    }
}

fn listen(path: &PathBuf) -> Result<UnixListener> {
    let failed = |error: io::Error| {
        let at = format!("console.ports: {}", path.display());
        Error::os(ErrorKind::Config, at, &error)
    };
    let listener = UnixListener::bind(path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

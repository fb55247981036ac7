//! All TCP connections: which packet belongs to which, and those that are not made yet because the
//! program is asked or the host's side has not answered. The guest's SYN is answered when it has.

use std::collections::HashMap;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use smoltcp::iface::SocketSet;
use smoltcp::wire::{IpAddress, Ipv4Packet, TcpPacket};

use super::core::Core;
use super::frame::End;
use super::host::{Ready, connect, reset_when_closed};
use super::policy::{Verdict, judge};
use super::rules::Protocol;
use super::tcp::{Connection, Key};
use super::timers::Token;

/// A SYN longer than this is no honest one.
const LONGEST_SYN: usize = 576;
/// Ports for connections to the guest.
const FIRST_PORT: u16 = 49_152;

#[derive(Debug)]
enum Stage {
    /// The program is asked.
    Asking(Vec<u8>),
    /// The host's side is being connected.
    Connecting(Vec<u8>, TcpStream),
    Open(Box<Connection>),
}

#[derive(Debug)]
struct Entry {
    key: Key,
    stage: Stage,
    is_dirty: bool,
}

/// The connections of a network.
#[derive(Debug, Default)]
pub(super) struct TcpTable {
    ids: HashMap<Key, u64>,
    entries: HashMap<u64, Entry>,
    dirty: Vec<u64>,
    next_port: u16,
}

impl TcpTable {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The connections that the guest knows, each with the sequence number that it expects next.
    pub(super) fn open(&self) -> Vec<(Key, u32)> {
        let open = |entry: &Entry| match &entry.stage {
            Stage::Open(connection) => Some((entry.key, connection.acknowledged)),
            _ => None,
        };
        self.entries.values().filter_map(open).collect()
    }

    /// A packet of the guest, which has been checked to be TCP over IPv4.
    pub(super) fn input(&mut self, bytes: &[u8], is_partial: bool, core: &mut Core) {
        let Ok(packet) = Ipv4Packet::new_checked(bytes) else { return };
        let Ok(segment) = TcpPacket::new_checked(packet.payload()) else { return };
        let (from, to) = (packet.src_addr(), packet.dst_addr());
        let is_right =
            is_partial || segment.verify_checksum(&IpAddress::from(from), &IpAddress::from(to));
        if !is_right || segment.src_port() == 0 || segment.dst_port() == 0 {
            return;
        }
        let key = Key { guest: (from, segment.src_port()), remote: (to, segment.dst_port()) };
        match self.ids.get(&key) {
            Some(id) => self.continues(*id, bytes, &segment, core),
            None if segment.syn() && !segment.ack() && !segment.rst() => {
                self.begins(key, bytes, core);
            }
            None => refuse(bytes, core),
        }
    }

    fn continues(&mut self, id: u64, bytes: &[u8], segment: &TcpPacket<&[u8]>, core: &mut Core) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        match &mut entry.stage {
            Stage::Open(connection) => {
                if segment.ack() {
                    connection.acknowledged = segment.ack_number().0.cast_unsigned();
                }
                connection.input(bytes, core);
                self.touch(id);
            }
            // Its SYN is repeated.
            _ if !segment.rst() => {}
            _ => self.remove(id, core),
        }
    }

    fn begins(&mut self, key: Key, bytes: &[u8], core: &mut Core) {
        if bytes.len() > LONGEST_SYN || self.len() >= core.config.max_connections {
            return refuse(bytes, core);
        }
        match judge(&core.config, Protocol::Tcp, key.remote) {
            Verdict::Deny => refuse(bytes, core),
            Verdict::Allow => self.dial(key, bytes.to_vec(), core),
            Verdict::Ask => {
                let id = core.new_id();
                if !core.ask(id, Protocol::Tcp, key.remote) {
                    return refuse(bytes, core);
                }
                self.insert(id, key, Stage::Asking(bytes.to_vec()));
            }
        }
    }

    /// The program has decided. Unknown numbers are those of connections that have ended.
    pub(super) fn answer(&mut self, id: u64, is_allowed: bool, core: &mut Core) {
        let Some(Entry { stage: Stage::Asking(syn), key, .. }) = self.entries.get_mut(&id) else {
            return;
        };
        let (syn, key) = (std::mem::take(syn), *key);
        self.remove(id, core);
        if is_allowed { self.dial(key, syn, core) } else { refuse(&syn, core) }
    }

    fn dial(&mut self, key: Key, syn: Vec<u8>, core: &mut Core) {
        let stream = core.target(key.remote).and_then(|to| connect(to).ok());
        let id = core.new_id();
        let watched =
            stream.filter(|stream| core.watch.add(stream.as_raw_fd(), Token::Tcp(id)).is_ok());
        match watched {
            Some(stream) => self.insert(id, key, Stage::Connecting(syn, stream)),
            None => refuse(&syn, core),
        }
    }

    /// A connection from the host to a port of the guest.
    pub(super) fn forward(&mut self, stream: TcpStream, guest: End, core: &mut Core) {
        let Some(port) = self.free_port(guest, core) else { return reset_when_closed(&stream) };
        let key = Key { guest, remote: (core.config.gateway, port) };
        let id = core.new_id();
        let is_watched = core.watch.add(stream.as_raw_fd(), Token::Tcp(id)).is_ok();
        if self.len() >= core.config.max_connections || !is_watched {
            return reset_when_closed(&stream);
        }
        if let Some(connection) = Connection::connect(key, stream, core) {
            self.insert(id, key, Stage::Open(Box::new(connection)));
            self.touch(id);
        }
    }

    fn free_port(&mut self, guest: End, core: &Core) -> Option<u16> {
        (0..=u16::MAX - FIRST_PORT).find_map(|_| {
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT).max(FIRST_PORT);
            let key = Key { guest, remote: (core.config.gateway, self.next_port) };
            (!self.ids.contains_key(&key)).then_some(self.next_port)
        })
    }

    /// The stream of a connection is ready.
    pub(super) fn ready(&mut self, id: u64, ready: Ready, core: &mut Core) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        match &mut entry.stage {
            Stage::Asking(_) => {}
            Stage::Open(connection) => connection.set_ready(ready),
            Stage::Connecting(..) => return self.connected(id, ready, core),
        }
        self.touch(id);
    }

    fn connected(&mut self, id: u64, ready: Ready, core: &mut Core) {
        let Some(entry) = self.take(id) else { return };
        let Stage::Connecting(syn, stream) = entry.stage else { return };
        let is_failed = !matches!(stream.take_error(), Ok(None));
        if !is_failed && stream.peer_addr().is_err() {
            // Not yet. This event was that of a socket that has not been connected.
            return self.insert(id, entry.key, Stage::Connecting(syn, stream));
        }
        if is_failed {
            if entry.key.remote.0 == core.config.dns {
                core.resolver.advance();
            }
            return refuse(&syn, core);
        }
        if let Some(mut connection) = Connection::accept(entry.key, &syn, stream, core) {
            connection.set_ready(ready);
            self.insert(id, entry.key, Stage::Open(Box::new(connection)));
            self.touch(id);
        }
    }

    fn insert(&mut self, id: u64, key: Key, stage: Stage) {
        self.ids.insert(key, id);
        self.entries.insert(id, Entry { key, stage, is_dirty: false });
    }

    fn take(&mut self, id: u64) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.ids.remove(&entry.key);
        Some(entry)
    }

    fn remove(&mut self, id: u64, core: &mut Core) {
        self.take(id);
        core.timers.set(Token::Tcp(id), None);
        core.stalled.remove(&Token::Tcp(id));
    }

    /// Serve a connection at the end of this turn.
    pub(super) fn touch(&mut self, id: u64) {
        if let Some(entry) = self.entries.get_mut(&id)
            && !std::mem::replace(&mut entry.is_dirty, true)
        {
            self.dirty.push(id);
        }
    }

    /// Serve the connections that have something to do.
    pub(super) fn serve(&mut self, core: &mut Core) {
        for id in std::mem::take(&mut self.dirty) {
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            entry.is_dirty = false;
            if let Stage::Open(connection) = &mut entry.stage
                && !connection.serve(Token::Tcp(id), core)
            {
                self.remove(id, core);
            }
        }
    }

    /// End all connections with a reset.
    pub(super) fn abort(&mut self, core: &mut Core) {
        for id in self.entries.keys().copied().collect::<Vec<_>>() {
            if let Some(Entry { stage: Stage::Open(connection), .. }) = self.entries.get_mut(&id) {
                connection.abort(core);
            }
            self.remove(id, core);
        }
    }
}

/// Have the guest see a reset.
fn refuse(packet: &[u8], core: &mut Core) {
    let now = core.now;
    let (stack, port) = core.parts();
    stack.ingress(now, packet, &mut SocketSet::new(Vec::new()), port);
}

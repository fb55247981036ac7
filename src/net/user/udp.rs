//! UDP: a flow is an endpoint of the guest, a destination, and a socket of the host that talks to
//! it alone. Flows end when nothing has passed for a while, or when there are too many.

use std::collections::HashMap;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use smoltcp::wire::Icmpv4DstUnreachable;

use super::core::Core;
use super::frame::{End, udp};
use super::host::udp_to;
use super::icmp::quote;
use super::policy::{Verdict, judge};
use super::rules::Protocol;
use super::timers::Token;

/// A flow ends after this time without a datagram.
const IDLE: Duration = Duration::from_secs(60);
/// Datagrams that wait for the program's answer.
const WAITING: usize = 4;
/// Datagrams that one flow receives in a turn.
const TURN: usize = 64;
/// A datagram of any length.
const DATAGRAM: usize = 65_536;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    guest: End,
    remote: End,
}

#[derive(Debug)]
struct Flow {
    key: Key,
    /// None while the program is asked.
    socket: Option<UdpSocket>,
    waiting: Vec<Vec<u8>>,
    /// What an error quotes: the beginning of the last packet.
    quote: Vec<u8>,
    used: Instant,
}

/// A datagram of the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Datagram<'a> {
    pub(super) from: End,
    pub(super) to: End,
    pub(super) payload: &'a [u8],
    /// The IP packet, or its beginning.
    pub(super) packet: &'a [u8],
}

/// The flows of a network.
#[derive(Debug)]
pub(super) struct UdpTable {
    ids: HashMap<Key, u64>,
    flows: HashMap<u64, Flow>,
    buffer: Vec<u8>,
    ident: u16,
}

impl Default for UdpTable {
    fn default() -> Self {
        let (ids, flows) = (HashMap::new(), HashMap::new());
        Self { ids, flows, buffer: vec![0; DATAGRAM], ident: 0 }
    }
}

impl UdpTable {
    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    pub(super) fn input(&mut self, datagram: Datagram<'_>, core: &mut Core) {
        let key = Key { guest: datagram.from, remote: datagram.to };
        if let Some(id) = self.ids.get(&key).copied() {
            return self.send(id, datagram, core);
        }
        let is_multicast = datagram.to.0.is_multicast() || datagram.to.0.is_broadcast();
        let verdict = judge(&core.config, Protocol::Udp, datagram.to);
        match verdict {
            // An error about these would be wrong (RFC 1122, 3.2.2).
            Verdict::Deny if is_multicast => {}
            Verdict::Deny => {
                core.unreachable(Icmpv4DstUnreachable::CommProhibited, datagram.packet);
            }
            Verdict::Allow | Verdict::Ask => self.begin(key, verdict, datagram, core),
        }
    }

    fn begin(&mut self, key: Key, verdict: Verdict, datagram: Datagram<'_>, core: &mut Core) {
        if self.flows.len() >= core.config.max_flows {
            self.evict(core);
        }
        let id = core.new_id();
        if verdict == Verdict::Ask && !core.ask(id, Protocol::Udp, key.remote) {
            return;
        }
        let flow = Flow {
            key,
            socket: None,
            waiting: Vec::new(),
            quote: quote(datagram.packet).to_vec(),
            used: core.now,
        };
        self.ids.insert(key, id);
        self.flows.insert(id, flow);
        core.timers.set(Token::Udp(id), Some(core.now + IDLE));
        if verdict == Verdict::Ask || self.open(id, core) {
            self.send(id, datagram, core);
        }
    }

    fn open(&mut self, id: u64, core: &mut Core) -> bool {
        let Some(flow) = self.flows.get_mut(&id) else { return false };
        let socket = core.target(flow.key.remote).and_then(|to| udp_to(to).ok());
        let watched =
            socket.filter(|socket| core.watch.add(socket.as_raw_fd(), Token::Udp(id)).is_ok());
        if watched.is_none() {
            core.unreachable(Icmpv4DstUnreachable::HostUnreachable, &flow.quote);
            self.remove(id, core);
            return false;
        }
        flow.socket = watched;
        true
    }

    /// The program has decided.
    pub(super) fn answer(&mut self, id: u64, is_allowed: bool, core: &mut Core) {
        let Some(flow) = self.flows.get_mut(&id).filter(|flow| flow.socket.is_none()) else {
            return;
        };
        let waiting = std::mem::take(&mut flow.waiting);
        if !is_allowed {
            core.unreachable(Icmpv4DstUnreachable::CommProhibited, &flow.quote);
            return self.remove(id, core);
        }
        let (key, quote) = (flow.key, flow.quote.clone());
        if self.open(id, core) {
            for payload in waiting {
                let (payload, packet) = (&payload[..], &quote[..]);
                let datagram = Datagram { from: key.guest, to: key.remote, payload, packet };
                self.send(id, datagram, core);
            }
        }
    }

    fn send(&mut self, id: u64, datagram: Datagram<'_>, core: &mut Core) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.used = core.now;
        let Some(socket) = &flow.socket else {
            if flow.waiting.len() < WAITING {
                flow.waiting.push(datagram.payload.to_vec());
            }
            return;
        };
        quote(datagram.packet).clone_into(&mut flow.quote);
        // Sent again once, because the first call may report an earlier datagram's error.
        let result = socket.send(datagram.payload).or_else(|_| socket.send(datagram.payload));
        if let Err(error) = result {
            Self::failed(flow, &error, core);
        }
    }

    fn failed(flow: &Flow, error: &io::Error, core: &mut Core) {
        let reason = match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => Icmpv4DstUnreachable::PortUnreachable,
            Some(libc::EHOSTUNREACH) => Icmpv4DstUnreachable::HostUnreachable,
            Some(libc::ENETUNREACH) => Icmpv4DstUnreachable::NetUnreachable,
            Some(libc::EPERM | libc::EACCES) => Icmpv4DstUnreachable::CommProhibited,
            // A full buffer: the datagram is lost, as on any link.
            _ => return,
        };
        if flow.key.remote.0 == core.config.dns {
            core.resolver.advance();
        }
        core.unreachable(reason, &flow.quote);
    }

    /// Pass on what a flow's socket has received.
    pub(super) fn receive(&mut self, id: u64, core: &mut Core) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let Some(socket) = &flow.socket else { return };
        for _ in 0..TURN {
            if core.outbox.is_busy() {
                break;
            }
            match socket.recv(&mut self.buffer) {
                Ok(count) => {
                    flow.used = core.now;
                    self.ident = self.ident.wrapping_add(1);
                    let payload = self.buffer.get(..count).unwrap_or_default();
                    let (from, to) = (flow.key.remote, flow.key.guest);
                    let mtu = usize::from(core.mtu);
                    for packet in udp(from, to, payload, mtu, self.ident) {
                        core.send(&packet);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => Self::failed(flow, &e, core),
            }
        }
        // There may be more.
        core.stalled.insert(Token::Udp(id));
    }

    /// A flow's time has come: it has been idle, or was used since.
    pub(super) fn expire(&mut self, id: u64, core: &mut Core) {
        let Some(flow) = self.flows.get(&id) else { return };
        let end = flow.used + IDLE;
        if end > core.now {
            return core.timers.set(Token::Udp(id), Some(end));
        }
        self.remove(id, core);
    }

    fn evict(&mut self, core: &mut Core) {
        let oldest = self.flows.iter().min_by_key(|(_, flow)| flow.used).map(|(id, _)| *id);
        if let Some(id) = oldest {
            self.remove(id, core);
        }
    }

    fn remove(&mut self, id: u64, core: &mut Core) {
        if let Some(flow) = self.flows.remove(&id) {
            self.ids.remove(&flow.key);
        }
        core.timers.set(Token::Udp(id), None);
        core.stalled.remove(&Token::Udp(id));
    }

    pub(super) fn clear(&mut self, core: &mut Core) {
        for id in self.flows.keys().copied().collect::<Vec<_>>() {
            self.remove(id, core);
        }
    }
}

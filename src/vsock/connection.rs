//! One connection: its state, its credit, and what is to be sent to the guest next. On the loop's
//! thread.

use vm_memory::VolatileSlice;

use super::backlog::Backlog;
use super::credit::{Incoming, Outgoing};
use super::packet::{self, Header, op};
use super::socket::{HostSocket, Received};

/// The most data of one packet.
const LARGEST: usize = 64 << 10;

/// The two ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host has requested it; the guest has not answered.
    Requested,
    Established,
    /// It is over for the guest. The host has not taken all data yet.
    Draining,
}

/// What a side has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) receive: bool,
    pub(super) send: bool,
}

impl Ended {
    fn flags(self) -> u32 {
        let receive = if self.receive { packet::SHUTDOWN_RECEIVE } else { 0 };
        receive | if self.send { packet::SHUTDOWN_SEND } else { 0 }
    }

    fn is_both(self) -> bool {
        self.receive && self.send
    }
}

/// A packet to send: its operation, its flags, and the bytes of data that were read for it.
pub(super) type Outgoings = (u16, u32, u32);

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    pub(super) phase: Phase,
    /// None once the host is done with it.
    pub(super) socket: Option<HostSocket>,
    /// What the host is sent when the guest accepts.
    greeting: Vec<u8>,
    /// REQUEST or RESPONSE, until it is sent.
    opening: Option<u16>,
    /// RST is to be sent, and nothing else.
    pub(super) is_reset: bool,
    incoming: Incoming,
    outgoing: Outgoing,
    pub(super) backlog: Backlog,
    /// There may be something to read.
    is_readable: bool,
    /// The host has ended at least one direction, so a short read may be followed by the end.
    is_ending: bool,
    host: Ended,
    /// What the guest knows of it.
    told: Ended,
    guest: Ended,
    /// Whether the socket is shut down for writing. To do it again would make it ready again.
    is_shut_down: bool,
    is_update_wanted: bool,
    has_asked: bool,
    /// Whether it is in the list of those with something to send.
    pub(super) is_queued: bool,
}

impl Connection {
    fn new(ports: Ports, phase: Phase, socket: HostSocket) -> Self {
        Self {
            ports,
            phase,
            socket: Some(socket),
            greeting: Vec::new(),
            opening: None,
            is_reset: false,
            incoming: Incoming::default(),
            outgoing: Outgoing::default(),
            backlog: Backlog::default(),
            is_readable: true,
            is_ending: false,
            host: Ended::default(),
            told: Ended::default(),
            guest: Ended::default(),
            is_shut_down: false,
            is_update_wanted: false,
            has_asked: false,
            is_queued: false,
        }
    }

    /// A connection that the host requests.
    pub(super) fn requested(ports: Ports, socket: HostSocket, greeting: Vec<u8>) -> Self {
        let opening = Some(op::REQUEST);
        Self { greeting, opening, ..Self::new(ports, Phase::Requested, socket) }
    }

    /// A connection that the guest has requested by this packet, and the host accepts.
    pub(super) fn accepted(ports: Ports, socket: HostSocket, header: &Header) -> Self {
        let opening = Some(op::RESPONSE);
        let mut accepted = Self { opening, ..Self::new(ports, Phase::Established, socket) };
        accepted.outgoing.update(header);
        accepted
    }

    /// Whether the host is gone, and only the guest's answer is missing.
    pub(super) fn is_forsaken(&self) -> bool {
        match self.phase {
            Phase::Requested => self.is_ending,
            Phase::Established => self.host.is_both() && self.host == self.told,
            Phase::Draining => false,
        }
    }

    /// Whether nothing is left to do.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Draining && (self.backlog.is_empty() || self.socket.is_none())
    }

    /// Whether the socket has to be watched for room to write.
    pub(super) fn wants_room(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Whether there may be something to send to the guest.
    pub(super) fn has_packets(&self) -> bool {
        if self.is_reset || self.opening.is_some() {
            return true;
        }
        self.phase == Phase::Established
            && (self.host != self.told
                || self.is_update_wanted
                || self.incoming.is_update_due()
                || (self.may_read()
                    && (self.outgoing.room() > 0 || !self.has_asked || self.is_ending)))
    }

    fn may_read(&self) -> bool {
        self.is_readable && !self.host.send && !self.guest.receive && self.socket.is_some()
    }

    /// The next packet for the guest. Its data is read into this room.
    pub(super) fn next(&mut self, room: &[VolatileSlice<'_>]) -> Option<Outgoings> {
        if self.is_reset {
            return Some((op::RST, 0, 0));
        }
        if let Some(opening) = self.opening.take() {
            return Some((opening, 0, 0));
        }
        if self.phase != Phase::Established {
            return None;
        }
        // The guest learns that data is not wanted before it sends more, but an end of both
        // directions is one packet, after the data.
        if self.host.receive && !self.is_ending && self.host != self.told {
            return Some(self.shutdown());
        }
        if self.may_read()
            && let Some(count) = self.read(room)
        {
            return Some((op::RW, 0, count));
        }
        if self.host != self.told {
            return Some(self.shutdown());
        }
        if self.may_read() && self.outgoing.room() == 0 && !self.has_asked {
            self.has_asked = true;
            return Some((op::CREDIT_REQUEST, 0, 0));
        }
        if std::mem::take(&mut self.is_update_wanted) || self.incoming.is_update_due() {
            return Some((op::CREDIT_UPDATE, 0, 0));
        }
        None
    }

    fn shutdown(&mut self) -> Outgoings {
        self.told = self.host;
        (op::SHUTDOWN, self.host.flags(), 0)
    }

    /// The count of forwarded bytes, for a packet that is sent now.
    pub(super) fn tell_credit(&mut self) -> u32 {
        self.is_update_wanted = false;
        self.incoming.tell()
    }

    fn read(&mut self, room: &[VolatileSlice<'_>]) -> Option<u32> {
        let socket = self.socket.as_ref()?;
        let credit = usize::try_from(self.outgoing.room()).unwrap_or(0).min(LARGEST);
        if credit == 0 {
            // The end takes no credit.
            if self.is_ending && matches!(socket.peek(&mut [0]), Ok(0) | Err(_)) {
                self.host_has_ended();
            }
            return None;
        }
        let received = socket.receive(&cut(room, credit));
        match received {
            Ok(Received::Data(0, _) | Received::Nothing) => self.is_readable = false,
            Ok(Received::Data(count, may_have_more)) => {
                self.is_readable = may_have_more || self.is_ending;
                self.outgoing.send(count);
                return Some(count);
            }
            Ok(Received::End) => self.host_has_ended(),
            Err(_) => {
                self.host.receive = true;
                self.host_has_ended();
            }
        }
        None
    }

    fn host_has_ended(&mut self) {
        self.is_readable = false;
        self.host.send = true;
        if self.socket.as_ref().is_some_and(HostSocket::is_hung_up) {
            self.host_takes_no_more();
        }
    }

    fn host_takes_no_more(&mut self) {
        self.host.receive = true;
        self.forward(self.backlog.bytes().len());
        self.backlog.clear();
    }

    fn forward(&mut self, count: usize) {
        // At most the size of the buffer.
        self.incoming.forward(u32::try_from(count).unwrap_or(u32::MAX));
    }

    /// The socket is ready: there may be something to read, or room to write.
    pub(super) fn ready(&mut self, is_readable: bool, is_ending: bool, is_hung_up: bool) {
        self.is_readable |= is_readable;
        self.is_ending |= is_ending || is_hung_up;
        if is_hung_up {
            self.host_takes_no_more();
            // Nobody reads what the host has sent before, if the guest does not.
            if self.guest.receive {
                self.host.send = true;
            }
        }
        self.flush();
    }

    /// Write what the host has not taken yet.
    pub(super) fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let Some(socket) = &self.socket else { return };
            match socket.send_bytes(self.backlog.bytes()) {
                Ok(0) => return,
                Ok(count) => {
                    self.backlog.take(count);
                    self.forward(count);
                }
                Err(_) => return self.host_takes_no_more(),
            }
        }
        if self.guest.send
            && let Some(socket) = &self.socket
            && !std::mem::replace(&mut self.is_shut_down, true)
        {
            socket.shut_down(libc::SHUT_WR);
        }
    }

    /// A packet of the guest, for this connection. Data is in `payload`.
    pub(super) fn take(&mut self, header: &Header, payload: &[VolatileSlice<'_>]) {
        if self.is_reset && header.op != op::RST {
            return;
        }
        let before = self.outgoing.room();
        self.outgoing.update(header);
        self.has_asked &= self.outgoing.room() <= before;
        match (header.op, self.phase) {
            (op::RST, _) => self.end(),
            (op::RESPONSE, Phase::Requested) if self.opening.is_none() => self.establish(),
            (op::RW, Phase::Established) if !self.guest.send => self.take_data(header, payload),
            (op::SHUTDOWN, Phase::Established) => self.take_shutdown(header.flags),
            (op::CREDIT_UPDATE, Phase::Established) => {}
            (op::CREDIT_REQUEST, Phase::Established) => self.is_update_wanted = true,
            _ => self.reset(),
        }
    }

    fn establish(&mut self) {
        self.phase = Phase::Established;
        let greeting = std::mem::take(&mut self.greeting);
        let sent = self.socket.as_ref().map(|socket| socket.send_bytes(&greeting));
        // The socket is empty, so there is room, unless the host is gone.
        if !matches!(sent, Some(Ok(count)) if count == greeting.len()) {
            self.host_takes_no_more();
        }
    }

    fn take_data(&mut self, header: &Header, payload: &[VolatileSlice<'_>]) {
        let present: usize = payload.iter().map(VolatileSlice::len).sum();
        let length = usize::try_from(header.len).unwrap_or(usize::MAX);
        if present != length || !self.incoming.receive(header.len) {
            return self.reset();
        }
        if self.host.receive {
            return self.forward(length);
        }
        let sent = match (&self.socket, self.backlog.is_empty()) {
            (Some(socket), true) => socket.send(payload),
            _ => Ok(0),
        };
        match sent {
            Ok(sent) => {
                self.forward(sent);
                if sent < length {
                    self.backlog.add(payload, sent);
                }
            }
            Err(_) => {
                self.forward(length);
                self.host_takes_no_more();
            }
        }
    }

    fn take_shutdown(&mut self, flags: u32) {
        self.guest.receive |= flags & packet::SHUTDOWN_RECEIVE != 0;
        self.guest.send |= flags & packet::SHUTDOWN_SEND != 0;
        self.flush();
        if self.guest.is_both() {
            self.reset();
        } else if self.guest.receive
            && let Some(socket) = &self.socket
        {
            socket.shut_down(libc::SHUT_RD);
        }
    }

    /// End it by a RST to the guest.
    pub(super) fn reset(&mut self) {
        self.is_reset = true;
    }

    /// It is over for the guest: what it has sent still goes to the host.
    pub(super) fn end(&mut self) {
        (self.phase, self.is_reset, self.opening) = (Phase::Draining, false, None);
        self.guest = Ended { receive: true, send: true };
        self.flush();
    }
}

/// The first bytes of some room.
fn cut<'a>(room: &[VolatileSlice<'a>], most: usize) -> smallvec::SmallVec<[VolatileSlice<'a>; 8]> {
    let mut left = most;
    let cut = |piece: &VolatileSlice<'a>| {
        let length = piece.len().min(left);
        left -= length;
        if length == 0 { None } else { piece.subslice(0, length).ok() }
    };
    room.iter().filter_map(cut).collect()
}

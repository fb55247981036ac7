//! All connections of a machine: takes the guest's packets, has those for the guest, and processes
//! the events of the host's sockets. On the loop's thread, or under the device's lock.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;

use event_manager::EventSet;
use vm_memory::VolatileSlice;

use super::connection::{Connection, Phase, Ports};
use super::credit::BUFFER;
use super::handshake::{self, Asked};
use super::hosts::{Hosts, UnixSocket};
use super::packet::{HOST_CID, Header, STREAM, op};
use super::socket::HostSocket;

/// How many connections a machine may have, with those that are only half made or not yet over.
pub const MAX_CONNECTIONS: usize = 512;
/// How many refusals may wait for the guest before its packets do.
pub(super) const MAX_REFUSALS: usize = 256;
/// The host's ports of connections that it requests begin here.
pub(super) const FIRST_PORT: u32 = 1 << 30;
/// How many programs are accepted at once.
const ACCEPTS: usize = 32;
/// The data of the unix socket's events. Those of connections have their number.
pub(super) const UNIX: u32 = 0;

/// See the module.
#[derive(Debug)]
pub struct Mux {
    cid: u64,
    /// Whether the guest has a driver.
    is_active: bool,
    pub(super) hosts: Hosts,
    /// Programs that have not yet said which port they want.
    pub(super) handshakes: HashMap<u32, HostSocket>,
    pub(super) connections: HashMap<u32, Connection>,
    ids: HashMap<Ports, u32>,
    /// The connections with something to send.
    ready: VecDeque<u32>,
    refusals: VecDeque<Header>,
    /// Those whose socket may have to be watched otherwise.
    pub(super) changed: Vec<u32>,
    /// Sockets to close once no loop watches them.
    pub(super) retired: Vec<HostSocket>,
    /// The process was out of descriptors: programs wait.
    pub(super) is_exhausted: bool,
    next_id: u32,
    next_port: u32,
}

impl Mux {
    /// For a guest with this address. Programs may connect by the unix socket.
    #[must_use]
    pub fn new(cid: u64, unix: Option<UnixSocket>) -> Self {
        Self {
            cid,
            is_active: false,
            hosts: Hosts::new(unix),
            handshakes: HashMap::new(),
            connections: HashMap::new(),
            ids: HashMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            changed: Vec::new(),
            retired: Vec::new(),
            is_exhausted: false,
            next_id: UNIX,
            next_port: FIRST_PORT,
        }
    }

    /// The guest's driver has started.
    pub fn start(&mut self) {
        self.is_active = true;
    }

    /// The guest's driver is gone, and all connections with it.
    pub fn reset(&mut self) {
        self.is_active = false;
        self.ids.clear();
        self.ready.clear();
        self.refusals.clear();
        let connected = self.connections.drain().filter_map(|(_, gone)| gone.socket);
        for socket in connected.chain(self.handshakes.drain().map(|(_, socket)| socket)) {
            // Its program sees the end now, whenever the loop closes it.
            socket.shut_down(libc::SHUT_RDWR);
            self.retired.push(socket);
        }
    }

    /// No loop watches the sockets any more: close them all. The unix socket is removed.
    pub fn close(&mut self) {
        self.reset();
        self.retired.clear();
        self.hosts = Hosts::new(None);
    }

    /// How many connections there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.connections.len() + self.handshakes.len()
    }

    /// Let the guest connect to a port: `listener` is an `O_PATH` descriptor of a listening unix
    /// socket.
    ///
    /// # Errors
    /// `AddrInUse` if something listens on the port.
    pub fn listen(&mut self, port: u32, listener: OwnedFd) -> io::Result<()> {
        self.hosts.listen(port, listener)
    }

    /// Undo [`Self::listen`]. Connections stay.
    pub fn unlisten(&mut self, port: u32) {
        self.hosts.unlisten(port);
    }

    /// Request a connection to a port of the guest. The program's end reads one zero byte when the
    /// guest has accepted, and the end of the file if it refuses.
    ///
    /// # Errors
    /// `ConnectionRefused` if the guest has no driver; EMFILE if there are too many connections.
    pub fn connect(&mut self, port: u32) -> io::Result<OwnedFd> {
        if !self.is_active {
            return Err(io::Error::from_raw_os_error(libc::ECONNREFUSED));
        }
        if !self.make_room() {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        let (ours, theirs) = HostSocket::pair()?;
        let id = self.new_id();
        self.request(id, port, ours, |_| vec![0]);
        Ok(theirs)
    }

    fn request(
        &mut self,
        id: u32,
        guest: u32,
        socket: HostSocket,
        greeting: impl Fn(u32) -> Vec<u8>,
    ) {
        let ports = Ports { host: self.new_port(guest), guest };
        self.insert(id, Connection::requested(ports, socket, greeting(ports.host)));
    }

    fn insert(&mut self, id: u32, connection: Connection) {
        self.ids.insert(connection.ports, id);
        self.connections.insert(id, connection);
        self.settle(id);
    }

    fn new_id(&mut self) -> u32 {
        loop {
            self.next_id = self.next_id.wrapping_add(1);
            let id = self.next_id;
            let is_used = self.connections.contains_key(&id) || self.handshakes.contains_key(&id);
            if id != UNIX && !is_used {
                return id;
            }
        }
    }

    fn new_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.ids.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.count() >= MAX_CONNECTIONS
    }

    /// Whether there is room for a connection. One whose host is gone may have to make it.
    fn make_room(&mut self) -> bool {
        if !self.is_full() {
            return true;
        }
        let found = self.connections.iter().find(|(_, connection)| connection.is_forsaken());
        let Some((id, ports)) = found.map(|(id, connection)| (*id, connection.ports)) else {
            return false;
        };
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: STREAM,
            op: op::RST,
            ..Header::default()
        };
        self.refusals.push_back(header);
        self.remove(id);
        true
    }

    fn remove(&mut self, id: u32) {
        let Some(connection) = self.connections.remove(&id) else { return };
        if self.ids.get(&connection.ports) == Some(&id) {
            self.ids.remove(&connection.ports);
        }
        self.retired.extend(connection.socket);
    }

    /// Whether the guest has to take refusals before more of its packets can be taken.
    #[must_use]
    pub fn is_congested(&self) -> bool {
        self.refusals.len() >= MAX_REFUSALS
    }

    /// A packet of the guest, and its data: as many bytes as the header says, if they are there.
    pub fn take_from_guest(&mut self, header: &Header, payload: &[VolatileSlice<'_>]) {
        self.is_exhausted = false;
        if header.src_cid != self.cid {
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != STREAM {
            return self.refuse(header);
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let known = self.ids.get(&ports).copied();
        if header.op == op::REQUEST
            && let Some(id) = known
            && self.connections.get(&id).is_some_and(Connection::is_forsaken)
        {
            // The guest has forgotten the former connection.
            self.remove(id);
            return self.accept(ports, header);
        }
        match known {
            Some(id) => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.take(header, payload);
                }
                self.settle(id);
            }
            None if header.op == op::REQUEST => self.accept(ports, header),
            None => self.refuse(header),
        }
    }

    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.refusals.push_back(header.refusal());
        }
    }

    fn accept(&mut self, ports: Ports, header: &Header) {
        let socket = if self.make_room() { self.hosts.connect(ports.host) } else { None };
        let Some(socket) = socket else { return self.refuse(header) };
        let id = self.new_id();
        self.insert(id, Connection::accepted(ports, socket, header));
    }

    /// Whether there may be a packet for the guest.
    #[must_use]
    pub fn has_packets(&self) -> bool {
        !self.refusals.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest. Its data is put into `room`, which is not empty.
    pub fn give_to_guest(&mut self, room: &[VolatileSlice<'_>]) -> Option<Header> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(refusal);
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.is_queued = false;
            let Some((op, flags, len)) = connection.next(room) else {
                self.look_after(id);
                continue;
            };
            let header = Header {
                src_cid: HOST_CID,
                dst_cid: self.cid,
                src_port: connection.ports.host,
                dst_port: connection.ports.guest,
                len,
                kind: STREAM,
                op,
                flags,
                buf_alloc: BUFFER,
                fwd_cnt: connection.tell_credit(),
            };
            if op == op::RST {
                connection.end();
            }
            self.settle(id);
            return Some(header);
        }
        None
    }

    /// A connection has changed: it may be over, or have something to send.
    fn settle(&mut self, id: u32) {
        self.look_after(id);
        if let Some(connection) = self.connections.get_mut(&id)
            && connection.has_packets()
            && !std::mem::replace(&mut connection.is_queued, true)
        {
            self.ready.push_back(id);
        }
    }

    /// Remove a connection that is over, and have its socket watched for what it needs.
    fn look_after(&mut self, id: u32) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.is_over() {
            return self.remove(id);
        }
        if connection.phase == Phase::Draining && self.ids.get(&connection.ports) == Some(&id) {
            self.ids.remove(&connection.ports);
        }
        if connection.phase == Phase::Established && connection.is_forsaken() {
            self.retired.extend(connection.socket.take());
        }
        let wanted = Some(connection.wants_room());
        if connection.socket.as_ref().is_some_and(|socket| socket.watched != wanted) {
            self.changed.push(id);
        }
    }

    /// A watched socket is ready.
    pub fn process_event(&mut self, data: u32, events: EventSet) {
        if data == UNIX {
            return self.accept_programs();
        }
        self.is_exhausted = false;
        let is_hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let is_ending = is_hung_up || events.contains(EventSet::READ_HANG_UP);
        if self.handshakes.contains_key(&data) {
            return self.shake_hands(data, is_ending);
        }
        if let Some(connection) = self.connections.get_mut(&data) {
            connection.ready(events.contains(EventSet::IN) || is_ending, is_ending, is_hung_up);
            self.settle(data);
        }
    }

    fn accept_programs(&mut self) {
        for _ in 0..ACCEPTS {
            let Some(unix) = self.hosts.unix.as_ref().filter(|_| !self.is_full()) else { return };
            match unix.accept() {
                Ok(socket) => {
                    let id = self.new_id();
                    self.handshakes.insert(id, socket);
                    self.changed.push(id);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.is_exhausted = true;
                    return;
                }
            }
        }
    }

    fn shake_hands(&mut self, id: u32, is_ending: bool) {
        let Some(asked) = self.handshakes.get(&id).map(handshake::read) else { return };
        if asked == Asked::Unfinished && !is_ending {
            return;
        }
        let Some(socket) = self.handshakes.remove(&id) else { return };
        match asked {
            Asked::Port(port) if self.is_active => {
                self.request(id, port, socket, handshake::answer);
                if is_ending && let Some(connection) = self.connections.get_mut(&id) {
                    connection.ready(true, true, false);
                }
            }
            _ => self.retired.push(socket),
        }
    }
}

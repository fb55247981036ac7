//! One TCP connection: smoltcp's socket towards the guest, a socket of the host's world, and the
//! bytes between them. Data waits in two buffers of a fixed size: what does not fit stays with its
//! sender.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{IpListenEndpoint, IpProtocol, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber};

use super::core::Core;
use super::frame::{End, ipv4};
use super::host::{Ready, reset_when_closed};
use super::timers::Token;

/// The size of each of the two buffers.
const BUFFER: usize = 256 * 1024;
/// How long a forwarded connection waits for the guest's answer.
const PATIENCE: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(30);

/// A connection without traffic is probed after this time.
const KEEP_ALIVE: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(60);

/// Both ends, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) guest: End,
    pub(super) remote: End,
}

/// A connection in which data may flow.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    /// The stream may have something to read; room to write.
    ready: Ready,
    /// Nothing more comes from the host's side.
    host_ended: bool,
    /// The stream has been told that nothing more comes from the guest.
    guest_ended: bool,
    /// The guest has not just ended its half, but reset the connection.
    is_reset: bool,
    /// The sequence number that the guest expects next, as it has said last.
    pub(super) acknowledged: u32,
}

impl Connection {
    /// Answer the guest's SYN, which is `packet`. None if it is not a proper one.
    pub(super) fn accept(
        key: Key,
        packet: &[u8],
        stream: TcpStream,
        core: &mut Core,
    ) -> Option<Self> {
        let mut socket = new_socket();
        let (address, port) = key.remote;
        let local = IpListenEndpoint { addr: Some(address.into()), port };
        socket.listen(local).ok()?;
        let mut this = Self::new(stream, socket);
        this.input(packet, core);
        (this.socket().state() == State::SynReceived).then_some(this)
    }

    /// Connect to the guest, from `remote`.
    pub(super) fn connect(key: Key, stream: TcpStream, core: &mut Core) -> Option<Self> {
        let mut socket = new_socket();
        socket.set_timeout(Some(PATIENCE));
        socket.connect(core.stack.context(), key.guest, key.remote).ok()?;
        Some(Self::new(stream, socket))
    }

    fn new(stream: TcpStream, socket: Socket<'static>) -> Self {
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        let ready = Ready { readable: true, writable: true, ended: false };
        Self {
            stream,
            sockets,
            handle,
            ready,
            host_ended: false,
            guest_ended: false,
            is_reset: false,
            acknowledged: 0,
        }
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    pub(super) fn set_ready(&mut self, ready: Ready) {
        self.ready.readable |= ready.readable;
        self.ready.writable |= ready.writable;
        self.ready.ended |= ready.ended;
    }

    /// A packet of the guest.
    pub(super) fn input(&mut self, packet: &[u8], core: &mut Core) {
        let before = self.socket().state();
        let now = core.now;
        let (stack, port) = core.parts();
        stack.ingress(now, packet, &mut self.sockets, port);
        let after = self.socket().state();
        let is_closed = matches!(after, State::Closed | State::Listen);
        let was_ending = matches!(before, State::LastAck | State::Closing | State::TimeWait);
        if is_closed && after != before && !was_ending {
            self.is_reset = true;
        }
        if before == State::SynSent && after == State::Established {
            self.socket().set_timeout(None);
        }
    }

    /// Move what can be moved, both ways. False: the connection is over.
    pub(super) fn serve(&mut self, token: Token, core: &mut Core) -> bool {
        self.read_host();
        self.write_host();
        let now = core.now;
        while {
            let (stack, port) = core.parts();
            stack.egress(now, &mut self.sockets, port)
        } {}
        if self.is_over() {
            self.finish();
            return false;
        }
        if core.outbox.is_busy() {
            core.stalled.insert(token);
            core.timers.set(token, None);
        } else {
            let next = core.stack.next(now, &self.sockets);
            core.timers.set(token, next);
        }
        true
    }

    fn read_host(&mut self) {
        let socket = self.sockets.get_mut::<Socket<'static>>(self.handle);
        while self.ready.readable && !self.host_ended && socket.can_send() {
            let mut stream = &self.stream;
            let result = socket.send(|buffer| match stream.read(buffer) {
                Ok(count) => (count, Ok((count, buffer.len()))),
                Err(e) => (0, Err(e)),
            });
            match result {
                Ok(Ok((0, _))) => self.host_ended = true,
                // Less than asked for: there is no more, unless the end is near.
                Ok(Ok((count, room))) => self.ready.readable = count == room || self.ready.ended,
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => self.ready.readable = false,
                Ok(Err(_)) | Err(_) => {
                    (self.host_ended, self.guest_ended) = (true, true);
                    socket.abort();
                }
            }
        }
        if self.host_ended {
            socket.close();
        }
    }

    fn write_host(&mut self) {
        let socket = self.sockets.get_mut::<Socket<'static>>(self.handle);
        while self.ready.writable && !self.guest_ended && socket.can_recv() {
            let mut stream = &self.stream;
            let result = socket.recv(|buffer| match stream.write(buffer) {
                Ok(count) => (count, Ok(())),
                Err(e) => (0, Err(e)),
            });
            match result {
                Ok(Ok(())) => {}
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => self.ready.writable = false,
                Ok(Err(_)) | Err(_) => {
                    (self.host_ended, self.guest_ended) = (true, true);
                    socket.abort();
                }
            }
        }
        let is_finished = matches!(
            socket.state(),
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait | State::Closed
        );
        if is_finished && !socket.can_recv() && !self.guest_ended && !self.is_reset {
            self.guest_ended = true;
            // Fails if the peer has gone: then there is nobody to tell.
            let _ = self.stream.shutdown(std::net::Shutdown::Write);
        }
    }

    fn is_over(&mut self) -> bool {
        let (is_reset, guest_ended) = (self.is_reset, self.guest_ended);
        let socket = self.socket();
        match socket.state() {
            State::Listen => true,
            // The connection has no remote end any more when the last segment has been sent.
            State::Closed => {
                socket.remote_endpoint().is_none()
                    && (is_reset || guest_ended || !socket.can_recv())
            }
            // The guest's FIN has been acknowledged, unless the outbox is busy; then the guest
            // repeats it and gets a reset, which harms nothing: all data has arrived.
            State::TimeWait => guest_ended,
            _ => false,
        }
    }

    /// Whatever did not end in order ends with a reset for the peer.
    fn finish(&mut self) {
        if self.is_reset || !self.host_ended || !self.guest_ended {
            reset_when_closed(&self.stream);
        }
    }

    /// End both sides at once. The peer sees a reset, and the guest if there is room.
    pub(super) fn abort(&mut self, core: &mut Core) {
        self.is_reset = true;
        self.socket().abort();
        let now = core.now;
        let (stack, port) = core.parts();
        stack.egress(now, &mut self.sockets, port);
        self.finish();
    }
}

fn new_socket() -> Socket<'static> {
    let buffer = || SocketBuffer::new(vec![0; BUFFER]);
    let mut socket = Socket::new(buffer(), buffer());
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    // A guest that has started anew answers with a reset.
    socket.set_keep_alive(Some(KEEP_ALIVE));
    socket
}

/// The segment that ends a connection of the guest.
pub(super) fn reset_segment(key: Key, sequence: u32) -> Vec<u8> {
    let repr = TcpRepr {
        src_port: key.remote.1,
        dst_port: key.guest.1,
        control: TcpControl::Rst,
        seq_number: TcpSeqNumber(sequence.cast_signed()),
        ack_number: None,
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let mut bytes = vec![0; repr.buffer_len()];
    let (from, to) = (key.remote.0, key.guest.0);
    let checks = ChecksumCapabilities::default();
    repr.emit(&mut TcpPacket::new_unchecked(&mut bytes[..]), &from.into(), &to.into(), &checks);
    ipv4(from, to, IpProtocol::Tcp, &bytes)
}

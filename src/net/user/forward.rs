//! Ports of the host that lead to the guest. A TCP connection becomes one from the gateway; a UDP
//! peer becomes a port of the gateway, for as long as it is in use.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::config::Forward;
use super::core::Core;
use super::frame::{End, udp};
use super::rules::Protocol;
use super::tcp_table::TcpTable;
use super::timers::Token;
use super::udp::Datagram;
use crate::error::{Error, ErrorKind, Result};

/// A peer's port is given to another one after this time without a datagram.
const IDLE: Duration = Duration::from_secs(60);
/// Peers of one forwarded UDP port.
const PEERS: usize = 64;
/// What one socket accepts or receives in a turn.
const TURN: usize = 64;
const DATAGRAM: usize = 65_536;
/// Below the ports of connections, which are of TCP anyway.
const FIRST_PORT: u16 = 32_768;

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

#[derive(Debug)]
struct Peer {
    address: SocketAddr,
    used: Instant,
}

#[derive(Debug)]
struct Port {
    socket: Socket,
    guest_port: u16,
    /// By the port of the gateway.
    peers: HashMap<u16, Peer>,
}

/// The forwarded ports.
#[derive(Debug, Default)]
pub(super) struct Forwards {
    ports: Vec<Port>,
    next_port: u16,
    ident: u16,
}

impl Forwards {
    /// Listen at every configured port.
    pub(super) fn open(core: &Core) -> Result<Self> {
        let mut ports = Vec::new();
        for (index, forward) in core.config.forwards.iter().enumerate() {
            let port = bind(forward).and_then(|port| {
                let token = Token::Forward(u64::try_from(index).unwrap_or_default());
                core.watch.add(port.fd(), token)?;
                Ok(port)
            });
            ports.push(port.map_err(|e| {
                let at = format!("forward[{index}]");
                let host = forward.host;
                Error::new(ErrorKind::Io, at, format!("cannot listen at {host}: {e}"))
            })?);
        }
        Ok(Self { ports, next_port: FIRST_PORT, ident: 0 })
    }

    /// The forwards with the addresses that the sockets really have.
    pub(super) fn list(&self) -> Vec<Forward> {
        self.ports.iter().filter_map(Port::describe).collect()
    }

    /// A socket is ready.
    pub(super) fn ready(&mut self, index: u64, tcp: &mut TcpTable, core: &mut Core) {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let Some(port) = self.ports.get_mut(index) else { return };
        let guest = (core.config.guest, port.guest_port);
        let token = Token::Forward(u64::try_from(index).unwrap_or_default());
        if let Socket::Tcp(listener) = &port.socket {
            for _ in 0..TURN {
                match listener.accept() {
                    Ok((stream, _)) if prepare(&stream).is_ok() => tcp.forward(stream, guest, core),
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                    // No descriptors, for example: again a little later.
                    Err(_) => {
                        let later = core.now + Duration::from_millis(100);
                        return core.timers.set(token, Some(later));
                    }
                }
            }
            core.stalled.insert(token);
            return;
        }
        self.receive(index, guest, token, core);
    }

    fn receive(&mut self, index: usize, guest: End, token: Token, core: &mut Core) {
        let mut buffer = vec![0; DATAGRAM];
        for _ in 0..TURN {
            if core.outbox.is_busy() {
                break;
            }
            let Some(port) = self.ports.get_mut(index) else { return };
            let Socket::Udp(socket) = &port.socket else { return };
            match socket.recv_from(&mut buffer) {
                Ok((count, address)) => {
                    let from = (core.config.gateway, self.port_of(index, address, core.now));
                    self.ident = self.ident.wrapping_add(1);
                    let payload = buffer.get(..count).unwrap_or_default();
                    let mtu = usize::from(core.mtu);
                    for packet in udp(from, guest, payload, mtu, self.ident) {
                        core.send(&packet);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // An earlier datagram has not arrived: the guest is not told.
                Err(_) => {}
            }
        }
        core.stalled.insert(token);
    }

    fn port_of(&mut self, index: usize, address: SocketAddr, now: Instant) -> u16 {
        let taken = |port: u16, ports: &[Port]| ports.iter().any(|p| p.peers.contains_key(&port));
        while taken(self.next_port, &self.ports) || self.next_port < FIRST_PORT {
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
        }
        let free = self.next_port;
        let Some(port) = self.ports.get_mut(index) else { return free };
        let known = port.peers.iter_mut().find(|(_, peer)| peer.address == address);
        if let Some((number, peer)) = known {
            peer.used = now;
            return *number;
        }
        port.peers.retain(|_, peer| now.saturating_duration_since(peer.used) < IDLE);
        if port.peers.len() >= PEERS {
            let oldest = port.peers.iter().min_by_key(|(_, peer)| peer.used).map(|(n, _)| *n);
            port.peers.remove(&oldest.unwrap_or_default());
        }
        port.peers.insert(free, Peer { address, used: now });
        free
    }

    /// Whether a datagram of the guest answers one that came through a forwarded port.
    pub(super) fn answer(&mut self, datagram: Datagram<'_>, core: &Core) -> bool {
        if datagram.to.0 != core.config.gateway || datagram.from.0 != core.config.guest {
            return false;
        }
        for port in &mut self.ports {
            let Socket::Udp(socket) = &port.socket else { continue };
            if port.guest_port == datagram.from.1
                && let Some(peer) = port.peers.get_mut(&datagram.to.1)
            {
                peer.used = core.now;
                // As on any link, it may be lost.
                let _ = socket.send_to(datagram.payload, peer.address);
                return true;
            }
        }
        false
    }

    pub(super) fn clear(&mut self) {
        for port in &mut self.ports {
            port.peers.clear();
        }
    }
}

impl Port {
    fn fd(&self) -> std::os::fd::RawFd {
        match &self.socket {
            Socket::Tcp(socket) => socket.as_raw_fd(),
            Socket::Udp(socket) => socket.as_raw_fd(),
        }
    }

    fn describe(&self) -> Option<Forward> {
        let (protocol, host) = match &self.socket {
            Socket::Tcp(socket) => (Protocol::Tcp, socket.local_addr()),
            Socket::Udp(socket) => (Protocol::Udp, socket.local_addr()),
        };
        Some(Forward { protocol, host: host.ok()?, guest_port: self.guest_port })
    }
}

fn bind(forward: &Forward) -> io::Result<Port> {
    let socket = match forward.protocol {
        Protocol::Tcp => {
            let listener = TcpListener::bind(forward.host)?;
            listener.set_nonblocking(true)?;
            Socket::Tcp(listener)
        }
        Protocol::Udp => {
            let socket = UdpSocket::bind(forward.host)?;
            socket.set_nonblocking(true)?;
            Socket::Udp(socket)
        }
    };
    Ok(Port { socket, guest_port: forward.guest_port, peers: HashMap::new() })
}

fn prepare(stream: &std::net::TcpStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)
}

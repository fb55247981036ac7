//! Sockets of the host that never wait, and the epoll set that watches them, edge-triggered.

use std::io;
use std::mem::size_of;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::timers::Token;

/// What became ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ready {
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// The peer sends no more, or there is an error.
    pub(super) ended: bool,
}

/// The epoll set of a user network.
pub(super) struct Watch(Epoll);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Watch({})", self.0.as_raw_fd())
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Watch {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Epoll::new()?))
    }

    /// Watch a socket until it is closed.
    pub(super) fn add(&self, fd: RawFd, token: Token) -> io::Result<()> {
        let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.0.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token.bits()))
    }

    /// Watch a timer.
    pub(super) fn add_timer(&self, fd: RawFd, token: Token) -> io::Result<()> {
        self.0.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token.bits()))
    }

    /// What became ready since the last call. It does not wait.
    pub(super) fn ready(&self, found: &mut Vec<(Token, Ready)>) {
        found.clear();
        let mut events = [EpollEvent::default(); 64];
        // Fails only if a signal arrives: the set is ready still, and the loop comes again.
        let count = self.0.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(count) {
            let set = event.event_set();
            let ended =
                set.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR);
            let ready = Ready {
                readable: ended || set.contains(EventSet::IN),
                writable: ended || set.contains(EventSet::OUT),
                ended,
            };
            found.push((Token::from_bits(event.data()), ready));
        }
    }
}

/// Begin a TCP connection. When it is made or has failed, the socket is writable.
pub(super) fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers; the result is checked.
    let fd = unsafe { libc::socket(family, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this number, and nothing else knows it.
    let stream = TcpStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    // A small segment of the guest goes out at once, as it would from its own socket.
    stream.set_nodelay(true)?;
    let result = match to {
        SocketAddr::V4(to) => connect_raw(fd, &address_v4(to), family),
        SocketAddr::V6(to) => connect_raw(fd, &address_v6(to), family),
    };
    match result {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(e),
        _ => Ok(stream),
    }
}

fn address_v4(to: std::net::SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default(),
        sin_port: to.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(to.ip().octets()) },
        sin_zero: [0; 8],
    }
}

fn address_v6(to: std::net::SocketAddrV6) -> libc::sockaddr_in6 {
    libc::sockaddr_in6 {
        sin6_family: libc::sa_family_t::try_from(libc::AF_INET6).unwrap_or_default(),
        sin6_port: to.port().to_be(),
        sin6_flowinfo: to.flowinfo(),
        sin6_addr: libc::in6_addr { s6_addr: to.ip().octets() },
        sin6_scope_id: to.scope_id(),
    }
}

/// `T` is the address structure of `family`.
fn connect_raw<T>(fd: RawFd, address: &T, _family: i32) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<T>()).unwrap_or_default();
    // SAFETY: the address is alive for the call, and `length` is its size.
    match unsafe { libc::connect(fd, std::ptr::from_ref(address).cast(), length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Have the peer see a reset when this socket is closed.
pub(super) fn reset_when_closed(stream: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let length = libc::socklen_t::try_from(size_of::<libc::linger>()).unwrap_or_default();
    let value = (&raw const linger).cast();
    // SAFETY: the structure is alive for the call, and `length` is its size. Fails only for a
    // descriptor that is no socket.
    unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, value, length);
    }
}

/// A UDP socket that sends to and receives from one peer only.
pub(super) fn udp_to(to: SocketAddr) -> io::Result<UdpSocket> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_nonblocking(true)?;
    socket.connect(to)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_connection_is_made_without_waiting_and_its_end_is_seen() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let mut stream = connect(listener.local_addr().unwrap()).unwrap();
            let (mut peer, _) = listener.accept().unwrap();
            let watch = Watch::new().unwrap();
            let token = Token::Tcp(7);
            watch.add(stream.as_raw_fd(), token).unwrap();
            stream.write_all(b"x").unwrap();
            peer.read_exact(&mut [0]).unwrap();
            let mut found = Vec::new();
            watch.ready(&mut found);
            let writable = Ready { readable: false, writable: true, ended: false };
            assert_eq!(found, [(token, writable)]);
            drop(peer);
            watch.ready(&mut found);
            assert!(found[0].1.ended && found[0].1.readable);
        }
    }

    #[test]
    fn a_reset_is_what_the_peer_sees_if_asked_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        reset_when_closed(&stream);
        drop(stream);
        let error = peer.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}

//! What the backends over sockets share: calls that never wait, whatever the descriptor's mode. Any
//! thread.

use std::io;
use std::net::{TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// Most of a connection's time limit: a host that does not answer is an error after this.
const CONNECT: Duration = Duration::from_secs(10);
/// Room for a burst in each direction. The kernel gives what its limits allow.
const BUFFER: libc::c_int = 1 << 20;

/// Where a socket's peer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A unix socket.
    Path(PathBuf),
    /// An address and port of TCP or UDP.
    Address(String, u16),
}

fn failed(at: &str, error: &io::Error) -> Error {
    Error::os(ErrorKind::Io, at, error)
}

/// Connect a stream.
///
/// # Errors
/// If there is no such peer, or it does not answer within ten seconds.
pub(super) fn connect_stream(peer: &Peer) -> Result<OwnedFd> {
    match peer {
        Peer::Path(path) => {
            let stream = UnixStream::connect(path);
            stream.map(OwnedFd::from).map_err(|e| failed(&path.to_string_lossy(), &e))
        }
        Peer::Address(host, port) => {
            let at = format!("{host}:{port}");
            let mut last = io::Error::from_raw_os_error(libc::EHOSTUNREACH);
            let all = (host.as_str(), *port).to_socket_addrs().map_err(|e| failed(&at, &e))?;
            for address in all {
                match TcpStream::connect_timeout(&address, CONNECT) {
                    Ok(stream) => {
                        // Fails for no TCP socket.
                        let _ = stream.set_nodelay(true);
                        return Ok(stream.into());
                    }
                    Err(error) => last = error,
                }
            }
            Err(failed(&at, &last))
        }
    }
}

/// A datagram socket at `own`, whose peer is `peer`.
///
/// # Errors
/// If there is no such peer, or the own address cannot be used.
pub(super) fn connect_datagram(own: Option<&Peer>, peer: &Peer) -> Result<OwnedFd> {
    match peer {
        Peer::Path(path) => {
            let socket = match own {
                Some(Peer::Path(own)) => bind(own),
                _ => UnixDatagram::unbound(),
            };
            let socket = socket.map_err(|e| failed("socket", &e))?;
            socket.connect(path).map_err(|e| failed(&path.to_string_lossy(), &e))?;
            Ok(socket.into())
        }
        Peer::Address(host, port) => {
            let at = format!("{host}:{port}");
            let local = match own {
                Some(Peer::Address(host, port)) => (host.as_str(), *port),
                _ if host.contains(':') => ("::", 0),
                _ => ("0.0.0.0", 0),
            };
            let socket = UdpSocket::bind(local).map_err(|e| failed("socket", &e))?;
            socket.connect((host.as_str(), *port)).map_err(|e| failed(&at, &e))?;
            Ok(socket.into())
        }
    }
}

/// What an earlier socket has left at the path is replaced, as a socket in use cannot be told from
/// it; anything that is no socket is not.
fn bind(path: &Path) -> io::Result<UnixDatagram> {
    use std::os::unix::fs::FileTypeExt;
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        std::fs::remove_file(path)?;
    }
    UnixDatagram::bind(path)
}

/// An option of a socket that is a number.
pub(super) fn option(fd: RawFd, name: libc::c_int) -> io::Result<libc::c_int> {
    let (mut value, mut length) = (0 as libc::c_int, 4 as libc::socklen_t);
    let place = (&raw mut value).cast();
    // SAFETY: the value and its length are locals.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, place, &raw mut length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Check the kind of a socket, and give it room for bursts.
///
/// # Errors
/// [`ErrorKind::Config`] if it is no such socket, or has no peer.
pub(super) fn prepare(socket: &OwnedFd, kinds: &[libc::c_int], what: &str) -> Result<()> {
    let fd = socket.as_raw_fd();
    let wrong = |detail: String| Error::new(ErrorKind::Config, "socket", detail);
    match option(fd, libc::SO_TYPE) {
        Ok(kind) if kinds.contains(&kind) => {}
        Ok(_) => return Err(wrong(format!("it is not a {what} socket"))),
        Err(error) => return Err(wrong(format!("it is not a socket: {error}"))),
    }
    let mut address = [0u64; 16];
    let mut length: libc::socklen_t = 128;
    let place = address.as_mut_ptr().cast();
    // SAFETY: the address has room for 128 bytes.
    if unsafe { libc::getpeername(fd, place, &raw mut length) } < 0 {
        return Err(wrong("it is not connected".into()));
    }
    for name in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
        if option(fd, name).is_ok_and(|size| size < BUFFER) {
            let (size, length) = (BUFFER, 4);
            let value = (&raw const size).cast();
            // SAFETY: the value is a local. It fails for no socket.
            let _ = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, name, value, length) };
        }
    }
    Ok(())
}

/// The result of a system call that returns a count or -1.
pub(super) fn counted(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// A part of a message, for system calls that only read it.
pub(super) fn part(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_another_kind_and_those_without_peer_are_refused() {
        let (one, _other) = UnixStream::pair().unwrap();
        let one = OwnedFd::from(one);
        assert!(prepare(&one, &[libc::SOCK_STREAM], "stream").is_ok());
        let error = prepare(&one, &[libc::SOCK_DGRAM], "datagram").unwrap_err();
        assert_eq!(error.to_string(), "socket: it is not a datagram socket");
        let alone = OwnedFd::from(UnixDatagram::unbound().unwrap());
        let error = prepare(&alone, &[libc::SOCK_DGRAM], "datagram").unwrap_err();
        assert_eq!(error.to_string(), "socket: it is not connected");
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(prepare(&file, &[libc::SOCK_DGRAM], "datagram").is_err());
    }

    #[test]
    fn a_peer_that_is_not_there_is_an_error_with_its_place() {
        let error = connect_stream(&Peer::Path("/nonexistent/socket".into())).unwrap_err();
        assert!(error.to_string().starts_with("/nonexistent/socket: "), "{error}");
        assert_eq!(error.errno, Some(libc::ENOENT));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let error = connect_stream(&Peer::Address("127.0.0.1".into(), port)).unwrap_err();
        assert_eq!(error.errno, Some(libc::ECONNREFUSED));
    }

    #[test]
    fn two_datagram_sockets_at_paths_have_each_other_as_peer() {
        let folder = std::env::temp_dir().join(format!("pyvmm-net-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (one, other) = (folder.join("one"), folder.join("other"));
        let first = UnixDatagram::bind(&one).unwrap();
        let second = connect_datagram(Some(&Peer::Path(other.clone())), &Peer::Path(one.clone()));
        let second = UnixDatagram::from(second.unwrap());
        first.connect(&other).unwrap();
        first.send(b"frame").unwrap();
        let mut bytes = [0; 8];
        assert_eq!(second.recv(&mut bytes).unwrap(), 5);
        // A socket that was left behind is replaced; a file is not.
        drop(second);
        let third = folder.join("third");
        let _third = UnixDatagram::bind(&third).unwrap();
        let third = Peer::Path(third);
        connect_datagram(Some(&Peer::Path(other)), &third).unwrap();
        let file = folder.join("file");
        std::fs::write(&file, "text").unwrap();
        assert!(connect_datagram(Some(&Peer::Path(file)), &third).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

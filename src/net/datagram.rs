//! Frames over a datagram socket, one in each message: as QEMU's `-netdev dgram` has it. On the
//! loop's thread.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::backend::{Frame, NetBackend, Watched};
use super::ending::Ending;
use super::socket::{Peer, connect_datagram, counted, option, part, prepare};
use crate::error::Result;
use crate::sync::{Mutex, rank};

/// Messages of one system call.
const BATCH: usize = 64;
/// Room for each, so that no frame is cut off.
const ROOM: usize = Frame::LONGEST + 1;

/// Messages that were received, and those of them that were given.
#[derive(Default)]
struct Incoming {
    /// Room for a batch; only what frames need of it is ever touched.
    bytes: Vec<u8>,
    lengths: Vec<usize>,
    given: usize,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} messages", self.given, self.lengths.len())
    }
}

/// See the module.
#[derive(Debug)]
pub struct DatagramSocket {
    socket: OwnedFd,
    description: String,
    /// Whether the peer is a process of this host, whose end is the end of the connection.
    is_local: bool,
    incoming: Mutex<Incoming, rank::NetBackend>,
    ending: Ending,
}

impl DatagramSocket {
    /// Over a connected socket, of datagrams or packets.
    ///
    /// # Errors
    /// If it is not a connected datagram socket.
    pub fn new(socket: OwnedFd) -> Result<Arc<Self>> {
        let description = format!("datagram socket {}", socket.as_raw_fd());
        Self::over(socket, description)
    }

    /// At an address of its own, connected to a peer.
    ///
    /// # Errors
    /// If there is no such peer, or the own address cannot be used.
    pub fn connect(own: Option<&Peer>, peer: &Peer) -> Result<Arc<Self>> {
        let description = match peer {
            Peer::Path(path) => format!("datagram {}", path.display()),
            Peer::Address(host, port) => format!("datagram {host}:{port}"),
        };
        Self::over(connect_datagram(own, peer)?, description)
    }

    fn over(socket: OwnedFd, description: String) -> Result<Arc<Self>> {
        prepare(&socket, &[libc::SOCK_DGRAM, libc::SOCK_SEQPACKET], "datagram")?;
        let is_local =
            option(socket.as_raw_fd(), libc::SO_DOMAIN).is_ok_and(|domain| domain == libc::AF_UNIX);
        let (incoming, ending) = (Mutex::default(), Ending::default());
        Ok(Arc::new(Self { socket, description, is_local, incoming, ending }))
    }

    /// Send a batch. Returns how many were taken.
    fn send_batch(&self, frames: &[Frame<'_>]) -> io::Result<usize> {
        let mut parts =
            [const { libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 } }; BATCH];
        parts.iter_mut().zip(frames).for_each(|(to, frame)| *to = part(frame.bytes));
        let mut messages = messages(&mut parts);
        let count = u32::try_from(frames.len().min(BATCH)).unwrap_or(0);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let fd = self.socket.as_raw_fd();
        // SAFETY: at least `count` messages, whose parts are slices that live through the call,
        // which reads them.
        let sent = unsafe { libc::sendmmsg(fd, messages.as_mut_ptr(), count, flags as _) };
        match counted(isize::try_from(sent).unwrap_or(-1)) {
            // A frame that is too long for the socket, or for which the kernel has no memory.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::ENOMEM)) => {
                self.ending.drop(1);
                Ok(1)
            }
            // Nobody is there yet, or any more. Over a network, that may change.
            Err(error)
                if !self.is_local
                    && error.raw_os_error().is_some_and(|errno| {
                        [libc::ECONNREFUSED, libc::EHOSTUNREACH, libc::ENETUNREACH].contains(&errno)
                    }) =>
            {
                self.ending.drop(1);
                Ok(1)
            }
            other => other,
        }
    }

    fn send_all(&self, frames: &[Frame<'_>]) -> io::Result<usize> {
        let mut taken = 0;
        while let Some(left) = frames.get(taken..).filter(|left| !left.is_empty()) {
            match self.send_batch(left) {
                Ok(count) => taken += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock
                        || error.raw_os_error() == Some(libc::ENOBUFS) =>
                {
                    return Ok(taken);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(taken)
    }

    /// Receive a batch. False if there is nothing now.
    fn fill(&self, incoming: &mut Incoming) -> io::Result<bool> {
        incoming.lengths.clear();
        incoming.given = 0;
        if incoming.bytes.is_empty() {
            incoming.bytes = vec![0; BATCH * ROOM];
        }
        let mut parts =
            [const { libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 } }; BATCH];
        for (to, room) in parts.iter_mut().zip(incoming.bytes.chunks_exact_mut(ROOM)) {
            *to = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: ROOM };
        }
        let mut messages = messages(&mut parts);
        let count = u32::try_from(BATCH).unwrap_or(0);
        let (fd, flags) = (self.socket.as_raw_fd(), libc::MSG_DONTWAIT);
        let no_limit = std::ptr::null_mut();
        // SAFETY: `BATCH` messages, each with its room in `bytes`, which lives through the call.
        let received =
            unsafe { libc::recvmmsg(fd, messages.as_mut_ptr(), count, flags as _, no_limit) };
        match counted(isize::try_from(received).unwrap_or(-1)) {
            Ok(count) => {
                let lengths = messages.iter().take(count).map(|message| message.msg_len);
                incoming.lengths.extend(lengths.map(|length| usize::try_from(length).unwrap_or(0)));
                Ok(true)
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN) => Ok(false),
                Some(libc::EINTR) => Ok(true),
                // An answer to what was sent: nobody was there.
                Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH)
                    if !self.is_local =>
                {
                    Ok(true)
                }
                _ => Err(error),
            },
        }
    }

    fn receive_all(
        &self,
        incoming: &mut Incoming,
        budget: usize,
        into: &mut dyn FnMut(Frame<'_>) -> bool,
    ) -> io::Result<()> {
        let mut given = 0;
        loop {
            while let Some(&length) = incoming.lengths.get(incoming.given) {
                let start = incoming.given * ROOM;
                let frame = incoming.bytes.get(start..start + length).unwrap_or_default();
                if length == 0 && self.is_local && self.is_packets() {
                    let detail = "the peer has closed it";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, detail));
                }
                if !into(Frame::complete(frame)) {
                    return Ok(());
                }
                incoming.given += 1;
                given += 1;
            }
            if given >= budget || !self.fill(incoming)? {
                return Ok(());
            }
        }
    }

    /// An empty packet is the end; an empty datagram is a datagram.
    fn is_packets(&self) -> bool {
        option(self.socket.as_raw_fd(), libc::SO_TYPE)
            .is_ok_and(|kind| kind == libc::SOCK_SEQPACKET)
    }
}

/// A message for each part.
fn messages(parts: &mut [libc::iovec; BATCH]) -> [libc::mmsghdr; BATCH] {
    // SAFETY: messages without names, all of whose fields may be zero.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
    for (message, part) in messages.iter_mut().zip(parts) {
        (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (part, 1);
    }
    messages
}

impl NetBackend for DatagramSocket {
    fn watched(&self) -> Watched {
        let fd = self.socket.as_raw_fd();
        Watched { receive: fd, send: fd }
    }

    fn send(&self, frames: &[Frame<'_>]) -> usize {
        if self.ending.drops(frames.len()) {
            return frames.len();
        }
        self.send_all(frames).unwrap_or_else(|error| {
            self.ending.end(&error);
            frames.len()
        })
    }

    fn receive(&self, budget: usize, into: &mut dyn FnMut(Frame<'_>) -> bool) {
        let mut incoming = self.incoming.lock();
        if self.ending.reason().is_some() {
            return;
        }
        if let Err(error) = self.receive_all(&mut incoming, budget, into) {
            self.ending.end(&error);
        }
    }

    fn failure(&self) -> Option<String> {
        self.ending.reason()
    }

    fn dropped(&self) -> u64 {
        self.ending.dropped()
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    fn pair() -> (Arc<DatagramSocket>, UnixDatagram) {
        let (own, peer) = UnixDatagram::pair().unwrap();
        (DatagramSocket::new(own.into()).unwrap(), peer)
    }

    fn received(net: &DatagramSocket, room: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        net.receive(1000, &mut |frame| {
            if frames.len() < room {
                frames.push(frame.bytes.to_vec());
                return true;
            }
            false
        });
        frames
    }

    #[test]
    fn frames_are_messages_in_both_directions() {
        let (net, peer) = pair();
        peer.set_nonblocking(true).unwrap();
        let long = vec![9; Frame::LONGEST];
        assert_eq!(net.send(&[Frame::complete(&[1; 14]), Frame::complete(&long)]), 2);
        let mut bytes = vec![0; 70_000];
        assert_eq!(peer.recv(&mut bytes).unwrap(), 14);
        assert_eq!(peer.recv(&mut bytes).unwrap(), Frame::LONGEST);
        peer.send(&[1; 20]).unwrap();
        peer.send(&long).unwrap();
        peer.send(&[2; 20]).unwrap();
        assert_eq!(received(&net, 1), [vec![1; 20]]);
        assert_eq!(received(&net, 9), [long, vec![2; 20]], "what had no room comes again");
    }

    #[test]
    fn a_slow_peer_makes_it_full_and_loses_nothing() {
        let (net, peer) = pair();
        let frames: Vec<[u8; 1500]> = (0..200).map(|n| [n; 1500]).collect();
        let frames: Vec<_> = frames.iter().map(|bytes| Frame::complete(bytes)).collect();
        let (mut sent, mut bytes) = (0, [0; 2000]);
        let mut expected = 0;
        while sent < frames.len() {
            sent += net.send(&frames[sent..]);
            while expected < sent {
                assert_eq!(peer.recv(&mut bytes).unwrap(), 1500);
                assert_eq!(usize::from(bytes[0]), expected);
                expected += 1;
            }
        }
        assert_eq!((expected, net.dropped()), (200, 0));
    }

    #[test]
    fn a_peer_of_this_host_that_is_closed_is_a_failure() {
        let (net, peer) = pair();
        drop(peer);
        assert_eq!(net.send(&[Frame::complete(&[0; 14])]), 1);
        assert!(net.failure().is_some());
        assert_eq!((net.send(&[Frame::complete(&[0; 14])]), net.dropped()), (1, 1));
    }

    #[test]
    fn nobody_at_an_address_yet_drops_the_frames() {
        let peer = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = peer.local_addr().unwrap().port();
        drop(peer);
        let net = DatagramSocket::connect(None, &Peer::Address("127.0.0.1".into(), port)).unwrap();
        for _ in 0..10 {
            assert_eq!(net.send(&[Frame::complete(&[0; 60])]), 1);
            assert_eq!(received(&net, 9).len(), 0);
        }
        assert_eq!(net.failure(), None);
    }
}

//! Frames over a stream socket, each behind its length in four bytes, most significant first: as
//! QEMU's `-netdev stream` and passt's `--fd` have it. On the loop's thread.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::backend::{Frame, NetBackend, Watched};
use super::ending::Ending;
use super::socket::{Peer, connect_stream, counted, part, prepare};
use crate::error::Result;
use crate::sync::{Mutex, rank};

/// Read at once, which is more than the longest frame.
const CHUNK: usize = 256 << 10;
const LENGTH: usize = 4;
/// Two parts for each frame; the kernel takes 1024.
const MOST_PARTS: usize = 1024;

#[derive(Debug, Default)]
struct Incoming {
    /// Bytes from `start` to `end` have been received and not given.
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

#[derive(Debug, Default)]
struct State {
    incoming: Incoming,
    /// The rest of a frame that was sent in part.
    rest: Vec<u8>,
}

/// See the module.
#[derive(Debug)]
pub struct StreamSocket {
    socket: OwnedFd,
    description: String,
    state: Mutex<State, rank::NetBackend>,
    ending: Ending,
}

impl StreamSocket {
    /// Over a connected socket.
    ///
    /// # Errors
    /// If it is not a connected stream socket.
    pub fn new(socket: OwnedFd) -> Result<Arc<Self>> {
        let description = format!("stream socket {}", socket.as_raw_fd());
        Self::over(socket, description)
    }

    /// Connected to a peer.
    ///
    /// # Errors
    /// If there is no such peer.
    pub fn connect(peer: &Peer) -> Result<Arc<Self>> {
        let description = match peer {
            Peer::Path(path) => format!("stream {}", path.display()),
            Peer::Address(host, port) => format!("stream {host}:{port}"),
        };
        Self::over(connect_stream(peer)?, description)
    }

    fn over(socket: OwnedFd, description: String) -> Result<Arc<Self>> {
        prepare(&socket, &[libc::SOCK_STREAM], "stream")?;
        let (state, ending) = (Mutex::default(), Ending::default());
        Ok(Arc::new(Self { socket, description, state, ending }))
    }

    /// Send what the kernel takes of these parts.
    fn write(&self, parts: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: a message without a name, all of whose fields may be zero.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = parts.as_ptr().cast_mut();
        message.msg_iovlen = parts.len();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the parts are slices that live through the call, which reads them.
        counted(unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, flags) })
    }

    /// Send the rest of the last frame. False if it is not complete.
    fn flush(&self, rest: &mut Vec<u8>) -> io::Result<bool> {
        while !rest.is_empty() {
            let sent = self.write(&[part(rest)])?;
            rest.drain(..sent);
        }
        Ok(true)
    }

    /// Send frames. Returns how many were taken.
    fn send_all(&self, state: &mut State, frames: &[Frame<'_>]) -> io::Result<usize> {
        let mut taken = 0;
        while let Some(left) = frames.get(taken..).filter(|left| !left.is_empty()) {
            let left = left.get(..MOST_PARTS / 2).unwrap_or(left);
            let length = |frame: &Frame<'_>| u32::try_from(frame.bytes.len()).unwrap_or(0);
            let lengths: Vec<[u8; LENGTH]> =
                left.iter().map(|frame| length(frame).to_be_bytes()).collect();
            let pairs = left.iter().zip(&lengths);
            let parts: Vec<_> =
                pairs.flat_map(|(frame, length)| [part(length), part(frame.bytes)]).collect();
            let mut sent = match self.write(&parts) {
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(taken),
                Err(error) => return Err(error),
            };
            for (frame, length) in left.iter().zip(&lengths) {
                if sent == 0 {
                    break;
                }
                taken += 1;
                let whole = LENGTH + frame.bytes.len();
                if sent < whole {
                    // Part of the frame is with the peer: the rest has to follow.
                    let bytes = length.iter().chain(frame.bytes);
                    state.rest.extend(bytes.skip(sent));
                    return Ok(taken);
                }
                sent -= whole;
            }
        }
        Ok(taken)
    }

    /// Receive more bytes. False if there are none now.
    fn fill(&self, incoming: &mut Incoming) -> io::Result<bool> {
        let Incoming { bytes, start, end } = incoming;
        bytes.resize(CHUNK, 0);
        bytes.copy_within(*start..*end, 0);
        (*start, *end) = (0, *end - *start);
        let room = bytes.get_mut(*end..).unwrap_or_default();
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: the pointer and length are those of the slice.
        let received = counted(unsafe {
            libc::recv(self.socket.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), flags)
        });
        match received {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer has closed it")),
            Ok(count) => {
                *end += count;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(error),
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
            while let Some(length) = incoming.next_length()? {
                let start = incoming.start + LENGTH;
                let frame = incoming.bytes.get(start..start + length).unwrap_or_default();
                if !into(Frame::complete(frame)) {
                    return Ok(());
                }
                incoming.start = start + length;
                given += 1;
            }
            if given >= budget || !self.fill(incoming)? {
                return Ok(());
            }
        }
    }
}

impl Incoming {
    /// The length of the next frame, if all of it is there.
    fn next_length(&self) -> io::Result<Option<usize>> {
        let waiting = self.bytes.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = waiting.split_first_chunk::<LENGTH>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length == 0 || length > Frame::LONGEST {
            let detail = format!("the peer has sent a frame of {length} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, detail));
        }
        Ok((rest.len() >= length).then_some(length))
    }
}

impl NetBackend for StreamSocket {
    fn watched(&self) -> Watched {
        let fd = self.socket.as_raw_fd();
        Watched { receive: fd, send: fd }
    }

    fn send(&self, frames: &[Frame<'_>]) -> usize {
        if self.ending.drops(frames.len()) {
            return frames.len();
        }
        let mut state = self.state.lock();
        let result = match self.flush(&mut state.rest) {
            Ok(_) => self.send_all(&mut state, frames),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        };
        result.unwrap_or_else(|error| {
            self.ending.end(&error);
            frames.len()
        })
    }

    fn has_unsent(&self) -> bool {
        !self.state.lock().rest.is_empty() && self.ending.reason().is_none()
    }

    fn receive(&self, budget: usize, into: &mut dyn FnMut(Frame<'_>) -> bool) {
        let mut state = self.state.lock();
        if self.ending.reason().is_some() {
            return;
        }
        if let Err(error) = self.receive_all(&mut state.incoming, budget, into) {
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
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Arc<StreamSocket>, UnixStream) {
        let (own, peer) = UnixStream::pair().unwrap();
        (StreamSocket::new(own.into()).unwrap(), peer)
    }

    fn received(net: &StreamSocket) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        net.receive(1000, &mut |frame| {
            frames.push(frame.bytes.to_vec());
            true
        });
        frames
    }

    #[test]
    fn frames_have_their_length_before_them() {
        let (net, mut peer) = pair();
        assert_eq!(net.send(&[Frame::complete(&[7; 14]), Frame::complete(&[8; 300])]), 2);
        let mut bytes = [0; 322];
        peer.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[..5], [0, 0, 0, 14, 7]);
        assert_eq!(bytes[18..23], [0, 0, 1, 44, 8]);
        peer.write_all(&[0, 0, 0, 14]).unwrap();
        peer.write_all(&[1; 10]).unwrap();
        assert_eq!(received(&net), Vec::<Vec<u8>>::new());
        peer.write_all(&[1; 4]).unwrap();
        peer.write_all(&[0, 0, 0, 1, 9, 0]).unwrap();
        assert_eq!(received(&net), [vec![1; 14], vec![9]]);
    }

    #[test]
    fn a_frame_without_room_comes_again_first() {
        let (net, mut peer) = pair();
        peer.write_all(&[0, 0, 0, 1, 5, 0, 0, 0, 1, 6]).unwrap();
        let mut offered = Vec::new();
        net.receive(10, &mut |frame| {
            offered.push(frame.bytes[0]);
            false
        });
        assert_eq!(offered, [5]);
        assert_eq!(received(&net), [[5], [6]]);
    }

    #[test]
    fn a_slow_peer_gets_whole_frames_in_order() {
        let (net, mut peer) = pair();
        let frame = vec![3; 60_000];
        let mut sent = 0;
        while net.send(&[Frame::complete(&frame)]) == 1 {
            sent += 1;
        }
        assert!(sent > 0 && net.failure().is_none());
        let reader = std::thread::spawn(move || {
            let mut count = 0;
            let mut length = [0; 4];
            while peer.read_exact(&mut length).is_ok() {
                assert_eq!(u32::from_be_bytes(length), 60_000);
                let mut bytes = vec![0; 60_000];
                peer.read_exact(&mut bytes).unwrap();
                count += 1;
            }
            count
        });
        let mut poll = libc::pollfd { fd: net.watched().send, events: libc::POLLOUT, revents: 0 };
        while net.send(&[Frame::complete(&frame)]) == 0 {
            // SAFETY: one pollfd that lives through the call.
            unsafe { libc::poll(&raw mut poll, 1, 60_000) };
        }
        while net.has_unsent() {
            // SAFETY: as before.
            unsafe { libc::poll(&raw mut poll, 1, 60_000) };
            assert_eq!(net.send(&[]), 0);
        }
        drop(net);
        assert_eq!(reader.join().unwrap(), sent + 1);
    }

    #[test]
    fn a_closed_or_wrong_peer_is_a_failure_with_its_reason() {
        let (net, peer) = pair();
        drop(peer);
        assert_eq!(received(&net).len(), 0);
        assert_eq!(net.failure().unwrap(), "the peer has closed it");
        assert_eq!((net.send(&[Frame::complete(&[0; 14])]), net.dropped()), (1, 1));
        let (net, mut peer) = pair();
        peer.write_all(&[0xff; 4]).unwrap();
        assert_eq!(received(&net).len(), 0);
        assert!(net.failure().unwrap().contains("4294967295 bytes"));
        let (net, peer) = pair();
        drop(peer);
        net.send(&[Frame::complete(&[0; 14])]);
        assert!(net.failure().unwrap().contains("Broken pipe"));
    }
}

//! The host's end of a connection: a unix stream socket that never waits. On the loop's thread.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use smallvec::SmallVec;
use vm_memory::VolatileSlice;

/// See the module.
#[derive(Debug)]
pub struct HostSocket {
    fd: OwnedFd,
    /// Whether an event loop watches it, and also for room to write.
    pub(super) watched: Option<bool>,
}

/// What a read has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// Bytes, and whether there may be more.
    Data(u32, bool),
    /// The host sends no more.
    End,
    /// Nothing now.
    Nothing,
}

type Iovecs = SmallVec<[libc::iovec; 8]>;

fn iovecs(pieces: &[VolatileSlice<'_>]) -> Iovecs {
    let iovec = |piece: &VolatileSlice<'_>| libc::iovec {
        iov_base: piece.ptr_guard_mut().as_ptr().cast(),
        iov_len: piece.len(),
    };
    // The kernel takes at most this many.
    pieces.iter().take(1024).map(iovec).collect()
}

fn message(iovecs: &mut Iovecs) -> libc::msghdr {
    // SAFETY: zeroes are a valid msghdr, with no address, no buffers and no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len() as _;
    message
}

impl From<OwnedFd> for HostSocket {
    fn from(fd: OwnedFd) -> Self {
        Self { fd, watched: None }
    }
}

impl AsRawFd for HostSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl HostSocket {
    /// Connect to a listening unix socket, without waiting.
    ///
    /// # Errors
    /// Those of connect(2): `WouldBlock` if the backlog of the listener is full.
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let flags = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers; the result is checked.
        let fd = unsafe { libc::socket(libc::AF_UNIX, flags, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made, and that nobody else has.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let (address, length) = address(path)?;
        // SAFETY: the address lives through the call and has this length.
        if unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self::from(fd))
    }

    /// Two connected ends. The second is for the program and may wait.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((Self::from(OwnedFd::from(ours)), OwnedFd::from(theirs)))
    }

    /// Read into these pieces.
    ///
    /// # Errors
    /// Those of recvmsg(2).
    pub(super) fn receive(&self, room: &[VolatileSlice<'_>]) -> io::Result<Received> {
        let mut iovecs = iovecs(room);
        let wanted: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        let mut message = message(&mut iovecs);
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: the buffers are memory of the guest or of a test, alive while the slices are.
        let count = unsafe { libc::recvmsg(self.as_raw_fd(), &raw mut message, flags) };
        if count < 0 {
            return match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
                e => Err(e),
            };
        }
        let count = usize::try_from(count).unwrap_or(0);
        if count == 0 && wanted > 0 {
            return Ok(Received::End);
        }
        // A read ends early where a program has passed descriptors, which are dropped.
        let may_have_more = count == wanted || message.msg_flags & libc::MSG_CTRUNC != 0;
        Ok(Received::Data(u32::try_from(count).unwrap_or(u32::MAX), may_have_more))
    }

    /// Look at the next bytes without taking them. Returns how many there are.
    ///
    /// # Errors
    /// Those of recv(2).
    pub(super) fn peek(&self, into: &mut [u8]) -> io::Result<usize> {
        self.receive_plain(into, libc::MSG_PEEK)
    }

    /// Take bytes that were looked at.
    ///
    /// # Errors
    /// Those of recv(2).
    pub(super) fn take(&self, into: &mut [u8]) -> io::Result<usize> {
        self.receive_plain(into, 0)
    }

    fn receive_plain(&self, into: &mut [u8], flags: i32) -> io::Result<usize> {
        let (buffer, length) = (into.as_mut_ptr().cast(), into.len());
        // SAFETY: the pointer and length are those of the slice.
        let count =
            unsafe { libc::recv(self.as_raw_fd(), buffer, length, flags | libc::MSG_DONTWAIT) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Write from these pieces. Returns how many bytes the kernel took.
    ///
    /// # Errors
    /// Those of sendmsg(2), but not that there is no room.
    pub(super) fn send(&self, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let mut iovecs = iovecs(pieces);
        let message = message(&mut iovecs);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the buffers are memory of the guest or of a test, alive while the slices are.
        taken(unsafe { libc::sendmsg(self.as_raw_fd(), &raw const message, flags) })
    }

    /// Write bytes. Returns how many of them the kernel took.
    ///
    /// # Errors
    /// Those of send(2), but not that there is no room.
    pub(super) fn send_bytes(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let (buffer, length) = (bytes.as_ptr().cast(), bytes.len());
        // SAFETY: the pointer and length are those of the slice.
        taken(unsafe { libc::send(self.as_raw_fd(), buffer, length, flags) })
    }

    /// End directions: `SHUT_RD`, `SHUT_WR` or both.
    pub(super) fn shut_down(&self, how: i32) {
        // SAFETY: no pointers. It fails only if the other end is gone.
        unsafe { libc::shutdown(self.as_raw_fd(), how) };
    }

    /// Whether the host has ended both directions.
    pub(super) fn is_hung_up(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one pollfd that lives through the call, which does not wait.
        let found = unsafe { libc::poll(&raw mut poll, 1, 0) };
        found > 0 && poll.revents & (libc::POLLHUP | libc::POLLERR) != 0
    }
}

fn taken(count: isize) -> io::Result<usize> {
    if let Ok(count) = usize::try_from(count) {
        return Ok(count);
    }
    match io::Error::last_os_error() {
        e if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
        e => Err(e),
    }
}

/// The longest path of a unix socket, without its final zero.
pub(super) const LONGEST_PATH: usize = 107;

/// The address of a path.
///
/// # Errors
/// `InvalidInput` if it is too long.
pub(super) fn address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: zeroes are a valid address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = u16::try_from(libc::AF_UNIX).unwrap_or(1);
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > LONGEST_PATH {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in address.sun_path.iter_mut().zip(bytes) {
        *place = byte.cast_signed();
    }
    let length = size_of::<libc::sockaddr_un>();
    Ok((address, u32::try_from(length).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn data_goes_both_ways_in_pieces_and_ends_are_seen() {
        let (ours, theirs) = HostSocket::pair().unwrap();
        let mut theirs = UnixStream::from(theirs);
        let (mut one, mut other) = ([0; 2], [0; 4]);
        let room = [VolatileSlice::from(&mut one[..]), VolatileSlice::from(&mut other[..])];
        assert_eq!(ours.receive(&room).unwrap(), Received::Nothing);
        theirs.write_all(b"abc").unwrap();
        assert_eq!(ours.receive(&room).unwrap(), Received::Data(3, false));
        theirs.write_all(b"abcdefg").unwrap();
        assert_eq!(ours.receive(&room).unwrap(), Received::Data(6, true));
        assert_eq!(ours.send(&room).unwrap(), 6);
        assert_eq!((one, other), (*b"ab", *b"cdef"));
        let mut found = [0; 6];
        theirs.read_exact(&mut found).unwrap();
        assert_eq!(found, *b"abcdef");
        assert!(!ours.is_hung_up());
        drop(theirs);
        let (mut one, mut other) = ([0; 1], [0; 1]);
        assert_eq!(ours.peek(&mut one).unwrap(), 1);
        assert_eq!(ours.take(&mut other).unwrap(), 1);
        assert_eq!((one, other), (*b"g", *b"g"));
        assert!(ours.is_hung_up());
        assert_eq!(ours.receive(&[VolatileSlice::from(&mut one[..])]).unwrap(), Received::End);
        assert!(ours.send_bytes(b"x").is_err());
    }

    #[test]
    fn what_the_kernel_does_not_take_is_not_an_error() {
        let (ours, theirs) = HostSocket::pair().unwrap();
        let bytes = vec![1; 1 << 20];
        let mut sent = 0;
        loop {
            match ours.send_bytes(&bytes).unwrap() {
                0 => break,
                count => sent += count,
            }
        }
        let mut theirs = UnixStream::from(theirs);
        let mut found = vec![0; sent];
        theirs.read_exact(&mut found).unwrap();
        assert!(ours.send_bytes(b"x").unwrap() == 1);
    }
}

//! Waits for file descriptors, and non-blocking reads of counters. Runs on the caller's thread.

use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

/// Wait until one of two file descriptors is readable, and return which are. Neither is, if the
/// deadline passed or a signal arrived. A negative number means no file descriptor.
pub(crate) fn wait_for_either(fds: [RawFd; 2], deadline: Option<Instant>) -> io::Result<[bool; 2]> {
    let mut polls = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    let timeout = deadline.map(|deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        libc::timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        }
    });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: two pollfds and, where not null, one timespec, all alive for the call.
    if unsafe { libc::ppoll(polls.as_mut_ptr(), 2, timeout, std::ptr::null()) } >= 0 {
        return Ok(polls.map(|poll| poll.revents != 0));
    }
    match io::Error::last_os_error() {
        e if e.kind() == io::ErrorKind::Interrupted => Ok([false, false]),
        e => Err(e),
    }
}

#[cfg(feature = "python")]
/// Whether the file descriptor is in blocking mode. False if it is not open.
pub(crate) fn is_blocking(fd: RawFd) -> bool {
    // SAFETY: no pointers; the result is checked.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    flags >= 0 && flags & libc::O_NONBLOCK == 0
}

/// Take the count of an eventfd or a timer without waiting, whatever its blocking mode, which any
/// holder of a duplicate may change.
///
/// # Errors
/// `WouldBlock` when the count is zero.
pub(crate) fn take_count(fd: RawFd) -> io::Result<u64> {
    let mut count = 0u64;
    let part = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: 8 };
    // -1, in two halves, is for files without a position.
    let (position, flags) = (-1_i64, libc::RWF_NOWAIT);
    // SAFETY: one part, the eight bytes of a local. musl has the function only since 1.2.5.
    let length = unsafe {
        libc::syscall(libc::SYS_preadv2, fd, &raw const part, 1_i64, position, position, flags)
    };
    if length >= 0 {
        return Ok(count);
    }
    match io::Error::last_os_error() {
        // Timers support the flag only since Linux 6.10.
        e if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => read_if_ready(fd),
        e => Err(e),
    }
}

fn read_if_ready(fd: RawFd) -> io::Result<u64> {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that lives through the call, which does not wait.
    if unsafe { libc::poll(&raw mut poll, 1, 0) } <= 0 {
        // With the errno, as the kernel returns it, because Python chooses the exception by it.
        return Err(io::Error::from_raw_os_error(libc::EAGAIN));
    }
    read_count(fd)
}

/// Read a count. This may wait, depending on the descriptor's blocking mode.
pub(crate) fn read_count(fd: RawFd) -> io::Result<u64> {
    let mut count = 0u64;
    // SAFETY: eight bytes of a local.
    let length = unsafe { libc::read(fd, (&raw mut count).cast(), 8) };
    if length < 0 { Err(io::Error::last_os_error()) } else { Ok(count) }
}

/// Add to the count of an eventfd. This may wait, depending on the descriptor's blocking mode. It
/// returns after a signal, unlike [`vmm_sys_util::eventfd::EventFd::write`].
#[cfg(feature = "python")]
pub(crate) fn write_count(fd: RawFd, count: u64) -> io::Result<()> {
    // SAFETY: eight bytes of a local.
    let length = unsafe { libc::write(fd, (&raw const count).cast(), 8) };
    if length < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[test]
    fn it_says_which_is_readable() {
        let (one, other) =
            (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        let fds = [one.as_raw_fd(), other.as_raw_fd()];
        assert_eq!(wait_for_either(fds, Some(Instant::now())).unwrap(), [false, false]);
        other.write(1).unwrap();
        assert_eq!(wait_for_either(fds, None).unwrap(), [false, true]);
        assert_eq!(wait_for_either([-1, fds[1]], None).unwrap(), [false, true]);
    }

    #[test]
    fn a_count_is_taken_without_waiting_also_where_the_descriptor_blocks() {
        let fd = EventFd::new(0).unwrap();
        for take in [take_count, read_if_ready] {
            assert_eq!(take(fd.as_raw_fd()).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
            fd.write(3).unwrap();
            assert_eq!(take(fd.as_raw_fd()).unwrap(), 3);
        }
    }
}

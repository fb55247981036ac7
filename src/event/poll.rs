//! A wait for one of two file descriptors, on whichever thread calls.

use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

/// Wait until one of two is readable, and say which are. Neither when the deadline passed or a signal came. A negative
/// number is no file descriptor.
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
}

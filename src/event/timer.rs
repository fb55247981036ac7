//! `TimerFd`: timerfd_create(2) on the monotonic clock, one-shot, periodic or at an absolute time.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::poll::take_count;

/// A timer with a file descriptor that is readable when the timer has expired.
#[derive(Debug)]
pub struct TimerFd(OwnedFd);

/// When a timer expires first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// After this time. Zero means at once.
    In(Duration),
    /// At this time of `CLOCK_MONOTONIC`. A time in the past means at once.
    At(Duration),
}

impl TimerFd {
    /// A timer that is not set.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: no pointers; the result is checked.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned this number, and nothing else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Arm the timer. With an interval it expires repeatedly. Clears previous expirations.
    ///
    /// # Errors
    /// If the kernel refuses the time.
    pub fn set(&self, first: Expiry, interval: Duration) -> io::Result<()> {
        let (first, flags) = match first {
            Expiry::In(delay) => (delay, 0),
            Expiry::At(time) => (time, libc::TFD_TIMER_ABSTIME),
        };
        // Zero would disarm the timer.
        self.settime(first.max(Duration::from_nanos(1)), interval, flags)
    }

    /// Disarm the timer and clear previous expirations.
    ///
    /// # Errors
    /// Never in practice.
    pub fn clear(&self) -> io::Result<()> {
        self.settime(Duration::ZERO, Duration::ZERO, 0)
    }

    fn settime(&self, first: Duration, interval: Duration, flags: i32) -> io::Result<()> {
        let times =
            libc::itimerspec { it_value: timespec(first)?, it_interval: timespec(interval)? };
        // SAFETY: our own timer, and times that live through the call. The old value is not
        // requested.
        let result = unsafe {
            libc::timerfd_settime(self.as_raw_fd(), flags, &raw const times, std::ptr::null_mut())
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The number of expirations since the last read or set. Does not wait.
    ///
    /// # Errors
    /// `WouldBlock` when the timer has not expired.
    pub fn read(&self) -> io::Result<u64> {
        take_count(self.as_raw_fd())
    }
}

fn timespec(duration: Duration) -> io::Result<libc::timespec> {
    let seconds = i64::try_from(duration.as_secs())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok(libc::timespec { tv_sec: seconds, tv_nsec: i64::from(duration.subsec_nanos()) })
}

impl AsRawFd for TimerFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(timer: &TimerFd) -> bool {
        let mut poll = libc::pollfd { fd: timer.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives through the call.
        unsafe { libc::poll(&raw mut poll, 1, 60_000) > 0 }
    }

    #[test]
    fn it_expires_once_or_again_and_again() {
        let timer = TimerFd::new().unwrap();
        assert_eq!(timer.read().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        timer.set(Expiry::In(Duration::ZERO), Duration::ZERO).unwrap();
        assert!(wait(&timer));
        assert_eq!(timer.read().unwrap(), 1);
        timer.set(Expiry::At(Duration::from_secs(1)), Duration::from_micros(10)).unwrap();
        assert!(wait(&timer));
        assert!(timer.read().unwrap() > 1, "each interval that has passed since is counted");
        timer.clear().unwrap();
        assert!(timer.read().is_err());
    }
}

//! A file descriptor that is readable while frames wait: an epoll set of an eventfd for frames that
//! are there, and a timer for the next that arrives. Any thread, with the lock of the port's queue
//! held.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::lane::Nanos;
use crate::event::{Expiry, TimerFd};

#[derive(Debug)]
pub(super) struct Wakeup {
    set: Epoll,
    event: EventFd,
    is_raised: bool,
    timer: TimerFd,
    /// When the timer expires or has expired.
    armed: Option<Nanos>,
}

impl Wakeup {
    /// # Errors
    /// If the process has no file descriptor left.
    pub(super) fn new() -> io::Result<Self> {
        let set = Epoll::new()?;
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let timer = TimerFd::new()?;
        for fd in [event.as_raw_fd(), timer.as_raw_fd()] {
            set.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Self { set, event, is_raised: false, timer, armed: None })
    }

    /// A frame is there.
    #[inline]
    pub(super) fn raise(&mut self) {
        if !self.is_raised {
            self.is_raised = true;
            // Cannot fail: the count is 0, and nobody else has the descriptor.
            let _ = self.event.write(1);
        }
    }

    /// No frame is there. The next arrives at this time.
    pub(super) fn lower(&mut self, next: Option<Nanos>) {
        if self.is_raised {
            self.is_raised = false;
            let _ = self.event.read();
        }
        if self.armed != next {
            self.arm(next);
        }
    }

    /// A frame arrives at this time.
    pub(super) fn expect(&mut self, time: Nanos) {
        if self.armed.is_none_or(|armed| time < armed) {
            self.arm(Some(time));
        }
    }

    fn arm(&mut self, time: Option<Nanos>) {
        self.armed = time;
        // Fails only for times that the kernel cannot represent, which do not come.
        let _ = match time {
            Some(time) => self.timer.set(Expiry::At(Duration::from_nanos(time)), Duration::ZERO),
            None => self.timer.clear(),
        };
    }
}

impl AsRawFd for Wakeup {
    fn as_raw_fd(&self) -> RawFd {
        self.set.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_readable(wakeup: &Wakeup, timeout: i32) -> bool {
        let mut poll = libc::pollfd { fd: wakeup.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives through the call.
        unsafe { libc::poll(&raw mut poll, 1, timeout) > 0 }
    }

    #[test]
    fn it_is_readable_while_a_frame_is_there_or_due() {
        let mut wakeup = Wakeup::new().unwrap();
        assert!(!is_readable(&wakeup, 0));
        wakeup.raise();
        assert!(is_readable(&wakeup, 0) && is_readable(&wakeup, 0));
        wakeup.lower(None);
        assert!(!is_readable(&wakeup, 0));
        wakeup.expect(1);
        assert!(is_readable(&wakeup, 60_000));
        wakeup.lower(Some(u64::MAX / 4));
        assert!(!is_readable(&wakeup, 0));
        wakeup.expect(2);
        assert!(is_readable(&wakeup, 60_000));
        wakeup.lower(None);
        assert!(!is_readable(&wakeup, 0));
    }
}

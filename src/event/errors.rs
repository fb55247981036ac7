//! What the crate's event manager and epoll answer, as errors that a person can act on.

use std::os::fd::RawFd;

use crate::error::{Error, ErrorKind};

pub(super) fn event_error(error: event_manager::Error) -> Error {
    Error {
        errno: errno_of(&error),
        ..Error::new(ErrorKind::Event, "EventManager", error.to_string())
    }
}

fn errno_of(error: &event_manager::Error) -> Option<i32> {
    match error {
        event_manager::Error::Epoll(errno) | event_manager::Error::EventFd(errno) => {
            Some(errno.errno())
        }
        _ => None,
    }
}

pub(super) fn at_fd(at: &str, fd: RawFd, error: event_manager::Error) -> Error {
    let errno = errno_of(&error);
    let detail = match errno {
        Some(libc::EPERM) => format!(
            "file descriptor {fd} is a regular file or a directory: these are always ready, epoll does \
             not watch them"
        ),
        Some(libc::EBADF) => format!("file descriptor {fd} is not open"),
        Some(libc::ENOENT) => format!("file descriptor {fd} was closed while it was registered"),
        Some(libc::EINVAL) => format!("epoll refuses file descriptor {fd} with these events"),
        _ => format!("file descriptor {fd}: {error}"),
    };
    Error { errno, ..Error::new(ErrorKind::Event, at, detail) }
}

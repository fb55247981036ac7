//! Converts errors of the crate's event manager and of epoll to helpful messages.

use std::io;
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
    about(at, fd, errno_of(&error), &error)
}

/// Convert an error of epoll itself.
pub(super) fn refused(at: &str, fd: RawFd, error: &io::Error) -> Error {
    about(at, fd, error.raw_os_error(), error)
}

fn about(at: &str, fd: RawFd, errno: Option<i32>, error: &dyn std::error::Error) -> Error {
    let detail = errno.and_then(detail).map_or_else(|| format!(": {error}"), |d| format!(" {d}"));
    let detail = format!("file descriptor {fd}{detail}");
    Error { errno, ..Error::new(ErrorKind::Event, at, detail) }
}

fn detail(errno: i32) -> Option<&'static str> {
    match errno {
        libc::EPERM => Some(
            "is a regular file or a directory: these are always ready, epoll does not watch them",
        ),
        libc::EBADF => Some("is not open"),
        libc::ENOENT => Some("was closed while it was registered"),
        libc::EINVAL => Some("cannot be watched with these events: epoll refuses them"),
        libc::ELOOP => Some("would make event loops watch each other in a circle, or too deeply"),
        _ => None,
    }
}

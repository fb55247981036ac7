//! Opens and checks the paths and file descriptors of serial streams when they are configured.
//! Opening never waits.

use std::fs::{File, FileType, OpenOptions};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};

/// What a stream is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest's input is read from it.
    Input,
    /// The guest's output is written to it.
    Output,
}

impl Direction {
    /// The key of the configuration.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::Input => "serial.input",
            Self::Output => "serial.output",
        }
    }

    fn access_mode(self) -> libc::c_int {
        match self {
            Self::Input => libc::O_RDONLY,
            Self::Output => libc::O_WRONLY,
        }
    }
}

/// How a stream is used without ever blocking, and without changing its blocking mode, which other
/// processes may share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IoMode {
    /// With calls that do not wait.
    Socket {
        /// An empty message is not the end of the input.
        has_messages: bool,
    },
    /// Through our own open file description, which does not block.
    NonBlocking,
    /// A regular file or a directory, which never blocks.
    File,
    /// As much at a time as poll reports ready, assuming that no other process uses it in between.
    Polled,
}

/// Open the input file. A FIFO does not end before it has had a writer.
///
/// # Errors
/// [`ErrorKind::Config`] if it cannot be opened or read.
pub fn input_file(path: &Path) -> Result<OwnedFd> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let failed = |e: io::Error| of_path(Direction::Input, ErrorKind::Config, path, &e);
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_dir() {
        return Err(failed(io::Error::from_raw_os_error(libc::EISDIR)));
    }
    Ok(file.into())
}

/// Create or truncate the output file. A FIFO needs a reader.
///
/// # Errors
/// [`ErrorKind::Io`] if it cannot be opened.
pub(super) fn output_file(path: &Path) -> Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).custom_flags(flags);
    options.open(path).map_err(|e| {
        let is_fifo = path.metadata().is_ok_and(|found| found.file_type().is_fifo());
        let mut error = of_path(Direction::Output, ErrorKind::Io, path, &e);
        if is_fifo && e.raw_os_error() == Some(libc::ENXIO) {
            error.detail = format!("{}: a FIFO without a reader", path.display());
            return error.hint("open it for reading first");
        }
        error
    })
}

fn of_path(direction: Direction, kind: ErrorKind, path: &Path, error: &io::Error) -> Error {
    let mut failed = Error::os(kind, direction.key(), error);
    failed.detail = format!("{}: {}", path.display(), failed.detail);
    failed
}

/// Duplicate a file descriptor, because the owner of the stream may close it.
///
/// # Errors
/// [`ErrorKind::Config`] if it is not open, or cannot be used in this direction.
pub fn duplicate(fd: RawFd, direction: Direction) -> Result<OwnedFd> {
    let bad = |detail: String| {
        let detail = format!("file descriptor {fd}: {detail}");
        Error::new(ErrorKind::Config, direction.key(), detail)
    };
    let failed = || {
        let mut error = Error::os(ErrorKind::Config, direction.key(), &io::Error::last_os_error());
        error.detail = format!("file descriptor {fd}: {}", error.detail);
        error
    };
    // SAFETY: a plain fcntl; the result is checked.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(failed());
    }
    // SAFETY: fcntl has just returned this number, and nothing else knows it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(copy) });
    // SAFETY: as above; the descriptor lives through the call.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    let mode = flags & libc::O_ACCMODE;
    if flags & libc::O_PATH != 0 || (mode != libc::O_RDWR && mode != direction.access_mode()) {
        return Err(bad(match direction {
            Direction::Input => "it is not open for reading".into(),
            Direction::Output => "it is not open for writing".into(),
        }));
    }
    let found = file.metadata().map_err(|e| bad(e.to_string()))?.file_type();
    if found.is_dir() {
        return Err(bad("it is a directory".into()));
    }
    if found.is_socket() {
        check_connected(&file, direction).map_err(bad)?;
    }
    Ok(file.into())
}

/// Refuse a socket that is listening or has no peer.
fn check_connected(socket: &File, direction: Direction) -> std::result::Result<(), String> {
    if option(socket, libc::SO_ACCEPTCONN) == Some(1) {
        return Err("the socket is listening; pass a connected socket".into());
    }
    // A datagram socket can receive without a connection.
    if has_messages(socket) && direction == Direction::Input {
        return Ok(());
    }
    // SAFETY: an all-zero address is valid, and the call writes at most its length to it.
    let is_connected = unsafe {
        let mut address: libc::sockaddr_storage = std::mem::zeroed();
        let mut length =
            libc::socklen_t::try_from(size_of::<libc::sockaddr_storage>()).unwrap_or(0);
        libc::getpeername(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut length) == 0
    };
    if is_connected { Ok(()) } else { Err("the socket is not connected".into()) }
}

fn option(socket: &File, name: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = libc::socklen_t::try_from(size_of::<libc::c_int>()).ok()?;
    // SAFETY: the value and its length live through the call, and the length is the value's.
    let result = unsafe {
        let value = (&raw mut value).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, value, &raw mut length)
    };
    (result == 0).then_some(value)
}

fn has_messages(socket: &File) -> bool {
    option(socket, libc::SO_TYPE).is_some_and(|kind| kind != libc::SOCK_STREAM)
}

/// Return the stream to use, and how. Pipes and terminals are opened again, so that they are
/// non-blocking here without affecting other users.
pub(super) fn unblocked(file: File, direction: Direction) -> (File, IoMode) {
    let Ok(kind) = file.metadata().map(|found| found.file_type()) else {
        return (file, IoMode::Polled);
    };
    if kind.is_socket() {
        let has_messages = has_messages(&file);
        return (file, IoMode::Socket { has_messages });
    }
    if kind.is_file() {
        return (file, IoMode::File);
    }
    match can_be_opened_again(&file, kind).then(|| again(&file, direction)) {
        Some(Ok(own)) => (own, IoMode::NonBlocking),
        // Another user's terminal, or no /proc.
        _ => (file, IoMode::Polled),
    }
}

/// Whether opening it again gives the same stream. This is not so for the controlling end of a
/// pseudo-terminal, where it would create another pair, and is not known for other devices.
fn can_be_opened_again(file: &File, kind: FileType) -> bool {
    if kind.is_fifo() {
        return true;
    }
    let mut number: libc::c_uint = 0;
    // SAFETY: an open descriptor, and a number that lives through the call.
    unsafe {
        libc::isatty(file.as_raw_fd()) == 1
            && libc::ioctl(file.as_raw_fd(), libc::TIOCGPTN, &raw mut number) != 0
    }
}

fn again(file: &File, direction: Direction) -> io::Result<File> {
    let is_output = direction == Direction::Output;
    OpenOptions::new()
        .read(!is_output)
        .write(is_output)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Whether a read or a write would make progress, or report an error.
pub(super) fn is_ready(file: &File, events: libc::c_short) -> bool {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events, revents: 0 };
    // SAFETY: one pollfd that lives through the call, which does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    fn refusal(fd: &impl AsRawFd, direction: Direction) -> String {
        duplicate(fd.as_raw_fd(), direction).unwrap_err().detail
    }

    #[test]
    fn what_can_never_be_a_stream_is_refused() {
        let directory = File::open("/").unwrap();
        assert!(refusal(&directory, Direction::Input).ends_with("directory"));
        let (reader, writer) = std::io::pipe().unwrap();
        assert!(refusal(&reader, Direction::Output).ends_with("writing"));
        assert!(refusal(&writer, Direction::Input).ends_with("reading"));
        let alone = UnixDatagram::unbound().unwrap();
        assert!(refusal(&alone, Direction::Output).ends_with("not connected"));
        let name = std::env::temp_dir().join(format!("pyvmm-listens-{}", std::process::id()));
        let listener = UnixListener::bind(&name).unwrap();
        std::fs::remove_file(&name).unwrap();
        assert!(refusal(&listener, Direction::Input).contains("listening"));
        for fd in [-1, i32::MAX] {
            assert_eq!(duplicate(fd, Direction::Input).unwrap_err().errno, Some(libc::EBADF));
        }
        let (one, _other) = UnixStream::pair().unwrap();
        duplicate(one.as_raw_fd(), Direction::Output).unwrap();
    }

    #[test]
    fn a_pipe_is_used_without_blocking_and_its_own_mode_stays() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let shared = writer.as_raw_fd();
        let copy = duplicate(shared, Direction::Output).unwrap();
        let (own, kind) = unblocked(copy.into(), Direction::Output);
        assert_eq!(kind, IoMode::NonBlocking);
        // SAFETY: two open descriptors.
        let modes = [shared, own.as_raw_fd()].map(|fd| unsafe { libc::fcntl(fd, libc::F_GETFL) });
        assert_eq!(modes.map(|mode| mode & libc::O_NONBLOCK), [0, libc::O_NONBLOCK]);
    }
}

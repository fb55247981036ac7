//! File descriptors at the serial port's two ends, as subscribers of the event manager: on the loop's thread.
//! Neither end's blocking mode is changed (a terminal's is shared with others), and neither ever blocks.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber, SubscriberId};
use vmm_sys_util::eventfd::EventFd;

use super::Serial;
use crate::config::{SerialConfig, SerialInput, SerialOutput};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;

/// A write of this size to a pipe or terminal that is ready does not block.
const CHUNK: usize = 256;
/// A socket says itself how much it takes.
const SOCKET_CHUNK: usize = 1 << 16;
/// Input is read ahead of the guest up to here.
const READ_AHEAD: usize = 4096;

/// Connect the port's ends; returns the subscribers that were added for them.
pub(crate) fn connect(
    serial: &Arc<Serial>,
    config: SerialConfig,
    manager: &EventManager,
) -> Result<Vec<SubscriberId>> {
    let mut ids = Vec::new();
    let output = match config.output {
        Some(SerialOutput::Fd(fd)) => Some(File::from(fd)),
        Some(SerialOutput::File(path)) => Some(create(&path)?),
        Some(SerialOutput::Subscriber) | None => None,
    };
    if let Some(file) = output {
        let is_socket = file.metadata().is_ok_and(|metadata| metadata.file_type().is_socket());
        let pump =
            OutputPump { serial: Arc::clone(serial), file, is_socket, waits_for_room: false };
        ids.push(manager.add_subscriber(Box::new(pump)));
    }
    if let Some(SerialInput::Fd(fd)) = config.input {
        ids.push(manager.add_subscriber(Box::new(InputPump {
            serial: Arc::clone(serial),
            wanted: Arc::clone(serial.input_wanted()?),
            file: File::from(fd),
            eof: config.input_eof,
            source: Source::Idle,
        })));
    }
    Ok(ids)
}

/// Whether somebody will take the output that goes here.
pub(crate) fn has_taker(config: &SerialConfig) -> bool {
    config.output.is_some()
}

fn create(path: &Path) -> Result<File> {
    File::create(path).map_err(|e| {
        let mut error = Error::os(ErrorKind::Io, "serial.output", &e);
        error.detail = format!("{}: {}", path.display(), error.detail);
        error
    })
}

/// Writes what the guest prints.
struct OutputPump {
    serial: Arc<Serial>,
    file: File,
    is_socket: bool,
    /// The file is watched for room.
    waits_for_room: bool,
}

impl OutputPump {
    fn pump(&mut self, ops: &mut EventOps) {
        loop {
            let chunk = self.serial.peek(if self.is_socket { SOCKET_CHUNK } else { CHUNK });
            if chunk.is_empty() {
                return self.watch(false, ops);
            }
            match self.write(&chunk) {
                Ok(written) => self.serial.consume(written),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return self.watch(true, ops),
                Err(e) => {
                    self.serial.fail(Error::os(ErrorKind::Io, "serial.output", &e));
                    return self.watch(false, ops);
                }
            }
        }
    }

    /// Write what there is room for, without waiting.
    fn write(&mut self, chunk: &[u8]) -> io::Result<usize> {
        if self.is_socket {
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: the pointer and the length are those of one slice, which is only read.
            let sent = unsafe {
                libc::send(self.file.as_raw_fd(), chunk.as_ptr().cast(), chunk.len(), flags)
            };
            return usize::try_from(sent).map_err(|_| io::Error::last_os_error());
        }
        if is_writable(&self.file) {
            self.file.write(chunk)
        } else {
            Err(io::ErrorKind::WouldBlock.into())
        }
    }

    fn watch(&mut self, for_room: bool, ops: &mut EventOps) {
        let events = Events::new(&self.file, EventSet::OUT);
        let changed = match (self.waits_for_room, for_room) {
            (false, true) => ops.add(events),
            (true, false) => ops.remove(events),
            _ => return,
        };
        match changed {
            Ok(()) => self.waits_for_room = for_room,
            Err(e) => self.serial.fail(Error::new(ErrorKind::Io, "serial.output", e.to_string())),
        }
    }
}

/// Room for a chunk, or an error that a write will tell. A regular file is always writable.
fn is_writable(file: &File) -> bool {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one pollfd that lives through the call, which does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
}

impl MutEventSubscriber for OutputPump {
    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        self.pump(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Some(fd) = self.serial.output_fd() {
            let _ = ops.add(Events::new_raw(fd, EventSet::IN));
        }
    }
}

/// How the input is followed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// Not watched: the guest has enough to read.
    Idle,
    /// Watched by the event manager.
    Watched,
    /// A regular file: always ready, read when the guest wants more.
    File,
    /// At its end.
    Ended,
}

/// Reads what the guest receives.
struct InputPump {
    serial: Arc<Serial>,
    wanted: Arc<EventFd>,
    file: File,
    eof: Vec<u8>,
    source: Source,
}

impl InputPump {
    /// The guest has read all: go on reading.
    fn resume(&mut self, ops: &mut EventOps) {
        match self.source {
            Source::Idle => match ops.add(Events::new(&self.file, EventSet::IN)) {
                Ok(()) => self.source = Source::Watched,
                // EPERM, the only refusal of an open fd: a file that epoll does not watch.
                Err(_) => {
                    self.source = Source::File;
                    self.read(ops);
                }
            },
            Source::File => self.read(ops),
            Source::Watched | Source::Ended => {}
        }
    }

    fn read(&mut self, ops: &mut EventOps) {
        let mut buffer = [0; 1024];
        match self.file.read(&mut buffer) {
            Ok(0) => self.end(ops),
            Ok(count) => {
                self.serial.feed(buffer.get(..count).unwrap_or(&[]));
                if self.source == Source::Watched && self.serial.input_waiting() >= READ_AHEAD {
                    let _ = ops.remove(Events::new(&self.file, EventSet::IN));
                    self.source = Source::Idle;
                }
            }
            Err(e)
                if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(_) => self.end(ops),
        }
    }

    fn end(&mut self, ops: &mut EventOps) {
        if self.source == Source::Watched {
            let _ = ops.remove(Events::new(&self.file, EventSet::IN));
        }
        self.source = Source::Ended;
        self.serial.feed(&self.eof);
    }
}

impl MutEventSubscriber for InputPump {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.wanted.as_raw_fd() {
            let _ = self.wanted.read();
            self.resume(ops);
        } else {
            self.read(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(&*self.wanted, EventSet::IN));
    }
}

/// A second descriptor of the same open file, for a stream that its owner may close.
///
/// # Errors
/// When `fd` is not open or the process has no number left.
pub fn duplicate(fd: std::os::fd::RawFd, at: &str) -> Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: a plain fcntl; the result is checked.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        let mut error = Error::os(ErrorKind::Config, at, &io::Error::last_os_error());
        error.detail = format!("file descriptor {fd}: {}", error.detail);
        return Err(error);
    }
    // SAFETY: fcntl has just given us this number and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Device;
    use std::os::unix::net::UnixStream;

    /// Turn until nothing has come for longer than output is gathered.
    fn turn(manager: &EventManager) {
        while manager.run_with_timeout(20).unwrap() > 0 {}
    }

    fn connected(output: Option<OwnedFd>, input: Option<OwnedFd>) -> (EventManager, Arc<Serial>) {
        let manager = EventManager::new().unwrap();
        let serial = Arc::new(Serial::new(None, output.is_some()).unwrap());
        let output = output.map(SerialOutput::Fd);
        let input = input.map(SerialInput::Fd);
        let config = SerialConfig { output, input, input_eof: b"\x04".to_vec() };
        connect(&serial, config, &manager).unwrap();
        (manager, serial)
    }

    #[test]
    fn output_waits_for_a_slow_reader_and_loses_nothing() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        writer.set_nonblocking(true).unwrap();
        let (manager, serial) = connected(Some(writer.into()), None);
        let text = vec![b'x'; 60_000];
        for chunk in text.chunks(1000) {
            for byte in chunk {
                serial.write(0, &[*byte]);
            }
            turn(&manager);
        }
        let mut received = Vec::new();
        let mut buffer = [0; 4096];
        while received.len() < text.len() {
            let count = reader.read(&mut buffer).unwrap();
            received.extend_from_slice(&buffer[..count]);
            turn(&manager);
        }
        assert_eq!(received, text);
        assert_eq!(serial.backlog(), 0);
    }

    #[test]
    fn a_reader_that_went_away_is_a_failure_of_the_output() {
        let (reader, writer) = UnixStream::pair().unwrap();
        drop(reader);
        let (manager, serial) = connected(Some(writer.into()), None);
        serial.write(0, b"x");
        turn(&manager);
        assert_eq!(serial.take_failure().unwrap().errno, Some(libc::EPIPE));
    }

    #[test]
    fn input_arrives_and_its_end_is_told() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        let (manager, serial) = connected(None, Some(reader.into()));
        writer.write_all(b"ab").unwrap();
        drop(writer);
        turn(&manager);
        assert_eq!(serial.input_waiting(), 3);
    }

    #[test]
    fn a_regular_file_is_read_as_the_guest_asks_for_it() {
        let file = File::open("/proc/self/exe").unwrap();
        let (manager, serial) = connected(None, Some(file.into()));
        turn(&manager);
        assert_eq!(serial.input_waiting(), 1024);
    }
}

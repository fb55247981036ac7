//! Serves serial streams that are file descriptors, as subscribers of the event manager. Runs on
//! the loop's thread, which never blocks in a read or write.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber, SubscriberId};
use vmm_sys_util::eventfd::EventFd;

use super::open::{Direction, IoMode, is_ready, output_file, unblocked};
use super::serial::Serial;
use crate::config::{SerialConfig, SerialInput, SerialOutput};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;

/// The most bytes of one write.
const CHUNK: usize = 1 << 16;
/// Every kind of socket accepts a message of this size.
const MESSAGE: usize = 1024;
/// A terminal that polls ready has room for this much, even if it expands each byte to eight
/// columns.
const POLLED_CHUNK: usize = 32;
/// The delay before another attempt, if a write accepted nothing although there was room.
const RETRY: Duration = Duration::from_millis(10);
/// Input is read ahead of the guest up to here.
const READ_AHEAD: usize = 4096;
/// A buffer of this size truncates no message.
const LONGEST_MESSAGE: usize = 1 << 16;

/// Connect the port's streams. Returns the subscribers added for them.
pub(crate) fn connect(
    serial: &Arc<Serial>,
    config: SerialConfig,
    manager: &EventManager,
) -> Result<Vec<SubscriberId>> {
    let mut ids = Vec::new();
    let output = match config.output {
        Some(SerialOutput::Fd(fd)) => Some(File::from(fd)),
        Some(SerialOutput::File(path)) => Some(output_file(&path)?),
        Some(SerialOutput::Subscriber) | None => None,
    };
    if let Some(file) = output {
        let (file, kind) = unblocked(file, Direction::Output);
        let pump = OutputPump { serial: Arc::clone(serial), file, kind, waits_for_room: false };
        ids.push(manager.add_subscriber(Box::new(pump)));
    }
    if let Some(SerialInput::Fd(fd)) = config.input {
        let (file, kind) = unblocked(File::from(fd), Direction::Input);
        ids.push(manager.add_subscriber(Box::new(InputPump {
            serial: Arc::clone(serial),
            wanted: Arc::clone(serial.input_wanted()?),
            file,
            kind,
            eof: config.input_eof,
            source: Source::Idle,
        })));
    }
    Ok(ids)
}

/// Whether the output has a consumer.
pub(crate) fn has_consumer(config: &SerialConfig) -> bool {
    config.output.is_some()
}

/// Writes the guest's output.
struct OutputPump {
    serial: Arc<Serial>,
    file: File,
    kind: IoMode,
    /// Whether the file is watched for room.
    waits_for_room: bool,
}

impl OutputPump {
    /// Write as much as there is room for. `has_room`: the file was found ready for more.
    fn pump(&mut self, has_room: bool, ops: &mut EventOps) {
        let mut is_first = true;
        loop {
            let chunk = self.serial.take_chunk(self.chunk());
            if chunk.bytes.is_empty() {
                return self.watch(false, ops);
            }
            let result = self.write(&chunk.bytes);
            self.serial.finish_write(&chunk, *result.as_ref().unwrap_or(&0));
            match result {
                // No file should do so. Retrying at once would spin.
                Ok(0) => return self.retry(ops),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // A terminal with room for one column refuses a newline, which takes two.
                    let lies = has_room && is_first;
                    return if lies { self.retry(ops) } else { self.watch(true, ops) };
                }
                Err(e) => {
                    self.serial.fail(Error::os(ErrorKind::Io, Direction::Output.key(), &e));
                    return self.watch(false, ops);
                }
            }
            is_first = false;
        }
    }

    fn chunk(&self) -> usize {
        match self.kind {
            IoMode::Socket { has_messages: true } => MESSAGE,
            IoMode::Socket { .. } | IoMode::NonBlocking | IoMode::File => CHUNK,
            IoMode::Polled => POLLED_CHUNK,
        }
    }

    /// Write as much as there is room for, without waiting.
    fn write(&mut self, chunk: &[u8]) -> io::Result<usize> {
        match self.kind {
            IoMode::Socket { .. } => {
                let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                // SAFETY: the pointer and the length are those of one slice, which is only read.
                let sent = unsafe {
                    libc::send(self.file.as_raw_fd(), chunk.as_ptr().cast(), chunk.len(), flags)
                };
                usize::try_from(sent).map_err(|_| io::Error::last_os_error())
            }
            IoMode::NonBlocking | IoMode::File => self.file.write(chunk),
            IoMode::Polled if is_ready(&self.file, libc::POLLOUT) => self.file.write(chunk),
            IoMode::Polled => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn retry(&mut self, ops: &mut EventOps) {
        self.watch(false, ops);
        self.serial.notify_after(RETRY);
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
            Err(e) => {
                self.serial.fail(Error::new(ErrorKind::Io, Direction::Output.key(), e.to_string()))
            }
        }
    }
}

impl MutEventSubscriber for OutputPump {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.pump(events.fd() == self.file.as_raw_fd(), ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Ok(fd) = self.serial.output_fd() {
            let _ = ops.add(Events::new_raw(fd, EventSet::IN));
        }
    }
}

/// How the input is read.
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

/// Reads the guest's input.
struct InputPump {
    serial: Arc<Serial>,
    wanted: Arc<EventFd>,
    file: File,
    kind: IoMode,
    eof: Vec<u8>,
    source: Source,
}

impl InputPump {
    /// The guest has read everything: continue reading.
    fn resume(&mut self, ops: &mut EventOps) {
        match self.source {
            Source::Idle => match ops.add(Events::new(&self.file, EventSet::IN)) {
                Ok(()) => self.source = Source::Watched,
                // EPERM, the only error for an open fd: epoll does not support the file.
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
        match self.read_some() {
            Ok(chunk) if chunk.is_empty() => {
                if self.kind != (IoMode::Socket { has_messages: true }) {
                    self.end(ops);
                }
            }
            Ok(chunk) => {
                self.serial.feed(&chunk);
                if self.source == Source::Watched && self.serial.input_waiting() >= READ_AHEAD {
                    let _ = ops.remove(Events::new(&self.file, EventSet::IN));
                    self.source = Source::Idle;
                }
            }
            Err(e)
                if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            // The other end of the terminal has been closed.
            Err(e) if e.raw_os_error() == Some(libc::EIO) && self.kind != IoMode::File => {
                self.end(ops);
            }
            Err(e) => {
                self.serial.fail_input(Error::os(ErrorKind::Io, Direction::Input.key(), &e));
                self.unwatch(ops);
            }
        }
    }

    /// Read the available input, without waiting. Empty at the end, or for an empty message.
    fn read_some(&mut self) -> io::Result<Vec<u8>> {
        let size = match self.kind {
            IoMode::Socket { has_messages: true } => LONGEST_MESSAGE,
            _ => 1024,
        };
        let mut buffer = vec![0; size];
        let count = match self.kind {
            IoMode::Socket { .. } => {
                // SAFETY: the pointer and the length are those of one buffer, which lives through
                // the call.
                let received = unsafe {
                    let start = buffer.as_mut_ptr().cast();
                    libc::recv(self.file.as_raw_fd(), start, buffer.len(), libc::MSG_DONTWAIT)
                };
                usize::try_from(received).map_err(|_| io::Error::last_os_error())?
            }
            IoMode::Polled if !is_ready(&self.file, libc::POLLIN) => {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            IoMode::NonBlocking | IoMode::File | IoMode::Polled => self.file.read(&mut buffer)?,
        };
        buffer.truncate(count);
        Ok(buffer)
    }

    fn end(&mut self, ops: &mut EventOps) {
        self.unwatch(ops);
        self.serial.feed(&self.eof);
    }

    /// Stop reading.
    fn unwatch(&mut self, ops: &mut EventOps) {
        if self.source == Source::Watched {
            let _ = ops.remove(Events::new(&self.file, EventSet::IN));
        }
        self.source = Source::Ended;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Device;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    /// Run the loop until nothing has arrived for longer than the output delay.
    fn turn(manager: &EventManager) {
        while manager.run_with_timeout(20).unwrap() > 0 {}
    }

    fn connected(output: Option<OwnedFd>, input: Option<OwnedFd>) -> (EventManager, Arc<Serial>) {
        let manager = EventManager::new().unwrap();
        let serial = Arc::new(
            Serial::new(
                super::super::serial_kind::SerialKind::Uart("COM1"),
                None,
                output.is_some(),
            )
            .unwrap(),
        );
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

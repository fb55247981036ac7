"""Python objects as streams of the serial port, served by subscribers of the machine's event manager.

File descriptors, sockets, paths and file objects over a descriptor are served by the native module
instead.
"""

from __future__ import annotations

import codecs
import inspect
import io
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from pyvmm._pyvmm import Events, TimerFd
from pyvmm.events import EventSet
from pyvmm.exceptions import ConfigError, StreamError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm._pyvmm import EventManager, EventOps, Serial, SubscriberId
    from pyvmm.config import SerialConfig

READ_SIZE = 1024
WRITE_SIZE = 1 << 16
# The delay before another attempt, if a stream had no input or no room.
RETRY_S = 0.01
# How long a write may return 0 before it is an error.
STUCK_TIMEOUT_S = 1.0
MAX_DESCRIPTOR = 2**31 - 1


def endpoint(stream: object, at: str) -> int | str | None:
    """The descriptor or path that the native module serves, or None if Python serves the stream."""
    if isinstance(stream, bool):
        raise ConfigError(f"{at}: expected a stream, not {stream}", at=at)
    if isinstance(stream, int):
        if not 0 <= stream <= MAX_DESCRIPTOR:
            raise ConfigError(f"{at}: {stream:#x} is not a file descriptor", at=at)
        return stream
    if isinstance(stream, (str, os.PathLike)):
        return os.fsdecode(stream)
    if isinstance(stream, socket.socket):
        if stream.fileno() < 0:
            raise ConfigError(f"{at}: the socket is closed", at=at)
        return stream.fileno()
    if at.endswith("output"):
        writer = _writer(stream, at)
        return _descriptor(writer.file) if isinstance(writer, FileWriter) else None
    if isinstance(stream, (bytes, bytearray, memoryview)):
        return None
    stream = _binary(stream)
    _check(stream, at, "read")
    return _descriptor(stream)


def connect(serial: Serial, manager: EventManager, config: SerialConfig, key: str) -> list[SubscriberId]:
    """Add subscribers for the streams that Python serves. `key` is the port's. Return their ids."""
    ids = []
    if config.output is not None and endpoint(config.output, f"{key}.output") is None:
        ids.append(manager.add_subscriber(Writer(serial, _writer(config.output, f"{key}.output"))))
    if isinstance(config.input, (bytes, bytearray, memoryview)):
        serial.send(bytes(config.input) + config.input_eof)
    elif config.input is not None and endpoint(config.input, f"{key}.input") is None:
        ids.append(manager.add_subscriber(Reader(serial, _binary(config.input), config.input_eof)))
    return ids


class Writer:
    """Passes the guest's output to a callable or a file object."""

    def __init__(self, serial: Serial, write: Callable[[bytes], object] | FileWriter) -> None:
        self._serial = serial
        self._write = write

    def init(self, ops: EventOps) -> None:
        """Watch for output."""
        ops.add(Events(self._serial, EventSet.IN))

    def process(self, events: Events, ops: EventOps) -> None:
        """Pass on the output. The port keeps what a file object does not accept."""
        if not isinstance(self._write, FileWriter):
            if output := self._serial.take_output():
                self._write(output)
            return
        chunk = self._serial._take(WRITE_SIZE)
        try:
            self._write(chunk)
        finally:
            is_done = self._write.accepted == len(chunk) and not self._write.must_flush
            self._serial._finish_write(self._write.accepted, None if is_done else RETRY_S)


class FileWriter:
    """Writes to a file object, which may accept only a part, or nothing for now."""

    def __init__(self, file: Any) -> None:
        self.file = file
        # For a raw file, None means "nothing for now"; other objects return it by default.
        self._is_raw = isinstance(file, io.RawIOBase)
        self._stuck_since: float | None = None
        self.accepted = 0
        self.must_flush = False

    def __call__(self, chunk: bytes) -> None:
        """Write as much as the file accepts without waiting, and set `accepted` to the number of bytes."""
        self.accepted = 0
        try:
            while self.accepted < len(chunk):
                count = self._count(self.file.write(chunk[self.accepted :]), len(chunk) - self.accepted)
                if count is None:
                    return
                self.accepted += count
                self.must_flush = True
                if count == 0:
                    self._check_stuck()
                    return
                self._stuck_since = None
            flush = getattr(self.file, "flush", None)
            if self.must_flush and flush is not None:
                flush()
            self.must_flush = False
        except BlockingIOError as error:
            # After a write, characters_written is the accepted count. After a flush, everything is
            # in the file object's own buffer.
            if self.accepted < len(chunk):
                self.accepted += min(max(getattr(error, "characters_written", 0), 0), len(chunk) - self.accepted)
            self.must_flush = True

    def _count(self, written: object, most: int) -> int | None:
        """The number of bytes that a write has accepted; None means nothing for now."""
        if written is None:
            return None if self._is_raw else most
        if not isinstance(written, int) or isinstance(written, bool) or not 0 <= written <= most:
            raise StreamError(f"serial.output: write() of {most} bytes returned {written!r}", at="serial.output")
        return written

    def _check_stuck(self) -> None:
        now = time.monotonic()
        if self._stuck_since is None:
            self._stuck_since = now
        elif now - self._stuck_since >= STUCK_TIMEOUT_S:
            self._stuck_since = None
            raise StreamError("serial.output: write() returned 0 repeatedly", at="serial.output")


class TextWriter:
    """Writes to a text object, such as the `sys.stdout` of a notebook, and flushes it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        # A character may be divided between two pieces. What is no UTF-8 is shown as U+FFFD.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, piece: bytes) -> None:
        """Write what the piece completes."""
        self._file.write(self._decoder.decode(piece))
        flush = getattr(self._file, "flush", None)
        if flush is not None:
            flush()


class Reader:
    """Reads more input from a callable or a file object each time the guest has read all of it."""

    def __init__(self, serial: Serial, source: Any, eof: bytes) -> None:
        self._serial = serial
        self._wanted = serial.input_wanted
        self._is_file = hasattr(source, "read")
        self._source = source
        self._eof = eof
        self._again: TimerFd | None = None

    def init(self, ops: EventOps) -> None:
        """Watch for the guest's demand."""
        ops.add(Events(self._wanted, EventSet.IN))

    def process(self, events: Events, ops: EventOps) -> None:
        """Send the next input to the guest, or `input_eof` at the end."""
        if self._again is not None and events.fd == self._again.fileno():
            self._again.read()
        else:
            self._wanted.read()
        try:
            chunk = self._source.read(READ_SIZE) if self._is_file else self._source()
        except BlockingIOError:
            chunk = None
        if chunk is None:
            self._try_again(ops)
        elif chunk:
            self._serial.send(chunk)
        else:
            ops.remove(self._wanted)
            self._serial.send(self._eof)

    def _try_again(self, ops: EventOps) -> None:
        if self._again is None:
            self._again = TimerFd()
            ops.add(Events(self._again, EventSet.IN))
        self._again.set(RETRY_S)


def _binary(stream: Any) -> Any:
    """The binary object below a text object, such as `sys.stdout`; anything else as it is."""
    return stream.buffer if isinstance(stream, io.TextIOWrapper) and not stream.closed else stream


def _writer(stream: Any, at: str) -> Callable[[bytes], object] | FileWriter:
    # The bound `write` of a file object returns a count as well, so use the file object.
    owner = getattr(stream, "__self__", None)
    if isinstance(owner, io.IOBase) and getattr(stream, "__name__", None) == "write":
        stream = owner
    binary = _binary(stream)
    if binary is not stream:
        stream.flush()
    stream = binary
    _check(stream, at, "write")
    if _is_text(stream):
        return TextWriter(stream)
    return FileWriter(stream) if hasattr(stream, "write") else stream


def _check(stream: Any, at: str, method: str) -> None:
    """Refuse anything but a file object with this method, text only for writing, or a callable."""
    if not hasattr(stream, method):
        if not callable(stream):
            kinds = "a path, a file descriptor, a socket, a binary file object or a callable"
            raise ConfigError(f"{at}: expected {kinds}, not {type(stream).__name__}", at=at)
        if inspect.iscoroutinefunction(stream) or inspect.iscoroutinefunction(type(stream).__call__):
            raise ConfigError(f"{at}: a coroutine function cannot be a stream, because it is not awaited", at=at)
    elif _is_text(stream) and method == "read":
        raise ConfigError(f"{at}: expected a binary stream, not text", at=at)
    elif getattr(stream, "closed", False) is True:
        raise ConfigError(f"{at}: the file object is closed", at=at)


def _is_text(stream: Any) -> bool:
    return isinstance(stream, io.TextIOBase) or hasattr(stream, "encoding")


def _descriptor(stream: Any) -> int | None:
    """The descriptor of a file object that passes bytes through unchanged; None for any other.

    The descriptor of a compressing file would bypass the compression, and a file in memory has no
    descriptor.
    """
    is_buffered = type(stream) in {io.BufferedReader, io.BufferedWriter, io.BufferedRandom}
    raw = stream.raw if is_buffered else stream
    if type(raw) not in {io.FileIO, socket.SocketIO}:
        return None
    try:
        if stream.writable():
            stream.flush()
        fd: int = raw.fileno()
    except (OSError, ValueError):
        # The buffer cannot be flushed, or the file below is closed: Python's `write` reports it.
        return None
    return fd

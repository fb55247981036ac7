"""Python objects at the serial port's two ends, as subscribers of the machine's event manager.

File descriptors, sockets, paths and the file objects over a descriptor do not come here: the native module serves them.
"""

from __future__ import annotations

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
# After a stream that had nothing to read or no room: how soon it is tried again.
RETRY_S = 0.01
# How long a write may go on taking nothing without saying why.
PATIENCE_S = 1.0
MOST_DESCRIPTOR = 2**31 - 1


def endpoint(stream: object, at: str) -> int | str | None:
    """What the native module takes of a stream: a descriptor, a path, or None for what Python serves."""
    if isinstance(stream, bool):
        raise ConfigError(f"{at}: a stream is needed, not {stream}", at=at)
    if isinstance(stream, int):
        if not 0 <= stream <= MOST_DESCRIPTOR:
            raise ConfigError(f"{at}: {stream:#x} is no file descriptor", at=at)
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
    _check(stream, at, "read")
    return _descriptor(stream)


def connect(serial: Serial, manager: EventManager, config: SerialConfig) -> list[SubscriberId]:
    """Subscribe the streams of a configuration that Python serves; returns their ids."""
    ids = []
    if config.output is not None and endpoint(config.output, "serial.output") is None:
        ids.append(manager.add_subscriber(Writer(serial, _writer(config.output, "serial.output"))))
    if isinstance(config.input, (bytes, bytearray, memoryview)):
        serial.send(bytes(config.input) + config.input_eof)
    elif config.input is not None and endpoint(config.input, "serial.input") is None:
        ids.append(manager.add_subscriber(Reader(serial, config.input, config.input_eof)))
    return ids


class Writer:
    """Hands what the guest prints to a callable or a file object."""

    def __init__(self, serial: Serial, write: Callable[[bytes], object] | FileWriter) -> None:
        self._serial = serial
        self._write = write

    def init(self, ops: EventOps) -> None:
        """Watch for output."""
        ops.add(Events(self._serial, EventSet.IN))

    def process(self, events: Events, ops: EventOps) -> None:
        """Take all there is; what a file object does not take stays the port's, for the next time."""
        if not isinstance(self._write, FileWriter):
            if output := self._serial.take_output():
                self._write(output)
            return
        piece = self._serial._take(WRITE_SIZE)
        try:
            self._write(piece)
        finally:
            is_done = self._write.taken == len(piece) and not self._write.must_flush
            self._serial._settle(self._write.taken, None if is_done else RETRY_S)


class FileWriter:
    """Writes pieces to a file object, which may take less than it is given, or nothing for now."""

    def __init__(self, file: Any) -> None:
        self.file = file
        # None means "nothing for now" for these alone; others return it for want of anything to
        # say.
        self._is_raw = isinstance(file, io.RawIOBase)
        self._stuck_since: float | None = None
        self.taken = 0
        self.must_flush = False

    def __call__(self, piece: bytes) -> None:
        """Write what the file takes without waiting; `taken` says how much of the piece that was."""
        self.taken = 0
        try:
            while self.taken < len(piece):
                count = self._count(self.file.write(piece[self.taken :]), len(piece) - self.taken)
                if count is None:
                    return
                self.taken += count
                self.must_flush = True
                if count == 0:
                    self._be_patient()
                    return
                self._stuck_since = None
            flush = getattr(self.file, "flush", None)
            if self.must_flush and flush is not None:
                flush()
            self.must_flush = False
        except BlockingIOError as error:
            # Of a write: how much it has taken. A flush has it all in the file object's own buffer.
            if self.taken < len(piece):
                self.taken += min(max(getattr(error, "characters_written", 0), 0), len(piece) - self.taken)
            self.must_flush = True

    def _count(self, written: object, most: int) -> int | None:
        """How much a write has taken; None: nothing for now."""
        if written is None:
            return None if self._is_raw else most
        if not isinstance(written, int) or isinstance(written, bool) or not 0 <= written <= most:
            raise StreamError(f"serial.output: write() of {most} bytes returned {written!r}", at="serial.output")
        return written

    def _be_patient(self) -> None:
        now = time.monotonic()
        if self._stuck_since is None:
            self._stuck_since = now
        elif now - self._stuck_since >= PATIENCE_S:
            self._stuck_since = None
            raise StreamError("serial.output: write() returns 0 again and again", at="serial.output")


class Reader:
    """Asks a callable or a file object for more input each time the guest has read what it had."""

    def __init__(self, serial: Serial, source: Any, eof: bytes) -> None:
        self._serial = serial
        self._wanted = serial.input_wanted
        self._is_file = hasattr(source, "read")
        self._source = source
        self._eof = eof
        self._again: TimerFd | None = None

    def init(self, ops: EventOps) -> None:
        """Watch for the guest's want."""
        ops.add(Events(self._wanted, EventSet.IN))

    def process(self, events: Events, ops: EventOps) -> None:
        """Give it the next piece, or tell it the end."""
        if self._again is not None and events.fd == self._again.fileno():
            self._again.read()
        else:
            self._wanted.read()
        try:
            piece = self._source.read(READ_SIZE) if self._is_file else self._source()
        except BlockingIOError:
            piece = None
        if piece is None and self._is_file:
            self._try_again(ops)
        elif piece:
            self._serial.send(piece)
        else:
            ops.remove(self._wanted)
            self._serial.send(self._eof)

    def _try_again(self, ops: EventOps) -> None:
        if self._again is None:
            self._again = TimerFd()
            ops.add(Events(self._again, EventSet.IN))
        self._again.set(RETRY_S)


def _writer(stream: Any, at: str) -> Callable[[bytes], object] | FileWriter:
    # The bound method of a file object returns what that takes, too.
    owner = getattr(stream, "__self__", None)
    if isinstance(owner, io.IOBase) and getattr(stream, "__name__", None) == "write":
        stream = owner
    _check(stream, at, "write")
    return FileWriter(stream) if hasattr(stream, "write") else stream


def _check(stream: Any, at: str, method: str) -> None:
    """Refuse what is neither a binary file object with this method nor a callable."""
    if not hasattr(stream, method):
        if not callable(stream):
            kinds = "a path, a file descriptor, a socket, a binary file object or a callable"
            raise ConfigError(f"{at}: {kinds} is needed, not {type(stream).__name__}", at=at)
        if inspect.iscoroutinefunction(stream) or inspect.iscoroutinefunction(type(stream).__call__):
            raise ConfigError(f"{at}: a coroutine function cannot be a stream: nobody awaits it", at=at)
    elif hasattr(stream, "encoding"):
        raise ConfigError(f"{at}: a binary stream is needed, not text; use its .buffer", at=at)
    elif getattr(stream, "closed", False) is True:
        raise ConfigError(f"{at}: the file object is closed", at=at)


def _descriptor(stream: Any) -> int | None:
    """The descriptor behind a file object that passes bytes on as they are; None for any other.

    A file that compresses has the descriptor of what it writes, and one in memory has none.
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
        # It is full, or closed below: Python tells.
        return None
    return fd

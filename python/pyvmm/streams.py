"""Python objects at the serial port's two ends, as subscribers of the machine's event manager.

File descriptors, sockets and paths do not come here: the native module serves them.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from pyvmm._pyvmm import Events
from pyvmm.events import EventSet
from pyvmm.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm._pyvmm import EventManager, EventOps, Serial, SubscriberId
    from pyvmm.config import SerialConfig

READ_SIZE = 1024


def endpoint(stream: object, at: str) -> int | str | None:
    """What the native module takes of a stream: a descriptor, a path, or None for what Python serves."""
    if isinstance(stream, bool):
        raise ConfigError(f"{at}: a stream is needed, not {stream}", at=at)
    if isinstance(stream, int):
        return stream
    if isinstance(stream, (str, os.PathLike)):
        return os.fsdecode(stream)
    if isinstance(stream, socket.socket):
        return stream.fileno()
    if at.endswith("output"):
        _writer(stream, at)
        return None
    if isinstance(stream, (bytes, bytearray, memoryview)) or callable(stream):
        return None
    if not hasattr(stream, "read"):
        raise _refusal(stream, at)
    return _descriptor(stream)


def connect(serial: Serial, manager: EventManager, config: SerialConfig) -> list[SubscriberId]:
    """Subscribe the streams of a configuration that Python serves; returns their ids."""
    ids = []
    if config.output is not None and endpoint(config.output, "serial.output") is None:
        ids.append(manager.add_subscriber(Writer(serial, _writer(config.output, "serial.output"))))
    if isinstance(config.input, (bytes, bytearray, memoryview)):
        serial.send(bytes(config.input) + config.input_eof)
    elif config.input is not None and endpoint(config.input, "serial.input") is None:
        ids.append(manager.add_subscriber(Reader(serial, _reader(config.input), config.input_eof)))
    return ids


class Writer:
    """Hands what the guest prints to a callable."""

    def __init__(self, serial: Serial, write: Callable[[bytes], object]) -> None:
        self._serial = serial
        self._write = write

    def init(self, ops: EventOps) -> None:
        """Watch for output."""
        ops.add(Events(self._serial, EventSet.IN))

    def process(self, events: Events, ops: EventOps) -> None:
        """Take all there is."""
        if output := self._serial.read():
            self._write(output)


class Reader:
    """Asks a callable for more input each time the guest has read what it had."""

    def __init__(self, serial: Serial, read: Callable[[], bytes], eof: bytes) -> None:
        self._serial = serial
        self._wanted = serial.input_wanted
        self._read = read
        self._eof = eof

    def init(self, ops: EventOps) -> None:
        """Watch for the guest's want."""
        ops.add(Events(self._wanted, EventSet.IN))

    def process(self, events: Events, ops: EventOps) -> None:
        """Give it the next piece, or tell it the end."""
        self._wanted.read()
        if piece := self._read():
            self._serial.send(piece)
        else:
            ops.remove(self._wanted)
            self._serial.send(self._eof)


def _writer(stream: Any, at: str) -> Callable[[bytes], object]:
    if hasattr(stream, "write"):
        if hasattr(stream, "encoding"):
            raise ConfigError(f"{at}: a binary stream is needed, not text; use its .buffer", at=at)
        return _FileWriter(stream)
    if callable(stream):
        return stream  # type: ignore[no-any-return]
    raise _refusal(stream, at)


class _FileWriter:
    """Writes all of each piece: a raw file may take less at once."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __call__(self, piece: bytes) -> None:
        left = memoryview(piece)
        while left:
            written = self._file.write(left)
            left = left[len(left) if written is None else written :]
        flush = getattr(self._file, "flush", None)
        if flush is not None:
            flush()


def _reader(stream: Any) -> Callable[[], bytes]:
    if hasattr(stream, "read"):
        return lambda: stream.read(READ_SIZE)
    return stream  # type: ignore[no-any-return]


def _descriptor(stream: Any) -> int | None:
    """The descriptor behind a file object; None for one in memory."""
    try:
        fd: int = stream.fileno()
    except (AttributeError, OSError):
        return None
    return fd


def _refusal(stream: object, at: str) -> ConfigError:
    kinds = "a path, a file descriptor, a socket, a binary file object or a callable"
    return ConfigError(f"{at}: {kinds} is needed, not {type(stream).__name__}", at=at)

"""The files of a configuration: its own, which is read, and those that its machine would write."""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

# The limit for a configuration file, in bytes.
MAX_FILE_SIZE = 1 << 24
WRITER_COMES_S = 0.5


def read(path: Path) -> bytes:
    """Read a whole file. Waits briefly for the writer of a FIFO."""
    flags = os.O_NONBLOCK | os.O_NOCTTY
    with open(path, "rb", buffering=0, opener=lambda name, mode: os.open(name, mode | flags)) as file:
        is_fifo = stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
        deadline = time.monotonic() + WRITER_COMES_S
        text = bytearray()
        while len(text) <= MAX_FILE_SIZE:
            piece = file.read(1 << 16)
            if piece:
                text += piece
            elif piece is None:
                select.select([file], [], [])
            elif text or not is_fifo:
                return bytes(text)
            elif time.monotonic() > deadline:
                raise OSError(errno.ENXIO, "a FIFO without a writer")
            else:
                time.sleep(0.005)
        raise OSError(errno.EFBIG, f"more than {MAX_FILE_SIZE} bytes")


def decoded(path: Path, cls: Any, what: str) -> Any:
    """The object in a .toml or .json file.

    Raises:
        ValueError: the file has another suffix, or is not TOML or JSON; msgspec's ValidationError
            if it is no such object.
        OSError: the file cannot be read.
    """
    decode: Any = {".toml": msgspec.toml.decode, ".json": msgspec.json.decode}.get(path.suffix)
    if decode is None:
        raise ValueError(f"the name of {what} must end in .toml or .json")
    try:
        return decode(read(path), type=cls)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def no_output(path: Path) -> str | None:
    """Why no output can be written to a path. It is not opened, because that would truncate it."""
    if path.is_dir():
        return os.strerror(errno.EISDIR)
    if not path.parent.is_dir():
        return os.strerror(errno.ENOENT)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return os.strerror(errno.EACCES)
    return None

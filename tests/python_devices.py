"""Devices in Python that several tests use."""

from __future__ import annotations

import struct

from guests import exit_with


class Log:
    """Remembers its accesses; reads give ascending bytes."""

    def __init__(self) -> None:
        self.accesses: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size))
        return int.from_bytes(bytes(range(0x41, 0x41 + size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size, value))


# Prints what port 0x80 gives, four times, and stops in between.
READS_TAPE = b"".join(b"\xba\x80\x00\xec\xba\xf8\x03\xee" for _ in range(4)) + exit_with(1)


class Tape:
    """A device that gives its bytes one after the other."""

    def __init__(self, tape: bytes) -> None:
        self.tape = tape
        self.at = 0

    def read(self, offset: int, size: int) -> int:
        self.at += 1
        return self.tape[self.at - 1]

    def save(self) -> bytes:
        return struct.pack("<I", self.at)

    def restore(self, state: bytes) -> None:
        (self.at,) = struct.unpack("<I", state)

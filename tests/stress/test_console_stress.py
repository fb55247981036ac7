"""Every byte that a guest prints arrives once and in order, on every kind of output.

A consumer takes it in pieces of any size at any time, while the machine is paused, resumed, saved,
stopped and run again. A short sequence in CI; PYVMM_STRESS_S sets for how many seconds each kind is
tried with further seeds.
"""

from __future__ import annotations

import io
import os
import pty
import random
import socket
import struct
import threading
import time
import tty
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from guests import exit_with, flat
from pyvmm import ExitReason, SerialConfig, StateError, Vmm, VmRunState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.kvm
SECONDS = float(os.environ.get("PYVMM_STRESS_S", "0"))
DEADLINE_S = 200.0
COUNT = 90_000  # more than the port and a pipe hold together, twice over for sockets that hold little

SEQUENCE = bytes(n & 0xFF for n in range(COUNT))
PRINT_SEQUENCE = (
    (
        b"\x66\xb9"
        + struct.pack("<I", COUNT)  # mov ecx, COUNT
        + b"\xba\xf8\x03\xb3\x00"  #  mov dx, 0x3f8; mov bl, 0
        b"\x88\xd8\xee"  #            back: mov al, bl; out dx, al
        b"\xfe\xc3\x66\x49\x75\xf7"  # inc bl; dec ecx; jnz back
    )
    + exit_with(0)
)


class Moody(io.RawIOBase):
    """A file object whose `write` does all that one may do."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.got = bytearray()
        self.failures = 0

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int | None:
        mood = self._chance.randrange(8)
        if mood == 0:
            return None
        if mood == 1:
            return 0
        if mood == 2:
            error = BlockingIOError(11, "full")
            error.characters_written = count = self._chance.randrange(len(piece) + 1)
            self.got += bytes(piece[:count])
            raise error
        if mood == 3:
            self.failures += 1
            raise OSError(28, "no space")
        count = self._chance.randint(1, len(piece))
        self.got += bytes(piece[:count])
        return count


class Ends(NamedTuple):
    """An output, what reads its other end (empty at the end), what closes the two, and what should arrive."""

    output: Any
    read: Callable[[int], bytes]
    close: Callable[[], object]
    close_reader: Callable[[], object]
    expected: bytes = SEQUENCE


def of_descriptors(reader: int, writer: int, output: Any, expected: bytes = SEQUENCE) -> Ends:
    def read(count: int) -> bytes:
        try:
            return os.read(reader, count)
        except OSError:  # a terminal whose other end is closed
            return b""

    close = output.close if hasattr(output, "close") else lambda: os.close(writer)
    return Ends(output, read, close, lambda: os.close(reader), expected)


def ends(kind: str, directory: Path, chance: random.Random) -> Ends:
    if kind == "socket":
        ours, theirs = socket.socketpair()
        return Ends(theirs, ours.recv, theirs.close, ours.close)
    if kind == "fifo":
        path = directory / f"fifo{chance.random()}"
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(reader, True)
        keeper = os.open(path, os.O_WRONLY)
        return of_descriptors(reader, keeper, path)
    if kind in {"raw terminal", "cooked terminal"}:
        reader, writer = pty.openpty()
        if kind == "cooked terminal":
            return of_descriptors(reader, writer, writer, SEQUENCE.replace(b"\n", b"\r\n"))
        tty.setraw(writer)
        return of_descriptors(reader, writer, writer)
    reader, writer = os.pipe()
    if kind == "nonblocking":
        os.set_blocking(writer, False)
    if kind == "pipe":
        return of_descriptors(reader, writer, writer)
    return of_descriptors(reader, writer, os.fdopen(writer, "wb", 0 if kind == "nonblocking" else -1))


def consume(read: Callable[[int], bytes], chance: random.Random, got: bytearray) -> None:
    while piece := read(chance.choice((1, 7, 100, 4096, 65536))):
        got += piece
        if chance.randrange(8) == 0:
            time.sleep(chance.random() / 50)


def disturb(vmm: Vmm, chance: random.Random, over: threading.Event) -> None:
    """Pause, resume, snapshot and stop the machine at random until the run is over."""
    while not over.is_set():
        with suppress(StateError):  # the guest has ended, or the next run has not begun
            kind = chance.randrange(4)
            if kind == 0:
                vmm.pause()
                vmm.resume()
            elif kind == 1:
                vmm.snapshot()
            elif kind == 2:
                vmm.stop()
        over.wait(chance.random() / 20)


def run_to_the_end(vmm: Vmm, chance: random.Random, failure: type[BaseException] | tuple[()]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            exit = vmm.run(chance.choice((0.0, 0.05, 0.2, 1.0)))
        except failure:
            if vmm.state is VmRunState.EXITING:  # what it printed last could not be written
                return
            continue
        if exit.reason not in {ExitReason.TIMEOUT, ExitReason.STOPPED}:
            assert exit.reason is ExitReason.CODE
            return
    raise AssertionError("the guest does not come to its end")


def once(output: Any, chance: random.Random, failure: type[BaseException] | tuple[()] = ()) -> bytes:
    """Run the guest to its end under disturbance; what is left for the host."""
    over = threading.Event()
    with Vmm(flat(PRINT_SEQUENCE, serial=SerialConfig(output=output))) as vmm:
        disturber = threading.Thread(target=disturb, args=(vmm, random.Random(chance.random()), over))
        disturber.start()
        try:
            run_to_the_end(vmm, chance, failure)
        finally:
            over.set()
            disturber.join(DEADLINE_S)
        assert not disturber.is_alive(), "a call waits for the console's reader"
        return vmm.serial.take_output()


def seeds() -> Any:
    """One seed, and more for as long as there is time."""
    end = time.monotonic() + SECONDS
    seed = 0
    while seed == 0 or time.monotonic() < end:
        yield seed
        seed += 1


@pytest.mark.parametrize(
    "kind", ["pipe", "nonblocking", "buffered", "socket", "fifo", "raw terminal", "cooked terminal"]
)
def test_every_byte_arrives_once_and_in_order(kind: str, tmp_path: Path) -> None:
    for seed in seeds():
        chance = random.Random(f"{kind} {seed}")
        output, read, close, close_reader, expected = ends(kind, tmp_path, chance)
        got = bytearray()
        consumer = threading.Thread(target=consume, args=(read, random.Random(seed), got))
        consumer.start()
        left = once(output, chance)
        if kind == "cooked terminal":
            left = left.replace(b"\n", b"\r\n")
        close()
        consumer.join(DEADLINE_S)
        close_reader()
        assert bytes(got) + left == expected, f"seed {seed}: {len(got)} bytes came, {len(left)} are left"


@pytest.mark.parametrize("kind", ["callable", "moody"])
def test_every_byte_is_given_to_python_once_and_in_order(kind: str) -> None:
    for seed in seeds():
        chance = random.Random(f"{kind} {seed}")
        got = bytearray()
        if kind == "moody":
            moody = Moody(random.Random(seed))
            left = once(moody, chance, OSError)
            assert moody.failures
            got = moody.got
        else:
            left = once(got.extend, chance)
        assert bytes(got) + left == SEQUENCE, f"seed {seed}: {len(got)} bytes came, {len(left)} are left"

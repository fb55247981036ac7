"""A console without a reader: only the guest waits."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from conftest import TESTS
from guests import exit_with, flat, print_text
from pyvmm import Exit, ExitReason, SerialConfig, StateError, Stop, Vmm, VmRunState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0

# Endless lines of one letter, 32 at a time and counted at 0x2000. Each newline takes two columns
# of a terminal.
PRINT_LINES = (
    b"\xba\xf8\x03"  # mov dx, 0x3f8
    b"\xbf\x00\x30\xb8\x78\x0a"  # mov di, 0x3000; mov ax, "x\n"
    b"\xb9\x20\x00\xf3\xab"  # mov cx, 32; rep stosw
    b"\xbe\x00\x30\xb9\x40\x00\xf3\x6e"  # back: mov si, 0x3000; mov cx, 64; rep outsb
    b"\x66\xff\x06\x00\x20"  # inc dword [0x2000]
    b"\xeb\xf1"  # jmp back
)
# The same, a byte an access.
PRINT_BYTES = (
    b"\xba\xf8\x03"  # mov dx, 0x3f8
    b"\xb0\x78\xee"  # back: mov al, 'x'; out dx, al
    b"\xb0\x0a\xee"  # mov al, 10; out dx, al
    b"\x66\xff\x06\x00\x20"  # inc dword [0x2000]
    b"\xeb\xf3"  # jmp back
)
# The same by one instruction: REP OUTSB of 4,096 bytes.
PRINT_STRINGS = (
    b"\xba\xf8\x03"  # mov dx, 0x3f8
    b"\x31\xf6\xb9\x00\x10"  # back: xor si, si; mov cx, 4096
    b"\xf3\x6e"  # rep outsb
    b"\x66\xff\x06\x00\x20"  # inc dword [0x2000]
    b"\xeb\xf2"  # jmp back
)


class Deaf(io.RawIOBase):
    """A file object that has no room."""

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> None:
        return None


def unread(kind: str, directory: Path, stack: ExitStack) -> Any:
    """An output of this kind, which takes something and then no more."""
    if kind == "deaf":
        return Deaf()
    if kind == "socket":
        pair = socket.socketpair()
        stack.enter_context(pair[0])
        return stack.enter_context(pair[1])
    if kind == "fifo":
        path = directory / "fifo"
        os.mkfifo(path)
        stack.callback(os.close, os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        return path
    ends = pty.openpty() if kind in {"cooked", "controller"} else os.pipe()
    reader, writer = reversed(ends) if kind == "controller" else ends
    stack.callback(os.close, reader)
    if kind == "buffered":
        return stack.enter_context(os.fdopen(writer, "wb"))
    stack.callback(os.close, writer)
    return writer


KINDS = ["pipe", "socket", "cooked", "controller", "buffered", "fifo", "deaf"]


@contextmanager
def stuck(kind: str, directory: Path, code: bytes = PRINT_LINES) -> Iterator[Vmm]:
    """A started machine whose guest waits for room in its console."""
    with ExitStack() as stack:
        vmm = Vmm(flat(code, serial=SerialConfig(output=unread(kind, directory, stack))))
        stack.callback(vmm.close)
        turning = threading.Thread(target=lambda: end.append(vmm.run(DEADLINE_S)))
        end: list[Any] = []
        turning.start()
        count = until_stuck(vmm)
        assert count > 0
        yield vmm
        vmm.close()
        turning.join(DEADLINE_S)
        assert not turning.is_alive()


def until_stuck(vmm: Vmm) -> int:
    """Wait until the guest's counter does not move; it also counts for the tests that it may still have moved."""
    last, deadline = -1, time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        count = vmm.memory.read_u32(0x2000)
        if count == last != 0:
            return count
        last = count
        time.sleep(0.1)
    raise AssertionError("the guest does not wait for its console")


def soon(call: Callable[[], object]) -> object:
    """The result of a call in another thread, which must return soon."""
    result: list[object] = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(DEADLINE_S / 2)
    assert result, "it waits for the console's reader"
    return result[0]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_continues_while_the_guest_waits_for_its_console(kind: str, tmp_path: Path) -> None:
    with stuck(kind, tmp_path) as vmm:
        soon(vmm.pause)
        assert vmm.state is VmRunState.PAUSED
        assert vmm.vcpus[0].regs.rip >= 0x1000
        snapshot = soon(vmm.snapshot)
        with snapshot.fork() as fork:  # type: ignore[attr-defined]
            assert fork.run(0.05).reason is ExitReason.TIMEOUT
        # On a busy machine it may not have come to the end of its room yet.
        deadline = time.monotonic() + DEADLINE_S
        while True:
            count = vmm.memory.read_u32(0x2000)
            for _ in range(20):
                soon(vmm.resume)
                soon(vmm.pause)
            if vmm.memory.read_u32(0x2000) <= count + 1:
                break
            assert time.monotonic() < deadline, "a guest that has no room enters only with room"
        soon(vmm.resume)
        soon(vmm.stop)


def test_a_string_instruction_waits_behind_itself(tmp_path: Path) -> None:
    with stuck("pipe", tmp_path, PRINT_STRINGS) as vmm:
        soon(vmm.pause)
        assert len(vmm.serial.take_output()) < 1 << 17
        soon(vmm.resume)


@pytest.mark.parametrize("kind", KINDS)
def test_time_passes_while_the_guest_waits_for_its_console(kind: str, tmp_path: Path) -> None:
    with (
        ExitStack() as stack,
        Vmm(flat(PRINT_LINES, serial=SerialConfig(output=unread(kind, tmp_path, stack)))) as vmm,
    ):
        for seconds in (0.7, 0.0, 0.1):
            assert soon(partial(vmm.run, seconds)) == Exit(ExitReason.TIMEOUT)
        vmm.start()
        assert soon(lambda: vmm.wait(0.1)) is None
        soon(vmm.close)


def test_a_started_machine_whose_loop_does_not_run_can_be_closed() -> None:
    vmm = Vmm(flat(PRINT_LINES, serial=SerialConfig(output=lambda piece: None)))
    vmm.start()
    until_stuck(vmm)
    soon(vmm.pause)
    soon(vmm.snapshot)
    soon(vmm.close)


@pytest.mark.parametrize("kind", ["pause", "snapshot", "stop", "close"])
def test_an_output_callable_may_do_anything_to_its_machine(kind: str) -> None:
    vmm: Vmm
    calls: list[object] = []

    def output(piece: bytes) -> None:
        if not calls:
            until_stuck(vmm)
            calls.append(getattr(vmm, kind)())
            vmm.stop()

    with Vmm(flat(PRINT_LINES, serial=SerialConfig(output=output))) as vmm:
        assert soon(lambda: vmm.run(DEADLINE_S)) == Exit(ExitReason.STOPPED)
        assert len(calls) == 1
    assert vmm.state is VmRunState.CLOSED


def test_an_output_callable_that_sends_and_reads_is_called_with_each_byte_once() -> None:
    got: list[bytes] = []
    vmm: Vmm

    def output(piece: bytes) -> None:
        vmm.serial.send(b"x")
        got.append(piece + vmm.serial.take_output())

    with Vmm(flat(PRINT_BYTES, serial=SerialConfig(output=output))) as vmm:
        vmm.run(0.3)
        count = vmm.memory.read_u32(0x2000)
        text = b"".join(got) + vmm.serial.take_output()
    assert text.startswith(b"x\n" * count)
    assert len(text) <= 2 * count + 2
    assert vmm.state is VmRunState.CLOSED


def test_an_exception_of_an_output_ends_the_run_and_the_next_continues() -> None:
    got: list[bytes] = []

    def output(piece: bytes) -> None:
        got.append(piece)
        if len(got) == 1:
            raise LookupError(len(piece))

    with Vmm(flat(PRINT_LINES, serial=SerialConfig(output=output))) as vmm:
        with pytest.raises(LookupError):
            vmm.run(DEADLINE_S)
        assert vmm.run(0.2).reason is ExitReason.TIMEOUT
    assert len(got) > 1


def test_the_end_of_the_process_and_ctrl_c_do_not_wait_for_a_reader() -> None:
    program = f"""
import os, signal, sys, threading
from pyvmm import FlatBoot, SerialConfig, Vmm, VmmConfig
sys.path[:0] = [{os.path.dirname(__file__)!r}, {str(TESTS)!r}]
from test_console_waits import PRINT_LINES, until_stuck
reader, writer = os.pipe()
vmm = Vmm(VmmConfig(boot=FlatBoot(PRINT_LINES), serial=SerialConfig(output=os.fdopen(writer, "wb"))))
def interrupt():
    until_stuck(vmm)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    vmm.run()
except KeyboardInterrupt:
    print("interrupted", flush=True)
vmm.start()
until_stuck(vmm)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"interrupted\n", b"")


def test_the_run_stops_at_the_byte_that_completes_a_text() -> None:
    with Vmm(flat(PRINT_BYTES)) as vmm:
        for text in (b"x\nx", b"\nx\n"):
            vmm.serial.stop_at(text)
            exit = vmm.run(DEADLINE_S)
            assert (exit.reason, exit.value) == (ExitReason.STOPPED, text)
            assert vmm.serial.take_output().endswith(text)
        assert vmm.memory.read_u32(0x2000) == 2
        vmm.serial.stop_at(b"x")
        vmm.serial.stop_at(b"")
        assert vmm.run(0.1).reason is ExitReason.TIMEOUT
        vmm.serial.stop_at(b"never")
        vmm.stop()
        assert vmm.run(DEADLINE_S).value is None
    with pytest.raises(StateError):
        vmm.run()


def test_a_device_that_stops_the_run_beside_a_text_wins() -> None:
    class Stopping:
        def write(self, offset: int, size: int, value: int) -> Stop:
            return Stop("device")

    code = b"\xba\x00\x05\xee" + PRINT_LINES  # mov dx, 0x500; out dx, al
    with Vmm(flat(code)) as vmm:
        vmm.add_pio_device(0x500, 1, Stopping())
        vmm.serial.stop_at(b"x")
        assert [vmm.run(DEADLINE_S).value for _ in range(2)] == ["device", b"x"]


def is_waited_for(text: bytes) -> bool:
    """Whether the end of a run brings a text out to a reader that begins when the guest has ended."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", 0) as file, os.fdopen(writer, "wb", 0) as output:
        room = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        assert os.write(writer, bytes(room)) == room
        with Vmm(flat(print_text(text) + exit_with(3), serial=SerialConfig(output=output))) as vmm:
            got = bytearray()

            def read() -> None:
                while vmm.state is not VmRunState.EXITING:
                    pass
                time.sleep(0.2)  # the run has come to its end by then, unless the host is busy
                while len(got) < room + len(text):
                    got.extend(file.read(4096))

            reading = threading.Thread(target=read)
            reading.start()
            assert vmm.run(DEADLINE_S).code == 3
            left = vmm.serial.take_output()
            output.write(left)
            reading.join(DEADLINE_S)
            assert got[room:] == text
    return not left


def test_the_end_of_a_run_waits_for_a_reader_that_begins_then() -> None:
    # On a busy host the reader may begin too late.
    assert any(is_waited_for(bytes(range(97, 123)) * 6) for _ in range(5))


class Slow(io.RawIOBase):
    """A file object that takes a byte every other time, and longer for some than a run's end waits for a reader."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.has_room = True

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int | None:
        self.has_room = not self.has_room
        if self.has_room:
            return None
        if len(self.got) < 3:
            time.sleep(0.6)
        self.got += piece[:1]
        return 1


def test_the_end_of_a_run_waits_longer_as_long_as_something_is_taken() -> None:
    output, text = Slow(), bytes(range(97, 123))
    with Vmm(flat(print_text(text) + exit_with(3), serial=SerialConfig(output=output))) as vmm:
        assert vmm.run(DEADLINE_S).code == 3
        assert vmm.serial.take_output() == b""
    assert output.got == text


def test_the_end_of_a_run_does_not_wait_for_a_reader_that_takes_nothing() -> None:
    text = bytes(range(97, 123))
    with Vmm(flat(print_text(text) + exit_with(3), serial=SerialConfig(output=Deaf()))) as vmm:
        assert soon(partial(vmm.run, None)).code == 3  # type: ignore[attr-defined]
        assert vmm.serial.take_output() == text

"""The console's text and history, beside every kind of output, and a conversation with Linux.

Covers python/pyvmm/console.py.
"""

from __future__ import annotations

import io
import re
import select
from typing import TYPE_CHECKING

import pytest
from guests import SPIN, echo_until, flat, print_text
from pyvmm import Console, ExitReason, GuestEndedError, SerialConfig, Vmm, VmmConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import BootedLinux

    Make = Callable[[VmmConfig], Vmm]

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120)]
DEADLINE_S = 60


def test_every_output_still_gets_all(tmp_path: Path) -> None:
    text = bytes(range(32, 127)) * 3
    file = io.BytesIO()
    got: list[bytes] = []
    with (tmp_path / "console").open("wb") as plain:
        for output in (file, plain, got.append, tmp_path / "path"):
            with Vmm(flat(print_text(text) + print_text(b"\x01") + SPIN, serial=SerialConfig(output=output))) as vmm:
                assert vmm.serial.expect("\x01", DEADLINE_S).before == text.decode()
                vmm.run(0.05)
    assert file.getvalue() == b"".join(got) == (tmp_path / "path").read_bytes() == text + b"\x01"
    assert (tmp_path / "console").read_bytes() == text + b"\x01"


def test_output_without_newlines_is_searched(make: Make) -> None:
    # xor si, si; mov cx, 0x4000; mov dx, 0x3f8; rep outsb
    code = b"\x31\xf6\xb9\x00\x40\xba\xf8\x03\xf3\x6e" + print_text(b"the end") + SPIN
    vmm = make(flat(code, address=0x8000))
    vmm.memory.fill(0, 0x4000, ord("x"))
    found = vmm.serial.expect([re.compile(r"xx?y"), re.compile(rb"the (end)")], DEADLINE_S)
    assert (found.index, found.before) == (1, b"x" * 0x4000)
    assert (vmm.console.dropped, vmm.console.tail(1)[-10:]) == (0, "xxxthe end")


def test_fileno_is_there_on_every_machine(make: Make) -> None:
    vmm = make(flat(print_text(b"some") + SPIN))
    vmm.serial.expect("some", DEADLINE_S)
    fd = vmm.serial.fileno()
    assert select.select([fd], [], [], DEADLINE_S)[0]
    assert vmm.serial.take_output() == b"some"
    assert select.select([fd], [], [], 0)[0] == []
    assert vmm.serial.fileno() == fd


def test_console_is_text_with_history(make: Make) -> None:
    vmm = make(flat(print_text(b"one\ntwo \xff\n") + SPIN))
    assert (vmm.console.text, vmm.console.tail()) == ("", "")
    vmm.serial.expect("one", DEADLINE_S)
    vmm.serial.expect(re.compile(b"\xff\n"), DEADLINE_S)
    console = vmm.console
    assert isinstance(console, Console)
    assert (console.text, str(console), console.matched) == ("one\ntwo \ufffd\n",) * 3
    assert ("two" in console, "three" in console, console.skip()) == (True, False, "")
    assert repr(console) == "<Console: 10 bytes, the last line 'two \ufffd'>"
    vmm.close()
    assert console.text == "one\ntwo \ufffd\n"


def test_skip_counts_what_is_there_as_matched(make: Make) -> None:
    vmm = make(flat(print_text(b"old text") + echo_until(ord("!"))))
    vmm.serial.expect("old", DEADLINE_S)
    while vmm.console.pending != " text":
        vmm.wait(0.001)
    assert vmm.console.skip() == " text"
    vmm.serial.send(b"text")
    assert vmm.serial.expect("text", DEADLINE_S).before == ""


@pytest.mark.linux
def test_linux_answers_a_line(booted_linux: BootedLinux) -> None:
    with booted_linux.snapshot.fork() as fork:
        assert "type a line" in fork.console
        fork.serial.sendline("hello there")
        fork.serial.expect(re.compile(r"you typed (hello) there\s"), DEADLINE_S)
        with pytest.raises(GuestEndedError) as caught:
            fork.serial.expect("never", DEADLINE_S)
    assert caught.value.exit is not None
    assert caught.value.exit.reason is ExitReason.RESET

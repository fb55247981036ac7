"""The terminal as the guest's console: the escape, and raw mode restored."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyvmm.terminal import Keys, raw

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.mark.parametrize(
    ("typed", "for_guest", "quit"),
    [
        (b"hello", b"hello", False),
        (b"a\x01xb", b"a", True),
        (b"\x01X", b"", True),
        (b"\x01a\x01\x01", b"\x01\x01", False),
        (b"\x01qb", b"b", False),
        (b"\x03\x04", b"\x03\x04", False),
    ],
)
def test_escape_is_told_from_what_the_guest_gets(typed: bytes, for_guest: bytes, quit: bool) -> None:
    keys = Keys()
    assert b"".join(keys.feed(bytes([byte])) for byte in typed) == for_guest
    assert keys.quit is quit


@given(st.lists(st.binary(max_size=5)))
def test_pieces_make_no_difference(pieces: list[bytes]) -> None:
    one, many = Keys(), Keys()
    assert one.feed(b"".join(pieces)) == b"".join(many.feed(piece) for piece in pieces)
    assert one.quit is many.quit


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    controller, end = pty.openpty()
    yield controller, end
    os.close(controller)
    os.close(end)


def test_raw_mode_ends_with_an_exception_too(terminal: tuple[int, int]) -> None:
    before = termios.tcgetattr(terminal[1])
    with pytest.raises(LookupError), raw(terminal[1]):
        assert termios.tcgetattr(terminal[1])[3] & termios.ECHO == 0
        raise LookupError
    assert termios.tcgetattr(terminal[1]) == before


def read_until(fd: int, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        seen += os.read(fd, 1024)
    return seen


def start(terminal: tuple[int, int]) -> subprocess.Popen[bytes]:
    end = terminal[1]
    command = [sys.executable, "-m", "pyvmm", "run"]
    return subprocess.Popen(command, stdin=end, stdout=end, stderr=end, start_new_session=True)


@pytest.mark.kvm
def test_guest_answers_what_is_typed_and_ctrl_a_x_leaves(terminal: tuple[int, int]) -> None:
    before = termios.tcgetattr(terminal[1])
    with start(terminal) as process:
        read_until(terminal[0], b"Type a line")
        os.write(terminal[0], b"hello\r")
        read_until(terminal[0], b"You typed: hello")
        os.write(terminal[0], b"\x03")  # Ctrl-C is the guest's in raw mode
        os.write(terminal[0], b"\x01x")
        assert process.wait(60) == 130
    assert termios.tcgetattr(terminal[1]) == before


@pytest.mark.kvm
def test_sigterm_ends_it_and_restores_the_terminal(terminal: tuple[int, int]) -> None:
    before = termios.tcgetattr(terminal[1])
    with start(terminal) as process:
        read_until(terminal[0], b"Type a line")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert termios.tcgetattr(terminal[1]) == before

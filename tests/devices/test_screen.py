"""The VGA text screen: `vmm.screen`, waits for its text, and `pyvmm run --screen`.

Covers python/pyvmm/screen.py, python/pyvmm/screen_display.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import pyvmm
from guests import HALT, SPIN, exit_with, flat, out
from hypothesis import given, settings
from hypothesis import strategies as st
from pyvmm import ClosedError, ExpectTimeoutError, GuestEndedError, PlatformConfig, Screen, Vmm, VmRunState

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
WITH_SCREEN = PlatformConfig(screen=True)


def draw(text: bytes, at: int = 0, attribute: int = 7) -> bytes:
    """Write characters to the screen from this one on, in real mode."""
    code = b"\xb8\x00\xb8\x8e\xc0\xbf" + (2 * at).to_bytes(2, "little")  # mov ax, 0xb800; mov es, ax; mov di, 2 * at
    return code + b"".join(b"\xb8" + bytes([byte, attribute]) + b"\xab" for byte in text)  # mov ax, cell; stosw


def crtc(index: int, value: int) -> bytes:
    return out(0x3D4, index) + out(0x3D5, value)


def test_the_text_the_colors_and_the_cursor_are_those_of_the_guest() -> None:
    code = draw(b"Hello") + draw(b"\x03\xc9\xcd\xbb", 80, 0x4E) + crtc(0x0E, 0) + crtc(0x0F, 85) + exit_with(0)
    with Vmm(flat(code, platform=WITH_SCREEN)) as vmm:
        assert vmm.screen.text == ""
        assert vmm.run(DEADLINE_S).code == 0
        screen = vmm.screen
        assert isinstance(screen, Screen)
        assert str(screen) == "Hello\n♥╔═╗"
        assert (len(screen.lines), screen.lines[1]) == (25, "♥╔═╗")
        assert screen.attributes[1][:5] == b"\x4e\x4e\x4e\x4e\x00"
        assert screen.cursor == (1, 5)
        assert "ell" in screen
        assert "Hello" not in repr(screen)
        html = screen._repr_html_()
        assert "color:#ffff55;background:#aa0000" in html
        assert "♥╔═╗" in html
        assert "\x1b[0;93;41m♥╔═╗" in screen.ansi()[1]


def test_the_start_address_scrolls_and_wraps() -> None:
    code = draw(b"second", 80) + draw(b"end", 0x3FFD) + exit_with(1)
    with Vmm(flat(code, platform=WITH_SCREEN)) as vmm:
        vmm.run(DEADLINE_S)
        assert vmm.screen.lines[:2] == ["", "second"]
    code = (
        draw(b"second", 80)
        + draw(b"end", 0x3FFD)
        + crtc(0x0C, 0x3F)
        + crtc(0x0D, 0xFD)
        + crtc(0x0A, 0x20)
        + exit_with(1)
    )
    with Vmm(flat(code, platform=WITH_SCREEN)) as vmm:
        vmm.run(DEADLINE_S)
        assert vmm.screen.lines[:3] == ["end", "   second", ""]
        assert vmm.screen.cursor is None
        with vmm.snapshot().fork() as fork:
            assert fork.screen.lines == vmm.screen.lines


def test_a_machine_without_the_registers_shows_its_memory() -> None:
    with Vmm(flat(draw(b"plain") + exit_with(0))) as vmm:
        vmm.run(DEADLINE_S)
        assert (vmm.screen.text, vmm.screen.cursor) == ("plain", None)
    with pytest.raises(ClosedError):
        str(vmm.screen)


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=0x8000), st.integers(0, 255), st.integers(0, 255))
def test_any_memory_is_a_screen(memory: bytes, high: int, low: int) -> None:
    code = crtc(0x0C, high) + crtc(0x0D, low) + exit_with(0)
    with Vmm(flat(code, platform=WITH_SCREEN)) as vmm:
        vmm.memory.write(0xB8000, memory)
        vmm.run(DEADLINE_S)
        shown = (memory.ljust(0x8000, b"\0") * 3)[(high << 8 | low) % 0x4000 * 2 :][: 80 * 25 * 2]
        assert b"".join(vmm.screen.attributes) == shown[1::2]
        assert all(len(line) <= 80 and line.isprintable() for line in vmm.screen.lines)
        vmm.screen._repr_html_()


def test_expect_finds_a_text_a_pattern_and_says_what_is_there() -> None:
    with Vmm(flat(draw(b"Pass 1") + SPIN, platform=WITH_SCREEN)) as vmm:
        found = vmm.screen.expect(re.compile(r"Pass (\d)"), DEADLINE_S)
        assert found.match is not None
        assert found.match[1] == "1"
        assert vmm.state is VmRunState.RUNNING
        assert vmm.screen.expect(["nothing", b"ass"], DEADLINE_S).index == 1
        with pytest.raises(
            ExpectTimeoutError, match=r"the screen did not show 'Pass 2' within 0.1 s; it shows:\n  Pass 1"
        ):
            vmm.screen.expect("Pass 2", 0.1)
        vmm.stop()
        vmm.wait(DEADLINE_S)
    with Vmm(flat(draw(b"over") + exit_with(3))) as vmm:
        with pytest.raises(GuestEndedError, match="before the screen showed 'never'") as ended:
            vmm.screen.expect("never", DEADLINE_S)
        assert ended.value.exit is not None
        assert (ended.value.exit.code, ended.value.pending) == (3, "over")


def test_expect_beside_a_thread_that_runs_the_machine() -> None:
    with Vmm(flat(draw(b"here") + SPIN)) as vmm:
        runner = threading.Thread(target=vmm.run, args=(DEADLINE_S,))
        runner.start()
        try:
            assert vmm.screen.expect("here", DEADLINE_S).matched == "here"
        finally:
            vmm.stop()
            runner.join(DEADLINE_S)
        assert not runner.is_alive()


def test_run_until_stops_the_machine() -> None:
    with Vmm(flat(draw(b"here") + SPIN)) as vmm:
        assert vmm.screen.run_until("here", DEADLINE_S).before == ""
        assert vmm.state is VmRunState.PAUSED


def test_expect_in_asyncio() -> None:
    async def main() -> str:
        with Vmm(flat(draw(b"here") + SPIN)) as vmm:
            found = await vmm.screen.expect_async("here", DEADLINE_S)
            vmm.stop()
            return str(found.matched)

    assert asyncio.run(main()) == "here"


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A guest that draws, prints and spins."""
    path = tmp_path / "guest"
    path.write_bytes(draw(b"on the screen") + out(0x3F8, ord("x")) + SPIN)
    return path


def test_the_command_line_shows_the_screen_at_the_end(guest: Path) -> None:
    command = ["run", "--flat", guest, "--screen"]
    done = pyvmm(*command, "--expect", "on the")
    assert (done.returncode, done.stdout) == (0, b"on the screen\n")
    done = pyvmm(*command, "--timeout", "0.5", "--expect", "nowhere")
    assert done.returncode == 123
    assert b"the screen did not show 'nowhere'" in done.stderr
    done = pyvmm(*command, "--json", "--expect", "on the")
    assert json.loads(done.stdout)["screen"][0] == "on the screen"
    assert done.stderr == b"on the screen\n"


def test_the_command_line_draws_on_a_terminal(guest: Path) -> None:
    master, slave = pty.openpty()
    try:
        command = [sys.executable, "-m", "pyvmm", "run", "--flat", str(guest), "--screen"]
        with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, close_fds=True) as process:
            os.close(slave)  # reading fails once the program has ended
            shown = b""
            while b"on the screen" not in shown and select.select([master], [], [], DEADLINE_S)[0]:
                shown += os.read(master, 4096)
            os.write(master, b"\x01x")  # Ctrl-A x
            with suppress(OSError):
                while select.select([master], [], [], DEADLINE_S)[0]:
                    shown += os.read(master, 4096)
            assert process.wait(DEADLINE_S) == 130
    finally:
        os.close(master)
    assert b"\x1b[2J" in shown
    assert HALT  # the serial port is not shown:
    assert b"x\x1b" not in shown.split(b"\x1b[2J")[0]

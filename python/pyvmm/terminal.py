"""The terminal as the guest's console: raw mode, and Ctrl-A as the escape key."""

from __future__ import annotations

import os
import signal
import termios
import tty
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pyvmm._pyvmm import Events
from pyvmm.events import EventSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyvmm._pyvmm import EventOps

ESCAPE = 0x01  # Ctrl-A
HELP = "Ctrl-A x ends the machine, Ctrl-A a sends Ctrl-A"


class Keys:
    """Filters typed bytes for the guest. Ctrl-A x sets `quit`."""

    def __init__(self) -> None:
        self.quit = False
        self._escaped = False

    def feed(self, typed: bytes) -> bytes:
        """Return the bytes for the guest; none after Ctrl-A x."""
        out = bytearray()
        for byte in typed:
            if self.quit:
                break
            if self._escaped:
                self._escaped = False
                if byte in b"xX":
                    self.quit = True
                elif byte in (ESCAPE, ord("a")):
                    out.append(ESCAPE)
            elif byte == ESCAPE:
                self._escaped = True
            else:
                out.append(byte)
        return bytes(out)


class Keyboard:
    """A subscriber that passes typed bytes to the guest, and stops the run at Ctrl-A x."""

    def __init__(self, fd: int, pipe: int, stop: Callable[[], object]) -> None:
        self.keys = Keys()
        self._fd = fd
        self._pipe = pipe
        self._stop = stop

    def init(self, ops: EventOps) -> None:
        """Watch the terminal."""
        ops.add(Events(self._fd, EventSet.IN))

    def process(self, events: Events, ops: EventOps) -> None:
        """Pass on typed bytes. End the run at Ctrl-A x, or if the terminal hangs up."""
        try:
            typed = os.read(self._fd, 1024) if events.event_set & EventSet.IN else b""
        except OSError:  # EIO: the terminal has hung up
            typed = b""
        if for_guest := self.keys.feed(typed):
            # As on a real line, input is lost while the guest's buffers are full. Ctrl-A x still
            # works.
            with suppress(BlockingIOError):
                os.write(self._pipe, for_guest)
        if self.keys.quit or not typed:
            ops.remove(self._fd)
            self._stop()


@contextmanager
def raw(fd: int) -> Iterator[None]:
    """Put the terminal in raw mode. Restore it afterwards, and while the process is suspended."""
    before = termios.tcgetattr(fd)

    def suspend(_number: int, _frame: object) -> None:
        restore(fd, before)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        # Execution continues here after SIGCONT.
        signal.signal(signal.SIGTSTP, suspend)
        tty.setraw(fd, termios.TCSANOW)

    handler = signal.signal(signal.SIGTSTP, suspend)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        restore(fd, before)
        signal.signal(signal.SIGTSTP, handler)


def restore(fd: int, modes: list[Any]) -> None:
    """Restore a terminal's modes at once, also from the background. Does nothing if the terminal is gone."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        # TCSANOW, because waiting for unread output could take forever.
        termios.tcsetattr(fd, termios.TCSANOW, modes)
    except termios.error:
        pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

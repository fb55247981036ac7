"""Shows a machine's VGA text screen on a terminal while the machine runs, for the command line."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyvmm._pyvmm import Events, TimerFd
from pyvmm.events import EventSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm._pyvmm import EventOps, Vmm

PERIOD_S = 0.1
CLEAR, HOME, END_OF_LINE, RESET = "\x1b[2J", "\x1b[H", "\x1b[K", "\x1b[0m"
STDOUT = 1


@contextmanager
def shown(vmm: Vmm, output: int) -> Iterator[None]:
    """Show the screen on this descriptor: all the time on a terminal, otherwise once at the end."""
    stream = sys.stdout if output == STDOUT else sys.stderr
    if not os.isatty(output):
        yield
        print(vmm.screen, file=stream, flush=True)
        return
    with TimerFd() as timer:
        display = Display(vmm, timer)
        vmm.add_subscriber(display)
        try:
            yield
        finally:
            display.draw()
            stream.write("\r\n")
            stream.flush()


class Display:
    """A subscriber that draws the lines that have changed."""

    def __init__(self, vmm: Vmm, timer: TimerFd) -> None:
        self._vmm = vmm
        self._timer = timer
        self._before: list[str] = []

    def init(self, ops: EventOps) -> None:
        """Draw from now on."""
        self._timer.set(0.0, PERIOD_S)
        ops.add(Events(self._timer, EventSet.IN))

    def process(self, events: Events, ops: EventOps) -> None:
        """Draw what has changed."""
        self._timer.read()
        self.draw()

    def draw(self) -> None:
        """Draw the lines that have changed since the last call."""
        lines = self._vmm.screen.ansi()
        if lines == self._before:
            return
        out = [] if self._before else [CLEAR]
        before = self._before or [""] * len(lines)
        for number, (line, old) in enumerate(zip(lines, before, strict=True), 1):
            if line != old:
                out.append(f"\x1b[{number};1H{line}{END_OF_LINE}")
        self._before = lines
        os.write(STDOUT, ("".join(out) + f"\x1b[{len(lines)};1H{RESET}").encode())

"""Signals that end a run on the command line, so that it is reported and the terminal is restored."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class EndingSignals:
    """While entered, the first signal calls a function, and a second SIGINT raises KeyboardInterrupt.

    Signals that the process ignores, as under nohup, stay ignored.
    """

    def __init__(self, stop: Callable[[], object]) -> None:
        self.number: int | None = None
        self._stop = stop
        self._before: dict[int, object] = {}

    def __enter__(self) -> EndingSignals:
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._end)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is None:
            self.number = number
        self._stop()

    @property
    def status(self) -> int | None:
        """The exit status of a process ended by the signal that arrived; None if none arrived."""
        return None if self.number is None else 128 + self.number

"""`TimerFd`: once, again and again, at a time."""

from __future__ import annotations

import time

import pytest
from pyvmm import EventManager, EventOps, Events, TimerFd


class Ticks:
    """Counts a timer's expirations."""

    def __init__(self, timer: TimerFd) -> None:
        self.timer = timer
        self.counts: list[int] = []

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.timer))

    def process(self, events: Events, ops: EventOps) -> None:
        self.counts.append(self.timer.read())


def test_one_shot_expires_once() -> None:
    with TimerFd() as timer:
        ticks = Ticks(timer)
        manager = EventManager()
        manager.add_subscriber(ticks)
        with pytest.raises(BlockingIOError):
            timer.read()
        timer.set(0.001)
        assert manager.run() == 1
        assert ticks.counts == [1]
        assert manager.run_with_timeout(0) == 0


def test_periodic_counts_missed_ticks() -> None:
    with TimerFd() as timer:
        # A period of 10 ms that began a second ago has missed about a hundred ticks.
        timer.set_at(time.monotonic() - 1, 0.01)
        ticks = Ticks(timer)
        manager = EventManager()
        manager.add_subscriber(ticks)
        manager.run()
        manager.run()
        assert ticks.counts[0] >= 100
        timer.clear()
        assert manager.run_with_timeout(0) == 0


def test_zero_is_at_once() -> None:
    manager = EventManager()
    timer = TimerFd()
    timer.set(0)
    manager.add_subscriber(Ticks(timer))
    assert manager.run() == 1


@pytest.mark.parametrize(
    ("seconds", "reason"),
    [
        (-1.0, "-1.0 is not a number of seconds of at least 0"),
        (float("nan"), "NaN is not a number of seconds of at least 0"),
        (float("inf"), "inf seconds are too long for a timer"),
        (1e19, "1e19 seconds are too long for a timer"),
        (1e300, "1e300 seconds are too long for a timer"),
    ],
)
def test_bad_time_is_refused(seconds: float, reason: str) -> None:
    with TimerFd() as timer:
        for name, arguments in {"delay": (seconds,), "interval": (0, seconds)}.items():
            with pytest.raises(ValueError, match=rf"\A{name}: {reason}\Z"):
                timer.set(*arguments)
        with pytest.raises(ValueError, match=rf"\Atime: {reason}\Z"):
            timer.set_at(seconds)


def test_closed_one_says_so() -> None:
    timer = TimerFd()
    timer.close()
    timer.close()
    assert timer.closed
    assert repr(timer) == "TimerFd(closed)"
    for call in (timer.read, timer.clear, timer.fileno, lambda: timer.set(1)):
        with pytest.raises(ValueError, match="closed"):
            call()

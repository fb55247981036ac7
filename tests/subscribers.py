"""Subscribers in Python that several tests use, and a deadline for what they call."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from pyvmm import (
    EventFd,
    EventOps,
    Events,
    EventSet,
)

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_S = 60


class Callback:
    """Calls a function for each event of its own eventfd. The first event is there at once, unless `initial` is 0."""

    def __init__(self, call: Callable[[], object], initial: int = 1) -> None:
        self.fd = EventFd(initial)
        self.call = call

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd, EventSet.IN))

    def process(self, events: Events, ops: EventOps) -> None:
        self.fd.read()
        self.call()


def after(event: threading.Event, call: Callable[[], None]) -> Callable[[], None]:
    """Call once an event is set."""

    def wait() -> None:
        event.wait()
        call()

    return wait


def within_deadline(call: Callable[[], object]) -> None:
    """Run in a thread that has to end."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive(), "it hangs"


class Once:
    """Calls a function once."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.fd = EventFd(1)
        self.function = function

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd, drain=True))

    def process(self, events: Events, ops: EventOps) -> Any:
        return self.function()

"""`EventSet`, and the protocol of a subscriber."""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pyvmm._pyvmm import EventOps, Events


class EventSet(IntFlag):
    """What to watch a file descriptor for, or what happened there: the flags of epoll_ctl(2)."""

    IN = 0x001
    PRIORITY = 0x002
    OUT = 0x004
    ERROR = 0x008
    HANG_UP = 0x010
    READ_HANG_UP = 0x2000
    EXCLUSIVE = 1 << 28
    WAKE_UP = 1 << 29
    ONE_SHOT = 1 << 30
    EDGE_TRIGGERED = 1 << 31


class Subscriber(Protocol):
    """Any object with these two methods can be passed to `add_subscriber`."""

    def init(self, ops: EventOps, /) -> object:
        """Register file descriptors. Called once, before `add_subscriber` returns."""

    def process(self, events: Events, ops: EventOps, /) -> object:
        """Handle one event. Called on the thread that runs the loop."""

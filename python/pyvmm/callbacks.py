"""Functions as subscribers: `EventManager.on` and `EventManager.call_later`."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from pyvmm._pyvmm import Events, TimerFd

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm._pyvmm import EventManager, EventOps, SubscriberId


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", function))


class Function:
    """A subscriber that calls a function with each event of one source."""

    def __init__(self, source: Any, event_set: int, function: Callable[[Events], object]) -> None:
        self._events = Events(source, event_set)
        self._function = function

    @property
    def name(self) -> str:
        """The function's name."""
        return _name(self._function)

    def init(self, ops: EventOps) -> None:
        """Watch the source."""
        ops.add(self._events)

    def process(self, events: Events, ops: EventOps) -> object:
        """Call the function."""
        return self._function(events)


def name_of(subscriber: object) -> str:
    """The name of what a subscriber calls."""
    return subscriber.name if isinstance(subscriber, Function | Later) else f"{type(subscriber).__qualname__}.process"


def warn_slow(name: str, seconds: float) -> None:
    """Log a callback that took longer than `EventManager.slow_callback_duration`."""
    logging.getLogger("pyvmm").warning("%s took %.3f s", name, seconds)


def leave_fork(error: BaseException | None) -> NoReturn:
    """End a process that a callback on a vCPU's thread has forked and left: what it would return to is its parent's."""
    status = 0 if error is None else 1
    try:
        if isinstance(error, SystemExit):
            status = error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            traceback.print_exception(error)
        for stream in sys.stdout, sys.stderr:
            with suppress(Exception):
                stream.flush()
    finally:
        os._exit(status)


def check_callable(function: object) -> None:
    """Refuse what could only fail later."""
    if not callable(function):
        raise TypeError(f"a function is needed here, not {type(function).__qualname__}")


def on(manager: EventManager, source: Any, event_set: int) -> Callable[[Any], Any]:
    """See `EventManager.on`."""

    def register(function: Any) -> Any:
        check_callable(function)
        id = manager.add_subscriber(Function(source, event_set, function))
        with suppress(AttributeError):  # a method takes no attributes
            function.subscriber_id = id
        return function

    return register


class Later:
    """A call that is due at a time; `cancel` takes it back."""

    def __init__(self, manager: EventManager, seconds: float, function: Callable[[], object]) -> None:
        self._manager = manager
        self._function = function
        self._timer = TimerFd()
        self._timer.set(seconds)
        self._id: SubscriberId | None = manager.add_subscriber(self)

    @property
    def name(self) -> str:
        """The function's name."""
        return _name(self._function)

    def init(self, ops: EventOps) -> None:
        """Watch the timer."""
        ops.add(Events(self._timer))

    def process(self, events: Events, ops: EventOps) -> object:
        """Call the function, once."""
        self.cancel()
        return self._function()

    def cancel(self) -> None:
        """Do not call. Does nothing when it was called or cancelled before."""
        id, self._id = self._id, None
        if id is not None:
            self._manager.remove_subscriber(id)
            self._timer.close()


def call_later(manager: EventManager, seconds: float, function: Callable[[], object]) -> Later:
    """See `EventManager.call_later`."""
    check_callable(function)
    return Later(manager, seconds, function)

"""Functions as subscribers: `EventManager.on`. The result of `EventManager.call_later`."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import suppress
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, NoReturn

from pyvmm._pyvmm import Events

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm._pyvmm import EventManager, EventOps, SubscriberId


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", function))


class Function:
    """A subscriber that calls a function with each event of one source."""

    def __init__(self, events: Events, function: Callable[[Events], object]) -> None:
        self._events = events
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
    """The name of the callable that a subscriber calls."""
    return subscriber.name if isinstance(subscriber, Function) else f"{type(subscriber).__qualname__}.process"


def warn_slow(name: str, seconds: float) -> None:
    """Log a callback that took longer than `EventManager.slow_callback_duration`."""
    logging.getLogger("pyvmm").warning("%s took %.3f s", name, seconds)


def leave_fork(error: BaseException | None) -> NoReturn:
    """End a process forked by a callback on a vCPU thread: it cannot return to the parent's machine."""
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
    """Refuse an object that is not callable."""
    if not callable(function):
        raise TypeError(f"expected a function, not {type(function).__qualname__}")


class Registered:
    """Wraps a callable that cannot take attributes, such as a bound method."""

    def __init__(self, function: Callable[..., Any]) -> None:
        update_wrapper(self, function)
        self._function = function
        self.subscriber_id: SubscriberId | None = None
        self.subscriber_ids: tuple[SubscriberId, ...] = ()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the function."""
        return self._function(*arguments, **named)


def on(manager: EventManager, source: Any, event_set: int, data: int, drain: bool) -> Callable[[Any], Any]:
    """See `EventManager.on`."""
    events = Events(source, event_set, data, drain=drain)

    def register(function: Any) -> Any:
        check_callable(function)
        id = manager.add_subscriber(Function(events, function))
        former = getattr(function, "subscriber_ids", ())
        # Drop ids that this manager has removed, in case the function is registered repeatedly.
        kept = [known for known in former if not manager._has_removed(known)]
        try:
            function.subscriber_id = id
        except AttributeError:
            function = Registered(function)
            function.subscriber_id = id
        function.subscriber_ids = (*kept, id)
        return function

    return register


class TimerHandle:
    """A scheduled call that can be cancelled. Created by `EventManager.call_later`."""

    def __init__(self, manager: EventManager, number: int, when: float) -> None:
        self._manager = manager
        self._number = number
        self._when = when
        self._is_cancelled = False

    def cancel(self) -> None:
        """Cancel the call. Does nothing if it was already made or cancelled."""
        self._is_cancelled |= self._manager._cancel_later(self._number)

    def cancelled(self) -> bool:
        """Whether it was cancelled before it was called."""
        return self._is_cancelled

    def when(self) -> float:
        """The time of the call, as `time.monotonic()` counts."""
        return self._when

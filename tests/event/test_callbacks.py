"""`EventManager.on` and `call_later`: functions as subscribers.

Covers src/py/enter.rs, src/py/event/stats.rs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest
from pyvmm import EventFd, EventManager, Events, EventSet


def test_function_is_called_with_each_event() -> None:
    manager = EventManager()
    fd = EventFd(2)
    seen: list[tuple[int, EventSet, int]] = []

    @manager.on(fd, EventSet.IN)
    def read(events: Events) -> None:
        seen.append((events.fd, events.event_set, fd.read()))

    assert manager.run() == 1
    assert seen == [(fd.fileno(), EventSet.IN, 2)]
    manager.remove_subscriber(read.subscriber_id)  # type: ignore[attr-defined]
    fd.write()
    assert manager.run_with_timeout(0) == 0


def test_method_can_be_registered_too() -> None:
    class Counter:
        count = 0

        def tick(self, events: Events) -> None:
            self.count += 1

    counter = Counter()
    manager = EventManager()
    manager.on(EventFd(1))(counter.tick)
    manager.run()
    assert counter.count == 1


def test_later_calls_once_in_order_and_can_be_cancelled() -> None:
    manager = EventManager()
    order: list[str] = []

    def second() -> None:
        order.append("second")
        manager.stop()

    manager.call_later(0.02, second)
    manager.call_later(0.001, lambda: order.append("first"))
    never = manager.call_later(0.01, lambda: order.append("never"))
    never.cancel()
    never.cancel()
    manager.run_forever()
    assert order == ["first", "second"]
    assert repr(manager) == "EventManager(subscribers=0)"


def test_exception_of_a_later_call_comes_out_of_the_run() -> None:
    manager = EventManager()
    manager.call_later(0, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        manager.run_forever()


def test_slow_callback_is_logged_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    manager = EventManager()
    fd = EventFd(1)
    assert manager.slow_callback_duration is None
    assert manager.slowest_callback is None

    @manager.on(fd)
    def slow(events: Events) -> None:
        fd.read()

    manager.slow_callback_duration = 0
    assert manager.slow_callback_duration is not None
    manager.run()
    assert "slow took " in caplog.text
    assert manager.slowest_callback is not None
    name, seconds = manager.slowest_callback
    assert "slow" in name
    assert 0 < seconds < 60
    caplog.clear()
    manager.slow_callback_duration = None
    fd.write()
    manager.run()
    assert caplog.text == ""
    with pytest.raises(ValueError, match="timeout"):
        manager.slow_callback_duration = -1


def slow(*_: object) -> None:
    time.sleep(0.002)


def slow_and_failing(*_: object) -> None:
    time.sleep(0.002)
    raise LookupError


async def slow_coroutine(*_: object) -> None:
    time.sleep(0.002)
    await asyncio.sleep(0)


@pytest.mark.parametrize("function", [slow, slow_and_failing, slow_coroutine])
@pytest.mark.parametrize("way", ["on", "call_later", "fire", "call_blocking"])
def test_every_slow_callback_is_logged(caplog: pytest.LogCaptureFixture, function: Any, way: str) -> None:
    async def main() -> None:
        manager = EventManager()
        manager.slow_callback_duration = 0.001
        endpoint = manager.remote_endpoint()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: None)
        hosting = asyncio.ensure_future(manager.run_async())
        await asyncio.sleep(0)
        if way == "on":
            manager.on(EventFd(1), drain=True)(function)
        elif way == "call_later":
            manager.call_later(0, function)
        elif way == "fire":
            endpoint.fire(function)
        else:
            with contextlib.suppress(LookupError):
                returned = await asyncio.to_thread(endpoint.call_blocking, function)
                if returned is not None:  # for its caller to await
                    endpoint.fire(lambda _: returned)
        while manager.slowest_callback is None or manager.slowest_callback[1] < 0.002:
            await asyncio.sleep(0)
        manager.stop()
        with contextlib.suppress(LookupError):
            await hosting

    asyncio.run(asyncio.wait_for(main(), 60))
    assert function.__name__ in caplog.text or "lambda" in caplog.text


def test_stacked_decorators_keep_all_ids() -> None:
    manager, other = EventManager(), EventManager()
    seen: list[tuple[int, int | None]] = []

    @manager.on(EventFd(1), drain=True, data=1)
    @manager.on(EventFd(2), drain=True, data=2)
    @other.on(EventFd(3), drain=True, data=3)
    def note(events: Events) -> None:
        seen.append((events.data, events.count))

    first, second, third = note.subscriber_ids  # type: ignore[attr-defined]
    assert note.subscriber_id == third  # type: ignore[attr-defined]
    manager.run()
    other.run()
    assert sorted(seen) == [(1, 1), (2, 2), (3, 3)]
    other.remove_subscriber(first)
    manager.remove_subscriber(second)
    manager.remove_subscriber(third)
    manager.on(EventFd())(note)
    assert len(note.subscriber_ids) == 2, "those that this manager has removed are gone"  # type: ignore[attr-defined]


def test_what_takes_no_attributes_is_wrapped() -> None:
    class Counter:
        def count(self, events: Events) -> int:
            """Count."""
            return events.data

    class Slots:
        __slots__ = ()

        def __call__(self, events: Events) -> None: ...

    manager = EventManager()
    for function in Counter().count, Slots(), print:
        registered: Any = manager.on(EventFd(), data=7)(function)
        assert registered.subscriber_ids == (registered.subscriber_id,)
        manager.remove_subscriber(registered.subscriber_id)
    assert manager.on(EventFd())(Counter().count)(Events(EventFd(), data=7)) == 7


def test_what_is_no_function_is_refused_at_once() -> None:
    manager = EventManager()
    with pytest.raises(TypeError, match="expected a function, not int"):
        manager.on(EventFd())(5)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="expected a function, not str"):
        manager.call_later(0, "x")  # type: ignore[arg-type]
    assert repr(manager) == "EventManager(subscribers=0)"

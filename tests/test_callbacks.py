"""`EventManager.on` and `call_later`: functions as subscribers."""

from __future__ import annotations

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
    with pytest.raises(ValueError, match="delay"):
        manager.call_later(-1, lambda: None)


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
    assert "slow took 0.0" in caplog.text
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


def test_what_is_no_function_is_refused_at_once() -> None:
    manager = EventManager()
    with pytest.raises(TypeError, match="a function is needed here, not int"):
        manager.on(EventFd())(5)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="a function is needed here, not str"):
        manager.call_later(0, "x")  # type: ignore[arg-type]
    assert repr(manager) == "EventManager(subscribers=0)"

"""`EventManager.call_later`: as asyncio's, with one descriptor for all.

Covers src/py/event/call_later.rs.
"""

from __future__ import annotations

import contextvars
import gc
import math
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import pytest
from alone import alone
from held import is_collected
from pyvmm import EventFd, EventManager

DEADLINE = 60.0


def run_until(manager: EventManager, is_done: Any) -> None:
    end = time.monotonic() + DEADLINE
    while not is_done():
        assert time.monotonic() < end, "the calls were not made"
        manager.run_with_timeout(100)


@alone
def test_many_timers_take_one_descriptor() -> None:
    manager = EventManager()
    manager.call_later(3600, print)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    later = [manager.call_later(3600 + i, print) for i in range(5000)]
    assert len(os.listdir("/proc/self/fd")) <= before
    assert repr(manager) == "EventManager(subscribers=0)"
    for each in later:
        each.cancel()
    assert manager.run_with_timeout(0) == 0


def test_late_calls_are_made_in_the_order_of_their_times() -> None:
    took = 1.0
    while took >= 0.001:  # otherwise the second call of the three may be due after the first
        manager = EventManager()
        order: list[int] = []
        start = time.monotonic()
        for number, delay in enumerate([0.003, 0.001, 0.002, -5, -5, 0, 0]):
            manager.call_later(delay, order.append, number)
        took = time.monotonic() - start
    time.sleep(0.004)
    run_until(manager, lambda: len(order) == 7)
    assert order == [3, 4, 5, 6, 1, 2, 0]


def test_arguments_and_context_are_passed_on() -> None:
    manager = EventManager()
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    context = contextvars.copy_context()
    context.run(variable.set, "theirs")
    seen: list[tuple[Any, ...]] = []

    def note(*arguments: int) -> None:
        seen.append((*arguments, variable.get()))

    variable.set("mine")
    manager.call_later(0, note, 1, 2)
    manager.call_later(0, note, 3, context=context)
    variable.set("later")
    run_until(manager, lambda: len(seen) == 2)
    assert seen == [(1, 2, "mine"), (3, "theirs")]
    with pytest.raises(TypeError, match=r"contextvars\.Context"):
        manager.call_later(0, note, context=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [-1e-9, -math.inf, -1e300, 0])
def test_a_time_that_has_passed_is_at_once(seconds: float) -> None:
    manager = EventManager()
    called: list[int] = []
    manager.call_later(seconds, called.append, 1)
    assert manager.run() == 1
    assert called == [1]


@pytest.mark.parametrize("seconds", [math.inf, 1e300, 1e18, 2**33, 1e9])
def test_a_time_that_is_far_never_comes_and_holds_up_no_other(seconds: float) -> None:
    manager = EventManager()
    far = manager.call_later(seconds, pytest.fail, "it was called")
    called: list[int] = []
    manager.call_later(0, called.append, 1)
    assert manager.run() == 1
    far.cancel()
    assert far.cancelled()
    assert manager.run_with_timeout(0) == 0


def test_what_is_no_time_is_refused() -> None:
    manager = EventManager()
    with pytest.raises(ValueError, match="nan"):
        manager.call_later(math.nan, print)
    with pytest.raises(TypeError):
        manager.call_later("soon", print)  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        manager.call_later(10**400, print)


def test_a_call_asked_for_by_a_call_waits_for_the_next_turn() -> None:
    manager = EventManager()
    called = 0

    def again() -> None:
        nonlocal called
        called += 1
        manager.call_later(-1, again)

    manager.call_later(0, again)
    for turn in range(1, 5):
        assert manager.run() == 1
        assert called == turn


def test_a_call_may_cancel_the_next_and_itself() -> None:
    manager = EventManager()
    order: list[str] = []

    def first() -> None:
        order.append("first")
        me.cancel()
        second.cancel()

    me = manager.call_later(0, first)
    second = manager.call_later(0, order.append, "second")
    third = manager.call_later(0, order.append, "third")
    run_until(manager, lambda: "third" in order)
    assert order == ["first", "third"]
    assert (me.cancelled(), second.cancelled(), third.cancelled()) == (False, True, False)


def test_an_exception_leaves_the_calls_behind_it_to_the_next_run() -> None:
    manager = EventManager()
    order: list[int] = []
    manager.call_later(0, order.append, 1)
    manager.call_later(0, lambda: 1 // 0)
    manager.call_later(0, order.append, 2)
    bell = EventFd(1)
    manager.on(bell)(lambda _: bell.read() // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            manager.run_forever()
    run_until(manager, lambda: len(order) == 2)
    assert order == [1, 2]
    assert manager.run_with_timeout(0) == 0


def test_a_cancelled_call_is_let_go_at_once() -> None:
    class Argument:
        pass

    manager = EventManager()
    argument = Argument()
    gone = weakref.ref(argument)
    later = manager.call_later(3600, print, argument)
    del argument
    later.cancel()
    assert gone() is None


def test_a_manager_in_a_call_of_its_own_is_collected() -> None:
    manager = EventManager()
    manager.call_later(3600, manager.run)
    gone = weakref.ref(manager)
    del manager
    assert is_collected(gone)


def test_calls_that_are_due_are_made_where_descriptors_have_run_out() -> None:
    code = """
import resource
from pyvmm import EventManager
manager, called = EventManager(), []
manager.call_later(0.001, called.append, 1)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
manager.call_later(0.002, called.append, 2)
while len(called) < 2:
    manager.run_with_timeout(100)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE)


def test_calls_are_asked_for_and_cancelled_by_any_thread_while_the_loop_waits() -> None:
    manager = EventManager()
    called: list[int] = []
    loop = threading.Thread(target=manager.run_forever)
    loop.start()

    def ask(number: int) -> None:
        for i in range(200):
            manager.call_later(0.001 * random.random(), called.append, number)
            if i % 2:
                manager.call_later(3600, pytest.fail).cancel()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    end = time.monotonic() + DEADLINE
    while len(called) < 800 and time.monotonic() < end:
        time.sleep(0.001)
    manager.stop()
    loop.join(DEADLINE)
    assert not loop.is_alive()
    assert sorted(called) == sorted([*range(4)] * 200)

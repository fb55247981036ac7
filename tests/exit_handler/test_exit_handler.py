"""`VmmExitHandler` and `WrappedExitHandler`, in a manager created by the program."""

from __future__ import annotations

import copy
import functools
import threading

from pyvmm import EventManager, EventOps, Events, EventSet, VmmExitHandler, WrappedExitHandler
from threads import all_at_once


def test_kick_clears_the_flag_when_the_loop_processes_it() -> None:
    handler = WrappedExitHandler()
    manager = EventManager()
    manager.add_subscriber(handler)
    assert handler.keep_running()
    handler.kick()
    assert handler.keep_running()
    assert manager.run() == 1
    assert not handler.keep_running()
    handler.rearm()
    assert handler.keep_running()
    assert manager.run_with_timeout(0) == 0


def test_clones_share_one_handler() -> None:
    inner = VmmExitHandler()
    handler = WrappedExitHandler(inner)
    for other in (handler.clone(), copy.copy(handler)):
        assert other == handler
        assert hash(other) == hash(handler)
    assert handler != WrappedExitHandler()
    manager = EventManager()
    manager.add_subscriber(inner)
    handler.clone().kick()
    manager.run()
    assert (inner.keep_running(), handler.handler.keep_running()) == (False, False)
    assert repr(inner) == "VmmExitHandler(keep_running=False)"


def test_kick_from_another_thread_ends_a_wait() -> None:
    handler = WrappedExitHandler()
    manager = EventManager()
    manager.add_subscriber(handler)
    kicker = threading.Thread(target=handler.kick)
    kicker.start()
    while handler.keep_running():
        manager.run()
    kicker.join()


def test_kick_ends_each_loop_that_watches_the_handler() -> None:
    handler = WrappedExitHandler()
    managers = [EventManager() for _ in range(3)]
    for manager in managers:
        manager.add_subscriber(handler)

    def run(manager: EventManager) -> None:
        while handler.keep_running():
            manager.run()

    all_at_once(*(functools.partial(run, manager) for manager in managers), handler.kick)


def test_it_can_be_part_of_a_python_subscriber() -> None:
    handler = VmmExitHandler()

    class Composed:
        def init(self, ops: EventOps) -> None:
            handler.init(ops)

        def process(self, events: Events, ops: EventOps) -> None:
            handler.process(events, ops)

    manager = EventManager()
    manager.add_subscriber(Composed())
    handler.exit_event.write(1)
    assert manager.run() == 1
    assert not handler.keep_running()
    assert manager.run_with_timeout(0) == 0, "the kick was drained"


def test_error_removes_it() -> None:
    handler = VmmExitHandler()

    class Fails:
        def init(self, ops: EventOps) -> None:
            handler.init(ops)

        def process(self, events: Events, ops: EventOps) -> None:
            handler.process(Events(handler.exit_event, EventSet.ERROR), ops)

    manager = EventManager()
    manager.add_subscriber(Fails())
    handler.kick()
    assert manager.run() == 1
    assert handler.keep_running()
    assert manager.run_with_timeout(0) == 0, "its fd is not watched any more"

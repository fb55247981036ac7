"""`RemoteEndpoint`, `run_forever` and `stop`: a loop reached from other threads and from its own callbacks.

Covers src/event/calls.rs, src/py/event/loop_call.rs.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from guests import SPIN, flat
from pyvmm import EventManager, Vmm
from subscribers import Callback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S = 60


@pytest.fixture
def running() -> Iterator[EventManager]:
    """A manager whose loop runs in a thread."""
    manager = EventManager()
    started = threading.Event()
    manager.add_subscriber(Callback(started.set))
    thread = threading.Thread(target=manager.run_forever, name="loop")
    thread.start()
    assert started.wait(DEADLINE_S)
    yield manager
    manager.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_call_runs_on_the_loops_thread_and_gives_its_value(running: EventManager) -> None:
    endpoint = running.remote_endpoint()
    name, manager = endpoint.call_blocking(lambda manager: (threading.current_thread().name, manager))
    assert name == "loop"
    assert manager is running


def test_exception_reaches_the_caller_and_the_loop_continues(running: EventManager) -> None:
    def fail(manager: EventManager) -> None:
        raise LookupError("on purpose")

    endpoint = running.remote_endpoint()
    with pytest.raises(LookupError, match="on purpose"):
        endpoint.call_blocking(fail)
    assert endpoint.call_blocking(lambda _: 5) == 5


def test_subscribers_are_added_and_removed_through_it(running: EventManager) -> None:
    called = threading.Event()
    endpoint = running.remote_endpoint()
    subscriber = Callback(called.set)
    id = endpoint.call_blocking(lambda manager: manager.add_subscriber(subscriber))
    assert called.wait(DEADLINE_S)
    assert endpoint.call_blocking(lambda manager: manager.remove_subscriber(id)) is subscriber


def test_many_threads_call_at_once(running: EventManager) -> None:
    endpoint = running.remote_endpoint()
    results: list[int] = []

    def call(n: int) -> None:
        results.extend(endpoint.call_blocking(lambda _, n=n, m=m: n * 100 + m) for m in range(50))  # type: ignore[misc]

    threads = [threading.Thread(target=call, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sorted(results) == sorted(n * 100 + m for n in range(8) for m in range(50))


def test_fire_is_called_without_a_waiting_caller(running: EventManager) -> None:
    called = threading.Event()
    running.remote_endpoint().fire(lambda _: called.set())
    assert called.wait(DEADLINE_S)


def test_exception_in_fire_ends_the_run() -> None:
    def fail(_: EventManager) -> None:
        raise LookupError("on purpose")

    manager = EventManager()
    manager.remote_endpoint().fire(fail)
    with pytest.raises(LookupError, match="on purpose"):
        manager.run_forever()


def test_calls_behind_one_that_raises_are_made_by_the_next_run() -> None:
    manager = EventManager()
    endpoint = manager.remote_endpoint()
    endpoint.fire(lambda _manager: 1 / 0)
    endpoint.fire(lambda manager: manager.stop())
    with pytest.raises(ZeroDivisionError):
        manager.run_forever()
    manager.run_forever()


def test_call_from_the_loops_own_thread_is_made_at_once() -> None:
    manager = EventManager()
    endpoint = manager.remote_endpoint()
    seen: list[Any] = []
    manager.add_subscriber(Callback(lambda: seen.append(endpoint.call_blocking(lambda m: m))))
    assert manager.run() == 1
    assert seen == [manager]


def test_call_times_out_when_no_thread_runs_the_loop() -> None:
    endpoint = EventManager().remote_endpoint()
    with pytest.raises(TimeoutError, match="is a thread in its run"):
        endpoint.call_blocking(lambda _: None, timeout=0.01)


def test_stop_from_a_callback_ends_run_forever() -> None:
    manager = EventManager()
    manager.add_subscriber(Callback(manager.stop))
    manager.run_forever()


def test_stop_before_run_forever_ends_it_at_once_and_only_that_one() -> None:
    manager = EventManager()
    manager.stop()
    manager.run_forever()
    manager.add_subscriber(Callback(manager.stop))
    manager.run_forever()


def test_kick_is_no_event() -> None:
    manager = EventManager()
    manager.remote_endpoint().kick()
    assert manager.run_with_timeout(0) == 0


def test_counters_tell_what_the_loop_did() -> None:
    manager = EventManager()
    manager.add_subscriber(Callback(lambda: None))
    assert (manager.turns, manager.dispatched) == (0, 0)
    manager.run()
    assert (manager.turns, manager.dispatched) == (1, 1)


@pytest.mark.parametrize("copy", [pickle.dumps, copy.copy, copy.deepcopy])
def test_endpoint_is_shared_and_never_copied(copy: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        copy(EventManager().remote_endpoint())


@pytest.mark.parametrize("call", ["fire", "call_blocking"])
def test_what_is_no_function_is_refused_at_once(call: str) -> None:
    with pytest.raises(TypeError, match="expected a function, not int"):
        getattr(EventManager().remote_endpoint(), call)(5)


@pytest.mark.kvm
def test_call_from_a_callback_of_a_shared_loop_is_made_at_once() -> None:
    """Whichever of the threads that turn it the callback is on."""
    manager = EventManager()
    endpoint = manager.remote_endpoint()
    seen: list[EventManager] = []
    with Vmm(flat(SPIN), event_manager=manager) as vmm, Vmm(flat(SPIN), event_manager=manager) as other:

        def call() -> None:
            seen.append(endpoint.call_blocking(lambda manager: manager, timeout=DEADLINE_S))
            vmm.stop()

        runs = [threading.Thread(target=machine.run) for machine in (other, vmm)]
        for run in runs:
            run.start()
        for _ in range(20):
            manager.add_subscriber(Callback(call))
        runs[1].join(DEADLINE_S)
        other.stop()
        runs[0].join(DEADLINE_S)
        assert not any(run.is_alive() for run in runs)
        manager.run_with_timeout(0)
    assert seen == [manager] * 20


def test_machines_that_share_a_loop_deliver_each_event_once() -> None:
    """Each source is ready until its callback reads it: a second delivery would find nothing there and raise."""
    manager = EventManager()
    left = 300
    with contextlib.ExitStack() as stack:
        machines = [stack.enter_context(Vmm(flat(SPIN), event_manager=manager)) for _ in range(4)]
        errors: list[BaseException] = []

        class Again(Callback):
            def __init__(self) -> None:
                super().__init__(self.again)

            def again(self) -> None:
                nonlocal left
                left -= 1
                if left > 0:
                    self.fd.write(1)
                else:
                    for machine in machines:
                        machine.stop()

        def run(machine: Vmm) -> None:
            try:
                machine.run(DEADLINE_S)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(machine,)) for machine in machines]
        for _ in range(3):
            manager.add_subscriber(Again())
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert not any(thread.is_alive() for thread in threads)
        assert errors == []
    assert left <= 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_exception_that_is_everyones_ends_the_run_too(error: type[BaseException]) -> None:
    """Ctrl-C comes in whatever the main thread does, also in a call that it makes for another thread."""
    manager = EventManager()
    endpoint = manager.remote_endpoint()
    got: list[BaseException] = []

    def ask() -> None:
        try:
            endpoint.call_blocking(fail)
        except BaseException as raised:
            got.append(raised)

    def fail(_: EventManager) -> None:
        raise error("on purpose")

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(error, match="on purpose"):
        manager.run_forever()
    asking.join(60)
    assert [type(each) for each in got] == [error]


def test_an_exception_that_its_caller_did_not_wait_for_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = EventManager()
    heard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(unraisable.exc_type))
    with pytest.raises(TimeoutError):
        manager.remote_endpoint().call_blocking(lambda _: 1 // 0, 0.0)
    manager.run_with_timeout(0)
    assert heard == [ZeroDivisionError]


@pytest.mark.parametrize("process", ["{}.setdefault", "functools.partial(max, 0, 0, key=id)", "lambda e, o: None"])
def test_a_busy_loop_hears_signals_and_lets_other_threads_run(process: str) -> None:
    """Callables written in C run no Python code, where the interpreter would see to both."""
    code = f"""
import functools, operator, os, signal, threading
from pyvmm import EventFd, EventManager, Events
manager, fd = EventManager(), EventFd(1)
class Subscriber: pass
subscriber = Subscriber()
subscriber.init = operator.methodcaller("add", Events(fd))
subscriber.process = {process}
manager.add_subscriber(subscriber)
def interrupt():
    while manager.turns < 10: beats.acquire()
    for _ in range(10): beats.acquire()
    os.kill(os.getpid(), signal.SIGINT)
beats = threading.Semaphore(0)
def beat():
    while True:
        beats.release()
        threading.Event().wait(0.001)
threading.Thread(target=beat, daemon=True).start()
threading.Thread(target=interrupt, daemon=True).start()
try: manager.run_forever()
except KeyboardInterrupt: os._exit(0)
os._exit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

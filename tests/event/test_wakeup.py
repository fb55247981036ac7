"""Signals while the main thread waits: through the process's wake-up fd, whichever thread the kernel gives them to."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING

import pytest
from guests import SPIN, flat
from pyvmm import EventManager, ExitReason, KvmVm, Vmm
from subscribers import Callback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S = 60
SIGNAL = signal.SIGUSR1


@contextlib.contextmanager
def handled(handler: Callable[[], object]) -> Iterator[None]:
    former = signal.signal(SIGNAL, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(SIGNAL, former)


@pytest.fixture
def wakeup() -> Iterator[socket.socket]:
    """The other end of the program's own wake-up fd."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        former = signal.set_wakeup_fd(theirs.fileno())
        yield ours
        assert signal.set_wakeup_fd(former) == theirs.fileno(), "the program's fd is there again"


def when_blocked(act: Callable[[], object]) -> threading.Thread:
    """Act in another thread, once the main thread sleeps in a ppoll(2) that has no limit."""
    main = os.getpid()

    def wait() -> None:
        number, timeout = "", ""
        while (number, timeout) != ("271", "0x0"):
            with open(f"/proc/self/task/{main}/syscall") as file:
                number, _, _, timeout = (file.read().split() + [""] * 4)[:4]
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def signal_this_thread() -> None:
    signal.pthread_kill(threading.get_ident(), SIGNAL)


def test_handler_runs_though_another_thread_got_the_signal() -> None:
    manager = EventManager()
    with handled(manager.stop):
        for _ in range(20):
            thread = when_blocked(signal_this_thread)
            manager.run_forever()
            thread.join()


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_stop_at_any_moment_of_a_wait_ends_it(in_main_thread: bool) -> None:
    """Also as the wait's first few milliseconds pass, when it begins anew with the pipe."""
    manager = EventManager()
    stopped = threading.Semaphore(0)
    moments = [step / 20_000 for step in range(80, 120)] * 3

    def stop() -> None:
        for moment in moments:
            stopped.acquire()
            time.sleep(moment)
            manager.stop()

    def run() -> None:
        for _ in moments:
            stopped.release()
            if in_main_thread:
                manager.run_forever()
            else:  # the first wait of a thread is special
                thread = threading.Thread(target=manager.run_forever)
                thread.start()
                thread.join()

    stopper = threading.Thread(target=stop)
    stopper.start()
    run()
    stopper.join()


def test_signal_from_before_the_wait_is_handled() -> None:
    manager = EventManager()
    with handled(manager.stop):
        for _ in range(200):
            thread = threading.Thread(target=signal_this_thread)
            thread.start()
            manager.run_forever()
            thread.join()


def test_programs_own_wakeup_fd_gets_its_bytes(wakeup: socket.socket) -> None:
    manager = EventManager()
    with handled(manager.stop):
        thread = when_blocked(signal_this_thread)
        manager.run_forever()
        thread.join()
    assert wakeup.recv(16) == bytes([SIGNAL])


def test_callbacks_find_the_programs_own_wakeup_fd(wakeup: socket.socket) -> None:
    manager = EventManager()
    seen: list[int] = []
    calls = Callback(lambda: seen.append(signal.set_wakeup_fd(-1)), 0)
    manager.add_subscriber(calls)
    thread = when_blocked(calls.fd.write)
    assert manager.run() == 1
    thread.join()
    signal.set_wakeup_fd(seen[0])


def test_exception_of_a_handler_ends_the_run(wakeup: socket.socket) -> None:
    def fail() -> None:
        raise LookupError("on purpose")

    manager = EventManager()
    with handled(fail):
        thread = when_blocked(signal_this_thread)
        with pytest.raises(LookupError, match="on purpose"):
            manager.run()
        thread.join()
    manager.add_subscriber(Callback(lambda: None))
    assert manager.run() == 1


def test_wakeup_fd_that_a_handler_sets_stays(wakeup: socket.socket) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    manager = EventManager()
    former: list[int] = []

    def choose() -> None:
        former.append(signal.set_wakeup_fd(writer))
        manager.stop()

    with handled(choose):
        for _ in range(2):
            thread = when_blocked(signal_this_thread)
            manager.run_forever()
            thread.join()
    assert former[1] == writer
    assert os.read(reader, 16) == bytes([SIGNAL])
    assert wakeup.recv(16) == bytes([SIGNAL]), "the first one"
    assert signal.set_wakeup_fd(former[0]) == writer
    os.close(reader)
    os.close(writer)


def test_handler_that_runs_another_loop() -> None:
    outer, inner = EventManager(), EventManager()
    inner.call_later(0.001, inner.stop)

    def run_inner() -> None:
        inner.run_forever()
        outer.stop()

    with handled(run_inner):
        thread = when_blocked(signal_this_thread)
        outer.run_forever()
        thread.join()


def test_loop_in_a_callback_of_another_is_woken_too(wakeup: socket.socket) -> None:
    outer, inner = EventManager(), EventManager()
    outer.add_subscriber(Callback(inner.run_forever))
    with handled(inner.stop):
        thread = when_blocked(signal_this_thread)
        assert outer.run() == 1
        thread.join()
    assert wakeup.recv(16) == bytes([SIGNAL])


def is_reset_by_asyncio() -> bool:
    """Python 3.12 and newer take the wake-up fd away from each child, if asyncio is imported."""
    return sys.version_info >= (3, 12) and "asyncio" in sys.modules


def test_child_forked_by_another_thread_has_the_programs_wakeup_fd(wakeup: socket.socket) -> None:
    manager = EventManager()
    number = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(number)
    expected = -1 if is_reset_by_asyncio() else number
    statuses: list[int] = []

    def child() -> int:
        if signal.set_wakeup_fd(number) != expected:
            return 2
        calls: list[bool] = []
        signal.signal(SIGNAL, lambda *_: calls.append(True))
        own = EventManager()
        with handled(own.stop):
            when_blocked(signal_this_thread)
            own.run_forever()
        return 0

    def fork() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of forks in a process of several threads
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = child()
            finally:
                os._exit(status)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        manager.stop()

    thread = when_blocked(fork)
    manager.run_forever()
    thread.join()
    assert statuses == [0]
    assert wakeup.recv(16) == bytes([SIGNAL]), "the program's fd is shared with its child, as ever"
    assert not select.select([wakeup], [], [], 0)[0]


def test_run_in_another_thread_leaves_the_wakeup_fd_alone(wakeup: socket.socket) -> None:
    manager = EventManager()
    thread = threading.Thread(target=manager.run_forever)
    thread.start()
    manager.remote_endpoint().call_blocking(lambda _: None)
    number = signal.set_wakeup_fd(-1)
    assert signal.set_wakeup_fd(number) == -1
    manager.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


@pytest.mark.kvm
@pytest.mark.parametrize("what", ["run", "wait", "bare"])
def test_machines_hear_signals_that_another_thread_got(what: str, wakeup: socket.socket) -> None:
    if what == "bare":
        with KvmVm(flat(SPIN)) as vm:
            vm.run()
            with handled(lambda: 1 // 0):
                thread = when_blocked(signal_this_thread)
                with pytest.raises(ZeroDivisionError):
                    vm.wait()
                thread.join()
    else:
        with Vmm(flat(SPIN)) as vmm:
            with handled(vmm.stop):
                thread = when_blocked(signal_this_thread)
                if what == "wait":
                    vmm.start()
                    exit = vmm.wait()
                else:
                    exit = vmm.run()
                thread.join()
            assert exit is not None
            assert exit.reason is ExitReason.STOPPED
    assert wakeup.recv(16) == bytes([SIGNAL])


def test_without_a_descriptor_left_signals_are_looked_at_in_slices() -> None:
    program = """
import os, resource, signal, threading
from pyvmm import EventManager

manager = EventManager()
signal.signal(signal.SIGUSR1, lambda *_: manager.stop())
resource.setrlimit(resource.RLIMIT_NOFILE, (manager.fileno() + 8, manager.fileno() + 8))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
thread = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), signal.SIGUSR1))
thread.start()
manager.run_forever()
thread.join()
print("stopped")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.stdout, done.stderr) == ("stopped\n", "")

"""Subscribers and the sources they watch: every kind of descriptor, changes from outside, sources drained for them."""

from __future__ import annotations

import ctypes
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from alone import alone
from pyvmm import EventError, EventFd, EventManager, EventOps, Events, EventSet, TimerFd

if TYPE_CHECKING:
    from collections.abc import Callable


class Watch:
    """Registers events and calls back."""

    def __init__(self, events: Events, on_event: Callable[[Events], object]) -> None:
        self.events = events
        self.on_event = on_event

    def init(self, ops: EventOps) -> None:
        ops.add(self.events)

    def process(self, events: Events, _ops: EventOps) -> None:
        self.on_event(events)


def first_event(source: Any, flags: EventSet = EventSet.IN) -> EventSet:
    """What the loop reports of a source that is ready, or soon will be."""
    manager = EventManager()
    seen: list[EventSet] = []
    manager.add_subscriber(Watch(Events(source, flags), lambda events: seen.append(events.event_set)))
    assert manager.run_with_timeout(10_000) == 1
    return seen[0]


def test_pidfd_is_ready_when_the_process_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    pidfd = os.pidfd_open(child.pid)
    try:
        assert first_event(pidfd) == EventSet.IN
        assert child.wait() == 0
    finally:
        os.close(pidfd)


def test_inotify_and_signalfd_are_sources(tmp_path: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    inotify = libc.inotify_init1(os.O_CLOEXEC)
    assert libc.inotify_add_watch(inotify, os.fsencode(tmp_path), 0x100) > 0  # IN_CREATE
    (tmp_path / "new").touch()
    assert first_event(inotify) == EventSet.IN
    os.close(inotify)
    mask = (ctypes.c_uint64 * 16)(1 << (signal.SIGUSR2 - 1))
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    signalfd = libc.signalfd(-1, mask, os.O_CLOEXEC)
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        assert first_event(signalfd) == EventSet.IN
        assert int.from_bytes(os.read(signalfd, 128)[:4], "little") == signal.SIGUSR2
    finally:
        os.close(signalfd)
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def test_priority_is_a_sockets_urgent_byte() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    with left, right:
        left.send(b"!", socket.MSG_OOB)
        assert EventSet.PRIORITY in first_event(right, EventSet.PRIORITY)


def test_terminal_and_its_hang_up() -> None:
    master, slave = pty.openpty()
    os.write(master, b"typed\n")
    assert first_event(slave) == EventSet.IN
    os.close(slave)
    assert EventSet.HANG_UP in first_event(master, EventSet.IN)
    os.close(master)


def test_read_hang_up_is_told_from_the_end() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.shutdown(socket.SHUT_WR)
        assert EventSet.READ_HANG_UP in first_event(right, EventSet.READ_HANG_UP)


def test_exclusive_wakes_and_cannot_be_modified() -> None:
    manager = EventManager()
    fd = EventFd(1)
    watch = Watch(Events(fd, EventSet.IN | EventSet.EXCLUSIVE), lambda _events: fd.read())
    id = manager.add_subscriber(watch)
    assert manager.run() == 1
    with pytest.raises(EventError, match="refuses"):  # epoll_ctl(2): no EPOLL_CTL_MOD for an exclusive one
        manager.event_ops(id).modify(Events(fd, EventSet.IN))


def test_hang_up_of_a_pipe_is_reported_once_when_it_is_one_shot() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    manager = EventManager()
    seen: list[EventSet] = []
    manager.add_subscriber(
        Watch(Events(reading, EventSet.IN | EventSet.ONE_SHOT), lambda events: seen.append(events.event_set))
    )
    assert manager.run() == 1
    assert manager.run_with_timeout(0) == 0
    assert seen == [EventSet.HANG_UP]
    os.close(reading)


def test_registrations_change_from_another_thread_while_the_loop_waits() -> None:
    manager = EventManager()
    fd, other = EventFd(1), EventFd()
    seen: list[int] = []
    id = manager.add_subscriber(Watch(Events(other), lambda events: seen.append(events.fd)))
    thread = threading.Thread(target=manager.run)
    thread.start()
    ops = manager.event_ops(id)
    ops.modify(Events(other, EventSet.IN | EventSet.EDGE_TRIGGERED))
    ops.add(Events(fd))
    thread.join(60)
    assert seen == [fd.fileno()]
    ops.remove(fd)
    assert manager.run_with_timeout(0) == 0
    with pytest.raises(EventError, match="not registered"):
        ops.remove(fd)


def test_ops_of_a_subscriber_that_is_gone_say_so() -> None:
    manager = EventManager()
    id = manager.add_subscriber(Watch(Events(EventFd()), print))
    ops = manager.event_ops(id)
    manager.remove_subscriber(id)
    with pytest.raises(EventError, match="removed"):
        ops.add(Events(EventFd()))
    with pytest.raises(EventError, match="removed"):
        manager.event_ops(id)
    with pytest.raises(EventError, match="another"):
        EventManager().event_ops(id)


def test_drained_sources_hand_over_their_count() -> None:
    manager = EventManager()
    fd, timer = EventFd(), TimerFd()
    counts: dict[int, int | None] = {}
    for source in (fd, timer):
        manager.add_subscriber(
            Watch(Events(source, drain=True), lambda events: counts.__setitem__(events.fd, events.count))
        )
    fd.write(3)
    fd.write(4)
    timer.set(0.0)
    assert manager.run_with_timeout(10_000) >= 1
    while timer.fileno() not in counts:
        manager.run_with_timeout(10_000)
    assert counts == {fd.fileno(): 7, timer.fileno(): 1}
    assert manager.run_with_timeout(0) == 0, "both were read"
    with pytest.raises(BlockingIOError):
        fd.read()
    assert Events(fd).count is None


def test_what_another_has_read_meanwhile_is_no_event() -> None:
    manager = EventManager()
    fd = EventFd()
    calls: list[int | None] = []

    def take(events: Events) -> None:
        calls.append(events.count)
        if select.select([fd], [], [], 0)[0]:
            fd.read()

    first = EventFd(1)
    manager.add_subscriber(Watch(Events(first, drain=True), take))
    manager.add_subscriber(Watch(Events(fd, drain=True), take))
    fd.write()
    assert manager.run() == 1
    assert calls == [1]


def test_drained_count_is_not_lost_behind_an_exception() -> None:
    manager = EventManager()
    fds = [EventFd(5), EventFd(5)]
    counts: list[int | None] = []

    def take(events: Events) -> None:
        counts.append(events.count)
        if len(counts) == 1:
            raise LookupError

    for fd in fds:
        manager.add_subscriber(Watch(Events(fd, EventSet.IN | EventSet.EDGE_TRIGGERED, drain=True), take))
    with pytest.raises(LookupError):
        manager.run()
    assert manager.run() == 1
    assert counts == [5, 5]


@alone
def test_drained_source_closed_while_registered_stays_open_until_it_is_removed() -> None:
    manager = EventManager()
    fd = EventFd(2)
    number = fd.fileno()
    counts: list[int | None] = []
    id = manager.add_subscriber(Watch(Events(fd, drain=True), lambda events: counts.append(events.count)))
    fd.close()
    assert EventFd().fileno() != number
    assert manager.run() == 1
    assert counts == [2]
    manager.remove_subscriber(id)
    assert EventFd().fileno() == number


@pytest.mark.parametrize("source", [0, EventFd(nonblocking=False), socket.socket()], ids=["int", "blocking", "socket"])
def test_what_cannot_be_drained_is_refused(source: Any) -> None:
    with pytest.raises(TypeError, match="drained"):
        Events(source, drain=True)


def test_hang_up_of_a_closed_source_with_a_duplicate_alive_is_dropped() -> None:
    reading, writing = os.pipe()
    copy = os.dup(reading)
    seen: list[EventSet] = []
    manager = EventManager()
    manager.add_subscriber(Watch(Events(reading), lambda events: seen.append(events.event_set)))
    os.close(reading)
    os.close(writing)
    assert [manager.run_with_timeout(0) for _ in range(3)] == [0, 0, 0]
    assert seen == []
    os.close(copy)


@pytest.mark.parametrize("with_duplicate", [False, True])
@alone
def test_number_that_was_closed_and_then_removed_can_be_added_again(with_duplicate: bool) -> None:
    manager = EventManager()
    fd = EventFd(1)
    number = fd.fileno()
    seen: list[int] = []
    id = manager.add_subscriber(Watch(Events(fd), lambda events: seen.append(events.fd)))
    copy = os.dup(number) if with_duplicate else None
    fd.close()
    ops = manager.event_ops(id)
    ops.remove(number)
    again = EventFd(1)
    assert again.fileno() == number
    ops.add(Events(number))
    assert manager.run() == 1
    assert seen == [number]
    if copy is not None:
        os.close(copy)


@alone
def test_closed_number_that_a_regular_file_has_now_is_refused_in_words() -> None:
    manager = EventManager()
    fd = EventFd()
    number = fd.fileno()
    manager.add_subscriber(Watch(Events(fd), print))
    fd.close()
    with open(__file__) as file:
        assert file.fileno() == number
        with pytest.raises(EventError, match="regular file"):
            manager.add_subscriber(Watch(Events(number), print))


def test_managers_that_watch_each_other_in_a_circle_are_refused() -> None:
    one, other = EventManager(), EventManager()
    one.add_subscriber(Watch(Events(other), print))
    with pytest.raises(EventError, match="circle"):
        other.add_subscriber(Watch(Events(one), print))
    with pytest.raises(EventError):
        one.add_subscriber(Watch(Events(one), print))

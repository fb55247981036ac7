"""Guest memory and forked children: a child reads on, and nothing that it writes reaches the machine or a snapshot."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from threading import Event, Thread
from typing import TYPE_CHECKING

import numpy
import pytest
from alone import alone
from guests import HALT, flat
from pyvmm import Snapshot, StateError, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Python warns of a fork beside threads, which is what one of these does.
pytestmark = [pytest.mark.kvm, pytest.mark.filterwarnings("ignore:This process")]
SYS_FORK = 57


def libc_fork() -> int:
    return os.fork()


def bare_fork() -> int:
    """Without the C library, which would have notified pyvmm."""
    return int(ctypes.CDLL(None, use_errno=True).syscall(SYS_FORK))


class Child:
    """A child that waits for a byte, then does something, and leaves with 0 if that raised nothing."""

    def __init__(self, act: Callable[[], object], fork: Callable[[], int] = libc_fork) -> None:
        ready, self.go = os.pipe()
        self.pid = fork()
        if self.pid == 0:
            try:
                os.read(ready, 1)
                act()
                os._exit(0)
            except BaseException:
                os._exit(1)
        os.close(ready)

    def finish(self) -> int:
        os.write(self.go, b"x")
        os.close(self.go)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize("fork", [libc_fork, bare_fork])
@alone
def test_a_child_of_before_a_snapshot_cannot_write_it(fork: Callable[[], int], tmp_path: Path) -> None:
    with Vmm(flat(HALT)) as vmm:
        vmm.memory.write(0x8000, b"golden")
        view = vmm.memory.view(0x8000, 16)

        def write() -> None:
            view[:6] = b"child!"

        child = Child(write, fork)
        snapshot = vmm.snapshot()
        assert child.finish() == 0
        with snapshot.fork() as machine:
            assert machine.memory.read(0x8000, 6) == b"golden"
        snapshot.save(tmp_path / "saved")
        with Snapshot.load(tmp_path / "saved").fork() as machine:
            assert machine.memory.read(0x8000, 6) == b"golden"
        vmm.reset(snapshot)
        assert vmm.memory.read(0x8000, 6) == b"golden"


def test_a_child_reads_what_was_there_and_writes_its_own() -> None:
    with Vmm(flat(HALT)) as vmm:
        vmm.memory.write(0x8000, b"parent")
        view, array = vmm.memory.view(0x8000, 16), numpy.frombuffer(vmm.memory.view(0x8000, 16), "uint8")

        def act() -> None:
            assert bytes(view[:6]) == b"parent"
            view[:6] = b"child!"
            assert bytes(array[:6]) == b"child!"

        assert Child(act).finish() == 0
        assert vmm.memory.read(0x8000, 6) == b"parent"
        assert bytes(array[:6]) == b"parent"


def test_a_grandchild_and_a_child_of_after_a_snapshot_write_their_own_too() -> None:
    with Vmm(flat(HALT)) as vmm:
        view = vmm.memory.view(0x8000, 16)
        vmm.snapshot()
        view[:6] = b"parent"

        def act() -> None:
            def again() -> None:
                assert bytes(view[:6]) == b"child!"
                view[:6] = b"grand!"

            view[:6] = b"child!"
            assert Child(again).finish() == 0
            assert bytes(view[:6]) == b"child!"

        assert Child(act).finish() == 0
        assert vmm.memory.read(0x8000, 6) == b"parent"


def test_calls_of_a_child_are_refused_and_its_views_may_be_dropped() -> None:
    with Vmm(flat(HALT)) as vmm:
        memory, views = vmm.memory, [vmm.memory.view(0, 4096)]

        def act() -> None:
            for call in (lambda: memory.read(0, 1), lambda: memory.view(0, 1), lambda: memory.add(1 << 30, 4096)):
                with pytest.raises(StateError):
                    call()
            views.clear()

        assert Child(act).finish() == 0


def test_memory_given_as_a_file_stays_shared_with_a_child() -> None:
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 4096)
    with Vmm(flat(HALT)) as vmm:
        vmm.memory.add(1 << 30, source=fd)
        os.close(fd)
        view = vmm.memory.view(1 << 30, 4096)

        def act() -> None:
            view[:6] = b"child!"

        assert Child(act).finish() == 0
        assert vmm.memory.read(1 << 30, 6) == b"child!"


def checksum(machine_view: memoryview) -> int:
    machine_view[0] = 255
    return sum(machine_view)


def worker(view: memoryview, queue: multiprocessing.SimpleQueue[int]) -> None:
    queue.put(checksum(view))


def test_multiprocessing_works_over_a_view() -> None:
    with Vmm(flat(HALT)) as vmm:
        vmm.memory.write(0x8000, bytes([1] * 16))
        view = vmm.memory.view(0x8000, 16)
        context = multiprocessing.get_context("fork")
        queue: multiprocessing.SimpleQueue[int] = context.SimpleQueue()
        processes = [context.Process(target=worker, args=(view, queue)) for _ in range(3)]
        for process in processes:
            process.start()
        assert [queue.get() for _ in processes] == [255 + 15] * 3
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert vmm.memory.read(0x8000, 16) == bytes([1] * 16)


def test_a_fork_beside_snapshots_of_other_threads_returns() -> None:
    # The handlers of fork take the lock of every mapping that is made and exchanged.
    stop = Event()

    def churn() -> None:
        while not stop.is_set():
            with Vmm(flat(HALT)) as vmm:
                vmm.reset(vmm.snapshot())

    thread = Thread(target=churn, daemon=True)
    thread.start()
    try:
        for _ in range(50):
            assert Child(lambda: None).finish() == 0
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()

"""Forks as workers: jobs that end, fail, hang and kill their guests, each for itself.

Covers python/pyvmm/snapshots.py.
"""

from __future__ import annotations

import gc
import os
import struct
import threading
import time
from concurrent.futures import CancelledError, as_completed
from typing import TYPE_CHECKING

import pytest
from alone import alone
from guests import SPIN, TRIPLE_FAULT, exit_with, flat
from pyvmm import ExitReason, ForkExecutor, Snapshot, StateError, Vmm

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
INPUT_AT = 0x5000

# 64 bits: exits with its input plus one; spins at 200, dies at 201. At 0x6000 it counts how often
# it has run.
PLUS_ONE_CODE = (
    b"\xff\x04\x25\x00\x60\x00\x00"  #  inc dword [0x6000]
    b"\x8a\x04\x25\x00\x50\x00\x00"  #  mov al, [0x5000]
    b"\x3c\xc8\x75\x02\xeb\xfe"  #      cmp al, 200; jne on; jmp $
    b"\x3c\xc9\x75\x0c" + TRIPLE_FAULT +  #  cmp al, 201; jne on
    b"\xfe\xc0\xe6\xf4"  #              inc al; out 0xf4, al
)  # fmt: skip
PLUS_ONE = flat(PLUS_ONE_CODE, "long64", address=0x10000, size_mib=2)


@pytest.fixture(scope="module")
def ready() -> Iterator[Snapshot]:
    with Vmm(PLUS_ONE) as vmm:
        yield vmm.snapshot()


def plus_one(vmm: Vmm, value: int) -> int:
    vmm.memory.write(INPUT_AT, bytes([value]))
    exit = vmm.run(DEADLINE_S)
    if exit.code is None:
        raise ArithmeticError(exit.reason)
    assert struct.unpack("<I", vmm.memory.read(0x6000, 4)) == (1,), "each job starts at the snapshot"
    return exit.code


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_map_gives_the_results_in_order(ready: Snapshot, workers: int) -> None:
    assert ready.map(plus_one, range(100), workers=workers) == list(range(1, 101))


def test_job_that_kills_its_guest_costs_only_that_job(ready: Snapshot) -> None:
    with ForkExecutor(ready, 2) as pool:
        futures = [pool.submit(plus_one, value) for value in (1, 201, 2, 201, 3)]
        results = [future.exception() or future.result() for future in futures]
    assert [r if isinstance(r, int) else type(r) for r in results] == [2, ArithmeticError, 3, ArithmeticError, 4]


def test_job_that_takes_too_long_costs_only_that_job(ready: Snapshot) -> None:
    with ForkExecutor(ready, 2, timeout=0.5) as pool:
        futures = [pool.submit(plus_one, value) for value in (1, 200, 2, 200, 3, 4)]
        assert [futures[n].result() for n in (0, 2, 4, 5)] == [2, 3, 4, 5]
        for late in (futures[1], futures[3]):
            with pytest.raises(TimeoutError, match=r"0\.5 seconds"):
                late.result()


def test_time_is_up_for_others_while_a_late_job_does_not_return(ready: Snapshot) -> None:
    is_over = threading.Event()

    def linger(vmm: Vmm) -> None:
        with pytest.raises(StateError):
            while True:
                vmm.memory.read(INPUT_AT, 1)  # until its time is up
        is_over.wait(DEADLINE_S)

    with ForkExecutor(ready, 2, timeout=0.2) as pool:
        lingering = pool.submit(linger)
        try:
            for _ in range(3):
                with pytest.raises(TimeoutError, match=r"0\.2 seconds"):
                    pool.submit(plus_one, 200).result(DEADLINE_S / 4)
            assert not lingering.done()
        finally:
            is_over.set()


@pytest.mark.parametrize("timeout", [1e12, float("inf")])
def test_time_limit_may_be_as_long_as_one_likes(ready: Snapshot, timeout: float) -> None:
    assert ready.map(plus_one, range(20), workers=2, timeout=timeout) == list(range(1, 21))


def test_job_that_closes_its_machine_costs_only_that_job(ready: Snapshot) -> None:
    def close(vmm: Vmm) -> None:
        vmm.close()
        vmm.run()

    with ForkExecutor(ready, 1) as pool:
        closed, after = pool.submit(close), pool.submit(plus_one, 5)
        with pytest.raises(StateError):
            closed.result()
        assert after.result() == 6


def test_map_raises_the_first_exception_and_ends_the_rest(ready: Snapshot) -> None:
    start = time.monotonic()
    with pytest.raises(ArithmeticError):
        ready.map(plus_one, [201, *[200] * 20], workers=2)
    assert time.monotonic() - start < DEADLINE_S
    with pytest.raises(TimeoutError):
        ready.map(plus_one, [1, 200], workers=2, timeout=0.2)


def test_executor_is_one_of_concurrent_futures(ready: Snapshot) -> None:
    with ForkExecutor(ready, 2) as pool:
        assert list(pool.map(plus_one, [7, 8, 9])) == [8, 9, 10]
        futures = {pool.submit(plus_one, value): value for value in range(10)}
        assert {futures[done] + 1 for done in as_completed(futures)} == {done.result() for done in futures}
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(plus_one, 1)
    for wrong in ({"workers": 0}, {"timeout": -1.0}, {"timeout": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ForkExecutor(ready, **wrong)


def test_shutdown_cancels_what_has_not_begun(ready: Snapshot) -> None:
    begun, go = threading.Event(), threading.Event()

    def wait(vmm: Vmm) -> int:
        begun.set()
        assert go.wait(DEADLINE_S)
        return plus_one(vmm, 1)

    pool = ForkExecutor(ready, 1)
    first, second = pool.submit(wait), pool.submit(plus_one, 1)
    assert begun.wait(DEADLINE_S)
    pool.shutdown(wait=False, cancel_futures=True)
    go.set()
    assert first.result() == 2
    with pytest.raises(CancelledError):
        second.result()
    pool.shutdown()


@alone
def test_pools_leave_nothing_behind() -> None:
    with Vmm(PLUS_ONE) as vmm:
        ready = vmm.snapshot()
    ready.map(plus_one, range(4), workers=2)
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        with pytest.raises(ArithmeticError):
            ready.map(plus_one, [1, 201, 2], workers=2, timeout=30)
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (descriptors, threads)


def test_workers_are_given_their_changes() -> None:
    with Vmm(flat(exit_with(3) + SPIN)) as vmm:
        snapshot = vmm.snapshot()
    seen: list[int] = []

    def changes(number: int) -> dict[str, object]:
        return {"entropy": lambda _fork: seen.append(number)}

    def run(vmm: Vmm, _value: int) -> ExitReason:
        return vmm.run(DEADLINE_S).reason

    with ForkExecutor(snapshot, 2, changes=changes) as pool:
        assert set(pool.map(run, range(8))) == {ExitReason.CODE}
    assert set(seen) <= {0, 1}

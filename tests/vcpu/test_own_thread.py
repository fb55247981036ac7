"""A vCPU's thread from one run to the next: it stays, takes what the next start gives it, and ends when it is idle.

Covers src/vcpu/own_thread.rs, src/vcpu/commands.rs, src/vcpu/commands_model.rs.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from guests import flat
from pyvmm import Stop, Vmm
from threads import vcpu_threads

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
OUT_FOR_EVER = b"\xba\x00\x05\xb0\x78\xee\xeb\xfd"  # mov dx, 0x500; mov al, 'x'; back: out dx, al; jmp back


class Where:
    """Notes the thread that it is called on, and ends the run."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.masks: list[set[int]] = []

    def write(self, offset: int, size: int, value: int) -> Stop:
        self.threads.append(threading.get_native_id())
        self.masks.append({int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])})
        return Stop(1)

    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        pass


def test_a_vcpu_keeps_its_thread_from_one_run_to_the_next() -> None:
    where = Where()
    with Vmm(flat(OUT_FOR_EVER)) as vmm:
        vmm.add_pio_device(0x500, 1, where)
        before = vmm.snapshot()
        for _ in range(3):
            vmm.run(DEADLINE_S)
            vmm.snapshot()
            vmm.reset(before)
        assert len(set(where.threads)) == 1
    assert where.threads[0] not in map(int, os.listdir("/proc/self/task"))


def test_a_thread_that_is_not_needed_for_a_while_ends() -> None:
    where = Where()
    with Vmm(flat(OUT_FOR_EVER)) as vmm:
        vmm.add_pio_device(0x500, 1, where)
        vmm.run(DEADLINE_S)
        give_up = time.monotonic() + DEADLINE_S
        while vcpu_threads():
            assert time.monotonic() < give_up
            time.sleep(0.01)
        vmm.run(DEADLINE_S)
    assert len(where.threads) == 2


def test_a_paused_machine_keeps_its_threads() -> None:
    threads: set[int] = set()
    written = threading.Event()

    class Device:
        def write(self, offset: int, size: int, value: int) -> None:
            threads.add(threading.get_native_id())
            written.set()

    with Vmm(flat(OUT_FOR_EVER)) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        vmm.start()
        assert written.wait(DEADLINE_S)
        vmm.pause()
        written.clear()
        time.sleep(1.5)  # longer than a thread waits for the next run
        assert threads <= set(map(int, os.listdir("/proc/self/task")))
        vmm.resume()
        assert written.wait(DEADLINE_S)
    assert len(threads) == 1


def test_the_next_run_has_the_mask_and_the_stack_of_its_own_start() -> None:
    where = Where()
    with Vmm(flat(OUT_FOR_EVER)) as vmm:
        vmm.add_pio_device(0x500, 1, where)
        vmm.run(DEADLINE_S)
        former = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        try:
            vmm.run(DEADLINE_S)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        vmm.run(DEADLINE_S)
        assert len(set(where.threads)) == 1
        former_size = threading.stack_size(32 << 20)
        try:
            vmm.run(DEADLINE_S)
        finally:
            threading.stack_size(former_size)
    assert [signal.SIGUSR2 in mask for mask in where.masks] == [False, True, False, False]
    assert len(set(where.threads)) == 2

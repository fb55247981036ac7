"""A call that waits for another thread's long work on the machine leaves the GIL to everybody else."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import guests
import pytest
from pyvmm import FlatBoot, MemoryConfig, Vcpu, Vmm, VmmConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    Look = Callable[[Vmm, Vcpu], object]

MIB = 256

LOOKS: dict[str, Look] = {
    "general registers": lambda _, vcpu: vcpu.regs.rip,
    "special registers": lambda _, vcpu: vcpu.sregs.cr0,
    "XSAVE state": lambda _, vcpu: vcpu.fpu.mxcsr,
    "MSRs": lambda _, vcpu: vcpu.msrs[0x10],
    "mp_state": lambda _, vcpu: vcpu.mp_state,
    "cpuid": lambda _, vcpu: vcpu.cpuid,
    "translate": lambda _, vcpu: vcpu.translate(0),
    "debug": lambda _, vcpu: vcpu.debug(),
    "guest-virtual memory": lambda vmm, vcpu: vmm.memory.read(0x1000, 1, vcpu=vcpu),
    "vcpus": lambda vmm, _: vmm.vcpus,
    "slots": lambda vmm, _: vmm.memory.slots,
}


def write_register(_: Vmm, vcpu: Vcpu) -> None:
    vcpu.regs.rax = 1


class Crowd:
    """A thread that wakes up over and over, and one that makes a call over and over beside it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.woken, self.gap = time.monotonic(), 0.0
        self.snapshot_s = float("inf")
        self.has_run_meanwhile = self.is_over = False
        self.failures: list[BaseException] = []
        self.threads = [threading.Thread(target=self.wake), threading.Thread(target=self.look)]

    def wake(self) -> None:
        while not self.is_over:
            time.sleep(0.001)
            now = time.monotonic()
            self.gap, self.woken = max(self.gap, now - self.woken), now

    def look(self) -> None:
        try:
            while not self.is_over:
                began, self.gap = time.monotonic(), 0.0
                self.call()
                now = time.monotonic()
                took, gap = now - began, max(self.gap, now - self.woken)
                if took > self.snapshot_s / 2 and gap < took / 2:
                    self.has_run_meanwhile = True
        except BaseException as error:
            self.failures.append(error)
            raise


@pytest.mark.parametrize("look", [*LOOKS.values(), write_register], ids=[*LOOKS, "write"])
def test_a_look_beside_a_snapshot_stops_no_other_thread(look: Look) -> None:
    config = VmmConfig(memory=MemoryConfig(size_mib=MIB), boot=FlatBoot(guests.HALT, mode="real16"))
    with Vmm(config) as vmm:
        vcpu = vmm.vcpus[0]  # to ask for it again would wait already
        kept, crowd = vmm.snapshot(), Crowd(lambda: look(vmm, vcpu))
        for thread in crowd.threads:
            thread.start()
        deadline = time.monotonic() + 30
        try:
            while not (crowd.has_run_meanwhile or crowd.failures) and time.monotonic() < deadline:
                # Every page is the machine's own and changed: the snapshot copies it.
                vmm.memory.fill(0x100000, (MIB - 2) << 20, 7)
                began = time.monotonic()
                kept = vmm.snapshot()
                crowd.snapshot_s = time.monotonic() - began
        finally:
            crowd.is_over = True
            for thread in crowd.threads:
                thread.join(60)
        assert not crowd.failures
        assert crowd.has_run_meanwhile, "no other thread ran while the call waited"
        assert kept.vcpus == 1
        assert vcpu.regs.rip == 0x1000

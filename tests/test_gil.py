"""A call that waits for another thread's long work on the machine leaves the GIL to everybody else."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import guests
import pytest
from pyvmm import FlatBoot, MemoryConfig, Vmm, VmmConfig

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 256
LONG_S = 0.02

LOOKS: dict[str, Callable[[Vmm], object]] = {
    "general registers": lambda vmm: vmm.vcpus[0].regs.rip,
    "special registers": lambda vmm: vmm.vcpus[0].sregs.cr0,
    "XSAVE state": lambda vmm: vmm.vcpus[0].fpu.mxcsr,
    "MSRs": lambda vmm: vmm.vcpus[0].msrs[0x10],
    "mp_state": lambda vmm: vmm.vcpus[0].mp_state,
    "cpuid": lambda vmm: vmm.vcpus[0].cpuid,
    "translate": lambda vmm: vmm.vcpus[0].translate(0),
    "debug": lambda vmm: vmm.vcpus[0].debug(),
    "guest-virtual memory": lambda vmm: vmm.memory.read(0x1000, 1, vcpu=vmm.vcpus[0]),
    "vcpus": lambda vmm: vmm.vcpus,
    "slots": lambda vmm: vmm.memory.slots,
}


def write_register(vmm: Vmm) -> None:
    vmm.vcpus[0].regs.rax = 1


class Crowd:
    """A thread that counts its turns, and one that makes a call over and over beside it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.turns = self.most = 0
        self.is_over = False
        self.failures: list[BaseException] = []
        self.threads = [threading.Thread(target=self.count), threading.Thread(target=self.look)]

    def count(self) -> None:
        while not self.is_over:
            self.turns += 1
            time.sleep(0)

    def look(self) -> None:
        try:
            while not self.is_over:
                turns, began = self.turns, time.monotonic()
                self.call()
                if time.monotonic() - began >= LONG_S:
                    self.most = max(self.most, self.turns - turns)
        except BaseException as error:
            self.failures.append(error)
            raise


@pytest.mark.parametrize("look", [*LOOKS.values(), write_register], ids=[*LOOKS, "write"])
def test_a_look_beside_a_snapshot_stops_no_other_thread(look: Callable[[Vmm], object]) -> None:
    config = VmmConfig(memory=MemoryConfig(MIB), boot=FlatBoot(guests.HALT, mode="real16"))
    with Vmm(config) as vmm:
        vcpu = vmm.vcpus[0]  # the machine's vCPUs are there before anybody waits for them
        kept, crowd = vmm.snapshot(), Crowd(lambda: look(vmm))
        for thread in crowd.threads:
            thread.start()
        deadline = time.monotonic() + 30
        try:
            # Two or three turns are those at the edges of the call.
            while crowd.most < 20 and not crowd.failures and time.monotonic() < deadline:
                vmm.memory.fill(0x100000, (MIB - 2) << 20, 7)
                kept = vmm.snapshot()
        finally:
            crowd.is_over = True
            for thread in crowd.threads:
                thread.join(60)
        assert not crowd.failures
        assert crowd.most >= 20, "no other thread ran while the call waited"
        assert kept.vcpus == 1
        assert vcpu.regs.rip == 0x1000

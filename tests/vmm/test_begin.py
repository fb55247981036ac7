"""How a run begins: a short one needs no thread of the vCPU's, and nobody can tell which it was.

Covers src/vmm/begin.rs.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alone import alone
from guests import HALT, SPIN, exit_with, flat, out, read_in
from pyvmm import (
    EventFd,
    EventOps,
    Events,
    ExitAction,
    ExitReason,
    Stop,
    Vcpu,
    VcpuExit,
    Vmm,
    VmRunState,
)
from threads import vcpu_threads

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
REP_OUTS = (
    b"\xfc\xba\x00\x05"  # cld; mov dx, 0x500
    b"\xbe\x00\x20"  #     mov si, 0x2000
    b"\xb9\x04\x00"  #     mov cx, 4
    b"\xf3\x6e"  #         rep outsb
)


def this_thread() -> str:
    """The name of the thread in the kernel."""
    return Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip()


def moves_quickly() -> bool:
    """Whether this kernel lets a vCPU change its thread without a wait of milliseconds."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (6, 13)


@alone
def test_a_short_run_starts_no_thread() -> None:
    with Vmm(flat(exit_with(3))) as vmm:
        start = vmm.snapshot()
        for _ in range(100):
            # A host that is busy may need more time than a short run has.
            if vmm.run(DEADLINE_S).code == 3 and not vcpu_threads():
                return
            vmm.reset(start)
        assert not moves_quickly()


@alone
def test_a_long_run_has_its_own_thread() -> None:
    with Vmm(flat(SPIN)) as vmm, ThreadPoolExecutor() as others:
        ran = others.submit(vmm.run, DEADLINE_S)
        while vcpu_threads() != ["vcpu_0"]:
            assert not ran.done()
            time.sleep(0.001)
        vmm.stop()
        assert ran.result().reason is ExitReason.STOPPED


def test_a_device_is_called_on_the_vcpus_thread_with_the_first_access() -> None:
    seen: list[tuple[str, str, int]] = []

    class Device:
        def read(self, offset: int, size: int) -> int:
            seen.append((this_thread(), "read", offset))
            return 0x42

        def write(self, offset: int, size: int, value: int) -> Any:
            seen.append((this_thread(), "write", value))
            return Stop("done") if value == 0x42 else None

    code = out(0x500, 7) + read_in(0x500) + b"\xee" + HALT  # out dx, al: what was read
    with Vmm(flat(code)) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        exit = vmm.run(DEADLINE_S)
        assert (exit.reason, exit.value) == (ExitReason.STOPPED, "done")
        assert vmm.run(DEADLINE_S).reason is ExitReason.HALT
    assert seen == [("vcpu_0", "write", 7), ("vcpu_0", "read", 0), ("vcpu_0", "write", 0x42)]


def test_a_string_instruction_reaches_its_device_once() -> None:
    seen: list[int] = []

    class Device:
        def write(self, offset: int, size: int, value: int) -> None:
            assert this_thread() == "vcpu_0"
            seen.append(value)

    with Vmm(flat(REP_OUTS + exit_with(0))) as vmm:
        vmm.memory.write(0x2000, b"\x01\x02\x03\x04")
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).code == 0
        assert vmm.vcpus[0].regs.rsi == 0x2004
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["hlt", "io", "any"])
def test_a_hook_is_called_on_the_vcpus_thread_with_the_first_exit(kind: Any) -> None:
    seen: list[tuple[str, str]] = []

    def hook(vcpu: Vcpu, exit: VcpuExit) -> ExitAction | None:
        seen.append((this_thread(), type(exit).__name__))
        return ExitAction.CONTINUE if len(seen) == 1 else None

    with Vmm(flat(out(0x300, 1) + HALT + HALT)) as vmm:
        vmm.on_exit(kind, hook)
        assert vmm.run(DEADLINE_S).reason is ExitReason.HALT
    expected = {"hlt": ["Hlt", "Hlt"], "io": ["IoOut"], "any": ["IoOut", "Hlt"]}[kind]
    assert seen == [("vcpu_0", name) for name in expected]


def test_an_event_of_a_guest_that_ends_at_once_is_delivered_before_the_run_returns() -> None:
    class Doorbell:
        def __init__(self) -> None:
            self.fd, self.rung = EventFd(), 0

        def init(self, ops: EventOps) -> None:
            ops.add(Events(self.fd))

        def process(self, events: Events, ops: EventOps) -> None:
            self.rung += self.fd.read()

    with Vmm(flat(out(0x600, 1) + exit_with(0))) as vmm:
        doorbell = Doorbell()
        vmm.add_subscriber(doorbell)
        vmm.add_ioeventfd(0x600, doorbell.fd, pio=True)
        start = vmm.snapshot()
        for count in range(1, 20):
            assert vmm.run(DEADLINE_S).code == 0
            assert doorbell.rung == count
            vmm.reset(start)


def test_requests_that_come_while_a_run_begins_are_heard() -> None:
    """At any moment of the first milliseconds: the run is on its caller's thread, handed over, or on another."""
    chance = random.Random(1)
    with Vmm(flat(SPIN)) as vmm, ThreadPoolExecutor() as others:
        start = vmm.snapshot()
        for turn in range(90):
            ran = others.submit(vmm.run, DEADLINE_S)
            while vmm.state is not VmRunState.RUNNING:
                assert not ran.done()
            until = time.perf_counter() + chance.choice([0, 5e-5, 2e-4, 3e-4, 1e-3])
            while time.perf_counter() < until:
                pass
            if turn % 3 == 0:
                vmm.pause(DEADLINE_S)
                assert vmm.vcpus[0].regs.rip == 0x1000
                vmm.resume()
            elif turn % 3 == 1:
                vmm.snapshot(DEADLINE_S)
            vmm.stop()
            assert ran.result(DEADLINE_S).reason is ExitReason.STOPPED
            if turn % 2:
                # A fresh count of the runs that begin elsewhere.
                vmm.reset(start)


@alone
def test_a_thread_that_blocks_all_signals_can_be_stopped() -> None:
    with Vmm(flat(SPIN)) as vmm:
        for run in (vmm.run, vmm.run_here, vmm.run, vmm.run_here):
            assert run(0.01).reason is ExitReason.TIMEOUT
            signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))

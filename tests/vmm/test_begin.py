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
from typing import TYPE_CHECKING, Any

import pytest
from alone import alone
from guests import HALT, SPIN, exit_with, flat, out, read_in
from pyvmm import (
    EventFd,
    EventManager,
    EventOps,
    Events,
    ExitAction,
    ExitReason,
    StateError,
    Stop,
    Vcpu,
    VcpuExit,
    Vmm,
    VmmError,
    VmRunState,
)
from threads import vcpu_threads

if TYPE_CHECKING:
    from collections.abc import Callable

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
    # On a busy host a run may take longer than a short one has.
    for _ in range(100):
        with Vmm(flat(exit_with(3))) as vmm:
            assert vmm.run(DEADLINE_S).code == 3
            if not vcpu_threads():
                return
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


class Doorbell:
    """Counts how often a guest has written to a port of its own."""

    def __init__(self, vmm: Vmm, port: int, before: Callable[[], object] | None = None) -> None:
        self.fd, self.rung, self.is_read, self.before = EventFd(), 0, True, before
        vmm.add_subscriber(self)
        vmm.add_ioeventfd(port, self.fd, pio=True)

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd))

    def process(self, events: Events, ops: EventOps) -> None:
        if self.before:
            self.before()
        if self.is_read:
            self.rung += self.fd.read()


def test_an_event_of_a_guest_that_ends_at_once_is_delivered_before_the_run_returns() -> None:
    with Vmm(flat(out(0x600, 1) + exit_with(0))) as vmm:
        doorbell = Doorbell(vmm, 0x600)
        start = vmm.snapshot()
        for count in range(1, 20):
            assert vmm.run(DEADLINE_S).code == 0
            assert doorbell.rung == count
            vmm.reset(start)


@pytest.mark.parametrize("run", ["run", "run_here"])
def test_all_events_of_a_guest_that_ends_at_once_are_delivered(run: str) -> None:
    """Also more than one iteration takes, and if the subscriber of the first never reads its event."""
    ports = range(0x600, 0x600 + 300)
    with Vmm(flat(b"".join(out(port, 1) for port in ports) + exit_with(0))) as vmm:
        doorbells = [Doorbell(vmm, port) for port in ports]
        doorbells[0].is_read = False
        start = vmm.snapshot()
        for count in range(1, 5):
            assert getattr(vmm, run)(DEADLINE_S).code == 0
            assert {doorbell.rung for doorbell in doorbells[1:]} == {count}
            vmm.reset(start)


@pytest.mark.parametrize("run", ["run", "run_here"])
def test_an_event_that_another_machines_thread_has_fetched_is_delivered_before_the_run_returns(run: str) -> None:
    manager = EventManager()
    entered, go = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert go.wait(DEADLINE_S)

    code = out(0x600, 1) + exit_with(0)
    with (
        ThreadPoolExecutor() as others,
        Vmm(flat(SPIN), event_manager=manager) as leader,
        Vmm(flat(code), event_manager=manager) as vmm,
    ):
        leading = others.submit(leader.run, DEADLINE_S)
        doorbell = Doorbell(vmm, 0x600, wait)
        ran = others.submit(getattr(vmm, run), DEADLINE_S)
        assert entered.wait(DEADLINE_S)
        with pytest.raises(TimeoutError):  # a run that does not wait would return now
            ran.result(0.2)
        go.set()
        assert ran.result(DEADLINE_S).code == 0
        assert doorbell.rung == 1
        leader.stop()
        assert leading.result(DEADLINE_S).reason is ExitReason.STOPPED


def test_a_run_beside_a_callback_of_the_last_one_continues_when_it_returns() -> None:
    entered, go = threading.Event(), threading.Event()
    written: list[int] = []

    class Slow:
        def write(self, offset: int, size: int, value: int) -> None:
            entered.set()
            assert go.wait(DEADLINE_S)
            written.append(value)

    with Vmm(flat(out(0x500, 7) + exit_with(3))) as vmm, ThreadPoolExecutor() as others:
        vmm.add_pio_device(0x500, 1, Slow())
        vmm.start()
        assert entered.wait(DEADLINE_S)
        # `start` does not change how the next run begins: on its caller's thread.
        vmm.stop()
        assert vmm.wait(0.01).reason is ExitReason.STOPPED  # type: ignore[union-attr]
        with pytest.raises(StateError, match=r"has not returned yet; use run\(\)"):
            vmm.run_here(DEADLINE_S)
        assert vmm.run(0.01).reason is ExitReason.TIMEOUT
        ran = others.submit(vmm.run, DEADLINE_S)
        go.set()
        assert ran.result(DEADLINE_S).code == 3
    assert written == [7]


# 32 bits: mov ebx, 0x10000000; mov al, [ebx]; mov [ebx + 4], al; and the same with a port and OUT
READS = {
    "mmio": (b"\xbb\x00\x00\x00\x10", b"\x8a\x03", b"\x88\x43\x04"),
    "port": (b"\x66\xba\x00\x05", b"\xec", b"\xee"),
}


@pytest.mark.parametrize("kind", READS)
@alone
def test_a_run_whose_thread_cannot_start_leaves_the_machine_before_the_access(kind: str) -> None:
    """The host may then continue the guest there, change its registers, or have it go elsewhere."""
    seen: list[object] = []

    class Device:
        def read(self, offset: int, size: int) -> int:
            seen.append("read")
            return 0x42

        def write(self, offset: int, size: int, value: int) -> None:
            seen.append(value)

    before, read, write = READS[kind]
    code = before + read + write + exit_with(1) + exit_with(2)
    for change in ("none", "rax", "rip"):
        seen.clear()
        with Vmm(flat(code, mode="protected32")) as vmm:
            device = Device()
            vmm.add_mmio_device(0x1000_0000, 0x1000, device)
            vmm.add_pio_device(0x500, 1, device)
            threading.stack_size(1 << 46)
            with pytest.raises(VmmError, match=r"vcpu_0: a thread with .* of stack cannot be started"):
                vmm.run(DEADLINE_S)
            threading.stack_size(0)
            assert (seen, vmm.state) == ([], VmRunState.PAUSED)
            regs = vmm.vcpus[0].regs
            if regs.rip == 0x1000:  # this kernel moves vCPUs slowly: no guest has run
                return
            assert regs.rip == 0x1000 + len(before)
            if change == "rax":
                regs.rax = 0x1234_5600
            elif change == "rip":
                regs.rip = 0x1000 + len(code) - len(exit_with(2))
            assert vmm.run(DEADLINE_S).code == (2 if change == "rip" else 1)
            assert seen == ([] if change == "rip" else ["read", 0x42])
            if change == "rax":
                assert vmm.vcpus[0].regs.rax >> 8 == 0x12_3456


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

"""Jobs of a pool, one after another on one worker: whatever one does, the next finds a new fork of the snapshot.

Covers src/vmm/renew.rs.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from guests import SPIN, exit_with, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from pyvmm import (
    CpuConfig,
    EventFd,
    ExitAction,
    ForkExecutor,
    SerialConfig,
    Snapshot,
    StateError,
    Stop,
    VcpuExit,
    Vmm,
    VmmError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
# How long a guest may go on that what was done to it before keeps from its end.
ACT_S = 1.0
SEED_AT = 0x8000

# 64 bits, ring 0: a port that nobody answers, a character, the exit port; and again.
GUEST = (
    b"\x66\xba\x00\x05\xec"  #          back: mov dx, 0x500; in al, dx
    b"\x88\x04\x25\x00\x30\x00\x00"  #  mov [0x3000], al
    b"\x66\xba\xf8\x03\xb0\x61\xee"  #  mov dx, 0x3f8; mov al, 'a'; out dx, al
    b"\xb0\x02\xe6\xf4"  #              mov al, 2; out 0xf4, al
    b"\xeb\xe7"  #                      jmp back
)


@pytest.fixture(scope="module")
def ready() -> Iterator[Snapshot]:
    with Vmm(flat(GUEST, "long64", address=0x10000, size_mib=2, cpu=CpuConfig(fixups=True))) as vmm:
        vmm.memory.write(SEED_AT, b"S" * 16)
        yield vmm.snapshot()


@pytest.fixture(scope="module")
def spinning() -> Iterator[Snapshot]:
    with Vmm(flat(SPIN)) as vmm:
        yield vmm.snapshot()


heard: list[str] = []
"""What has been called that one job left."""


def hear(*_: object) -> None:
    heard.append("a callback")


class Device:
    def read(self, offset: int, size: int) -> int:
        heard.append("a device")
        return 7

    def write(self, offset: int, size: int, value: int) -> None:
        heard.append("a device")


def observe(vmm: Vmm) -> dict[str, object]:
    """All that tells a machine from another, and how it runs."""
    heard.clear()
    vcpu = vmm.vcpus[0]
    seen: dict[str, object] = {
        "state": vmm.state,
        "unanswered": vmm.unanswered,
        "fixups": vmm.fixups,
        "counters": (vmm.stats.enabled, vmm.stats.exits, vmm.stats.vcpus),
        "input": vmm.serial.input_waiting,
        "output": vmm.serial.take_output(),
        "memory": vmm.memory.read(0, 2 << 20),
        "slots": vmm.memory.slots,
        "log_dirty": vmm.memory.log_dirty,
        "registers": (vcpu.regs.rip, vcpu.regs.rax, vcpu.sregs.cr3, vcpu.debugregs.dr7, vcpu.events.nmi_pending),
        "msrs": [vcpu.msrs[index] for index in (0x200, 0x277, 0x2FF, 0x403)],
        "turns": (vmm.event_manager.turns, vmm.event_manager.dispatched),
    }
    exit = vmm.run(DEADLINE_S)
    seen["run"] = (exit.reason, exit.code, exit.value, vmm.serial.take_output(), vmm.memory.read_u8(0x3000))
    seen["after"] = (vmm.state, vmm.unanswered)
    seen["heard"] = list(heard)
    return seen


def leave_running(vmm: Vmm) -> None:
    vmm.start()


def leave_paused(vmm: Vmm) -> None:
    vmm.start()
    with contextlib.suppress(StateError):  # it has ended
        vmm.pause()


def leave_exception(vmm: Vmm) -> None:
    def fail(*_: object) -> None:
        raise KeyError("of the job before")

    vmm.on_exit("io", fail)
    with contextlib.suppress(KeyError):
        vmm.run(DEADLINE_S)


def leave_timer(vmm: Vmm) -> None:
    vmm.event_manager.call_later(0, hear)


def leave_call(vmm: Vmm) -> None:
    vmm.event_manager.remote_endpoint().fire(hear)


def leave_subscriber(vmm: Vmm) -> None:
    fd = EventFd(1)
    vmm.event_manager.on(fd)(hear)
    kept.append(fd)


def leave_hostcall(vmm: Vmm) -> None:
    vmm.hostcall(1)(lambda: 0)


def leave_ioeventfd(vmm: Vmm) -> None:
    fd = EventFd()
    vmm.add_ioeventfd(0x500, fd, pio=True)
    kept.append(fd)


def leave_thread(vmm: Vmm) -> None:
    def run() -> None:
        with contextlib.suppress(Exception):  # also what a hook of the job raises
            vmm.run(0.01)

    threading.Thread(target=run, daemon=True).start()


def leave_msrs(vmm: Vmm) -> None:
    for index in (0x200, 0x277, 0x403):
        vmm.vcpus[0].msrs[index] = 6


def leave_failure(vmm: Vmm) -> None:
    vmm.vcpus[0].regs.rip = 0xDEAD_0000
    vmm.run(ACT_S)


def leave_debugging(vmm: Vmm) -> None:
    vmm.vcpus[0].debug(single_step=True)
    vmm.run(ACT_S)


def leave_fixup(vmm: Vmm) -> None:
    vmm.memory.write(0x10000, b"\x9b" + exit_with(5))  # fwait
    vmm.run(ACT_S)


def all_of(*acts: Callable[[Vmm], object]) -> Callable[[Vmm], object]:
    return lambda vmm: [act(vmm) for act in acts]


kept: list[object] = []
ACTS: dict[str, Callable[[Vmm], object]] = {
    "runs": lambda vmm: vmm.run(ACT_S),
    "runs out of time": lambda vmm: vmm.run(0),
    "writes": lambda vmm: vmm.memory.write(0x10000, b"\xf4" * 4096),
    "starts": leave_running,
    "pauses": leave_paused,
    "stops": lambda vmm: vmm.stop(),
    "kicks": lambda vmm: vmm.exit_handler.kick(),
    "runs and stops": all_of(lambda vmm: vmm.run(ACT_S), lambda vmm: vmm.stop()),
    "closes": lambda vmm: vmm.close(),
    "hooks": lambda vmm: vmm.on_exit("io", hear),
    "filters": lambda vmm: vmm.on_exit("msr", hear, msrs=[0x277]),
    "raises in a hook": leave_exception,
    "adds a device": lambda vmm: vmm.add_pio_device(0x500, 1, Device()),
    "adds memory": lambda vmm: vmm.memory.add(0x1000_0000, 4096),
    "removes memory": lambda vmm: vmm.memory.remove(vmm.memory.slots[0]),
    "logs": lambda vmm: setattr(vmm.memory, "log_dirty", True),
    "counts": lambda vmm: vmm.stats.enable(),
    "views": lambda vmm: kept.append(vmm.memory.view(0x3000, 16)),
    "overlays": lambda vmm: kept.append(vmm.memory.overlay(0x3000, ctypes.c_uint32)),
    "sends": lambda vmm: vmm.serial.send(b"left"),
    "timer": leave_timer,
    "call": leave_call,
    "subscriber": leave_subscriber,
    "hostcall": leave_hostcall,
    "ioeventfd": leave_ioeventfd,
    "thread": leave_thread,
    "registers": lambda vmm: vmm.vcpus[0].regs.update(rip=0x1234, rax=7),
    "mp state": lambda vmm: setattr(vmm.vcpus[0], "mp_state", 0),
    "msrs": leave_msrs,
    "nmi": lambda vmm: vmm.nmi(),
    "fails": leave_failure,
    "debugs": leave_debugging,
    "fixes up": leave_fixup,
    "steps": lambda vmm: vmm.vcpus[0].run_once(),
    "text": lambda vmm: vmm.serial.stop_at(b"a"),
    "keeps": kept.append,
    "keeps parts": lambda vmm: kept.extend((vmm.memory, vmm.serial, vmm.vcpus, vmm.vcpus[0].regs)),
    "snapshots": lambda vmm: kept.append(vmm.snapshot()),
    "raises": lambda vmm: 1 / 0,
}


# What a job's callback raised, and nobody waited for, is told where its machine is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@given(jobs=st.lists(st.lists(st.sampled_from(sorted(ACTS)), min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=120)
def test_next_job_finds_what_a_new_fork_has(ready: Snapshot, jobs: list[list[str]]) -> None:
    with ready.fork() as fork:
        want = observe(fork)

    def job(vmm: Vmm, acts: list[str]) -> None:
        for act in acts:
            with contextlib.suppress(Exception):  # after what it has done before, some acts are refused or fail
                ACTS[act](vmm)

    with ForkExecutor(ready, 1) as pool:
        for acts in jobs:
            with contextlib.suppress(ZeroDivisionError):
                pool.submit(job, acts).result(DEADLINE_S)
            assert pool.submit(observe).result(DEADLINE_S) == want
    kept.clear()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("act", sorted(ACTS))
def test_next_job_finds_nothing_of(ready: Snapshot, act: str) -> None:
    with ready.fork() as fork:
        want = observe(fork)
    with ForkExecutor(ready, 1) as pool:
        with contextlib.suppress(ZeroDivisionError):
            pool.submit(ACTS[act]).result(DEADLINE_S)
        assert pool.submit(observe).result(DEADLINE_S) == want
    kept.clear()


# What a job may do so that its fork is reset for the next, and not made anew: for everything else
# it is closed.
TAKEN_BACK: dict[str, Callable[[Vmm], object]] = {
    "Vmm.run": lambda vmm: vmm.run(DEADLINE_S),
    "Vmm.reset": lambda vmm: vmm.reset(kept_snapshot[0]),
    "Vmm.stop": lambda vmm: vmm.stop(),
    "Vmm.state": lambda vmm: vmm.state,
    "Vmm.config": lambda vmm: vmm.config,
    "Vmm.unanswered": lambda vmm: vmm.unanswered,
    "Vmm.fixups": lambda vmm: vmm.fixups,
    "Vmm.nmi": lambda vmm: vmm.nmi(),
    "Vmm.msi": lambda vmm: vmm.msi(0xFEE0_0000, 0x41),
    "Vmm.irq": lambda vmm: vmm.irq(5),
    "Vmm.vcpus": lambda vmm: vmm.vcpus,
    "Vmm.memory": lambda vmm: vmm.memory,
    "Vmm.serial": lambda vmm: vmm.serial,
    "Vmm.wait": lambda vmm: vmm.wait(0),  # raises: it was not started
    "Vmm.close": lambda vmm: None,  # then there is nothing to reset
    "IrqLine.line": lambda vmm: vmm.irq(5).line,
    "IrqLine.raise_": lambda vmm: vmm.irq(5).raise_(),
    "IrqLine.lower": lambda vmm: vmm.irq(5).lower(),
    "IrqLine.pulse": lambda vmm: vmm.irq(5).pulse(),
    "Serial.take_output": lambda vmm: vmm.serial.take_output(),
    "Serial.send": lambda vmm: vmm.serial.send(b"x"),
    "Serial.input_waiting": lambda vmm: vmm.serial.input_waiting,
    "GuestMemory.read": lambda vmm: vmm.memory.read(0, 1),
    "GuestMemory.readinto": lambda vmm: vmm.memory.readinto(0, bytearray(1)),
    "GuestMemory.write": lambda vmm: vmm.memory.write(0, b"x"),
    "GuestMemory.fill": lambda vmm: vmm.memory.fill(0, 1, 1),
    "GuestMemory.find": lambda vmm: vmm.memory.find(b"x"),
    "GuestMemory.size": lambda vmm: vmm.memory.size,
    "GuestMemory.ranges": lambda vmm: vmm.memory.ranges,
    "GuestMemory.slots": lambda vmm: vmm.memory.slots,
    "GuestMemory.read_u8": lambda vmm: vmm.memory.read_u8(0),
    "GuestMemory.write_u8": lambda vmm: vmm.memory.write_u8(0, 1),
    "GuestMemory.read_u16": lambda vmm: vmm.memory.read_u16(0),
    "GuestMemory.write_u16": lambda vmm: vmm.memory.write_u16(0, 1),
    "GuestMemory.read_u32": lambda vmm: vmm.memory.read_u32(0),
    "GuestMemory.write_u32": lambda vmm: vmm.memory.write_u32(0, 1),
    "GuestMemory.read_u64": lambda vmm: vmm.memory.read_u64(0),
    "GuestMemory.write_u64": lambda vmm: vmm.memory.write_u64(0, 1),
    "Vmm.resources": lambda vmm: vmm.resources,
    "Vcpu.id": lambda vmm: vmm.vcpus[0].id,
    "Vcpu.regs": lambda vmm: vmm.vcpus[0].regs.update(rax=1),
    "Vcpu.sregs": lambda vmm: setattr(vmm.vcpus[0].sregs, "cr2", 1),
    "Vcpu.fpu": lambda vmm: vmm.vcpus[0].fpu.mxcsr,
    "Vcpu.xcrs": lambda vmm: vmm.vcpus[0].xcrs,
    "Vcpu.debugregs": lambda vmm: setattr(vmm.vcpus[0].debugregs, "db0", 1),
    "Vcpu.events": lambda vmm: vmm.vcpus[0].events.nmi_pending,
    "Vcpu.lapic": lambda vmm: vmm.vcpus[0].lapic.svr,
    "Vcpu.msrs": lambda vmm: vmm.vcpus[0].msrs[0x277],
    "Vcpu.mp_state": lambda vmm: vmm.vcpus[0].mp_state,
    "Vcpu.cpuid": lambda vmm: vmm.vcpus[0].cpuid,
    "Vcpu.translate": lambda vmm: vmm.vcpus[0].translate(0),
}
CLOSES: dict[str, Callable[[Vmm], object]] = {
    "Vmm.add_ioeventfd": leave_ioeventfd,
    "Vmm.remove_ioeventfd": lambda vmm: vmm.remove_ioeventfd(0x500, EventFd(), pio=True),
    "Vmm.add_irqfd": lambda vmm: vmm.add_irqfd(EventFd(), 5),
    "Vmm.remove_irqfd": lambda vmm: vmm.remove_irqfd(EventFd(), 5),
    "Vmm.add_mmio_device": lambda vmm: vmm.add_mmio_device(0xD000_0000, 4096, Device()),
    "Vmm.remove_mmio_device": all_of(
        lambda vmm: vmm.add_mmio_device(0xD000_0000, 4096, Device()),
        lambda vmm: vmm.remove_mmio_device(0xD000_0000),
    ),
    "Vmm.add_pio_device": ACTS["adds a device"],
    "Vmm.remove_pio_device": all_of(ACTS["adds a device"], lambda vmm: vmm.remove_pio_device(0x500)),
    "Vmm.add_subscriber": lambda vmm: vmm.event_manager,
    "Vmm.remove_subscriber": lambda vmm: vmm.event_manager,
    "Vmm.event_manager": lambda vmm: vmm.event_manager,
    "Vmm.exit_handler": lambda vmm: vmm.exit_handler,
    "Vmm.hostcall": leave_hostcall,
    "Vmm.on_exit": ACTS["hooks"],
    "Vmm.off_exit": all_of(ACTS["hooks"], lambda vmm: vmm.off_exit("io", hear)),
    "Vmm.start": leave_running,
    "Vmm.pause": lambda vmm: vmm.pause(),
    "Vmm.resume": lambda vmm: vmm.resume(),
    "Vmm.run_async": lambda vmm: vmm.event_manager,
    "Vmm.snapshot": lambda vmm: vmm.snapshot(),
    "Vmm.stats": lambda vmm: vmm.stats.enabled,
    "Vmm.trace": lambda vmm: vmm.trace("trace"),
    "Serial.stop_at": lambda vmm: vmm.serial.stop_at(b"a"),
    "Serial.fileno": lambda vmm: vmm.serial.fileno(),
    "Serial.input_wanted": lambda vmm: vmm.serial.input_wanted,
    "GuestMemory.add": ACTS["adds memory"],
    "GuestMemory.remove": ACTS["removes memory"],
    "GuestMemory.log_dirty": ACTS["logs"],
    "GuestMemory.take_dirty": all_of(ACTS["logs"], lambda vmm: vmm.memory.take_dirty()),
    "GuestMemory.view": lambda vmm: vmm.memory.view(0, 1),
    "GuestMemory.overlay": lambda vmm: vmm.memory.overlay(0, ctypes.c_uint8),
    "Vcpu.answer": all_of(ACTS["steps"], lambda vmm: vmm.vcpus[0].answer(b"x")),
    "Vcpu.debug": lambda vmm: vmm.vcpus[0].debug(),
    "Vcpu.kick": lambda vmm: vmm.vcpus[0].kick(),
    "Vcpu.run_once": lambda vmm: vmm.vcpus[0].run_once(),
}
kept_snapshot: list[Snapshot] = []


def test_every_call_is_known_to_be_taken_back_or_to_close_the_fork() -> None:
    """A new one closes it unless it says that a reset takes back all that it does: its author has to choose."""
    with Vmm(flat(SPIN, irqchip=True)) as vmm:
        parts = (vmm, vmm.memory, vmm.vcpus[0], vmm.serial, vmm.irq(1))
        public = {f"{type(part).__name__}.{name}" for part in parts for name in dir(part) if not name.startswith("_")}
    assert TAKEN_BACK.keys() | CLOSES.keys() == public
    assert TAKEN_BACK.keys() & CLOSES.keys() == set()


@pytest.mark.parametrize("name", [*TAKEN_BACK, *CLOSES])
def test_fork_is_reset_where_that_takes_back_all_and_made_anew_otherwise(name: str) -> None:
    with Vmm(flat(exit_with(1), irqchip=True)) as vmm:
        snapshot = vmm.snapshot()
    kept_snapshot[:] = [snapshot]
    fork = snapshot.fork()
    fork._settle()
    handle = fork._lend()
    with contextlib.suppress(VmmError, ValueError):
        (TAKEN_BACK | CLOSES)[name](handle)
    assert fork._is_clean() is (name in TAKEN_BACK)
    assert fork._renew(snapshot) is False, "somebody holds it"
    del handle
    assert fork._renew(snapshot) is (name in TAKEN_BACK and name != "Vmm.stop")
    fork.close()


def test_machine_of_a_job_that_is_over_is_closed_to_whoever_has_kept_it(ready: Snapshot) -> None:
    def keep(vmm: Vmm) -> Any:
        return vmm, vmm.memory, vmm.vcpus[0], vmm.vcpus[0].regs, vmm.vcpus[0].msrs

    with ForkExecutor(ready, 1) as pool:
        vmm, memory, vcpu, regs, msrs = pool.submit(keep).result(DEADLINE_S)
        between = threading.Event()

        def job(machine: Vmm) -> object:
            assert machine is not vmm
            between.set()
            uses: list[Callable[[], object]] = [
                lambda: vmm.run(0),
                lambda: vmm.memory.write(SEED_AT, b"x"),
                lambda: memory.read(0, 1),
                lambda: memory.view(0, 1),
                lambda: vcpu.translate(0),
                lambda: regs.rip,
                lambda: msrs[0x277],
                lambda: vmm.on_exit("io", hear),
                lambda: vmm.add_pio_device(0x500, 1, Device()),
                vmm.snapshot,
                vmm.start,
            ]
            for use in uses:
                with pytest.raises(StateError, match="closed"):
                    use()
            return observe(machine)

        found = pool.submit(job).result(DEADLINE_S)
    with ready.fork() as fork:
        assert found == observe(fork)


@pytest.mark.parametrize("part", ["memory", "serial", "vcpus", "run"])
def test_part_that_a_thread_keeps_closes_the_fork(ready: Snapshot, part: str) -> None:
    """The thread has it before the job ends, and uses it while the next one runs."""
    go, used = threading.Event(), threading.Event()

    def first(vmm: Vmm) -> None:
        bound = getattr(vmm, part)
        has_it = threading.Event()

        def later() -> None:
            has_it.set()
            go.wait(DEADLINE_S)
            with contextlib.suppress(VmmError):
                match part:
                    case "memory":
                        bound.write(SEED_AT, b"poison")
                    case "serial":
                        bound.send(b"poison")
                    case "vcpus":
                        bound[0].regs.rip = 0xDEAD
                    case "run":
                        bound(DEADLINE_S)
            used.set()

        threading.Thread(target=later, daemon=True).start()
        assert has_it.wait(DEADLINE_S)

    def second(vmm: Vmm) -> dict[str, object]:
        go.set()
        assert used.wait(DEADLINE_S)
        return observe(vmm)

    with ForkExecutor(ready, 1) as pool:
        pool.submit(first).result(DEADLINE_S)
        found = pool.submit(second).result(DEADLINE_S)
    with ready.fork() as fork:
        assert found == observe(fork)


def test_callback_that_still_runs_keeps_no_other_job_waiting(ready: Snapshot) -> None:
    is_in, leave = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        is_in.set()
        leave.wait(DEADLINE_S)

    def first(vmm: Vmm) -> None:
        vmm.on_exit("io", wait)
        vmm.start()
        assert is_in.wait(DEADLINE_S)

    with ready.fork() as fork:
        want = observe(fork)
    with ForkExecutor(ready, 1) as pool:
        pool.submit(first).result(DEADLINE_S)
        assert pool.submit(observe).result(DEADLINE_S) == want
        assert not leave.is_set()
        leave.set()


def test_late_job_whose_callback_waits_delays_no_other_time_limit(spinning: Snapshot, ready: Snapshot) -> None:
    leave = threading.Event()

    def lingering(vmm: Vmm, callback: bool) -> None:
        if callback:
            vmm.memory.write(0x1000, b"\xe4\x80\xeb\xfe")  # in al, 0x80; jmp $
            vmm.on_exit("io", lambda *_: leave.wait(DEADLINE_S))
        vmm.run(DEADLINE_S)

    with ForkExecutor(spinning, 2, timeout=0.2) as pool:
        first = pool.submit(lingering, True)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                pool.submit(lingering, False).result(DEADLINE_S / 4)
        assert not first.done()
        leave.set()
        with pytest.raises(TimeoutError):
            first.result(DEADLINE_S)


class Answers:
    """A device of the pool's, which stays for each job."""

    def __init__(self) -> None:
        self.reads = 0

    def read(self, offset: int, size: int) -> int:
        self.reads += 1
        return 0x42

    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        pass


def test_what_setup_adds_is_there_for_each_job_and_the_fork_is_reset(ready: Snapshot) -> None:
    made: list[Answers] = []

    def setup(vmm: Vmm) -> None:
        made.append(Answers())
        vmm.add_pio_device(0x500, 1, made[-1])
        vmm.on_exit("io", lambda _vcpu, exit: ExitAction.CONTINUE if isinstance(exit, VcpuExit.IoOut) else None)

    def job(vmm: Vmm) -> int:
        vmm.run(0.05)
        return vmm.memory.read_u8(0x3000)

    with ForkExecutor(ready, 1, changes=lambda _: {"setup": setup}) as pool:
        assert [pool.submit(job).result(DEADLINE_S) for _ in range(3)] == [0x42] * 3
        assert len(made) == 1
        pool.submit(CLOSES["Vmm.off_exit"]).result(DEADLINE_S)
        assert pool.submit(job).result(DEADLINE_S) == 0x42
        assert len(made) == 2


def test_hook_of_the_setup_that_changes_the_machine_has_it_made_anew(ready: Snapshot) -> None:
    made: list[int] = []

    def setup(vmm: Vmm) -> None:
        made.append(1)

        def hook(_vcpu: object, exit: VcpuExit) -> object:
            if isinstance(exit, VcpuExit.IoIn):
                vmm.add_mmio_device(0xD000_0000, 4096, Answers())
                return Stop()
            return None

        vmm.on_exit("io", hook)

    with ForkExecutor(ready, 1, changes=lambda _: {"setup": setup}) as pool:
        for number in range(3):
            pool.submit(lambda vmm: vmm.run(DEADLINE_S).reason).result(DEADLINE_S)
            assert len(made) == number + 1


def test_each_job_has_randomness_of_its_own(ready: Snapshot) -> None:
    def seed(vmm: Vmm, _input: object = None) -> bytes:
        return vmm.memory.read(SEED_AT, 16)

    for arguments in ({"entropy": (SEED_AT, 16)}, {"changes": lambda _: {"entropy": (SEED_AT, 16)}}):
        with ForkExecutor(ready, 2, **arguments) as pool:
            seeds = [future.result(DEADLINE_S) for future in [pool.submit(seed) for _ in range(12)]]
        assert len(set(seeds)) == 12
        assert b"S" * 16 not in seeds
    assert len(set(ready.map(seed, range(6), workers=2, entropy=(SEED_AT, 16)))) == 6
    assert set(ready.map(seed, range(6), workers=2)) == {b"S" * 16}
    forks = ready.fork_many(3, entropy=(SEED_AT, 16))
    assert len({seed(fork) for fork in forks}) == 3
    for fork in forks:
        fork.close()


def test_entropy_that_does_more_than_write_memory_is_given_to_new_forks(ready: Snapshot) -> None:
    calls: list[Vmm] = []

    def entropy(vmm: Vmm) -> None:
        calls.append(vmm)
        vmm.on_exit("io", hear)

    def job(vmm: Vmm) -> int:
        heard.clear()
        vmm.run(DEADLINE_S)
        return len(heard)

    with ForkExecutor(ready, 1, entropy=entropy) as pool:
        assert [pool.submit(job).result(DEADLINE_S) for _ in range(3)] == [3] * 3


def test_processor_of_a_job_cannot_be_changed(ready: Snapshot) -> None:
    def change(vmm: Vmm) -> None:
        vmm.vcpus[0].cpuid = vmm.vcpus[0].cpuid

    with ForkExecutor(ready, 1) as pool:
        for _ in range(2):
            with pytest.raises(StateError, match="keeps its processor"):
                pool.submit(change).result(DEADLINE_S)


def test_input_of_a_stream_begins_anew_for_each_job(ready: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"xyz")
    serial = SerialConfig(input=str(path))

    def job(vmm: Vmm) -> int:
        deadline = time.monotonic() + DEADLINE_S
        while not vmm.serial.input_waiting and time.monotonic() < deadline:
            vmm.event_manager.run_with_timeout(10)
        return vmm.serial.input_waiting

    with ForkExecutor(ready, 1, changes=lambda _: {"serial": serial}) as pool:
        assert [pool.submit(job).result(DEADLINE_S) for _ in range(2)] == [3, 3]

"""Jobs of a pool, one after another on one worker: whatever one does, the next finds a new fork of the snapshot.

Covers src/vmm/renew.rs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from guests import SPIN, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_jobs import ACTS, CLOSES, DEADLINE_S, GUEST, SEED_AT, Device, hear, heard, kept, observe
from pyvmm import (
    CpuConfig,
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


@pytest.fixture(scope="module")
def ready() -> Iterator[Snapshot]:
    with Vmm(flat(GUEST, "long64", address=0x10000, size_mib=2, cpu=CpuConfig(fixups=True))) as vmm:
        vmm.memory.write(SEED_AT, b"S" * 16)
        yield vmm.snapshot()


@pytest.fixture(scope="module")
def spinning() -> Iterator[Snapshot]:
    with Vmm(flat(SPIN)) as vmm:
        yield vmm.snapshot()


# An uncollected exception of a job's callback is reported when its machine is closed.
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


def test_machine_kept_after_its_job_is_closed(ready: Snapshot) -> None:
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
    """A device of the pool, which stays for each job."""

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


def test_hook_of_the_setup_that_changes_the_machine_causes_a_new_fork(ready: Snapshot) -> None:
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
            with pytest.raises(StateError, match="CPUID cannot change"):
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

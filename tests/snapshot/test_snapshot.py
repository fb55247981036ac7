"""Snapshots and forks of guests that count. If the counts continue exactly, the guest was not restarted.

Covers src/py/vmm/fork.rs, src/py/snapshot/object.rs.
"""

from __future__ import annotations

import gc
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from alone import alone
from guests import SPIN, exit_with, flat, print_text
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import NONCE, NONCE_AT, counted, finish, oracle, while_it_runs
from pyvmm import (
    ConfigError,
    EventManager,
    ExitReason,
    SerialConfig,
    Snapshot,
    StateError,
    Vmm,
    VmRunState,
)

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
RAM_AT = 0x3000


@given(before=st.floats(0, 0.06), after=st.floats(0, 0.06), nonce=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_original_fork_and_reset_continue_exactly(before: float, after: float, nonce: int) -> None:
    with oracle(nonce) as vmm:
        vmm.run(before) if before else None
        if vmm.state is VmRunState.EXITING:
            return
        snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            vmm.run(after)
            assert finish(fork) == counted(nonce)
        vmm.reset(snapshot)
        assert finish(vmm) == counted(nonce)
        vmm.reset(snapshot)
        assert finish(vmm) == counted(nonce)


def test_snapshot_of_a_running_machine_lets_it_continue() -> None:
    with oracle() as vmm:
        vmm.start()
        snapshots = while_it_runs(vmm, 20)
        exit = vmm.wait(DEADLINE_S)
        assert exit is not None
        assert exit.code == 9
        assert vmm.serial.take_output() == counted(NONCE)
    for fork in (snapshots[0].fork(), snapshots[-1].fork()):
        with fork:
            assert finish(fork) == counted(NONCE)


def test_snapshots_from_several_threads_at_once_all_succeed() -> None:
    with Vmm(flat(SPIN, "user64", address=0x10000)) as vmm:
        vmm.start()
        with ThreadPoolExecutor(4) as pool:
            taken = list(pool.map(lambda _: vmm.snapshot(), range(100)))
        assert len({snapshot.id for snapshot in taken}) == 100
        assert vmm.state is VmRunState.RUNNING


def test_forked_child_resets_and_snapshots_its_own_machines() -> None:
    with oracle() as vmm:
        vmm.snapshot()
        snapshot = vmm.snapshot()  # the second one reads the page tables
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with snapshot.fork() as fork:
                    fork.memory.write(RAM_AT, b"mine")
                    with fork.snapshot().fork() as later:
                        found = later.memory.read(RAM_AT, 4)
                    status = int((found, fork.reset(snapshot)) != (b"mine", 1))
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0


def test_snapshot_of_a_paused_machine_leaves_it_paused() -> None:
    with Vmm(flat(SPIN)) as vmm:
        vmm.start()
        vmm.pause()
        vmm.snapshot()
        assert vmm.state is VmRunState.PAUSED
        vmm.stop()
        vmm.wait(DEADLINE_S)


def test_snapshot_before_the_first_run_starts_forks_where_it_would() -> None:
    with oracle() as vmm:
        snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            assert finish(fork) == counted(NONCE)
        assert finish(vmm) == counted(NONCE)


def test_snapshot_of_an_ended_guest_continues_after_its_end() -> None:
    with Vmm(flat(exit_with(1) + print_text(b"on") + exit_with(2))) as vmm:
        assert vmm.run(DEADLINE_S).code == 1
        snapshot = vmm.snapshot()
        with pytest.raises(StateError, match="ended"):
            vmm.run(DEADLINE_S)
        for machine in (snapshot.fork(), vmm):
            if machine is vmm:
                vmm.reset(snapshot)
            assert machine.run(DEADLINE_S).code == 2
            assert machine.serial.take_output() == b"on"


def test_snapshots_of_snapshots_are_a_tree() -> None:
    """Each machine counts on from where its branch stood."""
    with oracle(7) as root:
        tree: list[tuple[Snapshot, Vmm]] = [(root.snapshot(), root)]
        for level in range(4):
            snapshot, vmm = tree[-1]
            fork = snapshot.fork()
            assert fork.run(0.002 + 0.001 * level).reason is ExitReason.TIMEOUT
            tree.append((fork.snapshot(), fork))
        for snapshot, _ in reversed(tree):
            with snapshot.fork() as fork:
                assert finish(fork) == counted(7)
        flat = tree[-1][0].flatten()
        assert flat.mappings == 1
        for _, vmm in tree:
            vmm.close()
        with flat.fork() as fork:
            assert finish(fork) == counted(7)


def test_layers_hold_only_what_changed_and_flattening_joins_them() -> None:
    with Vmm(flat(SPIN, size_mib=8)) as vmm:
        vmm.memory.fill(0, 8 << 20, 1)
        first = vmm.snapshot()
        assert first.memory_bytes == 8 << 20
        vmm.memory.write(0x10000, b"changed")
        second = vmm.snapshot()
        assert second.memory_bytes - first.memory_bytes == 4096
        assert (first.mappings, second.mappings) == (1, 3)
        flat_one = second.flatten()
        assert (flat_one.mappings, flat_one.memory_bytes) == (1, 8 << 20)
        with second.fork() as fork, flat_one.fork() as other:
            assert fork.memory.read(0xFFFE, 10) == other.memory.read(0xFFFE, 10) == b"\1\1changed\1"


def test_forks_have_their_own_consoles_loops_and_memory() -> None:
    code = print_text(b"hello ") + b"\xba\xf8\x03\xa0\x00\x20\xee" + exit_with(9)  # mov al, [0x2000]; out dx, al
    manager, texts = EventManager(), [bytearray() for _ in range(3)]
    with Vmm(flat(code)) as vmm:
        snapshot = vmm.snapshot()
        for number, text in enumerate(texts):
            serial, shared = SerialConfig(output=text.extend), manager if number else None
            with snapshot.fork(serial=serial, event_manager=shared) as fork:
                fork.memory.write(0x2000, b"%d" % number)
                assert fork.run(DEADLINE_S).code == 9
                assert fork.config.serial.output is not None
        assert texts == [b"hello 0", b"hello 1", b"hello 2"]
        assert vmm.memory.read(0x2000, 1) == b"\0"
        with pytest.raises(ConfigError, match="serial"):
            snapshot.fork(serial="console")  # type: ignore[arg-type]


def test_entropy_is_written_before_a_fork_runs() -> None:
    with oracle() as vmm:
        snapshot = vmm.snapshot()
    by_place = [snapshot.fork(entropy=(NONCE_AT, 4)) for _ in range(2)]
    by_call = snapshot.fork(entropy=lambda fork: fork.memory.write(NONCE_AT, struct.pack("<I", 77)))
    nonces = [int.from_bytes(fork.memory.read(NONCE_AT, 4), "little") for fork in (*by_place, by_call)]
    assert len(set(nonces)) == 3
    for fork, nonce in zip((*by_place, by_call), nonces, strict=True):
        with fork:
            assert finish(fork) == counted(nonce)


def test_many_forks_are_made_in_parallel() -> None:
    with oracle() as vmm:
        vmm.run(0.01)
        snapshot = vmm.snapshot()
    forks = snapshot.fork_many(20, lambda number: {"entropy": lambda fork: fork.memory.write(0x6000, bytes([number]))})
    for number, fork in enumerate(forks):
        with fork:
            assert fork.memory.read(0x6000, 1) == bytes([number])
            assert finish(fork) == counted(NONCE)


@alone
def test_forks_of_which_one_cannot_be_made_leave_nothing() -> None:
    with oracle() as vmm:
        snapshot = vmm.snapshot()
    snapshot.fork().close()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError):
        snapshot.fork_many(5, lambda number: {"entropy": lambda _fork: 1 // (number - 3)})
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("count", [-1, 2**20 + 1, 2**62, -(2**70)])
def test_a_number_of_forks_that_no_host_has_is_refused(count: int) -> None:
    with oracle() as vmm:
        snapshot = vmm.snapshot()
    with pytest.raises(ValueError, match="count"):
        snapshot.fork_many(count)
    wrong: Any = "3"
    with pytest.raises(TypeError):
        snapshot.fork_many(wrong)
    assert snapshot.fork_many(0) == []


def test_memory_shared_with_others_is_refused_and_named() -> None:
    with Vmm(flat(SPIN)) as vmm:
        fd = os.memfd_create("shared")
        os.ftruncate(fd, 4096)
        slot = vmm.memory.add(0x200000, source=fd)
        with pytest.raises(StateError, match="0x200000"):
            vmm.snapshot()
        vmm.memory.remove(slot)
        vmm.snapshot()
        os.close(fd)


def test_added_memory_is_in_the_snapshot() -> None:
    with Vmm(flat(SPIN)) as vmm:
        vmm.memory.add(0x800000, 0x10000)
        vmm.memory.write(0x800100, b"added")
        snapshot = vmm.snapshot()
        vmm.memory.write(0x800100, b"later")
        with snapshot.fork() as fork:
            assert fork.memory.read(0x800100, 5) == b"added"
        vmm.reset(snapshot)
        assert vmm.memory.read(0x800100, 5) == b"added"

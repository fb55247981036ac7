"""Snapshots in files: whole, small, against a base, pickled, and inspected.

Covers src/bytes.rs, src/snapshot/load.rs, src/snapshot/pages.rs.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
from typing import TYPE_CHECKING, Any

import pytest
from guests import SPIN, flat
from oracle import NONCE, counted, finish, oracle
from pyvmm import CpuConfig, Snapshot, SnapshotError, StreamError, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


pytestmark = pytest.mark.kvm


@pytest.mark.parametrize("copy", [False, True])
def test_loaded_snapshot_continues_exactly(oracle_snapshot: Snapshot, oracle_file: Path, copy: bool) -> None:
    loaded = Snapshot.load(oracle_file, copy=copy, verify=True)
    assert (loaded.id, loaded.state, loaded.path) == (oracle_snapshot.id, oracle_snapshot.state, oracle_file)
    with loaded.fork() as fork:
        assert finish(fork) == counted(NONCE)
        fork.reset(loaded)
        assert finish(fork) == counted(NONCE)


def test_saved_loaded_and_saved_again_is_the_same_byte_for_byte(oracle_file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    Snapshot.load(oracle_file).save(again)
    assert again.read_bytes() == oracle_file.read_bytes()


def test_file_may_have_as_long_a_name_as_there_is(oracle_snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    oracle_snapshot.save(path)
    assert Snapshot.load(path).id == oracle_snapshot.id
    with pytest.raises(StreamError):
        oracle_snapshot.save(tmp_path / ("x" * 256))
    assert os.listdir(tmp_path) == [path.name]


def test_state_that_no_file_can_hold_is_refused_before_it_is_written(tmp_path: Path) -> None:
    class Huge:
        def read(self, offset: int, size: int) -> int:
            return 0

        def save(self) -> bytes:
            return bytes(1 << 28)

        def restore(self, state: bytes) -> None:
            pass

    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x80, 1, Huge())
        with pytest.raises(SnapshotError, match="268435456 at most"):
            vmm.snapshot().save(tmp_path / "huge")
    assert os.listdir(tmp_path) == []


def test_pages_of_zeros_cost_nothing(tmp_path: Path) -> None:
    with Vmm(flat(SPIN, size_mib=512)) as vmm:
        vmm.memory.write(0x100000, os.urandom(4096))
        vmm.memory.fill(0x200000, 1 << 20, 0)  # touched, and zero
        vmm.snapshot().save(tmp_path / "sparse")
    assert (tmp_path / "sparse").stat().st_size < 64 << 10


def test_file_against_a_base_holds_what_changed(tmp_path: Path) -> None:
    with Vmm(flat(SPIN, size_mib=8)) as vmm:
        vmm.memory.write(0, bytes(range(256)) * (8 << 12))
        base = vmm.snapshot()
        base.save(tmp_path / "base")
        vmm.memory.write(0x300000, b"changed")
        vmm.memory.fill(0x500000, 4096, 0)
        after = vmm.snapshot()
        after.save(tmp_path / "diff", base)
    assert (tmp_path / "diff").stat().st_size < 32 << 10
    with pytest.raises(SnapshotError, match=f"needs the snapshot {base.id}"):
        Snapshot.load(tmp_path / "diff")
    with pytest.raises(SnapshotError, match="this is"):
        Snapshot.load(tmp_path / "diff", after)
    for given_base in (base, tmp_path / "base", Snapshot.load(tmp_path / "base")):
        loaded = Snapshot.load(tmp_path / "diff", given_base)
        with loaded.fork() as fork, after.fork() as other:
            assert fork.memory.read(0, 8 << 20) == other.memory.read(0, 8 << 20)
        with loaded.flatten().fork() as fork:
            assert fork.memory.read(0x300000, 7) == b"changed"
    with Vmm(flat(SPIN, size_mib=4)) as smaller, pytest.raises(SnapshotError, match="memory"):
        after.save(tmp_path / "diff", smaller.snapshot())


def test_snapshots_are_pickled_by_their_file(oracle_file: Path, oracle_snapshot: Snapshot) -> None:
    loaded = pickle.loads(pickle.dumps(Snapshot.load(oracle_file)))
    assert loaded.id == oracle_snapshot.id
    with pytest.raises(TypeError, match="save"):
        pickle.dumps(oracle_snapshot)


def test_pickle_is_of_one_snapshot_and_not_of_another_in_its_file(oracle_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "pickled"
    Snapshot.load(oracle_file).save(path)
    pickled = pickle.dumps(Snapshot.load(path))
    assert pickle.loads(pickled).id == Snapshot.load(oracle_file).id
    with Vmm(flat(SPIN)) as vmm:
        vmm.snapshot().save(path)
    with pytest.raises(SnapshotError, match="no longer contains"):
        pickle.loads(pickled)


def test_progress_is_reported_and_can_end_the_save(tmp_path: Path) -> None:
    with Vmm(flat(SPIN, size_mib=8)) as vmm:
        vmm.memory.write(0, os.urandom(8 << 20))
        snapshot = vmm.snapshot()
    told: list[tuple[int, int]] = []
    snapshot.save(tmp_path / "file", progress=lambda done, total: told.append((done, total)))
    assert told == [(n << 20, 8 << 20) for n in range(1, 9)]
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(ZeroDivisionError):
        snapshot.save(tmp_path / "file", progress=lambda done, _total: 1 // (done - (3 << 20)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == before


@pytest.mark.parametrize("how", ["copy", "verify"])
def test_progress_of_a_load_is_reported_and_can_end_it(tmp_path: Path, how: str) -> None:
    with Vmm(flat(SPIN, size_mib=8)) as vmm:
        vmm.memory.write(0, os.urandom(8 << 20))
        base = vmm.snapshot()
        base.save(tmp_path / "base")
        vmm.memory.write(0, os.urandom(1 << 20))
        snapshot = vmm.snapshot()
        snapshot.save(tmp_path / "file", base)
    calls: list[tuple[int, int]] = []

    def load(progress: Callable[[int, int], object]) -> Snapshot:
        keywords: dict[str, Any] = {how: True}
        return Snapshot.load(tmp_path / "file", tmp_path / "base", progress=progress, **keywords)

    assert load(lambda done, total: calls.append((done, total))).id == snapshot.id
    assert calls == [*((n << 20, 8 << 20) for n in range(1, 9)), (1 << 20, 1 << 20)]
    with pytest.raises(ZeroDivisionError):
        load(lambda done, _total: 1 // (done - (3 << 20)))

    async def coroutine(_done: int, _total: int) -> None:
        pass

    with pytest.raises(TypeError, match="coroutine"):
        load(coroutine)
    calls.clear()
    Snapshot.load(tmp_path / "base", progress=lambda done, total: calls.append((done, total)))
    assert calls == []  # its pages are mapped, not read


def test_signal_handler_that_raises_ends_a_load(tmp_path: Path) -> None:
    with Vmm(flat(SPIN, size_mib=8)) as vmm:
        vmm.memory.write(0, os.urandom(8 << 20))
        vmm.snapshot().save(tmp_path / "file")

    def handler(*_: object) -> None:
        raise LookupError("handler")

    def progress(done: int, _total: int) -> None:
        calls.append(done)
        if done == 2 << 20:
            signal.raise_signal(signal.SIGUSR1)

    calls: list[int] = []
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(LookupError, match="handler"):
            Snapshot.load(tmp_path / "file", verify=True, progress=progress)
        assert calls == [1 << 20, 2 << 20]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_file_replaced_by_another_save_does_not_touch_live_forks(oracle_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "replaced"
    path.write_bytes(oracle_file.read_bytes())
    loaded = Snapshot.load(path)
    with loaded.fork() as fork, oracle(99) as other:
        other.snapshot().save(path)
        with loaded.fork() as later:
            assert finish(fork) == finish(later) == counted(NONCE)


def test_inspection_says_what_is_in_a_file(oracle_file: Path, oracle_snapshot: Snapshot) -> None:
    found = Snapshot.inspect(oracle_file)
    assert (found["id"], found["base"], found["vcpus"]) == (oracle_snapshot.id, None, 1)
    assert found["ranges"] == [(0, 2 << 20, False)]
    assert ("regs", 0, 144) in found["records"]
    json.dumps(found)


def test_two_vcpus_and_an_interrupt_controller_are_saved(tmp_path: Path) -> None:
    with Vmm(flat(SPIN, cpu=CpuConfig(vcpus=2), irqchip=True)) as vmm:
        vmm.run(0.01)
        vmm.snapshot().save(tmp_path / "file")
    with Snapshot.load(tmp_path / "file").fork() as fork:
        assert fork.vcpus[1].regs.rip == 0x1000
        fork.run(0.01)


def test_a_loaded_snapshot_says_what_it_takes_of_memory_and_of_its_file(tmp_path: Path) -> None:
    with Vmm(flat(SPIN, size_mib=2)) as vmm:
        vmm.memory.write(0x5000, b"x")
        snapshot = vmm.snapshot()
    snapshot.save(tmp_path / "file")
    loaded = Snapshot.load(tmp_path / "file")
    assert snapshot.memory_size == loaded.memory_size == 2 << 20
    assert (snapshot.file_bytes, loaded.memory_bytes) == (0, 0)
    assert snapshot.memory_bytes > 0
    assert 0 < loaded.file_bytes < 2 << 20

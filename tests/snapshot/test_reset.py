"""Resets: the machine is exactly what it was, whatever it did, or is refused and unchanged.

Covers src/vmm/resets.rs and src/vmm/restore.rs.
"""

from __future__ import annotations

import pytest
from guests import SPIN, exit_with, flat
from oracle import ORACLE, counted, finish, oracle
from python_devices import Tape
from pyvmm import (
    CpuConfig,
    StateError,
    Vmm,
    VmRunState,
)

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
RAM_AT = 0x3000


def test_reset_returns_the_number_of_pages() -> None:
    with Vmm(flat(SPIN, size_mib=8)) as vmm:
        vmm.memory.fill(0, 8 << 20, 1)
        snapshot = vmm.snapshot()
        assert vmm.reset(snapshot) == 0
        for page in (3, 4, 1000):
            vmm.memory.write(page * 4096 + 5, b"x")
        vmm.memory.write(7 * 4096, b"\1")  # written, and the same
        view = vmm.memory.view(2000 * 4096, 4096)
        view[17] = 9
        assert vmm.reset(snapshot) == 4
        assert view[17] == 1
        assert vmm.reset(snapshot) == 0
        assert vmm.memory.read(0, 8 << 20) == b"\1" * (8 << 20)


def test_many_resets_give_back_what_one_dirtied() -> None:
    with Vmm(flat(SPIN, size_mib=16)) as vmm:
        snapshot = vmm.snapshot()
        vmm.memory.fill(0, 16 << 20, 1)
        assert vmm.reset(snapshot) >= 4096 - 1
        for number in range(20):
            vmm.memory.write(0, bytes([number + 1]))
            assert vmm.reset(snapshot) == 1
        assert vmm.memory.read(0, 16 << 20) == snapshot.fork().memory.read(0, 16 << 20)


def test_reset_goes_to_any_snapshot_of_such_a_machine() -> None:
    with oracle(1) as vmm, oracle(2) as other:
        vmm.run(0.01)
        ours, theirs = vmm.snapshot(), other.snapshot()
        vmm.run(0.01)
        later = vmm.snapshot()
        for snapshot, nonce in ((ours, 1), (theirs, 2), (later, 1), (ours, 1)):
            vmm.reset(snapshot)
            assert finish(vmm) == counted(nonce)


def test_reset_of_a_running_machine_continues_from_the_snapshot() -> None:
    with oracle() as vmm:
        snapshot = vmm.snapshot()
        vmm.start()
        for _ in range(5):
            try:
                vmm.reset(snapshot)
            except StateError:  # it was faster
                break
        assert vmm.wait(DEADLINE_S) is not None


def test_reset_refuses_a_machine_with_other_parts_and_changes_nothing() -> None:
    with oracle() as vmm, Vmm(flat(ORACLE, "user64", address=0x10000, size_mib=4)) as larger:
        snapshot = vmm.snapshot()
        with pytest.raises(StateError, match="memory slots"):
            larger.reset(snapshot)
        with oracle(cpu=CpuConfig(vcpus=2)) as two, pytest.raises(StateError, match="vcpus 2, the snapshot 1"):
            two.reset(snapshot)
        with oracle(exit_port=None) as portless, pytest.raises(StateError, match="exit_port"):
            portless.reset(snapshot)
        vmm.close()
        with pytest.raises(StateError, match="closed"):
            vmm.reset(snapshot)
        with pytest.raises(StateError, match="closed"):
            vmm.snapshot()
        assert larger.memory.size == 4 << 20


def test_reset_refuses_devices_that_are_missing_and_changes_nothing() -> None:
    class Stateless:
        def read(self, offset: int, size: int) -> int:
            return 0

    with oracle() as vmm, oracle() as other:
        vmm.add_pio_device(0x80, 1, Tape(b""))
        snapshot = vmm.snapshot()
        other.memory.write(RAM_AT, b"mine")
        with pytest.raises(StateError, match="pio 0x80: the snapshot has a device there"):
            other.reset(snapshot)
        other.add_pio_device(0x80, 1, Stateless())
        with pytest.raises(StateError, match=r"has no restore\(\)"):
            other.reset(snapshot)
        assert (other.state, other.memory.read(RAM_AT, 4)) == (VmRunState.CREATED, b"mine")


def test_reset_to_another_cpuid_is_refused_once_the_guest_has_run() -> None:
    def machine(*hide: str) -> Vmm:
        return Vmm(flat(exit_with(9), "long64", address=0x10000, cpu=CpuConfig(hide=hide)))

    with machine("cx16") as vmm, machine() as fresh, machine() as other:
        snapshot = vmm.snapshot()
        cpuid = [part for part in snapshot.state if part[0] == "cpuid"]
        fresh.reset(snapshot)
        assert [part for part in fresh.snapshot().state if part[0] == "cpuid"] == cpuid
        assert fresh.run(DEADLINE_S).code == 9
        fresh.reset(snapshot)
        assert other.run(DEADLINE_S).code == 9
        other.memory.write(RAM_AT, b"mine")
        with pytest.raises(StateError, match=r"another CPUID.*fork"):
            other.reset(snapshot)
        assert (other.state, other.memory.read(RAM_AT, 4)) == (VmRunState.EXITING, b"mine")


def test_dirty_log_sees_what_a_reset_writes() -> None:
    with Vmm(flat(SPIN)) as vmm:
        snapshot = vmm.snapshot()
        vmm.memory.write(0x3000, b"x")
        vmm.memory.log_dirty = True
        vmm.reset(snapshot)
        assert vmm.memory.take_dirty().ranges == [(0x3000, 4096)]

"""Snapshots and resets keep to the memory slots that they have checked, whatever changes meanwhile."""

from __future__ import annotations

import os
from threading import Event, Thread

import pytest
from guests import exit_with, flat
from pyvmm import Snapshot, StateError, Vmm

pytestmark = pytest.mark.kvm
MIB = 1 << 20
PLACE = 0x4000_0000


def snapshot_of(size: int) -> tuple[Vmm, Snapshot]:
    vmm = Vmm(flat(exit_with(7)))
    vmm.memory.add(PLACE, size)
    vmm.memory.write(PLACE, b"golden")
    return vmm, vmm.snapshot()


@pytest.mark.parametrize("size", [4096, MIB // 2, 2 * MIB])
def test_reset_over_a_slot_of_another_size_is_refused_and_changes_nothing(size: int) -> None:
    vmm, snapshot = snapshot_of(MIB)
    with vmm:
        (_, slot) = vmm.memory.slots
        vmm.memory.remove(slot)
        vmm.memory.add(PLACE, size)
        vmm.memory.write(0x2000, b"now")
        with pytest.raises(StateError, match="memory slots"):
            vmm.reset(snapshot)
        assert (vmm.memory.read(0x2000, 3), vmm.memory.read(PLACE, 6)) == (b"now", bytes(6))


class Swap:
    """A device whose first write waits for a reset to begin, then replaces a slot of the machine."""

    def __init__(self, vmm: Vmm) -> None:
        self.vmm, self.slot = vmm, vmm.memory.add(PLACE, 64 * MIB)
        self.started, self.is_reset_waiting, self.swapped = Event(), Event(), Event()
        vmm.add_pio_device(0x500, 4, self)

    def write(self, offset: int, size: int, value: int) -> None:
        if self.swapped.is_set():
            return
        self.started.set()
        self.is_reset_waiting.wait(60)
        self.vmm.memory.remove(self.slot)
        self.vmm.memory.add(PLACE, 4096)
        self.swapped.set()

    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None: ...


def test_a_slot_swapped_while_a_reset_waits_is_not_mapped_over() -> None:
    # The reset waits for the vCPU, whose device replaces the memory that the reset has checked.
    code = b"\xba\x00\x05\xee\xeb\xfd"  # mov dx, 0x500; out dx, al; jmp back
    with Vmm(flat(code)) as vmm:
        swap = Swap(vmm)
        snapshot = vmm.snapshot()
        neighbours = [bytearray(b"\xa5" * MIB) for _ in range(64)]
        vmm.start()
        assert swap.started.wait(60)
        errors: list[Exception] = []

        def reset() -> None:
            try:
                vmm.reset(snapshot)
            except StateError as error:
                errors.append(error)

        thread = Thread(target=reset, daemon=True)
        thread.start()
        swap.is_reset_waiting.set()
        thread.join(60)
        assert not thread.is_alive()
        assert swap.swapped.wait(60)
        # Either the reset came first and was whole, or it found other slots.
        assert [slot.size for slot in vmm.memory.slots] == [MIB, 4096]
        assert all("memory slots" in str(error) for error in errors)
        assert all(block == b"\xa5" * MIB for block in neighbours)


def test_a_read_only_slot_is_not_that_of_a_snapshot() -> None:
    vmm, snapshot = snapshot_of(4096)
    with vmm:
        vmm.memory.remove(vmm.memory.slots[1])
        vmm.memory.add(PLACE, 4096, read_only=True)
        with pytest.raises(StateError, match="memory slots"):
            vmm.reset(snapshot)


def test_a_fork_with_a_shared_slot_is_reset_and_keeps_it() -> None:
    with Vmm(flat(exit_with(1) + exit_with(2))) as vmm:
        vmm.run(timeout=60)
        snapshot = vmm.snapshot()
    fd = os.memfd_create("map")
    os.ftruncate(fd, 65536)
    with snapshot.fork(setup=lambda machine: machine.memory.add(0x1000_0000, source=fd)) as fork:
        os.close(fd)
        for _ in range(3):
            assert fork.run(timeout=60).code == 2
            fork.memory.write(0x1000_0000, b"kept")
            fork.memory.write(0x2000, b"gone")
            assert fork.reset(snapshot) == 1
            assert (fork.memory.read(0x1000_0000, 4), fork.memory.read(0x2000, 4)) == (b"kept", bytes(4))


def test_memory_added_after_the_snapshot_is_never_removed_by_a_reset() -> None:
    with Vmm(flat(exit_with(1) + exit_with(2))) as vmm:
        vmm.run(timeout=60)
        snapshot = vmm.snapshot()
        slot = vmm.memory.add(PLACE, 4096)
        vmm.memory.write(PLACE, b"mine")
        with pytest.raises(StateError, match=rf"memory slots differ .* does not have the one at {PLACE:#x}"):
            vmm.reset(snapshot)
        assert vmm.memory.read(PLACE, 4) == b"mine"
        vmm.memory.remove(slot)
        vmm.reset(snapshot)
        assert vmm.run(timeout=60).code == 2
        vmm.memory.remove(vmm.memory.slots[0])
        with pytest.raises(StateError, match=r"memory slots differ .* the one at 0x0 is missing"):
            vmm.reset(snapshot)


def test_what_a_guest_writes_to_a_shared_slot_outlives_resets_and_is_seen_by_other_forks() -> None:
    # Real mode: inc byte [0x8000]; mov al, [0x8000]; out 0xf4, al
    code = b"\xfe\x06\x00\x80\xa0\x00\x80\xe6\xf4"
    with Vmm(flat(code, size_mib=1)) as vmm:
        vmm.memory.remove(vmm.memory.slots[0])
        vmm.memory.add(0, 0x8000)
        vmm.memory.write(0x1000, code)
        snapshot = vmm.snapshot()
    fd = os.memfd_create("map")
    os.ftruncate(fd, 4096)

    def share(machine: Vmm) -> None:
        machine.memory.add(0x8000, source=fd)

    with snapshot.fork(setup=share) as one, snapshot.fork(setup=share) as other:
        codes = []
        for machine in (one, other, one, one, other):
            codes.append(machine.run(timeout=60).code)
            assert machine.reset(snapshot) == 0
        assert codes == [1, 2, 3, 4, 5]
        assert os.pread(fd, 1, 0) == b"\x05"
    os.close(fd)

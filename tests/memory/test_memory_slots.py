"""Memory slots: where memory may be, and that no change of slots meets a snapshot or a reset halfway."""

from __future__ import annotations

import fcntl
import os
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import pytest
from guests import HALT, exit_with, flat
from pyvmm import ConfigError, GuestMemoryError, KvmVm, Snapshot, StateError, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm
MIB = 1 << 20
PLACE = 0x4000_0000
LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
KVM_OWN = 0xFEFF_C000


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


def test_a_slot_swapped_while_a_reset_waits_is_not_mapped_over() -> None:
    # The reset waits for the vCPU, whose device exchanges the memory that the reset has looked at.
    started, swapped = Event(), Event()

    class Swap:
        def write(self, offset: int, size: int, value: int) -> None:
            if swapped.is_set():
                return
            started.set()
            waiting.wait(60)
            vmm.memory.remove(big)
            vmm.memory.add(PLACE, 4096)
            swapped.set()

        def save(self) -> bytes:
            return b""

        def restore(self, state: bytes) -> None: ...

    waiting = Event()
    code = b"\xba\x00\x05\xee\xeb\xfd"  # mov dx, 0x500; out dx, al; jmp back
    with Vmm(flat(code)) as vmm:
        vmm.add_pio_device(0x500, 4, Swap())
        big = vmm.memory.add(PLACE, 64 * MIB)
        snapshot = vmm.snapshot()
        neighbours = [bytearray(b"\xa5" * MIB) for _ in range(64)]
        vmm.start()
        assert started.wait(60)
        errors: list[Exception] = []

        def reset() -> None:
            try:
                vmm.reset(snapshot)
            except StateError as error:
                errors.append(error)

        thread = Thread(target=reset, daemon=True)
        thread.start()
        waiting.set()
        thread.join(60)
        assert not thread.is_alive()
        assert swapped.wait(60)
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
        fork.memory.add(0x2000_0000, 4096)
        with pytest.raises(StateError, match="memory slots"):
            fork.reset(snapshot)


@pytest.mark.parametrize(
    ("address", "size"),
    [
        (LAPIC, 4096),
        (LAPIC - 4096, 8192),
        (IOAPIC, 4096),
        (IOAPIC - MIB, 16 * MIB),
        (KVM_OWN, 4096),
        (KVM_OWN + 0x3000, 4096),
    ],
)
def test_memory_where_the_machine_has_something_else_is_refused(address: int, size: int) -> None:
    with Vmm(flat(HALT, irqchip=True)) as vmm:
        with pytest.raises(GuestMemoryError, match="overlap"):
            vmm.memory.add(address, size)
        assert len(vmm.memory.slots) == 1


def test_memory_beside_the_chips_and_where_there_are_none_is_taken() -> None:
    with Vmm(flat(HALT, irqchip=True)) as vmm:
        for address in (LAPIC + 4096, LAPIC - 4096, IOAPIC + 4096, KVM_OWN - 4096, KVM_OWN + 0x4000, 0xFFFF_0000):
            vmm.memory.add(address, 4096)
    with KvmVm() as bare:
        bare.memory.add(LAPIC, 4096)
        with pytest.raises(GuestMemoryError, match="KVM keeps"):
            bare.memory.add(KVM_OWN, 4096)


def test_memory_and_a_device_do_not_lie_over_each_other() -> None:
    class Device:
        def read(self, offset: int, size: int) -> int:
            return 0

    device = Device()
    with Vmm(flat(HALT)) as vmm:
        vmm.add_mmio_device(PLACE + 0x1000, 0x10, device)
        for address, size in ((PLACE + 0x1000, 4096), (PLACE, 8192)):
            with pytest.raises(GuestMemoryError, match="Device, "):
                vmm.memory.add(address, size)
        vmm.memory.add(PLACE, 4096)
        with pytest.raises(ConfigError, match="memory"):
            vmm.add_mmio_device(PLACE + 0xFFF, 1, device)
        assert vmm.remove_mmio_device(PLACE + 0x1000) is device
        vmm.memory.add(PLACE + 0x1000, 4096)


@pytest.mark.parametrize(
    ("address", "size"),
    [(2**64 - 4096, 4096), (2**63, 2**63), (PLACE, 2**64 - 4096), (PLACE, 2**63), (2**52, 4096), (1, 4096)],
)
def test_memory_that_wraps_or_that_no_processor_addresses_is_refused(address: int, size: int) -> None:
    with Vmm(flat(HALT)) as vmm:
        with pytest.raises(Exception, match=f"{address:#x}|more than the host") as caught:
            vmm.memory.add(address, size)
        assert type(caught.value).__module__ == "pyvmm.exceptions"
        assert len(vmm.memory.slots) == 1


@pytest.mark.parametrize("offset", [1, 4095, 4097, 2**63, 2**64 - 4096])
def test_an_offset_that_cannot_be_is_refused_and_the_file_left_as_it_was(offset: int) -> None:
    fd = os.memfd_create("source", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)
    with KvmVm() as vm, pytest.raises(GuestMemoryError, match="offset"):
        vm.memory.add(PLACE, source=fd, offset=offset)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == 0
    os.close(fd)


def test_copies_within_guest_memory_may_overlap() -> None:
    with Vmm(flat(HALT)) as vmm:
        memory = vmm.memory
        data = bytes(range(256)) * 1024
        calls: list[Callable[[], Any]] = [
            lambda: memory.write(0x1_0100, memory.view(0x1_0000, len(data))),
            lambda: memory.readinto(0x1_0000, memory.view(0x1_0100, len(data))),
        ]
        for call in calls:
            memory.write(0x1_0000, data)
            call()
            assert memory.read(0x1_0100, len(data)) == data
        memory.write(0x1_0000, data)
        memory.write(0x1_0000, memory.view(0x1_0100, len(data) - 0x100))
        assert memory.read(0x1_0000, len(data) - 0x100) == data[0x100:]


def test_an_aligned_number_is_one_access_also_while_writes_are_noted() -> None:
    with Vmm(flat(HALT)) as vmm:
        vmm.memory.log_dirty = True
        vmm.memory.write_u64(0x8000, 2**64 - 1)
        assert vmm.memory.dirty().ranges == [(0x8000, 4096)]
        with pytest.raises(GuestMemoryError):
            vmm.memory.write_u64(MIB, 1)
        assert vmm.memory.dirty().ranges == []

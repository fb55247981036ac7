"""Memory slots: where memory can be, and that slots come and go while the guest runs.

Covers src/memory/table.rs, src/py/memory/guest.rs, src/py/memory/slot.rs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from guests import HALT, SPIN, flat
from pyvmm import ConfigError, GuestMemory, GuestMemoryError, KvmError, KvmVm, Vmm

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.kvm
MIB = 1 << 20
PLACE = 0x4000_0000
LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
KVM_OWN = 0xFEFF_C000


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    with Vmm(flat(HALT)) as vmm:
        yield vmm.memory


@pytest.mark.parametrize(
    ("address", "size", "error"),
    [
        (0x1800, 0x1000, GuestMemoryError),
        (0x4000, 0x800, GuestMemoryError),
        (0x4000, 0, GuestMemoryError),
        (0x0, 0x2000, GuestMemoryError),
        (2**64 - 4096, 0x2000, GuestMemoryError),
        (0x4000, 2**63, (GuestMemoryError, ConfigError)),
        (2**63, 0x1000, (KvmError, GuestMemoryError)),
        (-1, 0x1000, OverflowError),
        (0x4000, 2**64, OverflowError),
        (0x4000, 1.5, TypeError),
        (0x4000, None, TypeError),
    ],
)
def test_memory_that_cannot_be_is_refused_and_nothing_changes(address: int, size: Any, error: Any) -> None:
    with KvmVm() as vm:
        vm.memory.add(0x1000, 0x1000)
        with pytest.raises(error):
            vm.memory.add(address, size)
        assert vm.memory.ranges == [(0x1000, 0x1000)]
        assert len(vm.memory.slots) == 1


def test_memory_comes_and_goes_while_the_guest_runs() -> None:
    with Vmm(flat(SPIN)) as vmm:
        vmm.start()
        for _ in range(20):
            slot = vmm.memory.add(0xD000_0000, 0x10000)
            vmm.memory.write(0xD000_0000, b"data")
            vmm.memory.remove(slot)
        vmm.stop()
        assert str(vmm.wait(60)) == "stopped"


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
        with pytest.raises(GuestMemoryError, match="KVM reserves"):
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

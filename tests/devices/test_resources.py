"""What answers where: `vmm.resources`, and that nothing overlaps."""

from __future__ import annotations

import itertools
import json

import pytest
from command_line import pyvmm as command
from guests import SPIN, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from pyvmm import EventFd, KvmVm, Resource, StateError, Vmm, VmmConfig, VmmError

pytestmark = pytest.mark.kvm


class Doorbell:
    def write(self, offset: int, size: int, value: int) -> None: ...


def named(vmm: Vmm, name: str) -> list[tuple[str, int, int, bool]]:
    return [(r.kind, r.start, r.length, r.shared) for r in vmm.resources if r.name == name]


def test_a_machine_lists_memory_chips_devices_and_lines() -> None:
    with Vmm(flat(SPIN, size_mib=1, irqchip=True)) as vmm:
        assert named(vmm, "memory") == [("memory", 0, 1 << 20, False)]
        assert named(vmm, "the I/O APIC") == [("mmio", 0xFEC0_0000, 4096, False)]
        assert named(vmm, "COM1") == [("pio", 0x3F8, 8, False), ("gsi", 4, 1, True)]
        assert named(vmm, "exit port") == [("pio", 0xF4, 4, False)]
        assert named(vmm, "i8042") == [("pio", 0x60, 1, False), ("pio", 0x62, 3, False), ("gsi", 1, 1, True)]
        assert vmm.resources == sorted(vmm.resources, key=lambda r: ("memory mmio pio gsi".index(r.kind), r.start))
    with Vmm(flat(SPIN, exit_port=None)) as vmm:
        assert not named(vmm, "the I/O APIC")
        assert not named(vmm, "exit port")
        assert named(vmm, "i8042") == [("pio", 0x60, 5, False)]


def test_what_is_added_is_listed_until_it_is_removed() -> None:
    with Vmm(flat(SPIN, irqchip=True)) as vmm, EventFd() as event:
        before = vmm.resources
        vmm.add_mmio_device(0xD000_0000, 0x1000, Doorbell())
        vmm.add_pio_device(0x500, 4, Doorbell())
        slot = vmm.memory.add(0x2000_0000, 0x2000)
        vmm.add_irqfd(event, 9)
        vmm.add_ioeventfd(0xD000_0010, event)
        assert named(vmm, "Doorbell") == [("mmio", 0xD000_0000, 0x1000, False), ("pio", 0x500, 4, False)]
        assert ("memory", 0x2000_0000, 0x2000, False) in named(vmm, "memory")
        assert named(vmm, "irqfd") == [("gsi", 9, 1, True)]
        assert named(vmm, "ioeventfd") == [("mmio", 0xD000_0010, 1, True)]
        vmm.remove_ioeventfd(0xD000_0010, event)
        vmm.remove_irqfd(event, 9)
        vmm.memory.remove(slot)
        vmm.remove_pio_device(0x500)
        vmm.remove_mmio_device(0xD000_0000)
        assert vmm.resources == before


def test_a_refusal_names_what_is_there_and_changes_nothing() -> None:
    with Vmm(flat(SPIN, irqchip=True)) as vmm:
        vmm.add_mmio_device(0xD000_0000, 0x1000, Doorbell())
        before = vmm.resources
        with pytest.raises(VmmError, match="Doorbell, 0xd0000000 to 0xd0000fff"):
            vmm.memory.add(0xD000_0000, 0x1000)
        with pytest.raises(VmmError, match="overlaps memory"):
            vmm.add_mmio_device(0x1000, 4, Doorbell())
        with pytest.raises(VmmError, match="overlaps the local APICs"):
            vmm.add_mmio_device(0xFEE0_0FFC, 4, Doorbell())
        with pytest.raises(VmmError, match="overlaps COM1"):
            vmm.add_pio_device(0x3FF, 1, Doorbell())
        with pytest.raises(VmmError, match="overlaps i8042"):
            vmm.add_pio_device(0x62, 1, Doorbell())
        with pytest.raises(VmmError, match="overlaps the PIT of KVM"):
            vmm.add_pio_device(0x42, 1, Doorbell())
        with pytest.raises(VmmError):
            vmm.add_mmio_device(2**64 - 2, 4, Doorbell())
        with pytest.raises(VmmError):
            vmm.memory.add(0x3000_0001, 4096)
        assert vmm.resources == before


def test_a_fork_has_its_own_and_a_closed_machine_none() -> None:
    with Vmm(flat(SPIN)) as vmm:
        snapshot = vmm.snapshot()
        vmm.add_pio_device(0x500, 1, Doorbell())
        with snapshot.fork() as fork:
            assert fork.resources == [r for r in vmm.resources if r.name != "Doorbell"]
        listed = vmm.resources
        vmm.remove_pio_device(0x500)
        vmm.reset(snapshot)
        assert vmm.resources == [r for r in listed if r.name != "Doorbell"]
    with pytest.raises(StateError):
        _ = vmm.resources


def test_a_machine_made_by_hand_has_them_too() -> None:
    vm = KvmVm()
    vm.memory.add(0x1000, 0x1000)
    assert [r for r in vm.resources if r.kind == "memory"] == [Resource("memory", 0x1000, 0x1000, "memory", False)]
    vm.close()
    with KvmVm(flat(SPIN)) as configured, Vmm(flat(SPIN)) as vmm:
        assert configured.resources == vmm.resources


RANGES = st.tuples(st.sampled_from(["pio", "mmio", "memory"]), st.integers(0, 40), st.integers(1, 6), st.booleans())


@given(st.lists(RANGES, max_size=20))
@settings(max_examples=30)
def test_no_two_ranges_overlap_whatever_is_added_and_removed(wanted: list[tuple[str, int, int, bool]]) -> None:
    with Vmm(flat(SPIN)) as vmm:
        for kind, start, length, is_kept in wanted:
            at, size = 0x5000_0000 + start * 4096, length * 4096
            try:
                if kind == "pio":
                    vmm.add_pio_device(0x500 + start, length, Doorbell())
                elif kind == "mmio":
                    vmm.add_mmio_device(at, size, Doorbell())
                else:
                    slot = vmm.memory.add(at, size)
            except VmmError:
                continue
            if not is_kept:
                if kind == "pio":
                    vmm.remove_pio_device(0x500 + start)
                elif kind == "mmio":
                    vmm.remove_mmio_device(at)
                else:
                    vmm.memory.remove(slot)
        for space in ({"pio"}, {"mmio", "memory"}):
            ranges = sorted((r.start, r.start + r.length) for r in vmm.resources if r.kind in space)
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


def test_the_doctor_prints_the_map_of_a_machine(tmp_path: object) -> None:
    done = command("doctor", "--machine")
    assert done.returncode == 0
    assert b"COM1" in done.stdout
    assert b"0xfec00000" in done.stdout
    done = command("doctor", "--machine", "--json")
    with Vmm(VmmConfig(irqchip=True)) as vmm:
        assert [tuple(row.values()) for row in json.loads(done.stdout)] == vmm.resources
    assert command("doctor", "--config", "x").returncode != 0

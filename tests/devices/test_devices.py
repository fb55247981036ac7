"""Python objects as devices: every width on both buses, added and removed at any time, and refused if they cannot be.

Covers src/py/device.rs, src/py/vmm/devices.rs.
"""

from __future__ import annotations

import gc
import struct
import weakref
from typing import Any

import pytest
from guests import HALT, exit_with, flat, out, read_in
from held import is_collected
from python_devices import Log
from pyvmm import ConfigError, Exit, ExitReason, StateError, Vmm

pytestmark = pytest.mark.kvm
DEADLINE_S = 60


def test_ports_of_each_width_reach_a_device() -> None:
    device = Log()
    # 16 bits: in al, dx; out dx, al; in ax, dx; out dx, ax; in eax, dx; out dx, eax
    code = b"\xba\x04\x05" + b"\xec\xee" + b"\xed\xef" + b"\x66\xed\x66\xef" + exit_with(1)
    with Vmm(flat(code)) as vmm:
        vmm.add_pio_device(0x500, 8, device)
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.CODE, 1, 0)
    assert device.accesses == [
        ("read", 4, 1),
        ("write", 4, 1, 0x41),
        ("read", 4, 2),
        ("write", 4, 2, 0x4241),
        ("read", 4, 4),
        ("write", 4, 4, 0x44434241),
    ]


def test_addresses_of_each_width_reach_a_device() -> None:
    device = Log()
    # 64 bits: mov rbx, 0xd0000010; then a load and a store of each width
    code = (
        b"\x48\xbb" + struct.pack("<Q", 0xD000_0010) +
        b"\x8a\x03\x88\x03"  #          mov al, [rbx]; mov [rbx], al
        b"\x66\x8b\x03\x66\x89\x03"  #  mov ax, [rbx]; mov [rbx], ax
        b"\x8b\x03\x89\x03"  #          mov eax, [rbx]; mov [rbx], eax
        b"\x48\x8b\x03\x48\x89\x03"  #  mov rax, [rbx]; mov [rbx], rax
    ) + exit_with(1)  # fmt: skip
    with Vmm(flat(code, "long64")) as vmm:
        vmm.add_mmio_device(0xD000_0000, 0x1000, device)
        assert vmm.run(DEADLINE_S).code == 1
    assert device.accesses == [
        access
        for size in (1, 2, 4, 8)
        for access in (
            ("read", 0x10, size),
            ("write", 0x10, size, int.from_bytes(bytes(range(0x41, 0x41 + size)), "little")),
        )
    ]


def test_bytes_are_as_good_as_a_number() -> None:
    class Device:
        def read(self, _offset: int, size: int) -> bytes:
            return b"abcd"[:size]

    with Vmm(flat(b"\xba\x00\x05\x66\xed" + exit_with(1))) as vmm:
        vmm.add_pio_device(0x500, 4, Device())
        vmm.run(DEADLINE_S)
        assert vmm.vcpus[0].regs.rax & 0xFFFFFF00 == int.from_bytes(b"\0bcd", "little")


def test_a_half_that_is_missing_reads_as_ones_and_drops_writes() -> None:
    class Reads:
        def read(self, _offset: int, _size: int) -> int:
            return 7

    class Writes:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            pass

    code = out(0x500, 1) + read_in(0x500) + b"\x88\xc4" + read_in(0x501) + exit_with(1)  # mov ah, al
    with Vmm(flat(code)) as vmm:
        vmm.add_pio_device(0x500, 1, Reads())
        vmm.add_pio_device(0x501, 1, Writes())
        vmm.on_exit("io", lambda vcpu, exit: seen.append(vcpu.regs.rax & 0xFFFF) if exit.port == 0xF4 else None)
        seen: list[int] = []
        assert vmm.run(DEADLINE_S).code == 1
        assert seen == [0x0701], "AL is the exit code by then"
        assert vmm.unanswered == []


@pytest.mark.parametrize(
    ("base", "length", "text"),
    [
        (0x3F8, 1, "overlaps COM1, 0x3f8 to 0x3ff"),
        (0x3F0, 9, "overlaps"),
        (0xFFFF, 2, "0 to 0xffff"),
        (0x1_0000, 1, "0 to 0xffff"),
        (0x500, 0, "0 addresses"),
        ((1 << 64) - 1, 1, "0 to 0xffff"),
    ],
)
def test_ports_that_cannot_be_had_are_refused(base: int, length: int, text: str) -> None:
    with Vmm(flat(HALT)) as vmm:
        with pytest.raises(ConfigError, match=text) as refused:
            vmm.add_pio_device(base, length, Log())
        assert refused.value.at == f"{base:#x}"


def test_addresses_that_cannot_be_had_are_refused() -> None:
    with Vmm(flat(HALT, size_mib=2)) as vmm:
        for base, length in ((0, 1), (0x1F_FFFF, 2), (0x1000, 1 << 40)):
            with pytest.raises(ConfigError, match="memory"):
                vmm.add_mmio_device(base, length, Log())
        with pytest.raises(ConfigError):
            vmm.add_mmio_device((1 << 64) - 1, 2, Log())
        vmm.add_mmio_device(0x20_0000, 1, Log())
    with Vmm(flat(HALT, irqchip=True)) as vmm:
        with pytest.raises(ConfigError, match="the local APICs"):
            vmm.add_mmio_device(0xFEE0_0000, 8, Log())
        with pytest.raises(ConfigError, match="PIC of KVM"):
            vmm.add_pio_device(0x20, 1, Log())


@pytest.mark.parametrize("arguments", [(-1, 1), (1 << 64, 1), (0x500, -1), ("x", 1), (1.5, 1), (None, 1)], ids=repr)
def test_arguments_of_the_wrong_type_are_refused(arguments: tuple[Any, Any]) -> None:
    with Vmm(flat(HALT)) as vmm, pytest.raises((TypeError, OverflowError)):
        vmm.add_pio_device(*arguments, Log())


@pytest.mark.parametrize(
    "device", [None, 7, object(), type("Device", (), {"read": 7})()], ids=["None", "int", "object", "no method"]
)
def test_objects_that_are_no_devices_are_refused(device: Any) -> None:
    with Vmm(flat(HALT)) as vmm, pytest.raises(TypeError, match="device"):
        vmm.add_pio_device(0x500, 1, device)


def test_a_closed_machine_takes_no_devices() -> None:
    vmm = Vmm(flat(HALT))
    vmm.add_pio_device(0x500, 1, Log())
    vmm.close()
    with pytest.raises(StateError, match="closed"):
        vmm.add_pio_device(0x501, 1, Log())


def test_a_device_is_removed_and_given_back() -> None:
    device = Log()
    with Vmm(flat(out(0x500, 1) + exit_with(1))) as vmm:
        vmm.add_pio_device(0x500, 2, device)
        with pytest.raises(ConfigError, match="no added device"):
            vmm.remove_pio_device(0x501)
        with pytest.raises(ConfigError, match="no added device"):
            vmm.remove_mmio_device(0x500)
        assert vmm.remove_pio_device(0x500) is device
        with pytest.raises(ConfigError, match="no added device"):
            vmm.remove_pio_device(0x3F8)
        vmm.run(DEADLINE_S)
        assert [count.address for count in vmm.unanswered] == [0x500]
    assert device.accesses == []


def test_devices_come_and_go_from_other_threads_while_the_guest_uses_them() -> None:
    device = Log()
    device.accesses = []
    code = b"\xba\x00\x05\xee\xeb\xfd"  # mov dx, 0x500; out dx, al; jmp -3
    with Vmm(flat(code)) as vmm:
        vmm.start()
        for _ in range(200):
            vmm.add_pio_device(0x500, 1, device)
            vmm.remove_pio_device(0x500)
        vmm.add_pio_device(0x500, 1, device)
        before = len(device.accesses)
        while len(device.accesses) == before:
            assert vmm.wait(0.001) is None
        vmm.stop()
        assert vmm.wait(DEADLINE_S).reason is ExitReason.STOPPED  # type: ignore[union-attr]


def test_machines_in_cycles_with_their_devices_are_collected() -> None:
    class Device:
        def __init__(self, vmm: Vmm) -> None:
            self.vmm = vmm
            self.memory = vmm.memory

        def write(self, _offset: int, _size: int, _value: int) -> None:
            pass

    def cycle() -> tuple[weakref.ref[Vmm], weakref.ref[Device]]:
        vmm = Vmm(flat(out(0x500, 1) + exit_with(5)))
        device = Device(vmm)
        vmm.add_pio_device(0x500, 1, device)
        assert vmm.run(DEADLINE_S).code == 5
        return weakref.ref(vmm), weakref.ref(device)

    references = cycle()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_device_that_holds_the_memory_goes_with_the_machine() -> None:
    """The memory refers to the machine, the machine to its device, and the device to the memory, in a cycle."""

    class Device:
        def __init__(self, vmm: Vmm) -> None:
            self.memory = vmm.memory

        def write(self, _offset: int, _size: int, _value: int) -> None:
            pass

    vmm = Vmm(flat(HALT))
    device = Device(vmm)
    vmm.add_pio_device(0x500, 1, device)
    memory, gone = vmm.memory, weakref.ref(device)
    del vmm, device
    gc.collect()
    assert memory.read(0x1000, 1) == HALT, "whoever holds the memory has the machine too"
    del memory
    assert is_collected(gone)

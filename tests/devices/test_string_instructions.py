"""String instructions on devices: one call, or single accesses in the guest's order, and nothing lost.

Covers src/vcpu/access.rs.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from guests import exit_with, flat, keeps_fault_state
from hypothesis import given
from hypothesis import strategies as st
from python_devices import Log
from pyvmm import ExitReason, Stop, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = pytest.mark.kvm
DEADLINE_S = 60
Accesses = st.lists(
    st.tuples(st.sampled_from([0x500, 0x503, 0x507, 0x508]), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)),
    max_size=12,
)


class Strings(Log):
    def read_many(self, offset: int, size: int, count: int) -> bytes:
        self.accesses.append(("read_many", offset, size, count))
        return bytes(range(size * count))

    def write_many(self, offset: int, size: int, data: bytes) -> None:
        self.accesses.append(("write_many", offset, size, data))


# 16 bits: from 0x2000 to port 0x500, then from port 0x500 to 0x3000, so many elements. OUTS is 6e
# or 6f, INS 6c or 6d.
def repeat(outs: bytes, ins: bytes, count: int, source: int = 0x2000) -> bytes:
    """Both string instructions with a count."""
    return (
        b"\xba\x00\x05" +  #                               mov dx, 0x500
        b"\xbe" + struct.pack("<H", source) +  #           mov si, source
        b"\xb9" + struct.pack("<H", count) + outs +  #     mov cx, count; rep outs
        b"\xbf\x00\x30" +  #                               mov di, 0x3000
        b"\xb9" + struct.pack("<H", count) + ins  #        mov cx, count; rep ins
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "size", "outs", "ins"), [(b"", 1, 0x6E, 0x6C), (b"", 2, 0x6F, 0x6D), (b"\x66", 4, 0x6F, 0x6D)]
)
def test_string_instructions_are_one_call(prefix: bytes, size: int, outs: int, ins: int) -> None:
    device = Strings()
    data = bytes(range(100, 100 + 5 * size))
    code = repeat(b"\xf3" + prefix + bytes([outs]), b"\xf3" + prefix + bytes([ins]), 5) + exit_with(1)
    with Vmm(flat(code)) as vmm:
        vmm.memory.write(0x2000, data)
        vmm.add_pio_device(0x500, 4, device)
        assert vmm.run(DEADLINE_S).code == 1
        assert vmm.memory.read(0x3000, 5 * size) == bytes(range(5 * size))
        regs = vmm.vcpus[0].regs
        assert (regs.rcx, regs.rsi, regs.rdi) == (0, 0x2000 + 5 * size, 0x3000 + 5 * size)
    assert device.accesses == [("write_many", 0, size, data), ("read_many", 0, size, 5)]


def test_string_instructions_are_single_accesses_for_a_device_that_knows_no_others() -> None:
    device = Log()
    with Vmm(flat(repeat(b"\xf3\x6e", b"\xf3\x6c", 3) + exit_with(1))) as vmm:
        vmm.memory.write(0x2000, b"abc")
        vmm.add_pio_device(0x500, 4, device)
        assert vmm.run(DEADLINE_S).code == 1
        assert vmm.memory.read(0x3000, 4) == b"AAA\0"
    assert device.accesses == [("write", 0, 1, byte) for byte in b"abc"] + [("read", 0, 1)] * 3


def test_a_string_over_a_page_loses_nothing() -> None:
    device = Strings()
    data = bytes(range(256)) * 20
    with Vmm(flat(repeat(b"\xf3\x6e", b"", len(data), 0x2FF0) + exit_with(1))) as vmm:
        vmm.memory.write(0x2FF0, data)
        vmm.add_pio_device(0x500, 4, device)
        assert vmm.run(DEADLINE_S).code == 1
    pieces = [access[3] if access[0] == "write_many" else bytes([access[3]]) for access in device.accesses]  # type: ignore[list-item]
    assert b"".join(pieces) == data  # type: ignore[arg-type]
    assert len(pieces) < 10


def test_a_string_does_not_reach_into_a_page_that_the_guests_ring_may_not_read() -> None:
    device = Strings()
    # mov esi, 0x1fffff; mov ecx, 16; mov dx, 0x500; rep outsb
    code = bytes.fromhex("beffff1f00 b910000000 66ba0005 f36e") + exit_with(1)
    with Vmm(flat(code, "user64", size_mib=8)) as vmm:
        vmm.add_pio_device(0x500, 4, device)
        table = vmm.vcpus[0].sregs.cr3
        for _ in range(2):  # down to the directory of 2 MiB pages
            table = vmm.memory.read_u64(table) & 0xFFFF_F000
        vmm.memory.write_u64(table + 8, 0x20_0083)  # from 2 MiB on for the supervisor alone
        vmm.memory.write(0x1F_FFFF, b"Asecret")
        exit = vmm.run(DEADLINE_S)
        assert exit.reason is ExitReason.SHUTDOWN, "a page fault without an IDT"
        if keeps_fault_state(exit.fault):
            assert (vmm.vcpus[0].regs.rcx, vmm.vcpus[0].regs.rsi) == (15, 0x20_0000)
    assert device.accesses == [("write", 0, 1, ord("A"))]


def test_a_string_downwards_comes_in_the_guests_order() -> None:
    device = Strings()
    code = b"\xfd" + repeat(b"\xf3\x6f", b"", 3, 0x2004) + exit_with(1)  # std
    with Vmm(flat(code)) as vmm:
        vmm.memory.write(0x2000, b"aabbcc")
        vmm.add_pio_device(0x500, 4, device)
        assert vmm.run(DEADLINE_S).code == 1
        assert vmm.vcpus[0].regs.rsi & 0xFFFF == 0x1FFE
    assert device.accesses == [("write_many", 0, 2, b"ccbbaa")]


def test_the_run_ends_within_a_repeated_access() -> None:
    class Device:
        def __init__(self) -> None:
            self.written = b""

        def write(self, _offset: int, _size: int, value: int) -> Stop | None:
            self.written += bytes([value])
            return Stop(value) if value == ord("b") else None

    device = Device()
    with Vmm(flat(repeat(b"\xf3\x6e", b"", 3) + exit_with(3))) as vmm:
        vmm.memory.write(0x2000, b"abc")
        vmm.add_pio_device(0x500, 1, device)
        assert vmm.run(DEADLINE_S).value == ord("b")
        assert vmm.run(DEADLINE_S).code == 3
    assert device.written == b"abc"


@given(Accesses)
def test_any_writes_arrive_whole_and_in_order(accesses: list[tuple[int, int, int]]) -> None:
    widths: dict[int, Callable[[int], bytes]] = {1: lambda _: b"\xee", 2: lambda _: b"\xef", 4: lambda _: b"\x66\xef"}
    code = b"".join(
        b"\xba" + struct.pack("<H", port) + b"\x66\xb8" + struct.pack("<I", value) + widths[size](value)
        for port, size, value in accesses
    )
    device = Log()
    with Vmm(flat(code + exit_with(1))) as vmm:
        vmm.add_pio_device(0x500, 8, device)
        assert vmm.run(DEADLINE_S).code == 1
    expected = [
        ("write", port - 0x500, size, value & ((1 << 8 * size) - 1))
        for port, size, value in accesses
        if port + size <= 0x508
    ]
    assert device.accesses == expected

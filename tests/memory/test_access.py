"""Reads and writes of guest memory by address: bounds, types, and no surprise in size.

Covers src/memory/search.rs, src/py/memory/copy.rs.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import pytest
from guests import HALT, flat
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import GuestMemory, GuestMemoryError, KvmVm, StateError, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


pytestmark = pytest.mark.kvm
SIZE = 1 << 20
MIB = 1 << 20


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    with Vmm(flat(HALT)) as vmm:
        yield vmm.memory


def test_what_is_written_is_read(memory: GuestMemory) -> None:
    for data in (b"bytes", bytearray(b"more"), memoryview(b"view"), array("B", [1, 2])):
        memory.write(0x2000, data)
        assert memory.read(0x2000, len(data)) == bytes(data)
    assert (memory.size, memory.ranges) == (SIZE, [(0, SIZE)])


@pytest.mark.parametrize(
    ("address", "length"),
    [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (0, 2**63), (2**64 - 1, 2**64 - 1), (SIZE, 0)],
)
def test_range_outside_is_refused(memory: GuestMemory, address: int, length: int) -> None:
    with pytest.raises(GuestMemoryError, match="not entirely in guest memory"):
        memory.read(address, length)


def test_write_over_the_end_writes_nothing(memory: GuestMemory) -> None:
    memory.write(SIZE - 1, b"\0")
    with pytest.raises(GuestMemoryError):
        memory.write(SIZE - 1, b"ab")
    assert memory.read(SIZE - 1, 1) == b"\0"


@pytest.mark.parametrize(
    ("address", "length", "error"),
    [
        (-1, 1, OverflowError),
        (0, -1, OverflowError),
        (2**64, 1, OverflowError),
        (0.5, 1, TypeError),
        ("0", 1, TypeError),
    ],
)
def test_wrong_numbers_are_refused(
    memory: GuestMemory, address: object, length: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        memory.read(address, length)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", ["text", 5, None, memoryview(b"abcd")[::2]])
def test_wrong_data_is_refused(memory: GuestMemory, data: object) -> None:
    with pytest.raises((TypeError, ValueError, BufferError)):
        memory.write(0, data)  # type: ignore[arg-type]


@given(st.integers(0, SIZE + 16), st.binary(max_size=64))
def test_memory_agrees_with_a_bytearray(memory: GuestMemory, address: int, data: bytes) -> None:
    model = bytearray(memory.read(0, SIZE))
    try:
        memory.write(address, data)
    except GuestMemoryError:
        assert address + max(len(data), 1) > SIZE
    else:
        model[address : address + len(data)] = data
    assert memory.read(0, SIZE) == bytes(model)


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_numbers_are_little_endian_at_any_alignment(memory: GuestMemory, bits: int) -> None:
    read, write = getattr(memory, f"read_u{bits}"), getattr(memory, f"write_u{bits}")
    value = int.from_bytes(bytes(range(0xF8, 0xF8 + bits // 8)), "little")
    for address in (0x3000, 0x3001, 0x3FFF):
        write(address, value)
        assert read(address) == value
        assert memory.read(address, bits // 8) == value.to_bytes(bits // 8, "little")
    for wrong in (2**bits, -1):
        with pytest.raises(OverflowError):
            write(0x3000, wrong)
    for wrong_type in (1.0, "1", None):
        with pytest.raises(TypeError):
            write(0x3000, wrong_type)
    last = SIZE - bits // 8
    assert read(last) == 0
    for outside in (last + 1, 2**64 - 1):
        with pytest.raises(GuestMemoryError):
            read(outside)
        with pytest.raises(GuestMemoryError):
            write(outside, 1)
    assert memory.read(last, bits // 8) == bytes(bits // 8)


def test_readinto_fills_a_buffer_and_refuses_what_it_cannot_fill(memory: GuestMemory) -> None:
    memory.write(0x4000, b"abcdef")
    buffer = bytearray(4)
    memory.readinto(0x4001, buffer)
    assert buffer == b"bcde"
    with pytest.raises(GuestMemoryError):
        memory.readinto(SIZE - 2, buffer)
    assert buffer == b"bcde"
    for wrong in (b"bytes", memoryview(bytearray(8))[::2]):
        with pytest.raises(BufferError):
            memory.readinto(0, wrong)


def test_large_copies_and_buffers_of_other_types(memory: GuestMemory) -> None:
    data = bytes(range(256)) * 1024
    memory.write(0x8000, data)
    assert memory.read(0x8000, len(data)) == data
    memory.write(0x4000, array("I", [1, 2]))
    assert memory.read(0x4000, 8) == b"\1\0\0\0\2\0\0\0"
    memory.fill(0x8000, len(data))
    assert memory.read(0x8000, len(data)) == bytes(len(data))


@given(st.integers(0, SIZE + 16), st.integers(0, 64), st.integers(0, 255))
def test_fill_agrees_with_a_bytearray(memory: GuestMemory, address: int, length: int, value: int) -> None:
    model = bytearray(memory.read(0, SIZE))
    try:
        memory.fill(address, length, value)
    except GuestMemoryError:
        assert address + max(length, 1) > SIZE
    else:
        model[address : address + length] = bytes([value]) * length
    assert memory.read(0, SIZE) == bytes(model)


def test_find_looks_between_start_and_end(memory: GuestMemory) -> None:
    memory.write(0x9FFE, b"needle")
    assert memory.find(b"needle") == 0x9FFE
    assert memory.find(b"needle", 0x9FFF) is None
    assert memory.find(b"needle", 0x9FFE, 0x9FFE + 6) == 0x9FFE
    assert memory.find(bytearray(b"needle"), 0, 0x9FFE + 5) is None
    assert memory.find(b"e", 2**64 - 1) is None
    with pytest.raises(ValueError, match="empty"):
        memory.find(b"")


def test_ranges_over_two_slots_are_one_for_copies_but_not_for_views() -> None:
    with KvmVm() as vm:
        memory = vm.memory
        memory.add(0x1000, 0x1000)
        memory.add(0, 0x1000)
        assert memory.ranges == [(0, 0x1000), (0x1000, 0x1000)]
        memory.write(0xFFE, b"over")
        assert memory.read(0xFFE, 4) == b"over"
        assert memory.read_u32(0xFFE) == int.from_bytes(b"over", "little")
        assert memory.find(b"over") == 0xFFE
        memory.fill(0xFFF, 2, 0x41)
        assert memory.read(0xFFE, 4) == b"oAAr"
        with pytest.raises(GuestMemoryError, match="more than one memory slot"):
            memory.view(0xFFE, 4)


def test_a_vcpu_of_another_machine_has_no_say() -> None:
    with KvmVm() as one, KvmVm() as other:
        one.memory.add(0, 0x1000)
        vcpu = other.create_vcpu()
        with pytest.raises(StateError, match="another machine"):
            one.memory.read(0, 1, vcpu=vcpu)
        with pytest.raises(GuestMemoryError, match="more than the size"):
            one.memory.read(0, 2**63, vcpu=one.create_vcpu())


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
        assert vmm.memory.take_dirty().ranges == [(0x8000, 4096)]
        with pytest.raises(GuestMemoryError):
            vmm.memory.write_u64(MIB, 1)
        assert vmm.memory.take_dirty().ranges == []

"""Guest memory by address: bounds, types, and no surprise in size.

Covers src/memory/view.rs, src/py/memory_parts.rs.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from array import array
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from guests import HALT, SPIN, flat
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import ConfigError, GuestMemory, GuestMemoryError, KvmError, KvmVm, StateError, VcpuExit, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.kvm
SIZE = 1 << 20


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
    with pytest.raises(GuestMemoryError, match="not all in guest memory"):
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


def test_view_is_the_memory_itself(memory: GuestMemory) -> None:
    view = memory.view(0x5000, 16)
    view[:4] = b"view"
    assert memory.read(0x5000, 4) == b"view"
    memory.write_u8(0x5000, ord("V"))
    assert bytes(view[:4]) == b"View"
    assert (view.nbytes, view.readonly, view.format) == (16, False, "B")
    with pytest.raises(GuestMemoryError):
        memory.view(SIZE - 1, 2)
    with pytest.raises(IndexError):
        view[16] = 1


class Header(ctypes.LittleEndianStructure):
    _fields_ = (("magic", ctypes.c_uint32), ("length", ctypes.c_uint64))


def test_ctypes_structure_lies_over_memory(memory: GuestMemory) -> None:
    header = memory.overlay(0x6000, Header)
    header.magic = 0x1BADB002
    assert memory.read_u32(0x6000) == 0x1BADB002
    memory.write_u64(0x6008, 77)
    assert header.length == 77
    words = memory.overlay(0x6000, ctypes.c_uint32 * 2)
    assert words[0] == 0x1BADB002
    with pytest.raises(GuestMemoryError):
        memory.overlay(SIZE - 4, Header)
    for wrong in (int, None, Header()):
        with pytest.raises(TypeError):
            memory.overlay(0x6000, wrong)  # type: ignore[arg-type]


def test_numpy_array_over_a_view_is_the_memory_itself(memory: GuestMemory) -> None:
    array = numpy.frombuffer(memory.view(0x6000, 16), dtype=numpy.uint32)
    array[1] = 0xDEADBEEF
    assert memory.read_u32(0x6004) == 0xDEADBEEF
    memory.write_u32(0x600C, 7)
    assert (array[1], array[3]) == (0xDEADBEEF, 7)


def test_view_outlives_its_machine_and_its_slot() -> None:
    with KvmVm() as vm:
        kept = vm.memory.add(0, 0x1000)
        removed = vm.memory.add(0x1000, 0x1000)
        views = [vm.memory.view(0, 4096), vm.memory.view(0x1000, 4096)]
        vm.memory.remove(removed)
        views[1][0] = 5
        with pytest.raises(GuestMemoryError, match="not all"):
            vm.memory.read(0x1000, 1)
        with pytest.raises(GuestMemoryError, match="no such"):
            vm.memory.remove(removed)
        assert vm.memory.slots == (kept,)
    del vm
    gc.collect()
    for view in views:
        view[4095] = 7
        assert view[4095] == 7
    assert views[1][0] == 5


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


def test_two_machines_and_the_host_see_one_page() -> None:
    """Inc byte [0x8000]; hlt, in two machines over one memfd."""
    fd = os.memfd_create("shared", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 0x2000)
    machines = []
    for _ in range(2):
        vm = KvmVm()
        vm.memory.add(0x1000, 0x1000)
        vm.memory.write(0x1000, bytes.fromhex("fe060080 f4"))
        slot = vm.memory.add(0x8000, source=fd, offset=0x1000)
        assert (slot.size, slot.shared, slot.read_only) == (0x1000, True, False)
        vcpu = vm.create_vcpu()
        vcpu.sregs.cs.update(base=0, selector=0)
        vcpu.regs.update(rip=0x1000, rflags=2)
        assert isinstance(vcpu.run_once(), VcpuExit.Hlt)
        machines.append(vm)
    assert os.pread(fd, 1, 0x1000) == b"\2"
    with mmap.mmap(fd, 0x2000) as host:
        host[0x1001] = 9
    assert [vm.memory.read_u8(0x8001) for vm in machines] == [9, 9]
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)  # it would take the pages from under the guests
    for vm in machines:
        vm.close()
    os.close(fd)


def test_guest_cannot_write_read_only_memory(tmp_path: Path) -> None:
    """Mov al, [0x8000]; mov [0x8001], al; hlt."""
    file = tmp_path / "rom"
    file.write_bytes(b"R" + bytes(4095))
    with KvmVm() as vm, file.open("rb") as rom:
        memory = vm.memory
        memory.add(0x1000, 0x1000)
        memory.write(0x1000, bytes.fromhex("a00080 a20180 f4"))
        with pytest.raises(GuestMemoryError, match="reading only"):
            memory.add(0x8000, source=rom)
        memory.add(0x8000, source=rom, read_only=True)
        vcpu = vm.create_vcpu()
        vcpu.sregs.cs.update(base=0, selector=0)
        vcpu.regs.update(rip=0x1000, rflags=2)
        exit = vcpu.run_once()
        assert isinstance(exit, VcpuExit.MmioWrite)
        assert (exit.address, exit.data) == (0x8001, b"R")
        changes: list[tuple[Callable[[int, Any], None], Any]]
        changes = [(memory.write, b"x"), (memory.fill, 1), (memory.write_u8, 1), (memory.write_u64, 1)]
        for change, argument in changes:
            with pytest.raises(GuestMemoryError, match="reading only"):
                change(0x8000, argument)
        assert memory.view(0x8000, 1).readonly
        with pytest.raises(GuestMemoryError):
            memory.write(0x7FFF, b"xy")
    assert file.read_bytes()[:2] == b"R\0"


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


def test_files_that_cannot_be_memory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x")
    with KvmVm() as vm, (tmp_path / "short").open("r+b") as short, open(os.devnull, "r+b") as null:
        wrong: list[dict[str, Any]] = [
            {"size": 0x2000},
            {"offset": 1},
            {"offset": 0x1000},
            {"offset": 2**63},
            {"size": 1},
        ]
        for arguments in wrong:
            with pytest.raises(GuestMemoryError):
                vm.memory.add(0, source=short, **arguments)
        with pytest.raises(GuestMemoryError):
            vm.memory.add(0, source=null)
        with pytest.raises((ValueError, TypeError)):
            vm.memory.add(0, source=-1)
        with pytest.raises((OSError, GuestMemoryError)):
            vm.memory.add(0, 0x1000, source=10**6)
        assert vm.memory.slots == ()


def pages(ranges: list[tuple[int, int]]) -> set[int]:
    return {page for start, size in ranges for page in range(start, start + size, 0x1000)}


def test_dirty_pages_are_the_guests_and_the_hosts() -> None:
    """Mov [0x5000], al; hlt; mov [0x9fff], ax; hlt."""
    with KvmVm() as vm:
        memory = vm.memory
        memory.add(0, 0x10000)
        memory.write(0x1000, bytes.fromhex("a20050 f4 a3ff9f f4"))
        vcpu = vm.create_vcpu()
        vcpu.sregs.cs.update(base=0, selector=0)
        vcpu.regs.update(rip=0x1000, rflags=2)
        with pytest.raises(StateError, match="log_dirty"):
            memory.dirty()
        memory.log_dirty = True
        assert memory.log_dirty
        assert len(memory.dirty()) == 0
        vcpu.run_once()
        dirty = memory.dirty()
        # A superset: KVM may count pages that the guest has read. Here it reads the page of its
        # code.
        assert {0x5000} <= pages(dirty.ranges) <= {0x1000, 0x5000}
        assert int.from_bytes(dirty.bitmaps[0], "little") == sum(1 << page // 0x1000 for page in pages(dirty.ranges))
        assert memory.dirty().ranges == []
        vcpu.run_once()
        memory.write(0x2FFF, b"ab")
        memory.write_u8(0xF000, 1)
        memory.fill(0xC000, 1)
        dirty = memory.dirty()
        written = {0x2000, 0x3000, 0x9000, 0xA000, 0xC000, 0xF000}
        assert written <= pages(dirty.ranges) <= {0x1000, *written}
        assert len(dirty) == len(pages(dirty.ranges))
        memory.add(0x10000, 0x1000)
        memory.write_u64(0x10008, 1)
        assert memory.dirty().ranges == [(0x10000, 0x1000)], "a slot that came later is logged too"
        memory.log_dirty = False
        with pytest.raises(StateError):
            memory.dirty()


def test_a_vcpu_of_another_machine_has_no_say() -> None:
    with KvmVm() as one, KvmVm() as other:
        one.memory.add(0, 0x1000)
        vcpu = other.create_vcpu()
        with pytest.raises(StateError, match="another machine"):
            one.memory.read(0, 1, vcpu=vcpu)
        with pytest.raises(GuestMemoryError, match="more than all"):
            one.memory.read(0, 2**63, vcpu=one.create_vcpu())


def test_memory_comes_and_goes_while_the_guest_runs() -> None:
    with Vmm(flat(SPIN)) as vmm:
        vmm.start()
        for _ in range(20):
            slot = vmm.memory.add(0xD000_0000, 0x10000)
            vmm.memory.write(0xD000_0000, b"data")
            vmm.memory.remove(slot)
        vmm.stop()
        assert str(vmm.wait(60)) == "stopped"

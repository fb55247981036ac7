"""Views, ctypes structures and arrays over guest memory, which show it without a copy."""

from __future__ import annotations

import ctypes
import gc
from typing import TYPE_CHECKING

import numpy
import pytest
from guests import HALT, flat
from pyvmm import GuestMemory, GuestMemoryError, KvmVm, Vmm

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.kvm
SIZE = 1 << 20


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    with Vmm(flat(HALT)) as vmm:
        yield vmm.memory


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
        with pytest.raises(GuestMemoryError, match="not entirely"):
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

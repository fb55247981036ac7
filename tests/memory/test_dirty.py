"""The log of written pages."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING

import pytest
from children import end_in
from pyvmm import KvmVm, StateError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm import GuestMemory

pytestmark = pytest.mark.kvm


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
            memory.take_dirty()
        memory.log_dirty = True
        assert memory.log_dirty
        assert len(memory.take_dirty()) == 0
        vcpu.run_once()
        dirty = memory.take_dirty()
        # A superset: KVM may count pages that the guest has read. Here it reads the page of its
        # code.
        assert {0x5000} <= pages(dirty.ranges) <= {0x1000, 0x5000}
        assert int.from_bytes(dirty.bitmaps[0], "little") == sum(1 << page // 0x1000 for page in pages(dirty.ranges))
        assert memory.take_dirty().ranges == []
        vcpu.run_once()
        memory.write(0x2FFF, b"ab")
        memory.write_u8(0xF000, 1)
        memory.fill(0xC000, 1)
        dirty = memory.take_dirty()
        written = {0x2000, 0x3000, 0x9000, 0xA000, 0xC000, 0xF000}
        assert written <= pages(dirty.ranges) <= {0x1000, *written}
        assert len(dirty) == len(pages(dirty.ranges))
        memory.add(0x10000, 0x1000)
        memory.write_u64(0x10008, 1)
        assert memory.take_dirty().ranges == [(0x10000, 0x1000)], "a slot that came later is logged too"
        memory.log_dirty = False
        with pytest.raises(StateError):
            memory.take_dirty()


@pytest.fixture
def logged() -> Iterator[GuestMemory]:
    """Memory of 64 KiB whose written pages are logged."""
    with KvmVm() as vm:
        vm.memory.add(0, 0x10000)
        vm.memory.log_dirty = True
        yield vm.memory


def test_writes_through_a_view_are_in_the_log(logged: GuestMemory) -> None:
    view = logged.view(0x2FFE, 4)
    for _ in range(2):
        view[0] = 1
        assert logged.take_dirty().ranges == [(0x2000, 0x2000)]
    view[3] = 2
    view.release()
    assert logged.take_dirty().ranges == [(0x2000, 0x2000)], "what was written before the release"
    assert logged.take_dirty().ranges == []


def test_writes_through_a_structure_and_a_slice_of_a_view_are_in_the_log(logged: GuestMemory) -> None:
    number = logged.overlay(0x4000, ctypes.c_uint32)
    part = logged.view(0x8000, 0x2000)[0x1000:]
    logged.take_dirty()
    number.value = 5
    part[0] = 1
    assert pages(logged.take_dirty().ranges) == {0x4000, 0x8000, 0x9000}
    del number, part
    logged.take_dirty()
    assert logged.take_dirty().ranges == []


def test_a_view_for_reading_is_not_in_the_log(logged: GuestMemory) -> None:
    with logged.view(0x2000, 0x1000, readonly=True) as view:
        assert view.readonly
        with pytest.raises(TypeError, match="read-only"):
            view[0] = 1
        logged.write_u8(0x2000, 7)
        assert (view[0], logged.take_dirty().ranges) == (7, [(0x2000, 0x1000)])
        assert logged.take_dirty().ranges == []


def test_a_view_from_before_the_log_is_in_it_and_one_of_a_removed_slot_is_not(logged: GuestMemory) -> None:
    logged.log_dirty = False
    kept = logged.view(0x3000, 1)
    slot = logged.add(0x10000, 0x1000)
    gone = logged.view(0x10000, 1)
    logged.remove(slot)
    logged.add(0x10000, 0x1000)
    logged.log_dirty = True
    gone[0] = kept[0] = 1
    assert logged.take_dirty().ranges == [(0x3000, 0x1000)]
    gone.release()
    kept.release()
    assert logged.take_dirty().ranges == [(0x3000, 0x1000)]


def test_views_outlive_their_machine_and_come_and_go_beside_the_log() -> None:
    with KvmVm() as vm:
        memory = vm.memory
        memory.add(0, 0x10000)
        memory.log_dirty = True
        ended = threading.Event()

        def write() -> None:
            while not ended.is_set():
                with memory.view(0x5000, 8) as view:
                    view[0] = 1

        threads = [threading.Thread(target=write) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(200):
            assert pages(memory.take_dirty().ranges) <= {0x5000}
        ended.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        memory.take_dirty()
        assert memory.take_dirty().ranges == []
        kept = memory.view(0x6000, 1)
    kept[0] = 3
    assert kept[0] == 3
    kept.release()


def test_a_forked_child_drops_views_beside_threads_that_take_the_log(logged: GuestMemory) -> None:
    ended = threading.Event()

    def take() -> None:
        while not ended.is_set():
            logged.take_dirty()
            with logged.view(0, 1):
                pass

    thread = threading.Thread(target=take)
    thread.start()
    try:
        for _ in range(50):
            view = logged.view(0x1000, 1)
            child = os.fork()
            if child == 0:
                end_in(30)
                view.release()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        ended.set()
        thread.join(60)

"""The log of written pages."""

from __future__ import annotations

import pytest
from pyvmm import KvmVm, StateError

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

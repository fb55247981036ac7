"""Task switches of 32 bits by fix-up: task gates, CALL and JMP to a TSS, and IRET back."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from fixup_guests import CODE, GDT, NT, RF, TSS, gate, handler, landed, machine

if TYPE_CHECKING:
    from pyvmm import Vmm

pytestmark = pytest.mark.kvm
UD0 = bytes.fromhex("0f ff c0")
OTHER = 0x32000
OTHER_STACK = 0x9000
TASK = 0x40
EIP, EFLAGS, EAX, CS = 0x20, 0x24, 0x28, 0x4C
CR0_TS = 8


def tss_descriptor(base: int, kind: int, limit: int = 0x67, present: int = 1) -> int:
    access = present << 7 | kind
    return limit | (base & 0xFFFFFF) << 16 | access << 40 | base >> 24 << 56


def add_task(vmm: Vmm, eip: int, kind: int = 9, **descriptor: int) -> None:
    """The current task at 0x20 in the GDT, and another at 0x40 that starts at EIP."""
    vmm.memory.write_u64(GDT + 0x20, tss_descriptor(TSS, 11))
    vmm.memory.write_u64(GDT + TASK, tss_descriptor(OTHER, kind, **descriptor))
    general = (1, 2, 3, 4, OTHER_STACK, 6, 7, 8)
    segments = (0x18, 0x10, 0x18, 0x18, 0, 0, 0)
    vmm.memory.write(OTHER + 0x1C, struct.pack("<3I8I7I", 0, eip, 2, *general, *segments))


def u32(vmm: Vmm, address: int) -> int:
    return int.from_bytes(vmm.memory.read(address, 4), "little")


def test_task_gate_delivers_an_exception_to_another_task() -> None:
    with machine(UD0, "protected32", gates={6: gate(0, selector=TASK, kind=5)}) as vmm:
        add_task(vmm, handler(6))
        found = landed(vmm, "protected32", rsp=0x8000, rax=0x1234, rflags=2)
        assert (found.vector, found.rsp, found.rflags) == (6, OTHER_STACK, NT | 2)
        assert (u32(vmm, TSS + EIP), u32(vmm, TSS + EFLAGS), u32(vmm, TSS + EAX)) == (CODE, RF | 2, 0x1234)
        assert u32(vmm, OTHER) == 0x20, "the link to the old task"
        sregs = vmm.vcpus[0].sregs
        assert (sregs.tr.selector, sregs.tr.base, sregs.cr0 & CR0_TS) == (TASK, OTHER, CR0_TS)
        assert [vmm.memory.read_u64(GDT + n) >> 40 & 15 for n in (0x20, TASK)] == [11, 11]


def test_task_of_an_exception_finds_the_error_code_on_its_stack() -> None:
    gates = {6: gate(handler(6), present=0), 11: gate(0, selector=TASK, kind=5)}
    with machine(UD0, "protected32", gates=gates) as vmm:
        add_task(vmm, handler(11))
        found = landed(vmm, "protected32", rsp=0x8000, rflags=2)
        assert (found.vector, found.rsp, found.frame[0]) == (11, OTHER_STACK - 4, 6 * 8 + 3)


def test_called_task_returns_by_iret() -> None:
    with machine(bytes.fromhex("9a 00000000 4000"), "protected32") as vmm:  # call 0x40:0
        add_task(vmm, 0x3F00)
        vmm.memory.write(0x3F00, b"\xcf")
        found = landed(vmm, "protected32", rsp=0x8000, rbx=77, rflags=2)
        assert (found.vector, found.rsp, found.rflags) == (99, 0x8000, 2)
        sregs = vmm.vcpus[0].sregs
        assert (sregs.tr.selector, vmm.vcpus[0].regs.rbx) == (0x20, 77)
        assert [vmm.memory.read_u64(GDT + n) >> 40 & 15 for n in (0x20, TASK)] == [11, 9]
        assert (u32(vmm, OTHER + EIP), u32(vmm, OTHER + EFLAGS)) == (0x3F01, 2)


def test_jump_leaves_the_old_task() -> None:
    with machine(bytes.fromhex("ea 00000000 4000"), "protected32") as vmm:  # jmp 0x40:0
        add_task(vmm, handler(0x21))
        found = landed(vmm, "protected32", rsp=0x8000, rflags=2)
        assert (found.vector, found.rflags) == (0x21, 2)
        assert [vmm.memory.read_u64(GDT + n) >> 40 & 15 for n in (0x20, TASK)] == [9, 11]
        assert u32(vmm, TSS + EIP) == CODE + 7


@pytest.mark.parametrize(
    ("kind", "descriptor", "vector"),
    [(11, {}, 13), (9, {"present": 0}, 11), (9, {"limit": 0x66}, 10)],
    ids=["busy", "absent", "short"],
)
def test_task_that_cannot_be_entered_faults(kind: int, descriptor: dict[str, int], vector: int) -> None:
    with machine(bytes.fromhex("9a 00000000 4000"), "protected32") as vmm:
        add_task(vmm, handler(0x21), kind, **descriptor)
        found = landed(vmm, "protected32", rsp=0x8000, rflags=2)
    assert (found.vector, found.frame[:3]) == (vector, (TASK, CODE, 0x10))


def test_segment_that_a_task_cannot_load_is_an_invalid_task() -> None:
    """The fault is raised in the new task."""
    with machine(bytes.fromhex("9a 00000000 4000"), "protected32") as vmm:
        add_task(vmm, handler(0x21))
        vmm.memory.write(OTHER + 0x54, struct.pack("<I", 0x78))  # DS
        found = landed(vmm, "protected32", rsp=0x8000, rflags=2)
    assert (found.vector, found.frame[:3]) == (10, (0x78, handler(0x21), 0x10))

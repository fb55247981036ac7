"""Far returns, IRET and call gates by fix-up, between rings and within one."""

from __future__ import annotations

import struct

import pytest
from fixup_guests import AC, CF, CODE, GDT, IF, INNER_STACK, NT, OF, RF, TF, gate, handler, landed, machine  # fmt: skip

pytestmark = pytest.mark.kvm
ID = 1 << 21
STACK = 0x8000
IRET, IRETW, RETF, RETF_8 = b"\xcf", b"\x66\xcf", b"\xcb", b"\xca\x08\x00"
# Ring 1: in ring 3 a KVM that emulates raises #UD for what it refuses, and there is no exit.
OUTER_CODE, OUTER_DATA = 0x31, 0x39
STUB = 0x3F00
CODE_ABSENT = 0x00CF_1B00_0000_FFFF
DATA_ABSENT = 0x00CF_3300_0000_FFFF


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def test_iret_within_a_ring_loads_the_flags_and_keeps_the_stack_segment() -> None:
    flags = IF | AC | ID | CF | OF | NT | 2
    with machine(IRET, "protected32") as vmm:
        vmm.memory.write(STACK, words(handler(0x21), 0x10, flags, 0x1234))
        found = landed(vmm, "protected32", rsp=STACK, rflags=2)
    assert (found.vector, found.rsp, found.rflags, found.ss) == (0x21, STACK + 12, flags, 0x18)


def test_iret_with_words_keeps_the_upper_flags() -> None:
    with machine(IRETW, "protected32") as vmm:
        vmm.memory.write(STACK, struct.pack("<HHH", handler(0x21), 0x10, CF | 2))
        found = landed(vmm, "protected32", rsp=STACK, rflags=AC | 2)
    assert (found.vector, found.rsp, found.rflags) == (0x21, STACK + 6, AC | CF | 2)


def test_outer_ring_returns_from_its_interrupt_and_continues() -> None:
    """INT 0x21 in ring 1, a handler that is IRET alone, and INT 0x22."""
    gates = {0x21: gate(STUB, dpl=1), 0x22: gate(handler(0x22), dpl=1)}
    with machine(bytes.fromhex("cd 21 cd 22"), "protected32", ring=1, gates=gates) as vmm:
        vmm.memory.write(STUB, IRET)
        found = landed(vmm, "protected32", rsp=STACK, rflags=IF | AC | 2)
    assert (found.vector, found.frame[:5]) == (0x22, (CODE + 4, OUTER_CODE, IF | AC | 2, STACK, OUTER_DATA))


def test_iret_of_an_outer_ring_keeps_what_it_may_not_change() -> None:
    """Ring 1 with IOPL 0: IF and IOPL stay."""
    with machine(IRET + b"\xcd\x22", "protected32", ring=1, gates={0x22: gate(handler(0x22), dpl=1)}) as vmm:
        vmm.memory.write(STACK, words(CODE + 1, 0x31, 0x3000 | CF | 2))
        found = landed(vmm, "protected32", rsp=STACK, rflags=IF | 2)
    assert (found.vector, found.frame[2]) == (0x22, IF | CF | 2)


def test_return_to_an_outer_ring_closes_the_segments_of_the_inner_one() -> None:
    gates = {0x22: gate(handler(0x22), dpl=1)}
    with machine(RETF_8, "protected32", gates=gates) as vmm:
        data = 0x00CF_B300_0000_FFFF
        vmm.memory.write_u64(GDT + 0x30, 0x00CF_BB00_0000_FFFF)
        vmm.memory.write_u64(GDT + 0x38, data)
        vmm.memory.write(STUB, b"\xcd\x22")
        vmm.memory.write(STACK, words(STUB, OUTER_CODE, 1, 2, STACK + 0x100, OUTER_DATA))
        vmm.vcpus[0].sregs.update(es={"selector": OUTER_DATA, "dpl": 1})
        found = landed(vmm, "protected32", rsp=STACK, rflags=2)
        assert (found.vector, found.frame[:5]) == (0x22, (STUB + 2, OUTER_CODE, 2, STACK + 0x108, OUTER_DATA))
        sregs = vmm.vcpus[0].sregs
        assert (sregs.ds.selector, sregs.es.selector) == (0, OUTER_DATA)


@pytest.mark.parametrize(
    ("code", "frame", "vector", "error"),
    [
        (IRET, (0x1000, 0), 13, 0),
        (IRET, (0x1000, 0x18), 13, 0x18),
        (IRET, (0x1000, 0x400), 13, 0x400),
        (IRET, (0x1000, 0x40), 11, 0x40),
        (IRET, (0x1000, 0x33), 13, 0x30),
        (RETF, (0x1000, 0x33), 13, 0x30),
    ],
    ids=["null", "data", "no-descriptor", "absent", "wrong-level", "wrong-level-far"],
)
def test_return_to_what_is_no_code_faults(code: bytes, frame: tuple[int, int], vector: int, error: int) -> None:
    with machine(code, "protected32") as vmm:
        vmm.memory.write_u64(GDT + 0x40, CODE_ABSENT)
        vmm.memory.write(STACK, words(*frame, 2, STACK, 0x39))
        found = landed(vmm, "protected32", rsp=STACK, rflags=2)
    assert (found.vector, found.frame[:4]) == (vector, (error, CODE, 0x10, RF | 2))


@pytest.mark.parametrize(
    ("stack", "vector", "error"),
    [(0, 13, 0), (0x3B, 13, 0x38), (0x19, 13, 0x18), (0x31, 13, 0x30), (0x49, 12, 0x48)],
    ids=["null", "wrong-rpl", "wrong-dpl", "code", "absent"],
)
def test_return_to_what_is_no_stack_faults(stack: int, vector: int, error: int) -> None:
    with machine(IRET, "protected32") as vmm:
        vmm.memory.write_u64(GDT + 0x30, 0x00CF_BB00_0000_FFFF)
        vmm.memory.write_u64(GDT + 0x38, 0x00CF_B300_0000_FFFF)
        vmm.memory.write_u64(GDT + 0x48, DATA_ABSENT)
        vmm.memory.write(STACK, words(handler(0x21), OUTER_CODE, 2, STACK, stack))
        found = landed(vmm, "protected32", rsp=STACK, rflags=2)
    assert (found.vector, found.frame[:3]) == (vector, (error, CODE, 0x10))


def call_gate(offset: int, count: int = 0, dpl: int = 1, kind: int = 12) -> int:
    return int.from_bytes(
        struct.pack("<HHBBH", offset & 0xFFFF, 0x10, count, 0x80 | dpl << 5 | kind, offset >> 16), "little"
    )


def test_call_gate_takes_the_parameters_to_the_inner_stack() -> None:
    with machine(bytes.fromhex("9a 00000000 4100"), "protected32", ring=1) as vmm:  # call 0x41:0
        vmm.memory.write_u64(GDT + 0x40, call_gate(handler(0x21), count=2))
        vmm.memory.write(STACK, words(11, 22, 33))
        found = landed(vmm, "protected32", rsp=STACK, rflags=2)
    assert (found.vector, found.cs, found.ss, found.rsp) == (0x21, 0x10, 0x18, INNER_STACK - 24)
    assert found.frame == (CODE + 7, OUTER_CODE, 11, 22, STACK, OUTER_DATA)


@pytest.mark.parametrize("code", ["9a 00000000 4000", "ea 00000000 4000"], ids=["call", "jmp"])
def test_gate_within_a_ring_is_a_far_transfer(code: str) -> None:
    with machine(bytes.fromhex(code), "protected32") as vmm:
        vmm.memory.write_u64(GDT + 0x40, call_gate(handler(0x21)))
        found = landed(vmm, "protected32", rsp=STACK, rflags=2)
    pushed = 8 if code.startswith("9a") else 0
    assert (found.vector, found.rsp) == (0x21, STACK - pushed)
    if pushed:
        assert found.frame[:2] == (CODE + 7, 0x10)


@pytest.mark.parametrize(
    ("made", "vector", "error"),
    [
        (call_gate(handler(0x21), dpl=0), 13, 0x40),
        (call_gate(handler(0x21)) & ~(1 << 47), 11, 0x40),
        (call_gate(handler(0x21)) & ~0xFFFF_0000 | 0x18 << 16, 13, 0x18),
        (call_gate(handler(0x21)) & ~0xFFFF_0000, 13, 0),
        (call_gate(handler(0x21), kind=14), 13, 0x40),
    ],
    ids=["privilege", "absent", "data", "null", "interrupt-gate"],
)
def test_gate_that_cannot_be_called_faults(made: int, vector: int, error: int) -> None:
    with machine(bytes.fromhex("9a 00000000 4100"), "protected32", ring=1) as vmm:
        vmm.memory.write_u64(GDT + 0x40, made)
        found = landed(vmm, "protected32", rsp=STACK, rflags=2)
    assert (found.vector, found.frame[:3]) == (vector, (error, CODE, OUTER_CODE))


def test_step_over_an_iret_ends_at_its_target() -> None:
    with machine(IRET, "protected32") as vmm:
        vmm.memory.write(STACK, words(STUB, 0x10, 2))
        found = landed(vmm, "protected32", rsp=STACK, rflags=TF | 2)
    assert (found.vector, found.frame[:3]) == (1, (STUB, 0x10, 2))


def test_interrupt_and_return_of_a_kernel_of_32_bits_repeat() -> None:
    """A loop of INT and IRET, 100 times."""
    code = bytes.fromhex("b9 64 00 00 00 cd 21 e2 fc")  # mov ecx, 100; again: int 0x21; loop again
    with machine(code, "protected32", gates={0x21: gate(STUB)}) as vmm:
        vmm.memory.write(STUB, IRET)
        assert landed(vmm, "protected32", rsp=STACK, rflags=2).vector == 99
        assert vmm.vcpus[0].regs.rsp == STACK

"""Software interrupts by fix-up: frames, stacks and gates, in each mode, and the faults of a gate."""

from __future__ import annotations

import struct

import pytest
from fixup_guests import (
    AC,
    CF,
    CODE,
    FIXUPS,
    HANDLERS,
    IF,
    INNER_STACK,
    IST_STACK,
    NT,
    OF,
    RF,
    TF,
    gate,
    land,
    lay_out,
)  # fmt: skip
from guests import Mode, exit_with, flat
from pyvmm import CpuConfig, Exit, ExitReason, Vmm

pytestmark = pytest.mark.kvm
INT_0X21 = b"\xcd\x21"
INT3 = b"\xcc"
FLAGS = IF | NT | AC | 0x8D7  # all of arithmetic too; bit 1 is always one


@pytest.mark.parametrize(("code", "vector"), [(INT_0X21, 0x21), (INT3, 3), (b"\xf1", 1), (b"\xcd\x03", 3)])
@pytest.mark.parametrize("kind", [0xE, 0xF])
def test_interrupt_in_64_bits_pushes_what_the_processor_pushes(code: bytes, vector: int, kind: int) -> None:
    gates = {vector: gate(HANDLERS + 16 * vector, kind=kind)}
    found = land(code, "long64", gates=gates, rflags=FLAGS, rsp=0x8FFF)
    assert found.vector == vector
    assert found.frame[:5] == (CODE + len(code), 0x10, FLAGS, 0x8FFF, 0x18)
    assert found.rsp == 0x8FF0 - 40, "the stack is aligned to 16 bytes first"
    assert found.rflags == FLAGS & ~(NT | (IF if kind == 0xE else 0))
    assert (found.cs, found.ss) == (0x10, 0x18)


def test_interrupt_stack_table_gives_the_stack() -> None:
    found = land(INT_0X21, "long64", gates={0x21: gate(HANDLERS + 16 * 0x21, ist=1)}, rsp=0x8000)
    assert (found.vector, found.rsp, found.frame[3]) == (0x21, IST_STACK - 40, 0x8000)


# Ring 1: in ring 3 a KVM that emulates raises #UD for what it refuses, and there is no exit.
@pytest.mark.parametrize(("ist", "stack"), [(0, INNER_STACK), (1, IST_STACK)])
def test_interrupt_from_an_outer_ring_to_64_bits_takes_the_stack_of_the_tss(ist: int, stack: int) -> None:
    gates = {0x21: gate(HANDLERS + 16 * 0x21, dpl=1, ist=ist)}
    found = land(INT_0X21, "long64", ring=1, gates=gates, rsp=0x8004, rflags=IF | 2)
    assert found.vector == 0x21
    assert found.frame[:5] == (CODE + 2, 0x31, IF | 2, 0x8004, 0x39)
    assert (found.cs, found.ss, found.rsp, found.rflags) == (0x10, 0, stack - 40, 2)


@pytest.mark.parametrize("kind", [0xE, 0xF])
def test_interrupt_in_32_bits_stays_on_its_stack(kind: int) -> None:
    gates = {0x21: gate(HANDLERS + 16 * 0x21, kind=kind)}
    found = land(INT_0X21, "protected32", gates=gates, rsp=0x8001, rflags=FLAGS)
    assert found.vector == 0x21
    assert found.frame[:3] == (CODE + 2, 0x10, FLAGS)
    assert found.rsp == 0x8001 - 12
    assert found.rflags == FLAGS & ~(NT | (IF if kind == 0xE else 0))


def test_interrupt_from_an_outer_ring_to_32_bits_takes_the_stack_of_the_tss() -> None:
    gates = {3: gate(HANDLERS + 16 * 3, dpl=1)}
    found = land(INT3, "protected32", ring=1, gates=gates, rsp=0x8000, rflags=2)
    assert found.vector == 3
    assert found.frame[:5] == (CODE + 1, 0x31, 2, 0x8000, 0x39)
    assert (found.cs, found.ss, found.rsp) == (0x10, 0x18, INNER_STACK - 20)


def test_interrupt_through_a_gate_of_16_bits_pushes_words() -> None:
    gates = {0x21: gate(HANDLERS + 16 * 0x21, kind=6)}
    found = land(INT_0X21, "protected32", gates=gates, rsp=0x8000, rflags=CF | 2)
    # Words: CODE + 2 without its upper half, CS, flags.
    assert (found.vector, found.rsp) == (0x21, 0x8000 - 6)
    assert found.frame[0] == (0x10 << 16 | (CODE + 2) & 0xFFFF)
    assert found.frame[1] & 0xFFFF == CF | 2


def test_into_is_taken_on_overflow_only() -> None:
    gates = {4: gate(HANDLERS + 16 * 4)}
    assert land(b"\xce", "protected32", gates=gates, rflags=OF | 2).vector == 4
    assert land(b"\xce", "protected32", gates=gates, rflags=2).vector == 99


@pytest.mark.parametrize("mode", ["protected32", "long64"])
@pytest.mark.parametrize(
    ("changed", "vector", "error"),
    [
        (gate(HANDLERS, dpl=0), 13, 0x21 * 8 + 2),
        (gate(HANDLERS, dpl=1, present=0), 11, 0x21 * 8 + 2),
        (gate(HANDLERS, dpl=1, kind=0xC), 13, 0x21 * 8 + 2),
        (gate(HANDLERS, dpl=1, selector=0), 13, 0),
        (gate(HANDLERS, dpl=1, selector=0x18), 13, 0x18),
        (gate(HANDLERS, dpl=1, selector=0x400), 13, 0x400),
    ],
    ids=["privilege", "not-present", "wrong-type", "null-selector", "data-selector", "no-descriptor"],
)
def test_gate_that_cannot_be_entered_faults_at_the_instruction(
    mode: Mode, changed: bytes, vector: int, error: int
) -> None:
    found = land(INT_0X21, mode, ring=1, gates={0x21: changed}, rsp=0x8000, rflags=2)
    assert found.vector == vector
    assert found.frame[:4] == (error, CODE, 0x31, RF | 2)


@pytest.mark.parametrize("ring", [1, 3])
@pytest.mark.parametrize("code", [b"\x0f\x01\xcb", b"\x0f\xff\xc0"], ids=["stac", "ud0"])
def test_instruction_that_needs_privilege_is_undefined_without_it(code: bytes, ring: int) -> None:
    found = land(code, "protected32", ring=ring, rsp=0x8000, rflags=2)
    assert (found.vector, found.frame[:3]) == (6, (CODE, 0x30 | ring, RF | 2))


def test_page_fault_of_an_operand_has_its_address_and_code() -> None:
    code = bytes.fromhex("f3 48 0f b8 06")  # popcnt rax, [rsi]
    found = land(code, "long64", rsi=0x4_0000_0000, rflags=2)
    assert (found.vector, found.frame[0], found.frame[1], found.cr2) == (14, 0, CODE, 0x4_0000_0000)


def test_page_fault_of_a_save_is_one_of_a_write() -> None:
    cpu = CpuConfig(fixups=True, template="host")
    with Vmm(flat(bytes.fromhex("0f ae 26"), "long64", address=CODE, cpu=cpu)) as vmm:  # xsave [rsi]
        lay_out(vmm, "long64", {}, 0)
        (vcpu,) = vmm.vcpus
        vcpu.sregs.cr4 |= 1 << 18
        vcpu.regs.update(rsi=0x4_0000_0000, rax=3)
        assert vmm.run(10).code == 14
        assert (vmm.memory.read_u64(vcpu.regs.rsp), vcpu.sregs.cr2) == (2, 0x4_0000_0000)


def test_single_step_goes_over_a_fix_up() -> None:
    found = land(bytes.fromhex("f3 48 0f b8 c3 90"), "long64", rflags=TF | 2)  # popcnt rax, rbx; nop
    assert (found.vector, found.frame[0]) == (1, CODE + 5)


def test_interrupt_in_real_mode_goes_through_the_vectors() -> None:
    handler = exit_with(7)
    config = flat(b"\xcd\x21", cpu=FIXUPS)
    with Vmm(config) as vmm:
        vmm.memory.write(0x21 * 4, struct.pack("<HH", 0x10, 0x500))
        vmm.memory.write(0x5010, handler)
        assert vmm.run(10) == Exit(ExitReason.CODE, 7, 0)
        (vcpu,) = vmm.vcpus
        assert vmm.memory.read(vcpu.regs.rsp, 6) == struct.pack("<HHH", 0x1002, 0, 2)


def test_stack_that_is_not_there_becomes_a_double_fault() -> None:
    """The push of INT faults, and so does the delivery of that page fault: as on the processor."""
    gates = {8: gate(HANDLERS + 16 * 8, ist=1)}
    found = land(INT_0X21, "long64", gates=gates, rsp=0x4_0000_0000, rflags=2)
    assert (found.vector, found.frame[:2], found.frame[4]) == (8, (0, CODE), 0x4_0000_0000)

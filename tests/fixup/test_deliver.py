"""Exceptions of fix-ups, and those that are raised while they are delivered: to a double fault and a shutdown.

Covers src/fixup/stop.rs.
"""

from __future__ import annotations

import pytest
from fixup_guests import (
    CODE,
    IDT,
    IST_STACK,
    RF,
    TF,
    TSS,
    ZF,
    gate,
    handler,
    land,
    landed,
    machine,
    needs_software_kvm,
)  # fmt: skip
from guests import Mode
from pyvmm import ExitReason

pytestmark = pytest.mark.kvm
UD0 = bytes.fromhex("0f ff c0")  # which KVM refuses where it emulates; #UD on every processor
POPCNT = bytes.fromhex("f3 48 0f b8 06")  # popcnt rax, [rsi], which has no memory in these tests
NOWHERE = 0x4_0000_0000
GATE_OF_UD = 6 * 8 + 2


@pytest.mark.parametrize("mode", ["protected32", "long64"])
@pytest.mark.parametrize(
    ("changed", "vector", "error"),
    [
        ({6: gate(handler(6), present=0)}, 11, GATE_OF_UD | 1),
        ({6: gate(handler(6), kind=2)}, 13, GATE_OF_UD | 1),
        ({6: gate(handler(6), selector=0)}, 13, 1),
        ({6: gate(handler(6), selector=0x400)}, 13, 0x401),
        ({6: gate(handler(6), present=0), 11: gate(handler(11), present=0)}, 8, 0),
        ({6: gate(handler(6), present=0), 11: gate(handler(11), kind=2)}, 8, 0),
    ],
    ids=["not-present", "wrong-type", "null-selector", "no-descriptor", "twice", "not-present-then-wrong-type"],
)
def test_exception_whose_gate_is_bad_raises_the_next_one(
    mode: Mode, changed: dict[int, bytes], vector: int, error: int
) -> None:
    """With EXT in the error code: an exception is not the program's own interrupt."""
    found = land(UD0, mode, gates=changed, rflags=2)
    assert (found.vector, found.frame[:4]) == (vector, (error, CODE, 0x10, RF | 2))


@pytest.mark.parametrize("mode", ["protected32", "long64"])
def test_exception_beyond_the_idt_raises_a_protection_fault(mode: Mode) -> None:
    """The IDT has its first gate only: #UD, #DF and #GP are beyond it, and nothing can be delivered."""
    needs_software_kvm()  # of which the registers remain
    with machine(UD0, mode) as vmm:
        vmm.vcpus[0].sregs.update(idt={"base": IDT, "limit": 15})
        exit = vmm.run(10)
        assert exit.reason is ExitReason.SHUTDOWN
        assert exit.fault is not None
        assert exit.fault.startswith("triple fault\n")
        assert vmm.vcpus[0].regs.rip == CODE
        assert vmm.fixups == {"ud0": 1}


@pytest.mark.parametrize("mode", ["protected32", "long64"])
def test_double_fault_that_cannot_be_delivered_shuts_down(mode: Mode) -> None:
    needs_software_kvm()  # of which the instruction remains
    gates = {vector: gate(handler(vector), present=0) for vector in (6, 8, 11)}
    with machine(UD0, mode, gates=gates) as vmm:
        exit = vmm.run(10)
        assert exit.reason is ExitReason.SHUTDOWN
        assert exit.fault is not None
        assert "ud0" in exit.fault


def test_page_fault_in_a_page_fault_is_a_double_fault_with_the_second_address() -> None:
    gates = {14: gate(handler(14), ist=2), 8: gate(handler(8), ist=1)}
    with machine(POPCNT, "long64", gates=gates) as vmm:
        vmm.memory.write_u64(TSS + 0x2C, NOWHERE + 0x8000)
        found = landed(vmm, "long64", rsi=NOWHERE, rflags=2)
    assert (found.vector, found.frame[:2], found.rsp) == (8, (0, CODE), IST_STACK - 48)
    assert found.cr2 == NOWHERE + 0x8000 - 8


def test_page_fault_in_another_fault_is_handled_first() -> None:
    """#UD, then #PF of its stack: serially, not as a double fault."""
    gates = {6: gate(handler(6), ist=2)}
    with machine(UD0, "long64", gates=gates) as vmm:
        vmm.memory.write_u64(TSS + 0x2C, NOWHERE + 0x8000)
        found = landed(vmm, "long64", rsp=0x8000, rflags=2)
    assert (found.vector, found.frame[:2], found.cr2) == (14, (2, CODE), NOWHERE + 0x8000 - 8)


def test_stack_that_is_not_canonical_is_a_stack_fault() -> None:
    gates = {6: gate(handler(6), ist=2)}
    with machine(UD0, "long64", gates=gates) as vmm:
        vmm.memory.write_u64(TSS + 0x2C, 1 << 63)
        found = landed(vmm, "long64", rsp=0x8000, rflags=2)
    assert (found.vector, found.frame[:2]) == (12, (1, CODE))


def test_handler_that_is_not_canonical_is_a_protection_fault_at_the_instruction() -> None:
    found = land(UD0, "long64", gates={6: gate(1 << 60)}, rsp=0x8000, rflags=2)
    assert (found.vector, found.frame[:2], found.rsp) == (13, (1, CODE), 0x8000 - 48)


def test_step_after_a_fix_up_is_a_trap() -> None:
    """#DB's frame has the next instruction, no RF, and the flags as they were; DR6 says that it is a step."""
    with machine(bytes.fromhex("f3 48 0f b8 c3"), "long64") as vmm:  # popcnt rax, rbx
        found = landed(vmm, "long64", rflags=TF | 2)
        assert (found.vector, found.frame[0], found.frame[2]) == (1, CODE + 5, TF | ZF | 2)
        assert vmm.vcpus[0].debugregs.dr6 & 1 << 14

"""Instructions that depend on a feature, and old ones that KVM refuses: their results and their faults.

Covers src/fixup/feature.rs, src/fixup/legacy.rs, src/fixup/system.rs.
"""

from __future__ import annotations

import struct

import pytest
from fixup_guests import CODE, handler, landed, machine, needs_software_kvm
from guests import Mode

pytestmark = pytest.mark.kvm
DATA = 0x20000
STACK = 0x8000
INVPCID = bytes.fromhex("66 0f 38 82 06")  # invpcid rax, [rsi]


@pytest.mark.parametrize("mode", ["protected32", "long64"])
@pytest.mark.parametrize(
    "code",
    ["0f 01 fd", "f2 0f 38 f8 06", "f3 0f ae e8", "0f 01 c5", "0f 01 d6"],
    ids=["rdpru", "enqcmd", "incssp", "pconfig", "xtest"],
)
def test_instruction_that_the_guest_does_not_have_is_undefined(code: str, mode: Mode) -> None:
    needs_software_kvm()  # where none of their features is shown
    with machine(bytes.fromhex(code), mode) as vmm:
        found = landed(vmm, mode, rsi=DATA, rsp=STACK, rflags=2)
    assert (found.vector, found.frame[0]) == (6, CODE)


@pytest.mark.parametrize("mode", ["protected32", "long64"])
def test_random_number_sets_carry(mode: Mode) -> None:
    with machine(bytes.fromhex("0f c7 f1"), mode) as vmm:  # rdrand ecx
        found = landed(vmm, mode, rsp=STACK, rflags=0x8D6)
        assert (found.vector, found.rflags & 0x8D5) == (99, 1)


@pytest.mark.parametrize(("index", "vector"), [(-5, 99), (7, 99), (-6, 5), (8, 5)])
def test_bound_compares_signed_numbers(index: int, vector: int) -> None:
    with machine(bytes.fromhex("62 0e"), "protected32") as vmm:  # bound ecx, [esi]
        vmm.memory.write(DATA, struct.pack("<ii", -5, 7))
        found = landed(vmm, "protected32", rcx=index & 0xFFFFFFFF, rsi=DATA, rsp=STACK, rflags=2)
    assert found.vector == vector
    if vector == 5:
        assert found.frame[0] == CODE, "a fault: its frame has the instruction itself"


@pytest.mark.parametrize(("mode", "width"), [("protected32", 4), ("long64", 8)])
def test_enter_links_nested_frames(mode: Mode, width: int) -> None:
    with machine(bytes.fromhex("c8 20 00 03"), mode) as vmm:  # enter 0x20, 3
        for n in (1, 2):
            vmm.memory.write(0x9000 - n * width, (n * 0x1111).to_bytes(width, "little"))
        found = landed(vmm, mode, rbp=0x9000, rsp=STACK, rflags=2)
        frame = STACK - width
        assert (vmm.vcpus[0].regs.rbp, found.rsp) == (frame, STACK - 4 * width - 0x20)
        words = [int.from_bytes(vmm.memory.read(STACK - n * width, width), "little") for n in (1, 2, 3, 4)]
        assert words == [0x9000, 0x1111, 0x2222, frame]


def test_arpl_raises_the_level_of_a_selector() -> None:
    with machine(bytes.fromhex("63 0e"), "protected32") as vmm:  # arpl [esi], cx
        vmm.memory.write(DATA, b"\x10\x00\xff")
        found = landed(vmm, "protected32", rcx=0x23, rsi=DATA, rsp=STACK, rflags=2)
        assert (found.rflags & 0x40, vmm.memory.read(DATA, 3)) == (0x40, b"\x13\x00\xff")


@pytest.mark.parametrize(("selector", "vector"), [(0x10, 0x21), (0x13, 0x21), (0, 13), (3, 13)])
def test_sysenter_needs_a_segment(selector: int, vector: int) -> None:
    needs_software_kvm()  # whose guests are Intel's: one of AMD has no SYSENTER in long mode
    with machine(b"\x0f\x34", "long64") as vmm:
        (vcpu,) = vmm.vcpus
        for index, value in ((0x174, selector), (0x175, 0x9000), (0x176, handler(0x21))):
            vcpu.msrs[index] = value
        found = landed(vmm, "long64", rsp=STACK, rflags=0x202)
    assert found.vector == vector
    if vector == 0x21:
        assert (found.cs, found.ss, found.rsp, found.rflags) == (0x10, 0x18, 0x9000, 2)
    else:
        assert found.frame[:2] == (0, CODE)


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    ("pcid", "address", "bad_for"),
    [(0, 0, {4}), (1, 0, {0, 1, 4}), (1 << 12, 0, {0, 1, 2, 3, 4}), (0, 1 << 63, {0, 4})],
    ids=["zero", "pcid-off", "reserved", "non-canonical"],
)
def test_invpcid_checks_its_descriptor(kind: int, pcid: int, address: int, bad_for: set[int]) -> None:
    """Without CR4.PCIDE."""
    needs_software_kvm()  # which executes it whatever CPUID says
    with machine(INVPCID, "long64") as vmm:
        vmm.memory.write(DATA, struct.pack("<QQ", pcid, address))
        found = landed(vmm, "long64", rax=kind, rsi=DATA, rsp=STACK, rflags=2)
    assert found.vector == (13 if kind in bad_for else 99)

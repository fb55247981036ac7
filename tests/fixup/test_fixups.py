"""Instructions that KVM's emulator refuses, executed by pyvmm: against the processor itself and against the manual.

Covers src/fixup/bits.rs, src/fixup/cpu.rs, src/fixup/sse.rs.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from guests import FWAIT_FOREVER, HALT, TRIPLE_FAULT, Mode, exit_with, flat, keeps_fault_state, needs_processor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyvmm import CpuConfig, Exit, ExitAction, ExitReason, Kvm, KvmVm, Vcpu, VcpuExit, Vmm, kvm_info

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.kvm
FIXUPS = CpuConfig(fixups=True)
CODE = 0x10000
DATA = 0x20000
IDT = 0x30000
TSS = 0x31000
HANDLERS = 0x4000
INNER_STACK = 0x50000
IST_STACK = 0x60000
GDT = 0x80000

CF, PF, AF, ZF, SF, TF, IF, OF, NT, RF, AC = (1 << n for n in (0, 2, 4, 6, 7, 8, 9, 11, 14, 16, 18))
ARITHMETIC = CF | PF | AF | ZF | SF | OF
GENERAL = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"] + [f"r{n}" for n in range(8, 16)]


def run_once(code: str | bytes, mode: Mode, registers: Mapping[str, int], data: bytes, **cpu: Any) -> dict[str, int]:
    """The registers after the code, and the 64 bytes at DATA as `memory`."""
    code = bytes.fromhex(code) if isinstance(code, str) else code
    config = flat(code + b"\xe6\xf4", mode, address=CODE, cpu=CpuConfig(**cpu))  # out 0xf4, al
    with Vmm(config) as vmm:
        (vcpu,) = vmm.vcpus
        vmm.memory.write(DATA, data.ljust(64, b"\0"))
        vcpu.regs.update(**registers)
        exit = vmm.run(10)
        assert exit.reason is ExitReason.CODE, exit
        after = {name: getattr(vcpu.regs, name) for name in [*GENERAL, "rip", "rflags"]}
        after["memory"] = int.from_bytes(vmm.memory.read(DATA, 64), "little")
        return after


# Bytes, and the flags that the manual defines.
ARITHMETIC_CODE = {
    "popcnt rax, rbx": ("f3 48 0f b8 c3", ARITHMETIC),
    "popcnt eax, ebx": ("f3 0f b8 c3", ARITHMETIC),
    "popcnt ax, bx": ("66 f3 0f b8 c3", ARITHMETIC),
    "popcnt r9, r14": ("f3 4d 0f b8 ce", ARITHMETIC),
    "popcnt rax, [rsi+rdi*8+16]": ("f3 48 0f b8 44 fe 10", ARITHMETIC),
    "popcnt ax, [rsi]": ("66 f3 0f b8 06", ARITHMETIC),
    "crc32 eax, bl": ("f2 0f 38 f0 c3", ARITHMETIC),
    "crc32 eax, ah": ("f2 0f 38 f0 c4", ARITHMETIC),
    "crc32 rax, rbx": ("f2 48 0f 38 f1 c3", ARITHMETIC),
    "crc32 eax, word [rsi]": ("66 f2 0f 38 f1 06", ARITHMETIC),
    "adcx rax, rbx": ("66 48 0f 38 f6 c3", ARITHMETIC),
    "adox eax, [rsi]": ("f3 0f 38 f6 06", ARITHMETIC),
    "andn rax, rbx, rcx": ("c4 e2 e0 f2 c1", ZF | SF | OF | CF),
    "andn eax, ebx, [rsi]": ("c4 e2 60 f2 06", ZF | SF | OF | CF),
    "blsi rax, rbx": ("c4 e2 f8 f3 db", ZF | SF | OF | CF),
    "blsr eax, ebx": ("c4 e2 78 f3 cb", ZF | SF | OF | CF),
    "blsmsk rax, rbx": ("c4 e2 f8 f3 d3", ZF | SF | OF | CF),
    "bextr rax, rbx, rcx": ("c4 e2 f0 f7 c3", ZF | OF | CF),
    "bzhi eax, ebx, ecx": ("c4 e2 70 f5 c3", ZF | SF | OF | CF),
    "bzhi rax, rbx, rcx": ("c4 e2 f0 f5 c3", ZF | SF | OF | CF),
    "mulx rax, r8, rbx": ("c4 e2 bb f6 c3", ARITHMETIC),
    "mulx eax, eax, [rsi]": ("c4 e2 7b f6 06", ARITHMETIC),
    "pdep rax, rbx, rcx": ("c4 e2 e3 f5 c1", ARITHMETIC),
    "pext rax, rbx, rcx": ("c4 e2 e2 f5 c1", ARITHMETIC),
    "rorx rax, rbx, 5": ("c4 e3 fb f0 c3 05", ARITHMETIC),
    "rorx eax, ebx, 0": ("c4 e3 7b f0 c3 00", ARITHMETIC),
    "sarx eax, ebx, ecx": ("c4 e2 72 f7 c3", ARITHMETIC),
    "shlx rax, rbx, rcx": ("c4 e2 f1 f7 c3", ARITHMETIC),
    "shrx eax, ebx, ecx": ("c4 e2 73 f7 c3", ARITHMETIC),
    "cmpxchg16b [rsi]": ("48 0f c7 0e", ARITHMETIC),
    "lock cmpxchg16b [rsi]": ("f0 48 0f c7 0e", ARITHMETIC),
    "fwait": ("9b", ARITHMETIC),
    "fnclex": ("db e2", ARITHMETIC),
    "fninit; fldcw [rsi]; fwait; fnstsw [rsi]; fnstcw [rsi+8]": ("db e3 d9 2e 9b dd 3e d9 7e 08", ARITHMETIC),
    "stmxcsr [rsi]": ("0f ae 1e", ARITHMETIC),
}
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 0xFF, 0x8000, 2**31, 2**32 - 1, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1)
)


FEATURES = {
    "popcnt": "popcnt", "crc32": "sse4_2", "adcx": "adx", "adox": "adx", "andn": "bmi1", "blsi": "bmi1", "blsr": "bmi1",
    "blsmsk": "bmi1", "bextr": "bmi1", "bzhi": "bmi2", "mulx": "bmi2", "pdep": "bmi2", "pext": "bmi2", "rorx": "bmi2",
    "sarx": "bmi2", "shlx": "bmi2", "shrx": "bmi2", "cmpxchg16b": "cx16", "pshufb": "ssse3", "palignr": "ssse3",
}  # fmt: skip


def needed(name: str) -> set[str]:
    """The features of the processor behind the instructions of a case."""
    return {feature for mnemonic, feature in FEATURES.items() if mnemonic in name.split()}


@pytest.mark.parametrize("name", ARITHMETIC_CODE)
@settings(max_examples=25)
@given(
    st.lists(NUMBERS, min_size=15, max_size=15),
    st.sampled_from([0, ARITHMETIC, CF, OF]),
    st.binary(min_size=64, max_size=64),
)
@example([0] * 15, 0, bytes(64))
@example([2**64 - 1] * 15, ARITHMETIC, b"\xff" * 64)
def test_arithmetic_comes_to_what_the_processor_makes_of_it(
    name: str, numbers: list[int], flags: int, data: bytes
) -> None:
    """64-bit ring 3 runs on the processor itself, ring 0 through the fix-ups where KVM refuses."""
    needs_processor(*needed(name))
    code, defined = ARITHMETIC_CODE[name]
    registers = {**dict(zip(GENERAL, numbers, strict=True)), "rsi": DATA, "rdi": 1, "rflags": flags | 2}
    native = run_once(code, "user64", registers, data)
    fixed = run_once(code, "long64", registers, data, fixups=True)
    mask = ~(ARITHMETIC & ~defined)
    assert fixed | {"rflags": fixed["rflags"] & mask} == native | {"rflags": native["rflags"] & mask}


class Landing(NamedTuple):
    """Where a guest came out: the vector of the handler, and what it found."""

    vector: int
    frame: tuple[int, ...]
    rsp: int
    rflags: int
    cs: int
    ss: int
    cr2: int


def gate(offset: int, selector: int = 0x10, kind: int = 0xE, dpl: int = 0, ist: int = 0, present: int = 1) -> bytes:
    """A gate of 64 bits' IDT; its first half is one of 32 bits."""
    access = present << 15 | dpl << 13 | kind << 8 | ist
    return struct.pack("<HHHHII", offset & 0xFFFF, selector, access, offset >> 16 & 0xFFFF, offset >> 32, 0)


def lay_out(vmm: Vmm, mode: Mode, gates: Mapping[int, bytes], ring: int) -> None:
    """Handlers that exit with their vector, gates to them, a GDT with another ring, a TSS with its stacks."""
    is_long = mode != "protected32"
    handlers = b"".join(exit_with(vector).ljust(16, HALT) for vector in range(256))
    vmm.memory.write(HANDLERS, handlers)
    for vector in range(256):
        made = gates.get(vector, gate(HANDLERS + 16 * vector))
        vmm.memory.write(IDT + vector * (16 if is_long else 8), made if is_long else made[:8])
    if is_long:
        tss = struct.pack("<IQQQQQ", 0, INNER_STACK, 0, 0, 0, IST_STACK).ljust(104, b"\0")
    else:
        tss = struct.pack("<III", 0, INNER_STACK, 0x18).ljust(104, b"\0")
    vmm.memory.write(TSS, tss)
    code32, data = 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
    vmm.memory.write_u64(GDT + 0x30, code32 | ring << 45)
    vmm.memory.write_u64(GDT + 0x38, data | ring << 45)
    (vcpu,) = vmm.vcpus
    task = {"base": TSS, "limit": 103, "type": 11, "present": 1, "s": 0, "unusable": 0, "selector": 0x20}
    vcpu.sregs.update(idt={"base": IDT, "limit": 256 * (16 if is_long else 8) - 1}, tr=task)


def land(
    code: bytes,
    mode: Mode,
    *,
    ring: int = 0,
    gates: Mapping[int, bytes] | None = None,
    **regs: int,
) -> Landing:
    """Run into a handler. Outside ring 0 the code has 32 bits, in compatibility mode where the handler has 64."""
    with Vmm(flat(code + exit_with(99), mode, address=CODE, cpu=FIXUPS)) as vmm:
        lay_out(vmm, mode, gates or {}, ring)
        (vcpu,) = vmm.vcpus
        if ring:
            outer = {"dpl": ring, "l": 0, "db": 1}
            data = {"selector": 0x38 | ring, **outer}
            vcpu.sregs.update(cs={"selector": 0x30 | ring, **outer}, ss=data, ds=data, es=data)
        vcpu.regs.update(**regs)
        exit = vmm.run(10)
        assert exit.reason is ExitReason.CODE, exit
        assert exit.code is not None
        width = 4 if mode == "protected32" else 8
        rsp, sregs = vcpu.regs.rsp, vcpu.sregs
        words = vmm.memory.read(rsp, 6 * width)
        frame = tuple(int.from_bytes(words[n : n + width], "little") for n in range(0, 6 * width, width))
        return Landing(exit.code, frame, rsp, vcpu.regs.rflags, sregs.cs.selector, sregs.ss.selector, sregs.cr2)


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


# On XMM0 and XMM1, RAX, and memory at RSI.
SSE_CODE = {
    "movd xmm0, eax": "66 0f 6e c0",
    "movq xmm0, rax": "66 48 0f 6e c0",
    "movd eax, xmm1": "66 0f 7e c8",
    "movq rax, xmm1": "66 48 0f 7e c8",
    "movd [rsi], xmm1": "66 0f 7e 0e",
    "movd xmm0, [rsi]": "66 0f 6e 06",
    "movq xmm0, [rsi]": "f3 0f 7e 06",
    "movq xmm0, xmm1": "f3 0f 7e c1",
    "movq [rsi], xmm1": "66 0f d6 0e",
    "movlps xmm0, [rsi]": "0f 12 06",
    "movhps xmm0, [rsi]": "0f 16 06",
    "movlpd [rsi], xmm1": "66 0f 13 0e",
    "movhpd [rsi], xmm1": "66 0f 17 0e",
    "movlhps": "0f 16 c1",
    "movhlps": "0f 12 c1",
    "pmovmskb eax, xmm1": "66 0f d7 c1",
    "pxor": "66 0f ef c1",
    "pxor [rsi]": "66 0f ef 06",
    "xorps": "0f 57 c1",
    "xorpd": "66 0f 57 c1",
    "por": "66 0f eb c1",
    "orps": "0f 56 c1",
    "orpd": "66 0f 56 c1",
    "pand": "66 0f db c1",
    "andps": "0f 54 c1",
    "andpd": "66 0f 54 c1",
    "pandn": "66 0f df c1",
    "andnps": "0f 55 c1",
    "andnpd": "66 0f 55 c1",
    "paddb": "66 0f fc c1",
    "paddw": "66 0f fd c1",
    "paddd": "66 0f fe c1",
    "paddq": "66 0f d4 06",
    "psubb": "66 0f f8 c1",
    "psubw": "66 0f f9 c1",
    "psubd": "66 0f fa c1",
    "psubq": "66 0f fb c1",
    "pcmpeqb": "66 0f 74 c1",
    "pcmpeqw": "66 0f 75 c1",
    "pcmpeqd": "66 0f 76 c1",
    "pmuludq": "66 0f f4 c1",
    "pmullw": "66 0f d5 c1",
    "pminub": "66 0f da c1",
    "pmaxub": "66 0f de c1",
    "punpcklbw": "66 0f 60 c1",
    "punpcklwd": "66 0f 61 c1",
    "punpckldq": "66 0f 62 c1",
    "punpcklqdq": "66 0f 6c c1",
    "punpckhbw": "66 0f 68 c1",
    "punpckhwd": "66 0f 69 c1",
    "punpckhdq": "66 0f 6a c1",
    "punpckhqdq": "66 0f 6d c1",
    "unpcklps": "0f 14 c1",
    "unpckhps": "0f 15 c1",
    "pshufb": "66 0f 38 00 c1",
    "pshufd": "66 0f 70 c1 1b",
    "pshufd [rsi]": "66 0f 70 06 b1",
    "pshuflw": "f2 0f 70 c1 72",
    "pshufhw": "f3 0f 70 c1 8d",
    "shufps": "0f c6 c1 4e",
    "palignr 0": "66 0f 3a 0f c1 00",
    "palignr 5": "66 0f 3a 0f c1 05",
    "palignr 16": "66 0f 3a 0f c1 10",
    "palignr 29": "66 0f 3a 0f c1 1d",
    "palignr 200": "66 0f 3a 0f c1 c8",
    "pslldq 3": "66 0f 73 f8 03",
    "psrldq 15": "66 0f 73 d8 0f",
    "psrldq 16": "66 0f 73 d8 10",
    "psllw 3": "66 0f 71 f0 03",
    "pslld 31": "66 0f 72 f0 1f",
    "psllq 64": "66 0f 73 f0 40",
    "psrlw 16": "66 0f 71 d0 10",
    "psrld 7": "66 0f 72 d0 07",
    "psrlq 63": "66 0f 73 d0 3f",
    "psrad 5": "66 0f 72 e0 05",
    "psrad 200": "66 0f 72 e0 c8",
    "pslld xmm1": "66 0f f2 c1",
    "psrlq [rsi]": "66 0f d3 06",
    "psrad xmm1": "66 0f e2 c1",
}


WIDE = st.one_of(st.integers(0, 2**128 - 1), st.integers(0, 40))


def with_xmm(code: str, mode: Mode, xmm: list[int], data: bytes, **cpu: Any) -> list[int | bytes]:
    config = flat(bytes.fromhex(code) + b"\xe6\xf4", mode, address=CODE, cpu=CpuConfig(**cpu))  # out 0xf4, al
    with Vmm(config) as vmm:
        (vcpu,) = vmm.vcpus
        vmm.memory.write(DATA, data)
        vcpu.fpu.xmm[0], vcpu.fpu.xmm[1] = xmm
        vcpu.regs.update(rsi=DATA, rax=0x8899_AABB_CCDD_EEFF)
        exit = vmm.run(10)
        assert exit.reason is ExitReason.CODE, exit
        return [vcpu.fpu.xmm[0], vcpu.fpu.xmm[1], vcpu.regs.rax, vcpu.regs.rip, vmm.memory.read(DATA, 16)]


@pytest.mark.parametrize("name", SSE_CODE)
@settings(max_examples=10)
@given(st.lists(WIDE, min_size=2, max_size=2), st.binary(min_size=16, max_size=16))
@example([2**128 - 1, 1], b"\x05" + bytes(15))
@example([0x0123456789ABCDEF_FEDCBA9876543210, 0x80FF_7F01_0203_0405_0607_0809_0A0B_0C0D], bytes(range(0x7A, 0x8A)))
def test_sse_comes_to_what_the_processor_makes_of_it(name: str, xmm: list[int], data: bytes) -> None:
    needs_processor(*needed(name))
    native = with_xmm(SSE_CODE[name], "user64", xmm, data)
    assert with_xmm(SSE_CODE[name], "long64", xmm, data, fixups=True) == native


XSAVE_MODES: dict[str, str] = {
    "xsave": "0f ae 26",
    "xsave64": "48 0f ae 26",
    "xsavec": "0f c7 26",
    "xsavec64": "48 0f c7 26",
    "xsaveopt64": "48 0f ae 36",
}
AREA = 4096


@functools.cache
def common_xcr0() -> int:
    """The bits of XCR0 that ring 3 finds and that KVM lets a guest set.

    Where ring 0 is emulated ring 3 finds the host's, which may be more than KVM offers.
    """
    (offered,) = (
        leaf.edx << 32 | leaf.eax for leaf in Kvm().supported_cpuid if (leaf.function, leaf.index) == (0xD, 0)
    )
    if not kvm_info()["software_kvm"]:
        return offered
    return offered & run_once("31 c9 0f 01 d0", "user64", {}, b"", template="host")["rax"]  # xor ecx, ecx; xgetbv


def with_extended_state(
    code: str, mode: Mode, area: bytes, xmm: int, wanted: int, **cpu: Any
) -> tuple[bytes, list[int]]:
    """The area at RSI and the vCPU's x87, SSE and AVX state after the code."""
    config = flat(
        bytes.fromhex(code) + b"\xe6\xf4", mode, address=CODE, cpu=CpuConfig(template="host", **cpu)
    )  # out 0xf4, al
    with Vmm(config) as vmm:
        (vcpu,) = vmm.vcpus
        vcpu.sregs.cr4 |= 1 << 18
        vcpu.xcrs.xcr0 = common_xcr0()
        vmm.memory.write(DATA, area)
        vcpu.fpu.ymm[3] = xmm
        vcpu.fpu.ymm[15] = xmm >> 128
        vcpu.fpu.mxcsr = 0x1F80 if xmm else 0x1FA0
        vcpu.regs.update(rsi=DATA, rax=wanted, rdx=0, rflags=2)
        exit = vmm.run(10)
        assert exit.reason is ExitReason.CODE, exit
        fpu = vcpu.fpu
        ymm, st = [fpu.ymm[n] for n in range(16)], [fpu.st[n] for n in range(8)]
        return vmm.memory.read(DATA, AREA), [*ymm, *st, fpu.mxcsr, fpu.fcw, fpu.fsw, fpu.ftw]


@pytest.mark.parametrize("name", XSAVE_MODES)
@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4, 7, 0xE7, 0xFFFF])
@pytest.mark.parametrize("xmm", [0, 0x1234567890ABCDEF << 192 | 0xFEDC])
def test_xsave_leaves_what_the_processor_leaves(name: str, wanted: int, xmm: int) -> None:
    needs_processor("xsave", name.removesuffix("64"))
    wanted &= common_xcr0()
    before = b"\xa5" * 512 + bytes(64) + b"\x5a" * (AREA - 576)
    native, _ = with_extended_state(XSAVE_MODES[name], "user64", before, xmm, wanted)
    fixed, _ = with_extended_state(XSAVE_MODES[name], "long64", before, xmm, wanted, fixups=True)
    assert fixed == native


@pytest.mark.parametrize("save", ["xsave64", "xsavec64"])
@pytest.mark.parametrize("wanted", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("kept", [7, 3, 0])
def test_xrstor_loads_what_the_processor_loads(save: str, wanted: int, kept: int) -> None:
    needs_processor("xsave", save.removesuffix("64"))
    value = 0x1234567890ABCDEF << 192 | 0xFEDC
    area, _ = with_extended_state(XSAVE_MODES[save], "user64", bytes(AREA), value, kept)
    _, native = with_extended_state("48 0f ae 2e", "user64", area, 77, wanted)  # xrstor64 [rsi]
    _, fixed = with_extended_state("48 0f ae 2e", "long64", area, 77, wanted, fixups=True)
    assert fixed == native


def test_counts_say_what_was_executed_here() -> None:
    code = bytes.fromhex("f3 48 0f b8 c3 f3 48 0f b8 c3 9b")  # popcnt rax, rbx twice; fwait
    with Vmm(flat(code + exit_with(3), "long64", cpu=FIXUPS)) as vmm:
        assert vmm.fixups == {}
        assert vmm.run(10) == Exit(ExitReason.CODE, 3, 0)
        expected = {"popcnt": 2, "fwait": 1} if kvm_info()["software_kvm"] else {}
        assert vmm.fixups == expected
    assert vmm.fixups == expected


def needs_software_kvm() -> None:
    if not kvm_info()["software_kvm"]:
        pytest.skip("a hardware KVM executes every instruction")


def test_without_fixups_the_exit_stays() -> None:
    needs_software_kvm()
    with Vmm(flat(bytes.fromhex("f3 48 0f b8 46 08"), "long64")) as vmm:
        exit = vmm.run(10)
        assert vmm.fixups == {}
    assert exit.reason is ExitReason.INTERNAL_ERROR
    assert exit.fault is not None
    assert "instruction at 0x1000: popcnt rax, [rsi+8]\ninstruction bytes: f3 48 0f b8 46 08" in exit.fault


@pytest.mark.parametrize(
    ("code", "text"),
    [("0f 58 c0", "addps xmm0, xmm0"), ("f3 0f b8 04 25 00 00 00 60", "popcnt eax, [0x60000000]")],
    ids=["no-fix-up", "no-memory"],
)
def test_what_has_no_fixup_stays_an_exit_and_changes_nothing(code: str, text: str) -> None:
    needs_software_kvm()
    with Vmm(flat(bytes.fromhex(code), "long64", cpu=FIXUPS)) as vmm:
        exit = vmm.run(10)
        assert (exit.reason, vmm.fixups) == (ExitReason.INTERNAL_ERROR, {})
        assert exit.fault is not None
        assert text in exit.fault
        assert vmm.vcpus[0].regs.rip == 0x1000


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("real16", "popcnt ax, [bx+si+0x66]"),
        ("protected32", "popcnt eax, [eax+0x66]"),
        ("long64", "popcnt eax, [rax+0x66]"),
    ],
)
def test_instruction_is_read_with_the_bits_of_its_mode(mode: Mode, text: str) -> None:
    needs_software_kvm()
    with Vmm(flat(b"\xf3\x0f\xb8\x40\x66", mode)) as vmm:
        exit = vmm.run(10)
    assert exit.fault is not None
    assert f"instruction at 0x1000: {text}\n" in exit.fault


def test_other_faults_show_the_instruction_from_memory() -> None:
    with Vmm(flat(TRIPLE_FAULT, "long64")) as vmm:
        exit = vmm.run(10)
    assert exit.reason is ExitReason.SHUTDOWN
    assert exit.fault is not None
    if keeps_fault_state(exit.fault):
        assert "instruction at 0x100a: mov [rax], al\ninstruction bytes: 88 00" in exit.fault


def test_typed_exit_has_the_instruction_and_the_registers() -> None:
    needs_software_kvm()
    vm = KvmVm()
    vm.memory.add(0, 0x10000)
    vm.memory.write(0x1230, b"\xd9\xe8")  # fld1
    vcpu = vm.create_vcpu()
    vcpu.sregs.update(cs={"selector": 0x100, "base": 0x1000})
    vcpu.regs.update(rip=0x230, rbx=77, rflags=2)
    exit = vcpu.run_once()
    assert isinstance(exit, VcpuExit.InternalError)
    assert (exit.suberror, exit.disassembly, exit.instruction[:2]) == (1, "fld1", b"\xd9\xe8")
    assert (exit.registers["rbx"], exit.registers["rip"], exit.registers["cs"]) == (77, 0x230, 0x100)


def test_vcpu_driven_by_hand_has_fixups_too() -> None:
    code = bytes.fromhex("f3 48 0f b8 c3") + exit_with(3)  # popcnt rax, rbx
    with Vmm(flat(code, "long64", cpu=FIXUPS)) as vmm:
        (vcpu,) = vmm.vcpus
        vcpu.regs.rbx = 7
        assert isinstance(vcpu.run_once(), VcpuExit.IoOut)
        assert vcpu.regs.rip == 0x1000 + len(code)


@pytest.mark.parametrize("code", [b"\x0f\x01\xcb", b"\x0f\x58\xc0"], ids=["stac", "addps"])
def test_hook_sees_what_is_left_to_it_and_may_go_on(code: bytes) -> None:
    """With fix-ups a hook is asked for what has none; without, for all that KVM refuses."""
    needs_software_kvm()
    seen: list[str | None] = []

    def skip(vcpu: Vcpu, exit: VcpuExit) -> ExitAction:
        assert isinstance(exit, VcpuExit.InternalError)
        seen.append(exit.disassembly)
        assert exit.registers["rip"] == vcpu.regs.rip
        vcpu.regs.rip += len(code)
        return ExitAction.CONTINUE

    for fixups in (False, True):
        with Vmm(flat(code + exit_with(5), "long64", cpu=CpuConfig(fixups=fixups))) as vmm:
            vmm.on_exit("internal-error", skip)
            assert vmm.run(10) == Exit(ExitReason.CODE, 5, 0)
    assert seen == (["stac"] if code[1] == 1 else ["addps xmm0, xmm0"] * 2)


def test_stack_that_is_not_there_becomes_a_double_fault() -> None:
    """The push of INT faults, and so does the delivery of that page fault: as on the processor."""
    gates = {8: gate(HANDLERS + 16 * 8, ist=1)}
    found = land(INT_0X21, "long64", gates=gates, rsp=0x4_0000_0000, rflags=2)
    assert (found.vector, found.frame[:2], found.frame[4]) == (8, (0, CODE), 0x4_0000_0000)


def test_kick_and_timeout_end_a_guest_that_does_nothing_but_fixups() -> None:
    with Vmm(flat(FWAIT_FOREVER, "long64", cpu=FIXUPS)) as vmm:
        assert vmm.run(0.2) == Exit(ExitReason.TIMEOUT)
        vmm.start()
        vmm.pause()
        assert vmm.vcpus[0].regs.rip in (0x1000, 0x1001)
        vmm.resume()
        vmm.stop()
        assert vmm.wait(10) == Exit(ExitReason.STOPPED)


def test_pages_that_a_fixup_writes_are_dirty() -> None:
    code = bytes.fromhex("0f ae 1e 48 0f c7 4e 40")  # stmxcsr [rsi]; cmpxchg16b [rsi+64]
    with Vmm(flat(code + exit_with(0), "long64", address=CODE, cpu=FIXUPS)) as vmm:
        vmm.memory.log_dirty = True
        vmm.vcpus[0].regs.update(rsi=DATA + 0xFC0, rax=0, rdx=0)
        assert vmm.run(10).code == 0
        ranges = vmm.memory.take_dirty().ranges
        assert all(any(start <= page < start + size for start, size in ranges) for page in (DATA, DATA + 0x1000))


def test_two_processors_exchange_16_bytes_one_after_the_other() -> None:
    """Each adds 1 to a counter of 128 bits 300 times; the one that comes last exits."""
    code = bytes.fromhex(
        "be 00 00 02 00"  #        mov esi, DATA
        "bf 2c 01 00 00"  #        mov edi, 300
        "48 8b 06"  #       again: mov rax, [rsi]
        "48 8b 56 08"  #           mov rdx, [rsi+8]
        "48 8d 58 01"  #    retry: lea rbx, [rax+1]
        "48 89 d1"  #              mov rcx, rdx
        "f0 48 0f c7 0e"  #        lock cmpxchg16b [rsi]
        "75 f2"  #                 jne retry
        "ff cf"  #                 dec edi
        "75 e7"  #                 jne again
        "b8 01 00 00 00"  #        mov eax, 1
        "f0 0f c1 46 20"  #        lock xadd [rsi+32], eax
        "85 c0"  #                 test eax, eax
        "74 04"  #                 jz wait
        "b0 07 e6 f4"  #           mov al, 7; out 0xf4, al
        "f3 90 eb fc"  #    wait:  pause; jmp wait
    )
    config = flat(code, "long64", address=CODE, cpu=CpuConfig(vcpus=2, fixups=True))
    with Vmm(config) as vmm:
        assert vmm.run(60).code == 7
        assert vmm.memory.read_u64(DATA) == 600

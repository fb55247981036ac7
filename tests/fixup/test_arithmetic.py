"""Arithmetic, SSE and XSAVE by fix-up: each comes to what the processor makes of it.

Covers src/fixup/area.rs, src/fixup/bits.rs, src/fixup/xsave.rs.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from fixup_guests import common_xcr0
from guests import Mode, flat, needs_processor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyvmm import CpuConfig, ExitReason, Snapshot, Vmm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


pytestmark = pytest.mark.kvm
CODE = 0x10000
DATA = 0x20000
CF, PF, AF, ZF, SF, TF, IF, OF, NT, RF, AC = (1 << n for n in (0, 2, 4, 6, 7, 8, 9, 11, 14, 16, 18))
ARITHMETIC = CF | PF | AF | ZF | SF | OF
GENERAL = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"] + [f"r{n}" for n in range(8, 16)]
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
XSAVE_MODES: dict[str, str] = {
    "xsave": "0f ae 26",
    "xsave64": "48 0f ae 26",
    "xsavec": "0f c7 26",
    "xsavec64": "48 0f c7 26",
    "xsaveopt64": "48 0f ae 36",
}
AREA = 4096


class Machines:
    """Machines by what they execute. Each is made once, and is new again for every example."""

    def __init__(self) -> None:
        self.made: dict[tuple[Any, ...], tuple[Vmm, Snapshot]] = {}

    def __call__(self, code: str, mode: Mode, **cpu: Any) -> Vmm:
        key = (code, mode, *cpu.items())
        if key not in self.made:
            exits = bytes.fromhex(code) + b"\xe6\xf4"  # out 0xf4, al
            vmm = Vmm(flat(exits, mode, address=CODE, cpu=CpuConfig(**cpu)))
            self.made[key] = vmm, vmm.snapshot()
        vmm, start = self.made[key]
        vmm.reset(start)
        return vmm

    def close(self) -> None:
        for vmm, _ in self.made.values():
            vmm.close()


@pytest.fixture
def machines() -> Iterator[Machines]:
    with contextlib.closing(Machines()) as machines:
        yield machines


def run_once(vmm: Vmm, registers: Mapping[str, int], data: bytes) -> dict[str, int]:
    """The registers after the code, and the 64 bytes at DATA as `memory`."""
    (vcpu,) = vmm.vcpus
    vmm.memory.write(DATA, data.ljust(64, b"\0"))
    vcpu.regs.update(**registers)
    exit = vmm.run(10)
    assert exit.reason is ExitReason.CODE, exit
    after = {name: getattr(vcpu.regs, name) for name in [*GENERAL, "rip", "rflags"]}
    after["memory"] = int.from_bytes(vmm.memory.read(DATA, 64), "little")
    return after


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
    machines: Machines, name: str, numbers: list[int], flags: int, data: bytes
) -> None:
    """64-bit ring 3 runs on the processor itself, ring 0 through the fix-ups where KVM refuses."""
    needs_processor(*needed(name))
    code, defined = ARITHMETIC_CODE[name]
    registers = {**dict(zip(GENERAL, numbers, strict=True)), "rsi": DATA, "rdi": 1, "rflags": flags | 2}
    native = run_once(machines(code, "user64"), registers, data)
    fixed = run_once(machines(code, "long64", fixups=True), registers, data)
    mask = ~(ARITHMETIC & ~defined)
    assert fixed | {"rflags": fixed["rflags"] & mask} == native | {"rflags": native["rflags"] & mask}


def with_xmm(vmm: Vmm, xmm: list[int], data: bytes) -> list[int | bytes]:
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
def test_sse_comes_to_what_the_processor_makes_of_it(
    machines: Machines, name: str, xmm: list[int], data: bytes
) -> None:
    needs_processor(*needed(name))
    native = with_xmm(machines(SSE_CODE[name], "user64"), xmm, data)
    assert with_xmm(machines(SSE_CODE[name], "long64", fixups=True), xmm, data) == native


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

"""AVX, AVX-512, floating-point and x87 by fix-up: each comes to what the processor makes of it.

Covers src/fixup/native.rs, src/fixup/vector.rs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fixup_guests import CODE, common_xcr0, gate, handler, landed, machine, needs_software_kvm
from guests import Mode, flat, needs_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from pyvmm import CpuConfig, ExitReason, Vmm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm
DATA = 0x20000
OSXSAVE, OSXMMEXCPT, OSFXSR = 1 << 18, 1 << 10, 1 << 9
# Bytes, and the features of the processor. On vector registers, RAX to R10, and memory at RSI.
VECTOR_CODE = {
    "vzeroall": ("c5 fc 77", ["avx"]),
    "vzeroupper": ("c5 f8 77", ["avx"]),
    "vmovdqu ymm0, [rsi]": ("c5 fe 6f 06", ["avx"]),
    "vmovdqu [rsi], ymm1": ("c5 fe 7f 0e", ["avx"]),
    "vmovdqa ymm0, [rsi+32]": ("c5 fd 6f 46 20", ["avx"]),
    "vmovaps [rsi], xmm1": ("c5 f8 29 0e", ["avx"]),
    "vmovups ymm0, [rsi+rdi*8+1]": ("c5 fc 10 44 fe 01", ["avx"]),
    "vmovntdqa ymm1, [rsi]": ("c4 e2 7d 2a 0e", ["avx2"]),
    "vpxor ymm0, ymm1, ymm2": ("c5 f5 ef c2", ["avx2"]),
    "vptest ymm0, [rsi]": ("c4 e2 7d 17 06", ["avx"]),
    "vpmovmskb eax, ymm1": ("c5 fd d7 c1", ["avx2"]),
    "vmovq r9, xmm1": ("c4 c1 f9 7e c9", ["avx"]),
    "vmovq xmm2, r10": ("c4 c1 f9 6e d2", ["avx"]),
    "vpinsrq xmm0, xmm1, rbx, 1": ("c4 e3 f1 22 c3 01", ["avx"]),
    "vpextrq rdi, xmm1, 1": ("c4 e3 f9 16 cf 01", ["avx"]),
    "vbroadcasti128 ymm0, [rsi]": ("c4 e2 7d 5a 06", ["avx2"]),
    "vfmadd231pd ymm0, ymm1, ymm2": ("c4 e2 f5 b8 c2", ["fma"]),
    "vaddps ymm0, ymm1, [rsi]": ("c5 f4 58 06", ["avx"]),
    "vcvtsi2sd xmm0, xmm1, r9": ("c4 c1 f3 2a c1", ["avx"]),
    "vmaskmovps [rsi], ymm1, ymm2": ("c4 e2 75 2e 16", ["avx"]),
    "vaesenc xmm0, xmm1, xmm2": ("c4 e2 71 dc c2", ["avx", "aes"]),
    "addps xmm0, xmm1": ("0f 58 c1", []),
    "divsd xmm0, [rsi]": ("f2 0f 5e 06", []),
    "sqrtpd xmm0, [rsi]": ("66 0f 51 06", []),
    "cvtsd2si r8, xmm1": ("f2 4c 0f 2d c1", []),
    "cvttsd2si ebx, [rsi]": ("f2 0f 2c 1e", []),
    "cvtsd2si rbx, [rsi]": ("f2 48 0f 2d 1e", []),
    "cvttss2si r9, [rsi]": ("f3 4c 0f 2c 0e", []),
    "cvtss2si ebx, [rsi+1]": ("f3 0f 2d 5e 01", []),
    "cvtsi2ss xmm0, ebx": ("f3 0f 2a c3", []),
    "comisd xmm0, xmm1": ("66 0f 2f c1", []),
    "pcmpestri xmm0, xmm1, 0": ("66 0f 3a 61 c1 00", ["sse4_2"]),
    "pcmpistrm xmm0, [rsi+1], 0": ("66 0f 3a 62 46 01 00", ["sse4_2"]),
    "pclmulqdq xmm0, xmm1, 1": ("66 0f 3a 44 c1 01", ["pclmulqdq"]),
    "aesdec xmm0, xmm1": ("66 0f 38 de c1", ["aes"]),
    "sha256rnds2 xmm1, xmm2": ("0f 38 cb ca", ["sha_ni"]),
    "pextrb [rsi], xmm1, 3": ("66 0f 3a 14 0e 03", ["sse4_1"]),
    "movntps [rsi], xmm1": ("0f 2b 0e", []),
    "paddd mm0, [rsi]": ("0f fe 06", []),
    "fld1; fldpi; faddp; fstp qword [rsi]": ("d9 e8 d9 eb de c1 dd 1e", []),
    "fild qword [rsi]; fsqrt; fistp dword [rsi+8]": ("df 2e d9 fa db 5e 08", []),
    "fld tword [rsi]; fld st0; fucomip": ("db 2e d9 c0 df e9 dd d8", []),
    "vpaddd zmm0, zmm1, zmm2": ("62 f1 75 48 fe c2", ["avx512f"]),
    "vmovdqu64 [rsi], zmm1": ("62 f1 fe 48 7f 0e", ["avx512f"]),
    "vprord xmm0, xmm1, 7": ("62 f1 7d 08 72 c1 07", ["avx512vl"]),
    "vpaddq zmm0 {k1}{z}, zmm1, [rsi]{1to8}": ("62 f1 f5 d9 d4 06", ["avx512f"]),
    "vpermi2d ymm0, ymm1, ymm2": ("62 f2 75 28 76 c2", ["avx512vl"]),
    "kmovw k1, ebx; kortestw k1, k1": ("c5 f8 92 cb c5 f8 98 c9", ["avx512f"]),
}
WIDE = st.integers(0, 2**256 - 1)


def outcome(
    name: str, mode: Mode, wide: list[int], numbers: list[int], data: bytes, fixups: bool = False
) -> list[object]:
    code, _ = VECTOR_CODE[name]
    config = flat(
        bytes.fromhex(code) + b"\xe6\xf4", mode, address=CODE, cpu=CpuConfig(template="host", fixups=fixups)
    )  # out 0xf4, al
    with Vmm(config) as vmm:
        (vcpu,) = vmm.vcpus
        vcpu.sregs.cr4 |= OSXSAVE | OSXMMEXCPT | OSFXSR
        vcpu.xcrs.xcr0 = common_xcr0()
        vmm.memory.write(DATA, data)
        for number, value in enumerate(wide):
            vcpu.fpu.ymm[number] = value
        rax, rbx, rcx, rdx, r9, r10 = numbers
        vcpu.regs.update(rax=rax, rbx=rbx, rcx=rcx, rdx=rdx, r9=r9, r10=r10, rsi=DATA, rdi=1, rflags=2)
        exit = vmm.run(10)
        assert exit.reason is ExitReason.CODE, exit
        fpu, regs = vcpu.fpu, vcpu.regs
        state = [*(fpu.ymm[n] for n in range(16)), *(fpu.st[n] for n in range(8)), fpu.mxcsr, fpu.fsw, fpu.fcw]
        general = [regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rdi, regs.r8, regs.r9, regs.r10, regs.rip, regs.rflags]
        return [*state, *general, vmm.memory.read(DATA, 128)]


@pytest.mark.parametrize("name", VECTOR_CODE)
@settings(max_examples=5)
@given(
    st.lists(WIDE, min_size=3, max_size=3),
    st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6),
    st.binary(min_size=128, max_size=128),
)
def test_vector_comes_to_what_the_processor_makes_of_it(
    name: str, wide: list[int], numbers: list[int], data: bytes
) -> None:
    _, features = VECTOR_CODE[name]
    needs_processor(*features)
    if features and common_xcr0() & 6 != 6:
        pytest.skip("KVM offers no AVX")
    native = outcome(name, "user64", wide, numbers, data)
    assert outcome(name, "long64", wide, numbers, data, fixups=True) == native


@pytest.mark.parametrize(
    ("code", "vector"),
    [("c5 fd 6f 46 08", 13), ("0f 58 46 08", 13), ("0f 10 46 08", 99), ("c5 fe 6f 46 08", 99)],
    ids=["vmovdqa", "addps", "movups", "vmovdqu"],
)
def test_operand_that_is_not_aligned_faults_where_the_processor_wants_it(code: str, vector: int) -> None:
    needs_processor("avx")
    with machine(bytes.fromhex(code), "long64") as vmm:
        (vcpu,) = vmm.vcpus
        vcpu.sregs.cr4 |= OSXSAVE | OSFXSR
        vcpu.xcrs.xcr0 = 7
        assert landed(vmm, "long64", rsi=DATA, rsp=0x8000, rflags=2).vector == vector


@pytest.mark.parametrize(
    ("cr0", "cr4", "xcr0", "vector"),
    [(0, 0, 7, 6), (0, OSXSAVE, 3, 6), (8, OSXSAVE, 7, 7), (4, OSXSAVE, 7, 99)],
    ids=["osxsave", "xcr0", "task-switched", "emulation"],
)
def test_avx_needs_what_enables_it(cr0: int, cr4: int, xcr0: int, vector: int) -> None:
    needs_processor("avx")
    with machine(bytes.fromhex("c5 fc 77"), "long64") as vmm:  # vzeroall
        (vcpu,) = vmm.vcpus
        vcpu.sregs.update(cr0=vcpu.sregs.cr0 & ~0xE | cr0, cr4=vcpu.sregs.cr4 & ~OSXSAVE | cr4)
        vcpu.xcrs.xcr0 = xcr0
        assert landed(vmm, "long64", rsp=0x8000, rflags=2).vector == vector


@pytest.mark.parametrize(("cr4", "vector"), [(OSXMMEXCPT, 19), (0, 6)])
def test_unmasked_division_by_zero_is_an_exception(cr4: int, vector: int) -> None:
    with machine(bytes.fromhex("f3 0f 5e c1"), "long64") as vmm:  # divss xmm0, xmm1
        (vcpu,) = vmm.vcpus
        vcpu.sregs.cr4 = vcpu.sregs.cr4 & ~OSXMMEXCPT | OSFXSR | cr4
        vcpu.fpu.xmm[0], vcpu.fpu.xmm[1] = 0x3F800000, 0
        vcpu.fpu.mxcsr = 0x1F80 & ~(1 << 9)
        assert landed(vmm, "long64", rsp=0x8000, rflags=2).vector == vector
        assert (vcpu.fpu.xmm[0], vcpu.fpu.mxcsr) == (0x3F800000, 0x1F80 & ~(1 << 9) | 4)


def test_unmasked_exception_of_x87_is_raised_by_the_next_instruction() -> None:
    code = bytes.fromhex("d9 2e d9 e8 d9 ee de f9 90 d9 e8")  # fldcw [rsi]; fld1; fldz; fdivp; nop; fld1
    with machine(code, "long64") as vmm:
        vmm.memory.write(DATA, b"\x7b\x03")  # division by zero is not masked
        vmm.vcpus[0].sregs.cr0 |= 0x20
        found = landed(vmm, "long64", rsi=DATA, rsp=0x8000, rflags=2)
    assert (found.vector, found.frame[0]) == (16, CODE + 9)


def test_page_fault_of_a_vector_leaves_its_registers() -> None:
    """The operand crosses into a page that is not there."""
    needs_processor("avx")
    with machine(bytes.fromhex("c5 fe 7f 0e"), "long64", gates={14: gate(handler(14))}) as vmm:
        (vcpu,) = vmm.vcpus
        vcpu.sregs.cr4 |= OSXSAVE
        vcpu.xcrs.xcr0 = 7
        found = landed(vmm, "long64", rsi=0x4_0000_0000, rsp=0x8000, rflags=2)
        assert (found.vector, found.frame[:2], found.cr2) == (14, (2, CODE), 0x4_0000_0000)


ROM = 0x20_0000
WRITERS = {
    "vmovdqu [rsi], ymm1": "c5 fe 7f 0e",
    "fnsave [rsi]": "dd 36",
    "xsave [rsi]": "0f ae 26",
    "cmpxchg16b [rsi]": "48 0f c7 0e",
    "movss [rsi], xmm1": "f3 0f 11 0e",
}


@pytest.mark.parametrize(
    ("name", "address"),
    [*((name, ROM) for name in WRITERS), ("vmovdqu [rsi], ymm1", ROM - 16), ("fnsave [rsi]", ROM - 16)],
)
def test_rom_is_not_written_by_fix_up(name: str, address: int, tmp_path: Path) -> None:
    """Other machines may share its file. A write that crosses into ROM writes nothing."""
    needs_software_kvm()
    needs_processor("avx")
    (tmp_path / "rom").write_bytes(b"\x55" * 4096)
    with machine(bytes.fromhex(WRITERS[name]), "long64") as vmm, (tmp_path / "rom").open("r+b") as file:
        vmm.memory.add(ROM - 4096, 4096)
        vmm.memory.add(ROM, source=file, read_only=True)
        (vcpu,) = vmm.vcpus
        vcpu.sregs.cr4 |= OSXSAVE | OSFXSR
        vcpu.xcrs.xcr0 = 7
        vcpu.fpu.xmm[1] = 2**128 - 1
        vcpu.regs.update(rsi=address, rsp=0x8000, rflags=2, rax=2**64 // 3, rdx=2**64 // 3, rbx=1, rcx=1)
        before = vmm.memory.read(address, 16)
        assert vmm.run(10).reason is ExitReason.INTERNAL_ERROR
        assert vmm.memory.read(address, 16) == before
    assert (tmp_path / "rom").read_bytes() == b"\x55" * 4096


def test_page_tables_in_rom_are_used_as_they_are() -> None:
    needs_software_kvm()
    needs_processor("avx")
    with machine(bytes.fromhex("c5 fe 7f 0e"), "long64") as vmm:  # vmovdqu [rsi], ymm1
        (vcpu,) = vmm.vcpus
        top = vcpu.sregs.cr3 & ~0xFFF
        low = vmm.memory.read_u64(top) & 0xFFFF_FFFF_F000
        directory = bytearray(vmm.memory.read(low, 4096))
        directory[0] &= ~0x20  # not accessed
        vmm.memory.add(ROM, 0x2000, read_only=True)
        vmm.memory.write(ROM, vmm.memory.read(top, 4096) + directory)
        vmm.memory.write_u64(ROM, ROM + 0x1000 | 3)
        tables = vmm.memory.read(ROM, 0x2000)
        vcpu.sregs.update(cr3=ROM, cr4=vcpu.sregs.cr4 | OSXSAVE)
        vcpu.xcrs.xcr0 = 7
        assert landed(vmm, "long64", rsi=DATA, rsp=0x8000, rflags=2).vector == 99
        assert vmm.fixups["vmovdqu"] == 1
        assert vmm.memory.read(ROM, 0x2000) == tables


def test_long_run_of_vectors_is_counted_and_can_be_interrupted() -> None:
    needs_software_kvm()
    code = bytes.fromhex("0f 58 c1 eb fb")  # again: addps xmm0, xmm1; jmp again
    with machine(code, "long64") as vmm:
        vmm.vcpus[0].sregs.cr4 |= OSFXSR
        assert vmm.run(0.2).reason is ExitReason.TIMEOUT
        assert vmm.fixups["addps"] > 0
        assert vmm.vcpus[0].regs.rip in (CODE, CODE + 3)

"""A vCPU's registers by name: views of the kernel's structures (Linux, include/uapi/linux/kvm.h and asm/kvm.h).

Each access reads or changes the vCPU itself. All raise `StateError` while the guest runs,
`OverflowError` for a number that is too wide, and `KvmError` for one that KVM refuses.
"""

from __future__ import annotations

import operator
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar

from pyvmm._pyvmm import Register
from pyvmm.views import Part, View, flags, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyvmm._pyvmm import MsrBytes, RegisterBytes


RFLAGS = (
    (0, "CF"), (2, "PF"), (4, "AF"), (6, "ZF"), (7, "SF"), (8, "TF"), (9, "IF"), (10, "DF"), (11, "OF"), (14, "NT"),
    (16, "RF"), (17, "VM"), (18, "AC"), (19, "VIF"), (20, "VIP"), (21, "ID"),
)  # fmt: skip


class Regs(View):
    """The general registers: struct kvm_regs."""

    __slots__ = ()
    rip = Register(128)
    rflags = Register(136)
    rax = Register(0)
    rbx = Register(8)
    rcx = Register(16)
    rdx = Register(24)
    rsi = Register(32)
    rdi = Register(40)
    rsp = Register(48)
    rbp = Register(56)
    r8 = Register(64)
    r9 = Register(72)
    r10 = Register(80)
    r11 = Register(88)
    r12 = Register(96)
    r13 = Register(104)
    r14 = Register(112)
    r15 = Register(120)

    def _rows(self) -> Iterator[tuple[str, str]]:
        for name, text in super()._rows():
            yield name, f"{text} [{flags(int(text, 16), RFLAGS)}]" if name == "rflags" else text


class Segment(View):
    """A segment register with its hidden part: struct kvm_segment."""

    __slots__ = ()
    _size: ClassVar[int] = 24
    base = Register(0)
    limit = Register(8, 4)
    selector = Register(12, 2)
    type = Register(14, 1)
    present = Register(15, 1)
    dpl = Register(16, 1)
    db = Register(17, 1)
    s = Register(18, 1)
    l = Register(19, 1)  # noqa: E741
    g = Register(20, 1)
    avl = Register(21, 1)
    unusable = Register(22, 1)


class DescriptorTable(View):
    """Base and limit of a descriptor table: struct kvm_dtable."""

    __slots__ = ()
    _size: ClassVar[int] = 16
    base = Register(0)
    limit = Register(8, 2)


class Sregs(View):
    """The system registers: struct kvm_sregs."""

    __slots__ = ()
    cs = Part(Segment, 0)
    ds = Part(Segment, 24)
    es = Part(Segment, 48)
    fs = Part(Segment, 72)
    gs = Part(Segment, 96)
    ss = Part(Segment, 120)
    tr = Part(Segment, 144)
    ldt = Part(Segment, 168)
    gdt = Part(DescriptorTable, 192)
    idt = Part(DescriptorTable, 208)
    cr0 = Register(224)
    cr2 = Register(232)
    cr3 = Register(240)
    cr4 = Register(248)
    cr8 = Register(256)
    efer = Register(264)
    apic_base = Register(272)


class DebugRegs(View):
    """The debug registers: struct kvm_debugregs."""

    __slots__ = ()
    db0 = Register(0)
    db1 = Register(8)
    db2 = Register(16)
    db3 = Register(24)
    dr6 = Register(32)
    dr7 = Register(40)


class Xcrs(View):
    """The extended control registers: struct kvm_xcrs."""

    __slots__ = ()
    xcr0 = Register(16)


class VcpuEvents(View):
    """Exceptions, interrupts and NMIs that are pending or being delivered: struct kvm_vcpu_events."""

    __slots__ = ()
    exception_injected = Register(0, 1)
    exception_nr = Register(1, 1)
    exception_has_error_code = Register(2, 1)
    exception_pending = Register(3, 1)
    exception_error_code = Register(4, 4)
    interrupt_injected = Register(8, 1)
    interrupt_nr = Register(9, 1)
    interrupt_soft = Register(10, 1)
    interrupt_shadow = Register(11, 1)
    nmi_injected = Register(12, 1)
    nmi_pending = Register(13, 1)
    nmi_masked = Register(14, 1)
    sipi_vector = Register(16, 4)
    flags = Register(20, 4)
    smm = Register(24, 1)
    smi_pending = Register(25, 1)
    smi_inside_nmi = Register(26, 1)
    smi_latched_init = Register(27, 1)
    triple_fault_pending = Register(28, 1)
    exception_has_payload = Register(55, 1)
    exception_payload = Register(56)


class Lapic(View):
    """The local APIC's registers (Intel SDM volume 3, chapter 12). Needs an in-kernel interrupt controller."""

    __slots__ = ()
    id = Register(0x20, 4)
    version = Register(0x30, 4)
    tpr = Register(0x80, 4)
    ppr = Register(0xA0, 4)
    ldr = Register(0xD0, 4)
    dfr = Register(0xE0, 4)
    svr = Register(0xF0, 4)
    esr = Register(0x280, 4)
    icr_low = Register(0x300, 4)
    icr_high = Register(0x310, 4)
    lvt_timer = Register(0x320, 4)
    lvt_thermal = Register(0x330, 4)
    lvt_perf = Register(0x340, 4)
    lvt_lint0 = Register(0x350, 4)
    lvt_lint1 = Register(0x360, 4)
    lvt_error = Register(0x370, 4)
    timer_initial_count = Register(0x380, 4)
    timer_current_count = Register(0x390, 4)
    timer_divide = Register(0x3E0, 4)


class Vectors:
    """Sixteen (of x87, eight) wide registers, as ints."""

    def __init__(self, registers: RegisterBytes, parts: Sequence[tuple[int, int]], feature: int, count: int) -> None:
        self._registers = registers
        self._parts = parts
        self._feature = feature
        self._count = count

    @property
    def _bits(self) -> int:
        return 8 * sum(size for _, size in self._parts)

    def _index(self, index: int) -> int:
        index = operator.index(index)
        if not -self._count <= index < self._count:
            raise IndexError(f"there are {self._count} of these registers")
        return index % self._count

    def __len__(self) -> int:
        """Return the number of registers."""
        return self._count

    def __getitem__(self, index: int) -> int:
        """Read one register."""
        index = self._index(index)
        data = self._registers.read()
        parts = [data[offset + 16 * index :][:size] for offset, size in self._parts]
        return int.from_bytes(b"".join(parts), "little")

    def __setitem__(self, index: int, value: int) -> None:
        """Set one register."""
        index, value = self._index(index), operator.index(value)
        try:
            data = value.to_bytes(self._bits // 8, "little")
        except OverflowError:
            raise OverflowError(f"{value:#x} does not fit into {self._bits} bits") from None
        area = bytearray(self._registers.read())
        for offset, size in self._parts:
            at = offset + 16 * index
            area[at : at + size], data = data[:size], data[size:]
        present = int.from_bytes(area[XSTATE_BV : XSTATE_BV + 8], "little") | self._feature
        area[XSTATE_BV : XSTATE_BV + 8] = present.to_bytes(8, "little")
        self._registers.replace(0, bytes(area))

    def __repr__(self) -> str:
        """Show all registers, in hex."""
        return f"[{', '.join(f'{self[index]:#x}' for index in range(self._count))}]"


# Offsets in the XSAVE area, standard format (Intel SDM volume 1, chapter 13).
ST, XMM, XSTATE_BV, YMM_HIGH = 32, 160, 512, 576


class Fpu(View):
    """x87, SSE and AVX: struct kvm_xsave."""

    __slots__ = {
        "st": "The registers of the x87 stack as integers of 80 bits: `st[0]` to `st[7]`.",
        "xmm": "The SSE registers as integers of 128 bits: `xmm[0]` to `xmm[15]`.",
        "ymm": "The AVX registers as integers of 256 bits: `ymm[0]` to `ymm[15]`.",
    }
    fcw = Register(0, 2)
    fsw = Register(2, 2)
    ftw = Register(4, 1)
    fop = Register(6, 2)
    fip = Register(8)
    fdp = Register(16)
    mxcsr = Register(24, 4)

    def __init__(self, registers: RegisterBytes) -> None:
        super().__init__()
        self.st = Vectors(registers, [(ST, 10)], 1, 8)
        self.xmm = Vectors(registers, [(XMM, 16)], 2, 16)
        self.ymm = Vectors(registers, [(XMM, 16), (YMM_HIGH, 16)], 6, 16)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield from super()._rows()
        for name in ("st", "xmm"):
            yield name, repr(getattr(self, name))


class Msr(IntEnum):
    """Model-specific registers by their names in the processor manuals."""

    IA32_TIME_STAMP_COUNTER = 0x10
    IA32_APIC_BASE = 0x1B
    IA32_MTRRCAP = 0xFE
    IA32_SYSENTER_CS = 0x174
    IA32_SYSENTER_ESP = 0x175
    IA32_SYSENTER_EIP = 0x176
    IA32_MISC_ENABLE = 0x1A0
    IA32_DEBUGCTL = 0x1D9
    IA32_PAT = 0x277
    IA32_MTRR_DEF_TYPE = 0x2FF
    IA32_TSC_DEADLINE = 0x6E0
    IA32_EFER = 0xC0000080
    IA32_STAR = 0xC0000081
    IA32_LSTAR = 0xC0000082
    IA32_CSTAR = 0xC0000083
    IA32_FMASK = 0xC0000084
    IA32_FS_BASE = 0xC0000100
    IA32_GS_BASE = 0xC0000101
    IA32_KERNEL_GS_BASE = 0xC0000102
    IA32_TSC_AUX = 0xC0000103


class Msrs:
    """Model-specific registers, by number, by `Msr` or by its name."""

    def __init__(self, registers: MsrBytes) -> None:
        self._registers = registers

    def _index(self, msr: int | str) -> int:
        if not isinstance(msr, str):
            return msr
        try:
            return Msr[msr]
        except KeyError:
            known = ", ".join(Msr.__members__)
            raise KeyError(f"no MSR has the name {msr!r}; these have one: {known}") from None

    def __getitem__(self, msr: int | str) -> int:
        """Read one register."""
        return self._registers.load(self._index(msr))

    def __setitem__(self, msr: int | str, value: int) -> None:
        """Set one register."""
        self._registers.store(self._index(msr), value)

    def _rows(self) -> Iterator[tuple[str, str]]:
        for msr in Msr:
            with suppress(OSError):
                yield msr.name, f"{self[msr]:#x}"

    def __repr__(self) -> str:
        """Show the registers that have a name and that KVM knows."""
        return f"Msrs({', '.join(f'{name}={text}' for name, text in self._rows())})"

    def _repr_html_(self) -> str:
        """Return a table of these registers, for notebooks."""
        return table("Msrs", self._rows())


class MpState(IntEnum):
    """The run state of a vCPU: KVM_MP_STATE."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One leaf of CPUID: struct kvm_cpuid_entry2.

    Attributes:
        function: the leaf, EAX of the instruction.
        index: the subleaf, ECX of the instruction; 0 if the leaf has none.
        flags: KVM_CPUID_FLAG_* bits; 1 means that the index matters.
        eax: the result in EAX.
        ebx: the result in EBX.
        ecx: the result in ECX.
        edx: the result in EDX.
    """

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int

    def __repr__(self) -> str:
        """Show the fields in hex."""
        return f"CpuidEntry({', '.join(f'{name}={value:#x}' for name, value in asdict(self).items())})"

"""Machines with fix-ups: a handler for each vector, gates to them, another ring, a task with stacks."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, NamedTuple

from guests import HALT, Mode, exit_with, flat
from pyvmm import CpuConfig, ExitReason, Kvm, Vmm, kvm_info

if TYPE_CHECKING:
    from collections.abc import Mapping

FIXUPS = CpuConfig(fixups=True)
CODE = 0x10000
IDT = 0x30000
TSS = 0x31000
HANDLERS = 0x4000
INNER_STACK = 0x50000
IST_STACK = 0x60000
GDT = 0x80000
CF, PF, AF, ZF, SF, TF, IF, OF, NT, RF, AC = (1 << n for n in (0, 2, 4, 6, 7, 8, 9, 11, 14, 16, 18))


class Landing(NamedTuple):
    """Where a guest came out: the vector of the handler, and what it found."""

    vector: int
    frame: tuple[int, ...]
    rsp: int
    rflags: int
    cs: int
    ss: int
    cr2: int


def needs_software_kvm() -> None:
    """Skip where a hardware KVM executes every instruction."""
    if not kvm_info()["software_kvm"]:
        import pytest  # which takes longer than most of the programs that import these guests

        pytest.skip("a hardware KVM executes every instruction")


def handler(vector: int) -> int:
    """The address of the handler that exits with a vector."""
    return HANDLERS + 16 * vector


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
        made = gates.get(vector, gate(handler(vector)))
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
    limit = 256 * (16 if is_long else 8) - 1
    vcpu.sregs.update(idt={"base": IDT, "limit": limit}, gdt={"base": GDT, "limit": 0x7F}, tr=task)


def machine(code: bytes, mode: Mode, *, ring: int = 0, gates: Mapping[int, bytes] | None = None) -> Vmm:
    """A machine about to run the code, which then exits with 99.

    Outside ring 0 the code has 32 bits, in compatibility mode where the handlers have 64.
    """
    vmm = Vmm(flat(code + exit_with(99), mode, address=CODE, cpu=FIXUPS))
    lay_out(vmm, mode, gates or {}, ring)
    (vcpu,) = vmm.vcpus
    if ring:
        outer = {"dpl": ring, "l": 0, "db": 1}
        data = {"selector": 0x38 | ring, **outer}
        vcpu.sregs.update(cs={"selector": 0x30 | ring, **outer}, ss=data, ds=data, es=data)
    return vmm


def landed(vmm: Vmm, mode: Mode, **regs: int) -> Landing:
    """Run a machine into a handler."""
    (vcpu,) = vmm.vcpus
    vcpu.regs.update(**regs)
    exit = vmm.run(10)
    assert exit.reason is ExitReason.CODE, exit
    assert exit.code is not None
    width = 4 if mode == "protected32" else 8
    rsp, sregs = vcpu.regs.rsp, vcpu.sregs
    words = vmm.memory.read(rsp, 6 * width)
    frame = tuple(int.from_bytes(words[n : n + width], "little") for n in range(0, 6 * width, width))
    return Landing(exit.code, frame, rsp, vcpu.regs.rflags, sregs.cs.selector, sregs.ss.selector, sregs.cr2)


def land(code: bytes, mode: Mode, *, ring: int = 0, gates: Mapping[int, bytes] | None = None, **regs: int) -> Landing:
    """Run code into a handler."""
    with machine(code, mode, ring=ring, gates=gates) as vmm:
        return landed(vmm, mode, **regs)


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
    code = bytes.fromhex("31 c9 0f 01 d0 89 c3") + exit_with(0)  # xor ecx, ecx; xgetbv; mov ebx, eax
    with Vmm(flat(code, "user64", address=CODE, cpu=CpuConfig(template="host"))) as vmm:
        vmm.run(10)
        return offered & vmm.vcpus[0].regs.rbx

"""Every piece of state that a host can change, poisoned, and what of a snapshot can be compared."""

from __future__ import annotations

import itertools
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

from pyvmm import KvmError, Snapshot, Vcpu, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable

# Registers that move by themselves: the TSC, and counters of KVM's software for rings that it
# emulates.
TIMES = {0x10, 0x4000_0010, 0x4000_0020}
ALL_ONES = 2**64 - 1
# Where KVM or a processor has registers: the architectural ones, Hyper-V's, KVM's and AMD's.
MSR_RANGES = (
    range(0x1000),
    range(0x4000_0000, 0x4000_0200),
    range(0x4B56_4D00, 0x4B56_4D40),
    range(0xC000_0000, 0xC000_0200),
    range(0xC001_0000, 0xC001_0400),
    range(0xC001_1000, 0xC001_1100),
)
# Not a state but a request for a reset, which waits for the next entry: Hyper-V's.
HV_RESET = 0x4000_0003
# What comes with other classes, or under another number: EFER and the bases of FS, GS and the LAPIC
# are special registers; Hyper-V's of the APIC are the LAPIC's; full-width counters are those that
# KVM lists.
ELSEWHERE = {0x1B, 0xC000_0080, 0xC000_0100, 0xC000_0101, 0x4000_0070, 0x4000_0071, 0x4000_0072, *range(0x4C1, 0x4C9)}


def msrs(snapshot: Snapshot, vcpu: int = 0) -> dict[int, int]:
    (data,) = [data for kind, number, data in snapshot.state if (kind, number) == ("msrs", vcpu)]
    return dict(struct.iter_unpack("<IQ", data))


def comparable(snapshot: Snapshot) -> dict[tuple[str, int], object]:
    """The state by class, without what time changes."""
    found: dict[tuple[str, int], object] = {}
    for kind, number, data in snapshot.state:
        match kind:
            case "clock":
                continue
            case "msrs":
                table = dict(struct.iter_unpack("<IQ", data))
                found[kind, number] = {index: value for index, value in table.items() if index not in TIMES}
            case "pit":  # three channels of 24 bytes, each with the time of its count behind
                channels = [data[24 * n : 24 * n + 16] for n in range(3)]
                found[kind, number] = [*channels, data[72:]]
            case "lapic":  # the current count of its timer
                found[kind, number] = data[:0x390] + data[0x394:]
            case "pio 0x70":  # the clock's flag of each second
                found[kind, number] = data[:-1]
            case _:
                found[kind, number] = data
    return found


def poison_registers(vmm: Vmm) -> None:
    for vcpu in vmm.vcpus:
        vcpu.regs.rip = vcpu.regs.rsp = vcpu.regs.r15 = 0xDEAD_BEE8
        vcpu.sregs.cr2, vcpu.sregs.cr3 = 0xDEAD_0000, 0x7000
        vcpu.sregs.ds.base = vcpu.sregs.fs.base = vcpu.sregs.gs.base = 0x1234_5000
        vcpu.sregs.idt.base = 0x1_0000
        vcpu.fpu.xmm[7] = 0x1234_5678
        vcpu.debugregs.db0, vcpu.debugregs.dr7 = 0x1234, 0x401


def poison_events(vmm: Vmm) -> None:
    for vcpu in vmm.vcpus:
        events = vcpu.events
        events.exception_nr, events.exception_injected = 13, 1
        events.nmi_masked = 1
        events.interrupt_shadow = 1
    vmm.nmi(0)


def poison_chips(vmm: Vmm) -> None:
    for line in (1, 3, 9, 12, 20):
        vmm.irq(line).raise_()
    for line in (4, 8, 14):
        vmm.irq(line).pulse()


def poison_lapic(vmm: Vmm) -> None:
    for vcpu in vmm.vcpus:
        vcpu.lapic.svr = 0x1FF
        vcpu.lapic.tpr = 0x20
        vcpu.lapic.lvt_timer = 2 << 17 | 0x41  # deadlines
        vcpu.lapic.timer_divide = 3


def poison_mp_state(vmm: Vmm) -> None:
    for vcpu in vmm.vcpus:
        vcpu.mp_state = 3  # halted


def settable(vcpu: Vcpu) -> dict[int, int]:
    """Registers that KVM gives and takes, with a value they do not have."""
    found = {}
    for index in itertools.chain(*MSR_RANGES):
        if index in TIMES or index in ELSEWHERE or index == HV_RESET:
            continue
        with suppress(KvmError):
            value = vcpu.msrs[index]
            for other in (value ^ 1, value ^ 0x1000, value ^ 6, 0 if value else ALL_ONES, value ^ 0xC00):
                with suppress(KvmError):
                    vcpu.msrs[index] = other & ALL_ONES
                    is_other = vcpu.msrs[index] != value
                    vcpu.msrs[index] = value
                    if is_other:
                        found[index] = other & ALL_ONES
                        break
    return found


def poison_msrs(vmm: Vmm) -> None:
    for vcpu in vmm.vcpus:
        for index, value in settable(vcpu).items():
            with suppress(KvmError):  # some depend on another
                vcpu.msrs[index] = value


POISONS: list[Callable[[Vmm], None]] = [
    poison_registers, poison_events, poison_chips, poison_lapic, poison_mp_state, poison_msrs,
]  # fmt: skip

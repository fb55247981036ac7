"""The vCPUs of a snapshot: registers of every class, several vCPUs, pending interrupts and halts.

Covers src/vm/at_rest.rs and src/snapshot/vcpu.rs.
"""

from __future__ import annotations

import os
import struct
import threading
from typing import TYPE_CHECKING

import pytest
from guests import HALT, SPIN, count_vcpus, exit_with, flat
from oracle import ORACLE, while_it_runs
from pyvmm import (
    CpuConfig,
    ExitReason,
    SerialConfig,
    Snapshot,
    Vmm,
    VmmError,
    VmRunState,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.kvm
DEADLINE_S = 60
# Two vCPUs, 64 bits, ring 3: each counts to 100 million in a register and in memory of its own, and
# then both meet at 0x6000; the second to come there ends the machine.
TWO_COUNT = (
    b"\xb9\x00\xe1\xf5\x05"  #  mov ecx, 100000000
    b"\x89\xfe\xc1\xe6\x0c"  #  mov esi, edi; shl esi, 12
    # back:
    b"\xff\x86\x00\x70\x00\x00"  #  inc dword [rsi + 0x7000]
    b"\xff\xc9\x75\xf6"  #      dec ecx; jnz back
    b"\xb8\x01\x00\x00\x00"  #  mov eax, 1
    b"\xf0\x0f\xc1\x04\x25\x00\x60\x00\x00"  #  lock xadd [0x6000], eax
    b"\xff\xc8\x75\x04" + exit_with(3) + b"\xf3\x90\xeb\xfc"  #      dec eax; jnz wait
)
# Real mode with an interrupt controller: IRQ 4 at vector 0x24, whose handler sends back what the
# serial port received. It says "r", waits with interrupts off until the host sets [0x2000], and
# then takes what is pending.
INTERRUPTED = (
    b"\xfa"  #                                          cli
    b"\xb0\x11\xe6\x20\xb0\x20\xe6\x21\xb0\x04\xe6\x21\xb0\x01\xe6\x21"  # the PIC: vectors from 0x20
    b"\xb0\xef\xe6\x21"  #                              all masked but IRQ 4
    b"\xc7\x06\x90\x00\x00\x11\xc7\x06\x92\x00\x00\x00"  # [0x90] = 0:0x1100
    b"\xba\xf9\x03\xb0\x01\xee"  #                      mov dx, 0x3f9; mov al, 1; out dx, al
    b"\xba\xf8\x03\xb0\x72\xee"  #                      print 'r'
    b"\x80\x3e\x00\x20\x00\x74\xf9"  #                  wait: cmp byte [0x2000], 0; je wait
    b"\xfb\xf4" + exit_with(5)  #                                      sti; hlt
).ljust(0x100, b"\x90") + b"\xba\xf8\x03\xec\xee\xb0\x20\xe6\x20\xcf"  # in al, dx; out dx, al; EOI; iret
# 64 bits, ring 3: takes YMM3 and YMM4 from 0x7000, sets [0x3000], waits until the host sets
# [0x2000], and leaves both at 0x6000.
HOLDS_YMM = (
    b"\xc5\xfe\x6f\x1c\x25\x00\x70\x00\x00"  #         vmovdqu ymm3, [0x7000]
    b"\xc5\xfe\x6f\x24\x25\x20\x70\x00\x00"  #         vmovdqu ymm4, [0x7020]
    b"\xc6\x04\x25\x00\x30\x00\x00\x01"  #             mov byte [0x3000], 1
    b"\x80\x3c\x25\x00\x20\x00\x00\x00\x74\xf6"  # back: cmp byte [0x2000], 0; je back
    b"\xc5\xfe\x7f\x1c\x25\x00\x60\x00\x00"  #         vmovdqu [0x6000], ymm3
    b"\xc5\xfe\x7f\x24\x25\x20\x60\x00\x00"  #         vmovdqu [0x6020], ymm4
) + exit_with(4)  # fmt: skip


def test_two_vcpus_continue_together() -> None:
    with Vmm(flat(count_vcpus(2), "user64", address=0x10000, cpu=CpuConfig(vcpus=2))) as vmm:
        snapshot = vmm.snapshot()
        for machine in (vmm, *(snapshot.fork() for _ in range(3))):
            assert machine.run(DEADLINE_S).code == 2
            machine.close()


def test_two_vcpus_interrupted_count_to_the_same_end() -> None:
    config = flat(TWO_COUNT, "user64", address=0x10000, cpu=CpuConfig(vcpus=2))
    with Vmm(config) as vmm:
        vmm.start()
        snapshots = while_it_runs(vmm, 5)
        assert vmm.wait(DEADLINE_S) is not None
        for snapshot in snapshots:
            with snapshot.fork() as fork:
                assert fork.run(DEADLINE_S).code == 3
                assert [fork.memory.read(at, 4) for at in (0x7000, 0x8000)] == [struct.pack("<I", 100_000_000)] * 2


def test_interrupt_that_is_pending_arrives_in_every_fork() -> None:
    seen = threading.Event()

    def look(piece: bytes) -> None:
        if b"r" in piece:
            vmm.serial.send(b"x")
            vmm.stop()
            seen.set()

    with Vmm(flat(INTERRUPTED, irqchip=True, pit=False, serial=SerialConfig(output=look))) as vmm:
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
        assert seen.is_set()
        snapshot = vmm.snapshot()
        for _ in range(3):
            with snapshot.fork() as fork:
                fork.memory.write(0x2000, b"\1")
                assert fork.run(DEADLINE_S).code == 5
                assert fork.serial.take_output() == b"x"


def test_state_of_a_fork_is_that_of_its_snapshot() -> None:
    """Nothing but time tells them apart: the clock, the TSC, and what the PIT and the LAPIC count down."""
    for config in (
        flat(SPIN),
        flat(SPIN, irqchip=True),
        flat(ORACLE, "user64", address=0x10000, cpu=CpuConfig(vcpus=2)),
    ):
        with Vmm(config) as vmm:
            vmm.run(0.01)
            first = vmm.snapshot()
            with first.fork() as fork:
                second = fork.snapshot()
            timeless = {"clock", "pit", "lapic", "msrs"}
            assert [r for r in first.state if r[0] not in timeless] == [r for r in second.state if r[0] not in timeless]
            assert msrs_without_time(first) == msrs_without_time(second)


def msrs_without_time(snapshot: Snapshot) -> list[dict[int, int]]:
    tables = [dict(struct.iter_unpack("<IQ", data)) for kind, _, data in snapshot.state if kind == "msrs"]
    assert all(0x10 in table for table in tables)
    # The time stamp counter, and Hyper-V's run time and reference time, which some KVMs list.
    times = {0x10, 0x4000_0010, 0x4000_0020}
    return [{index: value for index, value in table.items() if index not in times} for table in tables]


def test_registers_of_every_class_come_back() -> None:
    with Vmm(flat(SPIN, "user64", address=0x10000)) as vmm:
        vcpu = vmm.vcpus[0]
        vcpu.regs.r15 = 0x1122_3344_5566_7788
        vcpu.debugregs.db0 = 0x4444
        vcpu.msrs[0xC000_0102] = 0x5555
        vcpu.sregs.cr2 = 0x6666
        snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            for machine in (fork, vmm):
                if machine is vmm:
                    vcpu.regs.r15 = vcpu.debugregs.db0 = vcpu.msrs[0xC000_0102] = vcpu.sregs.cr2 = 0
                    vmm.reset(snapshot)
                other = machine.vcpus[0]
                assert other.regs.r15 == 0x1122_3344_5566_7788
                assert other.debugregs.db0 == 0x4444
                assert other.msrs[0xC000_0102] == 0x5555
                assert other.sregs.cr2 == 0x6666


@pytest.fixture
def halted() -> Iterator[Vmm]:
    with Vmm(flat(HALT)) as vmm:
        yield vmm


def test_halt_is_left_behind(halted: Vmm) -> None:
    assert halted.run(DEADLINE_S).reason is ExitReason.HALT
    with halted.snapshot().fork() as fork:
        assert fork.vcpus[0].regs.rip == 0x1001


def test_avx_registers_are_kept() -> None:
    nonce = os.urandom(64)
    with Vmm(flat(HOLDS_YMM, "user64", address=0x10000, size_mib=2, cpu=CpuConfig(template="host"))) as vmm:
        vcpu = vmm.vcpus[0]
        vmm.memory.write(0x7000, nonce)
        try:
            vcpu.sregs.cr4 |= 1 << 18  # OSXSAVE
            vcpu.xcrs.xcr0 = 7
        except VmmError as error:
            pytest.skip(f"no AVX for guests here: {error}")
        while not vmm.memory.read_u8(0x3000):
            vmm.run(0.02)
            if vmm.state is VmRunState.EXITING:
                pytest.skip("no AVX for guests here")
        snapshot = vmm.snapshot()
        for machine in (snapshot.fork(), snapshot.fork(), vmm):
            if machine is vmm:
                vmm.reset(snapshot)
            machine.memory.write(0x7000, bytes(64))  # one that started again would hold this
            machine.memory.write(0x2000, b"\1")
            assert machine.run(DEADLINE_S).code == 4
            assert machine.memory.read(0x6000, 64) == nonce
            machine.close()

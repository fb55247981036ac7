"""A guest that has halted permanently ends its run; one that an interrupt or an NMI can still wake does not.

Covers src/vm/halted.rs and src/vcpu/halted.rs.
"""

from __future__ import annotations

import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from command_line import pyvmm
from guests import HALT, exit_with, flat, out
from pyvmm import (
    CpuConfig,
    EventManager,
    Exit,
    ExitAction,
    ExitReason,
    StateError,
    Stop,
    Vcpu,
    VcpuExit,
    Vmm,
    VmRunState,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
# Longer than the watch waits for a guest that stays halted.
IDLE_S = 1.0
TWO = CpuConfig(vcpus=2)
STI, CLI = b"\xfb", b"\xfa"
HALT_AGAIN = b"\xf4\xeb\xfd"  # hlt; jmp back
# Real mode: vector 2 leads to 0x1100, where `nmi_ends` has exit_with(7).
SET_VECTOR = b"\xc7\x06\x08\x00\x00\x11\xc7\x06\x0a\x00\x00\x00"  # mov word [8], 0x1100; mov word [10], 0


def nmi_ends(code: bytes) -> bytes:
    """The code, with an NMI handler that exits with 7."""
    return (SET_VECTOR + code).ljust(0x100, b"\x90") + exit_with(7)


def test_guest_that_halts_with_interrupts_off_ends_its_run(tmp_path: Path) -> None:
    for pit in (False, True):
        with Vmm(flat(CLI + HALT_AGAIN, irqchip=True, pit=pit)) as vmm:
            assert vmm.run(DEADLINE_S) == Exit(ExitReason.ALL_HALTED, vcpu=0)
            assert vmm.state is VmRunState.PAUSED
            assert vmm.vcpus[0].regs.rip == 0x1002
    program, config = tmp_path / "code", tmp_path / "vm.toml"
    program.write_bytes(CLI + HALT_AGAIN)
    config.write_text("irqchip = true\n")
    done = pyvmm("run", "--flat", program, "--config", config, "--timeout", str(DEADLINE_S))
    assert (done.returncode, done.stderr) == (0, b"")


def test_guest_that_waits_for_an_interrupt_is_not_ended() -> None:
    with Vmm(flat(STI + HALT_AGAIN, irqchip=True)) as vmm:
        assert vmm.run(IDLE_S).reason is ExitReason.TIMEOUT
        # Vector 4: the guest has not told the PIC another base.
        vmm.memory.write(0x10, b"\x00\x11\x00\x00")
        vmm.memory.write(0x1100, exit_with(9))
        vmm.irq(4).pulse()
        assert vmm.run(DEADLINE_S).code == 9


@pytest.mark.parametrize("awake", [0, 1])
def test_one_vcpu_with_interrupts_on_keeps_the_machine(awake: int) -> None:
    # cmp di, awake; jne halt; sti; halt: hlt; jmp halt
    code = b"\x83\xff" + bytes([awake]) + b"\x75\x01" + STI + HALT_AGAIN
    with Vmm(flat(code, irqchip=True, cpu=TWO)) as vmm:
        assert vmm.run(IDLE_S).reason is ExitReason.TIMEOUT
    with Vmm(flat(CLI + HALT_AGAIN, irqchip=True, cpu=TWO)) as vmm:
        assert vmm.run(DEADLINE_S).reason is ExitReason.ALL_HALTED


def test_vcpu_that_waits_to_be_started_counts_as_halted() -> None:
    code = (
        b"\x83\xff\x00\x75\x12"  # cmp edi, 0; jne wait
        b"\xb8\x00\x03\xe0\xfe"  # mov eax, 0xfee00300
        b"\xc7\x40\x10\x00\x00\x00\x01"  # mov dword [rax + 0x10], 1 << 24: to APIC 1
        b"\xc7\x00\x00\x45\x00\x00"  # mov dword [rax], INIT
        b"\xf4\xeb\xfd"  # wait: hlt; jmp wait
    )
    with Vmm(flat(code, "long64", irqchip=True, cpu=TWO)) as vmm:
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.ALL_HALTED, vcpu=0)


def test_nmi_after_the_end_continues_the_guest() -> None:
    with Vmm(flat(nmi_ends(CLI + HALT_AGAIN), irqchip=True)) as vmm:
        for _ in range(2):
            assert vmm.run(DEADLINE_S).reason is ExitReason.ALL_HALTED
        vmm.nmi()
        assert vmm.run(DEADLINE_S).code == 7


def test_forks_and_resets_of_a_halted_guest_are_halted() -> None:
    with Vmm(flat(nmi_ends(CLI + HALT_AGAIN), irqchip=True)) as vmm:
        assert vmm.run(DEADLINE_S).reason is ExitReason.ALL_HALTED
        snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            assert fork.run(DEADLINE_S).reason is ExitReason.ALL_HALTED
            fork.nmi()
            assert fork.run(DEADLINE_S).code == 7
            fork.reset(snapshot)
            assert fork.run(DEADLINE_S).reason is ExitReason.ALL_HALTED
        vmm.nmi()
        assert vmm.run(DEADLINE_S).code == 7


def test_hook_of_hlt_can_keep_the_machine_waiting() -> None:
    calls: list[int] = []
    with Vmm(flat(nmi_ends(CLI + HALT_AGAIN), irqchip=True)) as vmm:

        @vmm.on_exit("hlt")
        def wait(vcpu: Vcpu, exit: VcpuExit.Hlt) -> ExitAction:
            calls.append(vcpu.id)
            if len(calls) == 3:
                vmm.nmi()
            return ExitAction.CONTINUE

        assert vmm.run(DEADLINE_S).code == 7
        assert calls == [0, 0, 0]
    with Vmm(flat(CLI + HALT_AGAIN, irqchip=True)) as vmm:
        answers = [ExitAction.RETRY, Stop("halted")]
        vmm.on_exit("hlt", lambda vcpu, exit: answers.pop(0))
        assert vmm.run(DEADLINE_S).value == "halted"
        assert vmm.vcpus[0].regs.rip == 0x1002, "in the kernel it stays halted"
    with Vmm(flat(CLI + HALT_AGAIN, irqchip=True)) as vmm:
        vmm.on_exit("hlt", lambda vcpu, exit: None)
        assert vmm.run(DEADLINE_S).reason is ExitReason.ALL_HALTED


def test_machines_that_share_a_loop_end_each_for_itself() -> None:
    manager = EventManager()
    with (
        Vmm(flat(CLI + HALT_AGAIN, irqchip=True), event_manager=manager) as halted,
        Vmm(flat(STI + HALT_AGAIN, irqchip=True), event_manager=manager) as idle,
        ThreadPoolExecutor(2) as pool,
    ):
        runs = [pool.submit(vmm.run, limit) for vmm, limit in ((halted, DEADLINE_S), (idle, IDLE_S))]
        assert [run.result().reason for run in runs] == [ExitReason.ALL_HALTED, ExitReason.TIMEOUT]


def write_msr(index: int, value: int) -> bytes:
    """Real mode: mov ecx, index; mov eax, value; xor edx, edx; wrmsr."""
    return b"\x66\xb9" + struct.pack("<I", index) + b"\x66\xb8" + struct.pack("<I", value) + b"\x66\x31\xd2\x0f\x30"


def test_pit_that_can_send_nmis_keeps_the_machine() -> None:
    # x2APIC on, APIC on, and its first line, which is the PIT's, in NMI mode.
    code = SET_VECTOR + write_msr(0x1B, 0xFEE00D00) + write_msr(0x80F, 0x1FF) + write_msr(0x835, 0x400) + HALT_AGAIN
    with Vmm(flat(code.ljust(0x100, b"\x90") + b"\xcf", irqchip=True)) as vmm:
        assert vmm.run(IDLE_S).reason is ExitReason.TIMEOUT
    with Vmm(flat(code.ljust(0x100, b"\x90") + b"\xcf", irqchip=True, pit=False)) as vmm:
        assert vmm.run(DEADLINE_S).reason is ExitReason.ALL_HALTED


def test_line_that_is_an_nmi_keeps_the_machine() -> None:
    code = (
        b"\xb8\x00\x00\xc0\xfe"  # mov eax, 0xfec00000: the I/O APIC
        b"\xc7\x00\x1a\x00\x00\x00"  # mov dword [rax], 0x1a: line 5
        b"\xc7\x40\x10\x00\x04\x00\x00"  # mov dword [rax + 0x10], NMI
    )
    with Vmm(flat(code + HALT_AGAIN, "long64", irqchip=True)) as vmm:
        assert vmm.run(IDLE_S).reason is ExitReason.TIMEOUT
    with Vmm(flat(code[:5] + HALT_AGAIN, "long64", irqchip=True)) as vmm:
        assert vmm.run(DEADLINE_S).reason is ExitReason.ALL_HALTED


def test_paused_machine_is_not_ended() -> None:
    with Vmm(flat(CLI + HALT_AGAIN, irqchip=True)) as vmm:
        vmm.start()
        vmm.pause()
        assert vmm.wait(IDLE_S) is None
        assert vmm.state is VmRunState.PAUSED
        vmm.resume()
        exit = vmm.wait(DEADLINE_S)
        assert exit is not None
        assert exit.reason is ExitReason.ALL_HALTED


def test_snapshots_beside_do_not_hide_a_halted_guest() -> None:
    ends = threading.Event()
    with Vmm(flat(CLI + HALT_AGAIN, irqchip=True)) as vmm:

        def take_snapshots() -> None:
            while not ends.wait(0.1):
                with suppress(StateError):
                    vmm.snapshot()

        with ThreadPoolExecutor(1) as pool:
            taken = pool.submit(take_snapshots)
            try:
                assert vmm.run(DEADLINE_S).reason is ExitReason.ALL_HALTED
            finally:
                ends.set()
            taken.result()


def test_vcpu_in_a_callback_is_not_halted() -> None:
    ends = threading.Event()

    class Slow:
        def write(self, offset: int, size: int, value: int) -> None:
            ends.wait(IDLE_S)

    # The first vCPU is in the device, the other is halted.
    code = b"\x83\xff\x00\x75\x02\xe6\x80" + HALT_AGAIN  # cmp di, 0; jne halt; out 0x80, al; halt: ...
    with Vmm(flat(code, irqchip=True, cpu=TWO)) as vmm:
        vmm.add_pio_device(0x80, 1, Slow())
        start = time.monotonic()
        assert vmm.run(DEADLINE_S).reason is ExitReason.ALL_HALTED
        assert time.monotonic() - start >= IDLE_S


def test_machine_without_a_controller_halts_as_before() -> None:
    with Vmm(flat(out(0x80, 1) + HALT)) as vmm:
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.HALT, vcpu=0)

"""Every class of state: whatever a guest or its host leaves there, a reset brings back what a fork has."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from guests import HALT, SPIN, exit_with, flat
from poison import ALL_ONES, POISONS, comparable, msrs, settable
from pyvmm import CpuConfig, ExitReason, KvmError, Snapshot, StateError, Stop, Vmm, VmRunState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.kvm
DEADLINE_S = 60

TSC_DEADLINE = 0x6E0


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.__name__)
def test_reset_brings_back_what_a_fork_has(poison: Callable[[Vmm], None]) -> None:
    with Vmm(flat(SPIN, irqchip=True, pit=True, cpu=CpuConfig(vcpus=2))) as vmm:
        vmm.run(0.01)
        snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            want = comparable(fork.snapshot())
        with suppress(KvmError):
            poison(vmm)
        assert comparable(vmm.snapshot()) != want, "the poison has changed something"
        vmm.reset(snapshot)
        found = comparable(vmm.snapshot())
        assert {part: data for part, data in found.items() if want[part] != data} == {}
        assert found.keys() == want.keys()


def test_every_register_that_can_be_changed_is_in_a_snapshot() -> None:
    with Vmm(flat(HALT, irqchip=True)) as vmm:
        can_change = settable(vmm.vcpus[0])
        assert {0x277, 0x2FF, 0x200, 0x403} <= can_change.keys(), "PAT, MTRRs and machine-check banks"
        assert can_change.keys() - msrs(vmm.snapshot()).keys() == set()


def test_lapic_timer_that_counts_comes_back_from_one_with_deadlines() -> None:
    with Vmm(flat(SPIN, irqchip=True)) as vmm:
        lapic = vmm.vcpus[0].lapic
        lapic.svr, lapic.lvt_timer, lapic.timer_divide = 0x1FF, 1 << 17 | 1 << 16 | 0x40, 0xB  # periodic, masked
        lapic.timer_initial_count = 0x7FFF_FFFF
        snapshot = vmm.snapshot()
        lapic.lvt_timer = 2 << 17 | 1 << 16 | 0x41
        vmm.vcpus[0].msrs[TSC_DEADLINE] = ALL_ONES >> 1
        vmm.reset(snapshot)
        assert (lapic.lvt_timer, lapic.timer_initial_count) == (1 << 17 | 1 << 16 | 0x40, 0x7FFF_FFFF)
        assert lapic.timer_current_count > 0
        assert vmm.vcpus[0].msrs[TSC_DEADLINE] == 0


# Real mode: both PICs at 0x70, all of the slave's lines on, then a spin with interrupts on; each
# vector counts at 0x3000 + 2 * number. At 0x500 the guest says that it is ready.
def count_interrupts() -> bytes:
    setup = b"".join(
        bytes([0xB0, value, 0xE6, port])  # mov al, value; out port, al
        for port, value in (
            (0x20, 0x11), (0x21, 0x68), (0x21, 0x04), (0x21, 0x01),
            (0xA0, 0x11), (0xA1, 0x70), (0xA1, 0x02), (0xA1, 0x01), (0x21, 0x00), (0xA1, 0x00),
        )
    )  # fmt: skip
    table = 0x1400
    vectors = b"\x31\xc0\x8e\xd8"  # xor ax, ax; mov ds, ax
    handlers = b""
    for number in range(16):
        at = table + len(handlers)
        vectors += b"\xc7\x06" + struct.pack("<HH", 4 * (0x68 + number), at)  # mov word [vector], handler
        vectors += b"\xc7\x06" + struct.pack("<HH", 4 * (0x68 + number) + 2, 0)
        handlers += b"\xff\x06" + struct.pack("<H", 0x3000 + 2 * number)  # inc word [count]
        handlers += b"\x50\xb0\x20\xe6\xa0\xe6\x20\x58\xcf"  # push ax; end both interrupts; pop ax; iret
    code = vectors + setup + b"\xba\x00\x05\xee\xfb\xeb\xfe"  # mov dx, 0x500; out dx, al; sti; jmp $
    return code.ljust(table - 0x1000, b"\x90") + handlers


class Ready:
    def write(self, offset: int, size: int, value: int) -> Stop:
        return Stop(value)

    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        pass


def counts(vmm: Vmm, at_least: int = 0) -> list[int]:
    """How often each line has interrupted, once there were so many interrupts."""
    vmm.run(0.1)
    while sum(struct.unpack("<16H", vmm.memory.read(0x3000, 32))) < at_least:
        vmm.run(0.1)
    return list(struct.unpack("<16H", vmm.memory.read(0x3000, 32)))


@pytest.mark.parametrize("line", [1, 4, 5, 8, 9, 12, 15])
@pytest.mark.parametrize("how", ["pulse", "raise_"])
def test_interrupt_of_the_former_guest_reaches_no_later_one(line: int, how: str) -> None:
    with Vmm(flat(count_interrupts(), irqchip=True)) as vmm:
        vmm.add_pio_device(0x500, 1, Ready())
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
        snapshot = vmm.snapshot()
        getattr(vmm.irq(line), how)()
        vmm.reset(snapshot)
        assert counts(vmm) == [0] * 16
        vmm.reset(snapshot)
        vmm.irq(line).pulse()
        assert counts(vmm, at_least=1) == [int(number == line) for number in range(16)], "the line works"


def test_line_that_is_high_is_high_in_forks_and_after_a_reset() -> None:
    with Vmm(flat(count_interrupts(), irqchip=True)) as vmm:
        vmm.add_pio_device(0x500, 1, Ready())
        vmm.run(DEADLINE_S)
        vmm.irq(5).raise_()
        snapshot = vmm.snapshot()
        vmm.irq(5).lower()
        vmm.irq(6).raise_()
        vmm.reset(snapshot)
        with snapshot.fork(setup=lambda fork: fork.add_pio_device(0x500, 1, Ready())) as fork:
            for machine in (fork, vmm):
                machine.irq(5).pulse()  # it is high: no edge but the one that the snapshot has
                machine.irq(6).pulse()
                assert counts(machine) == [int(number in (5, 6)) for number in range(16)]


def test_line_that_is_high_is_high_after_save_and_load(tmp_path: Path) -> None:
    with Vmm(flat(count_interrupts(), irqchip=True)) as vmm:
        vmm.add_pio_device(0x500, 1, Ready())
        vmm.run(DEADLINE_S)
        vmm.irq(5).raise_()
        snapshot = vmm.snapshot()
    snapshot.save(tmp_path / "file")
    loaded = Snapshot.load(tmp_path / "file")
    assert loaded.state == snapshot.state
    with loaded.fork(setup=lambda fork: fork.add_pio_device(0x500, 1, Ready())) as fork:
        fork.irq(5).pulse()  # it is high already: no second edge
        assert counts(fork)[5] == 1


MMIO = 0xD000_0000
# 64 bits, ring 0. Each makes an access that its device stops, with more to come; by name.
ACCESSES = {
    "in": b"\x66\xba\x00\x05\xec",  #                                           mov dx, 0x500; in al, dx
    "out": b"\x66\xba\x00\x05\xee",  #                                          out dx, al
    "rep insb": b"\x66\xba\x00\x05\xbf\x00\x30\x00\x00\xb9\x28\x00\x00\x00\xf3\x6c",
    "rep outsb": b"\x66\xba\x00\x05\xbe\x00\x30\x00\x00\xb9\x28\x00\x00\x00\xf3\x6e",
    "mov": b"\xbb" + struct.pack("<I", MMIO) + b"\x8b\x03",  #                  mov eax, [rbx]
    "add": b"\xbb" + struct.pack("<I", MMIO) + b"\x83\x03\x05",  #              add dword [rbx], 5
    "store": b"\xbb" + struct.pack("<I", MMIO) + b"\x89\x03",  #                mov [rbx], eax
    "rep movsb": b"\xbe" + struct.pack("<I", MMIO) + b"\xbf\x00\x30\x00\x00\xb9\x28\x00\x00\x00\xf3\xa4",
    "rep movsq to itself": b"\xbe" + struct.pack("<I", MMIO) + b"\xbf" + struct.pack("<I", MMIO + 0x800)
    + b"\xb9\x28\x00\x00\x00\xf3\x48\xa5",
    "rep stosb": b"\xbf" + struct.pack("<I", MMIO) + b"\xb9\x28\x00\x00\x00\xf3\xaa",
    "repe cmpsb": b"\xbe" + struct.pack("<I", MMIO) + b"\xbf" + struct.pack("<I", MMIO + 0x800)
    + b"\xb9\x28\x00\x00\x00\xf3\xa6",
    "push": b"\xbb" + struct.pack("<I", MMIO) + b"\xbc\x00\x50\x00\x00\xff\x33",  # mov esp, 0x5000; push [rbx]
}  # fmt: skip


class Device:
    """Answers its first accesses, and then stops or raises."""

    def __init__(self, answered: int, raises: bool) -> None:
        self.left = answered
        self.raises = raises
        self.calls = 0

    def act(self, value: object) -> object:
        self.calls += 1
        self.left -= 1
        if self.left >= 0:
            return value
        if self.raises:
            raise ZeroDivisionError
        return Stop("stopped")

    def read(self, offset: int, size: int) -> object:
        return self.act(0)

    def write(self, offset: int, size: int, value: int) -> object:
        return self.act(None)


@pytest.mark.parametrize("raises", [False, True], ids=["stops", "raises"])
@pytest.mark.parametrize("answered", [0, 1, 7])
@pytest.mark.parametrize("access", ACCESSES)
def test_reset_asks_no_device_for_the_guest_that_goes(access: str, answered: int, raises: bool) -> None:
    code = exit_with(1) + ACCESSES[access] + exit_with(2)
    with Vmm(flat(code, "long64", address=0x10000, size_mib=2)) as vmm:
        assert vmm.run(DEADLINE_S).code == 1
        snapshot = vmm.snapshot()
        device = Device(answered, raises)
        vmm.add_mmio_device(MMIO, 0x1000, device)
        vmm.add_pio_device(0x500, 1, device)
        vmm.reset(snapshot)
        for _ in range(3):
            device.left = answered
            with suppress(ZeroDivisionError):
                vmm.run(DEADLINE_S)
            calls = device.calls
            vmm.reset(snapshot)
            assert device.calls == calls
        device.left = 1000
        assert vmm.run(DEADLINE_S).code == 2
        vmm.reset(snapshot)
        vmm.remove_mmio_device(MMIO)
        vmm.remove_pio_device(0x500)
        with snapshot.fork() as fork:
            assert vmm.memory.read(0, 2 << 20) == fork.memory.read(0, 2 << 20)
            assert comparable(vmm.snapshot()) == comparable(fork.snapshot())


def test_reset_that_is_refused_leaves_an_access_to_be_completed() -> None:
    code = ACCESSES["in"] + exit_with(2)

    def machine(*hide: Any) -> Vmm:
        return Vmm(flat(code, "long64", address=0x10000, cpu=CpuConfig(hide=hide)))

    with machine("cx16") as other, machine() as vmm:
        snapshot = other.snapshot()
        device = Device(0, raises=False)
        vmm.add_pio_device(0x500, 1, device)
        assert vmm.run(DEADLINE_S).value == "stopped"
        rip = vmm.vcpus[0].regs.rip
        with pytest.raises(StateError, match="another CPUID"):
            vmm.reset(snapshot)
        assert (vmm.vcpus[0].regs.rip, device.calls) == (rip, 1)
        assert vmm.run(DEADLINE_S).code == 2


def test_unanswered_access_is_abandoned_by_a_reset_and_refused_by_a_snapshot() -> None:
    with Vmm(flat(exit_with(1) + ACCESSES["in"] + exit_with(2), "long64", address=0x10000)) as vmm:
        snapshot = vmm.snapshot()
        vmm.vcpus[0].run_once()
        vmm.vcpus[0].run_once()
        with pytest.raises(StateError, match="waits for the data"):
            vmm.snapshot()
        vmm.reset(snapshot)
        assert vmm.run(DEADLINE_S).code == 1


@pytest.mark.parametrize("how", ["before a run", "after a time-out", "after an end"])
def test_stop_from_before_a_reset_stops_no_later_run(how: str) -> None:
    code = SPIN if how == "after a time-out" else exit_with(3)
    with Vmm(flat(code)) as vmm:
        snapshot = vmm.snapshot()
        if how != "before a run":
            vmm.run(0.01)
        vmm.stop()
        vmm.reset(snapshot)
        assert vmm.run(0.05).reason is (ExitReason.TIMEOUT if code == SPIN else ExitReason.CODE)


def test_stop_of_a_run_that_is_reset_ends_that_run() -> None:
    with Vmm(flat(SPIN)) as vmm:
        snapshot = vmm.snapshot()
        vmm.start()
        vmm.stop()
        vmm.reset(snapshot)
        exit = vmm.wait(DEADLINE_S)
        assert exit is not None
        assert exit.reason is ExitReason.STOPPED
        assert vmm.state is VmRunState.PAUSED

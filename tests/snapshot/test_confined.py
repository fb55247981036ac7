"""Programs in ring 3, for which a reset sets less: what they try, and what the host does to them, leaves nothing.

Resets in a row take other ways than the first one. Covers src/vcpu/whole_state.rs,
src/memory/touched.rs.
"""

from __future__ import annotations

import ctypes
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from poison import POISONS, comparable
from programs import DEADLINE_S, build, machine
from pyvmm import ExitAction, ExitReason, KvmError, Snapshot, StateError, Vcpu, VcpuExit, Vmm, kvm_info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.kvm
MIB = 1 << 20
KERNEL_GS_BASE = 0xC000_0102
GATES = 0x8_7000
DEVICE = 0x500

# It is ready, does what `choice` says, and ends.
PROGRAM = """
#include <stdint.h>
volatile int choice, found;
static inline void end(int code) { __asm__ volatile("out %%eax, $0xf4" : : "a"(code)); }
static inline void call(int value) { __asm__ volatile("outb %%al, %%dx" : : "a"(value), "d"(0x500)); }
/* Ring 0 by a gate that the host has changed: registers that ring 3 cannot write, and a stack without a trace. */
__asm__(".globl handler\\nhandler: mov $0xc0000102, %ecx; mov $0x1234000, %eax; xor %edx, %edx; wrmsr;"
        "mov %rax, %dr0; mov %rax, %cr2;"
        "pop %r8; pop %r9; pop %r10; pop %r11; pop %r12; xor %eax, %eax;"
        "mov %rax, -8(%rsp); mov %rax, -16(%rsp); mov %rax, -24(%rsp); mov %rax, -32(%rsp); mov %rax, -40(%rsp);"
        "lea -256(%r11), %rsp; push %r12; push %r11; push %r10; push %r9; push %r8; iretq");
#define CASE(n, code) case n: __asm__ volatile(code : : : "rax", "rcx", "rdx", "rbx", "memory"); break
__attribute__((force_align_arg_pointer)) void _start(void) {
    end(7);
    found++;
    switch (choice) {
    CASE(1, "pcmpeqd %%xmm7, %%xmm7; fld1");
    CASE(2, "xor %%eax, %%eax; mov %%eax, %%fs; mov %%eax, %%gs; mov $0x3b, %%eax; mov %%eax, %%ds");
    CASE(3, "syscall");
    CASE(4, "sysenter");
    CASE(5, "mov $0xc0000102, %%ecx; wrmsr");
    CASE(6, "int $0x80");
    CASE(7, "int3");
    CASE(8, "ud2");
    CASE(9, "mov %%rax, %%cr2");
    CASE(10, "mov %%rax, %%dr0");
    CASE(11, "pushq $0x20; pushq $0; lretq");
    CASE(12, "movl $0, 0x80000");
    CASE(13, "movl $0, 0x87000");
    CASE(14, "movl $0, 0x84000");
    CASE(15, "pushf; orl $0x100, (%%rsp); popf; nop; nop");
    CASE(16, "pushf; orl $0x240400, (%%rsp); popf");
    CASE(17, "mov $0x28, %%eax; lldt %%ax");
    CASE(18, "xor %%ecx, %%ecx; mov $1, %%eax; xor %%edx, %%edx; xsetbv");
    CASE(19, "pushq $0x18; pushq %%rsp; pushq $2; pushq $0x10; pushq $0; iretq");
    CASE(20, "mov $7, %%eax; mov %%eax, %%fs");
    CASE(21, "hlt");
    CASE(22, "xor %%eax, %%eax; cpuid; sgdt -16(%%rsp); rdtsc");
    CASE(23, "pushq $0x20; pushq $0; mov %%rsp, %%rax; rex.W lcall *(%%rax)");
    CASE(24, "jmp .");
    CASE(25, "mov $0xfee00000, %%eax; movl $0, (%%rax)");
    CASE(26, "vmcall");
    CASE(27, "vmmcall");
    CASE(28, "mov $0x500, %%edx; in %%dx, %%al");
    case 40: call(1); __asm__ volatile("int3" : : : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "memory");
        call(0); break;
    case 41: call(1); break;
    case 42: for (;;) __asm__ volatile("int3");
    }
    end(choice == 0 ? found : 9);
    for (;;);
}
"""
HANGS = 24


@pytest.fixture
def snapshot(tmp_path: Path) -> Iterator[Snapshot]:
    with Vmm(machine(build(tmp_path, PROGRAM))) as vmm:
        assert vmm.run(DEADLINE_S).code == 7
        yield vmm.snapshot()


def state(vmm: Vmm) -> tuple[Any, bytes]:
    classes = comparable(vmm.snapshot()).items()
    return {name: value for name, value in classes if name != ("pio 0x500", 1)}, vmm.memory.read(0, 8 * MIB)


def poisoned(vmm: Vmm, choice: int, run: Callable[[Vmm], object] | None = None) -> None:
    vmm.memory.write(vmm.symbols["choice"], bytes([choice]))
    limit = 0.05 if choice == HANGS else DEADLINE_S
    _ = run(vmm) if run else vmm.run_here(limit)


def check(vmm: Vmm, snapshot: Snapshot, poison: Callable[[], object]) -> None:
    """Nothing is left of a poison, in any of several resets in a row."""
    with snapshot.fork() as fork:
        want = state(fork)
    for number in range(3):
        # The first reset after a look sets everything; those after it need not.
        for _ in range(3):
            vmm.reset(snapshot)
            poison()
        vmm.reset(snapshot)
        assert state(vmm) == want, f"reset {number}"
        vmm.reset(snapshot)
        poisoned(vmm, 1)
        vmm.reset(snapshot)
        poison()
        vmm.reset(snapshot)
        assert vmm.run_here(DEADLINE_S).code == 1, f"reset {number}: what the guest finds"


@pytest.mark.parametrize("choice", range(29))
def test_nothing_is_left_of_what_ring_3_tries(snapshot: Snapshot, choice: int) -> None:
    with snapshot.fork() as vmm:
        check(vmm, snapshot, lambda: poisoned(vmm, choice))


@pytest.mark.parametrize("choice", [1, 3, 15, HANGS])
def test_nothing_is_left_after_a_run_on_the_vcpus_thread(snapshot: Snapshot, choice: int) -> None:
    with snapshot.fork() as vmm:
        check(vmm, snapshot, lambda: poisoned(vmm, choice, lambda vmm: vmm.run(0.05)))


@pytest.mark.parametrize("poison", POISONS)
def test_nothing_is_left_of_what_the_host_sets(snapshot: Snapshot, poison: Callable[[Vmm], None]) -> None:
    with snapshot.fork() as vmm:

        def act() -> None:
            with suppress(KvmError, StateError):  # what a machine without these chips does not have
                poison(vmm)

        check(vmm, snapshot, act)


class Device:
    """Has no state of its own."""

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        raise NotImplementedError

    def save(self) -> bytes:
        return b""

    def restore(self, data: bytes) -> None:
        pass


class Gate(Device):
    """Gives the guest ring 0 by a gate, and takes it away again, so that memory shows nothing of it."""

    def __init__(self, vmm: Vmm, write: Callable[[int, bytes], object]) -> None:
        self.vmm, self.put = vmm, write
        self.at = GATES + 3 * 16
        self.own = vmm.memory.read(self.at, 16)

    def write(self, offset: int, size: int, value: int) -> None:
        handler = self.vmm.symbols["handler"]
        low, high = struct.unpack("<QQ", self.own)
        low = low & ~(0xFFFF | 0xFFFF << 48) | handler & 0xFFFF | (handler >> 16) << 48
        self.put(self.at, struct.pack("<QQ", low, high) if value else self.own)


def by_view(vmm: Vmm, whole: bool = False) -> Callable[[int, bytes], object]:
    def write(at: int, data: bytes) -> None:
        start, size = (0, vmm.memory.size) if whole else (at, len(data))
        with vmm.memory.view(start, size) as view:
            view[at - start : at - start + len(data)] = data

    return write


def by_lasting_view(vmm: Vmm) -> Callable[[int, bytes], object]:
    view = vmm.memory.view(0, vmm.memory.size)

    def write(at: int, data: bytes) -> None:
        view[at : at + len(data)] = data

    return write


def by_number(vmm: Vmm) -> Callable[[int, bytes], object]:
    def write(at: int, data: bytes) -> None:
        for n, word in enumerate(struct.unpack("<QQ", data)):
            vmm.memory.write_u64(at + 8 * n, word)

    return write


def by_overlay(vmm: Vmm) -> Callable[[int, bytes], object]:
    overlay = vmm.memory.overlay(GATES, ctypes.c_uint8 * 4096)

    def write(at: int, data: bytes) -> None:
        overlay[at - GATES : at - GATES + len(data)] = list(data)

    return write


def system(vmm: Vmm) -> bytes:
    """The machine's own tables."""
    return vmm.memory.read(0x8_0000, 0x1_FC00)


WAYS: dict[str, Callable[[Vmm], Callable[[int, bytes], object]]] = {
    "write": lambda vmm: vmm.memory.write,
    "number": by_number,
    "view": by_view,
    "view of all": lambda vmm: by_view(vmm, whole=True),
    "lasting view": by_lasting_view,
    "overlay": by_overlay,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_guest_to_which_the_host_has_given_ring_0_is_reset_entirely(snapshot: Snapshot, way: str) -> None:
    with snapshot.fork() as vmm:
        vmm.reset(snapshot)
        want = system(vmm)
        vmm.add_pio_device(DEVICE, 1, Gate(vmm, WAYS[way](vmm)))
        poisoned(vmm, 40)
        assert vmm.vcpus[0].msrs[KERNEL_GS_BASE] == 0x123_4000, "the guest was in ring 0"
        assert system(vmm) == want, "and memory shows nothing of it"
        check(vmm, snapshot, lambda: poisoned(vmm, 40))


def test_a_guest_whose_device_sets_registers_is_reset_entirely(snapshot: Snapshot) -> None:
    class Sets(Device):
        def write(self, offset: int, size: int, value: int) -> None:
            vcpu = vmm.vcpus[0]
            vcpu.msrs[KERNEL_GS_BASE] = 0x77_0000
            vcpu.debugregs.db1 = 0x1230
            vcpu.sregs.gs.base = 0x1000

    with snapshot.fork() as vmm:
        vmm.add_pio_device(DEVICE, 1, Sets())
        check(vmm, snapshot, lambda: poisoned(vmm, 41))


def test_a_guest_whose_hook_sets_registers_is_reset_entirely(snapshot: Snapshot) -> None:
    with snapshot.fork() as vmm:

        def set_registers(vcpu: Vcpu, exit: VcpuExit) -> None:
            vcpu.msrs[KERNEL_GS_BASE] = 0x78_0000

        vmm.on_exit("io", set_registers)
        check(vmm, snapshot, lambda: poisoned(vmm, 41))


def test_a_guest_that_is_left_in_its_exceptions_code_is_reset_entirely(snapshot: Snapshot) -> None:
    with snapshot.fork() as vmm:
        vmm.on_exit("hlt", lambda vcpu, exit: ExitAction.CONTINUE)
        check(vmm, snapshot, lambda: poisoned(vmm, 42, lambda vmm: vmm.run_here(0.02)))


def test_an_nmi_is_not_lost_and_does_not_last(snapshot: Snapshot) -> None:
    with snapshot.fork() as vmm:
        for _ in range(4):
            vmm.reset(snapshot)
            vmm.nmi(0)
            assert vmm.run_here(DEADLINE_S).reason is ExitReason.EXCEPTION
        check(vmm, snapshot, lambda: vmm.nmi(0))


def test_resets_to_two_snapshots_in_turn_set_the_state_of_each(snapshot: Snapshot) -> None:
    with snapshot.fork() as vmm:
        vmm.vcpus[0].msrs[KERNEL_GS_BASE] = 0x99_0000
        vmm.vcpus[0].debugregs.db2 = 0x4560
        other = vmm.snapshot()
        for _ in range(4):
            for which in (snapshot, other):
                vmm.reset(which)
                for _ in range(2):
                    assert vmm.run_here(DEADLINE_S).code == 1
                    vmm.reset(which)
            vmm.reset(other)
            assert vmm.vcpus[0].msrs[KERNEL_GS_BASE] == 0x99_0000
            assert vmm.vcpus[0].debugregs.db2 == 0x4560
            vmm.reset(snapshot)
            assert vmm.vcpus[0].msrs[KERNEL_GS_BASE] == 0


@pytest.mark.skipif(bool(kvm_info()["software_kvm"]), reason="there the counter is the host's")
def test_the_time_of_a_snapshot_comes_back(snapshot: Snapshot) -> None:
    tsc = 0x10
    with snapshot.fork() as vmm:
        vmm.reset(snapshot)
        vmm.run_here(DEADLINE_S)
        vmm.reset(snapshot)
        first = vmm.vcpus[0].msrs[tsc]
        passed = []
        for _ in range(10):
            vmm.reset(snapshot)
            poisoned(vmm, HANGS)  # 50 ms
            vmm.reset(snapshot)
            passed.append(vmm.vcpus[0].msrs[tsc] - first)
        # Some of them were read at once. It counts with at least 1 GHz.
        assert min(passed[3:]) < 50e-3 * 3 * 1e9, "the counter has not gone on from where it was"

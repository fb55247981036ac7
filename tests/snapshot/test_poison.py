"""Guest and host poison what they can reach; after a reset nothing of it is left, in no class of guest.

Resets in a row take other ways than the first one: what KVM has taken before, it takes at the next
entry. Covers src/vcpu/entry.rs and src/snapshot/translations.rs.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from guests import exit_with, flat
from poison import POISONS, comparable
from pyvmm import CpuConfig, KvmError, Snapshot, StateError, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
MIB = 1 << 20
CHOICE_AT, FLAG = 0x2_0000, 0x5A
PAGE, OTHER_PAGE = 0x40_0000, 0x60_0000
# In the machine's own tables: the entry for 2 MiB at 4 MiB.
ENTRY_AT = 0x8_6010

# 64 bits. A byte that the host leaves in memory decides whether the guest poisons itself first.
# Then it exits with what it finds at 4 MiB.
FIND = b"\xa0" + struct.pack("<Q", PAGE) + b"\xe6\xf4"  # mov al, [PAGE]; out 0xf4, al


def poisoned(poison: bytes) -> bytes:
    choose = b"\xa0" + struct.pack("<Q", CHOICE_AT) + b"\x3c" + bytes([FLAG])  # mov al, [CHOICE_AT]; cmp al, FLAG
    return choose + b"\x0f\x85" + struct.pack("<i", len(poison)) + poison + FIND  # jne find


def remap(flags: int) -> bytes:
    """Map other memory at 4 MiB: mov rax, entry; mov [ENTRY_AT], rax."""
    return b"\x48\xb8" + struct.pack("<Q", OTHER_PAGE | flags) + b"\x48\xa3" + struct.pack("<Q", ENTRY_AT)


def write_msr(index: int, value: int) -> bytes:
    return b"\xb9" + struct.pack("<I", index) + b"\xb8" + struct.pack("<I", value) + b"\x31\xd2\x0f\x30"


RING_3 = (
    b"\x66\x0f\x76\xff"  #          pcmpeqd xmm7, xmm7
    b"\xd9\xe8"  #                  fld1
    b"\x31\xc0\x8e\xd8\x8e\xc0\x8e\xe0\x8e\xe8"  # xor eax, eax; mov ds, es, fs and gs, ax
    b"\xfd\x49\xff\xc7"  #          std; inc r15
) + remap(0x87)
RING_0 = (
    b"\xb8\x09\x00\x00\x00\x44\x0f\x22\xc0"  # mov eax, 9; mov cr8, rax
    b"\x0f\x22\xd0"  #              mov cr2, rax
    b"\x0f\x23\xc0\x0f\x23\xd8"  #  mov dr0, rax; mov dr3, rax
    b"\x31\xc0\x8e\xd8\x8e\xc0\x8e\xe0\x8e\xe8"
    b"\xfd\x49\xff\xc7"
    + write_msr(0xC000_0102, 0x1000)  # KERNEL_GS_BASE
    + write_msr(0xC000_0082, 0x2000)  # LSTAR
    + write_msr(0x174, 0x10)  # SYSENTER_CS
    + write_msr(0x277, 0x0606_0606)  # PAT
    + remap(0x83)
)
REAL = (
    b"\xb8\x34\x12\x8e\xd8\x8e\xe0"  # mov ax, 0x1234; mov ds, ax; mov fs, ax
    b"\x66\x49\xfd\x0f\x20\xc0\x83\xc8\x20\x0f\x22\xc0"  # dec ecx; std; mov eax, cr0; or ax, NE; mov cr0, eax
    b"\x2e\xfe\x06\x00\x30"  # inc byte cs:[0x3000]
)
GUESTS: dict[str, tuple[bytes, Any]] = {
    "real16": (REAL + exit_with(1) + b"\xf4", {}),
    "long64": (poisoned(RING_0), {}),
    "user64": (poisoned(RING_3), {}),
    "two vCPUs": (poisoned(RING_3), {"cpu": CpuConfig(vcpus=2)}),
    "fix-ups": (poisoned(RING_0 + b"\x0f\x28\xf9"), {"cpu": CpuConfig(fixups=True)}),
    "irqchip": (poisoned(RING_0), {"irqchip": True, "pit": True}),
}
MODES = {"real16": "real16", "user64": "user64", "two vCPUs": "user64"}


def machine(kind: str) -> Vmm:
    code, rest = GUESTS[kind]
    mode: Any = MODES.get(kind, "long64")
    address = 0x1000 if mode == "real16" else 0x1_0000
    # 64 bits: the second vCPU only spins. test edi, edi; jz behind; jmp $
    code = (b"" if mode == "real16" else b"\x85\xff\x74\x02\xeb\xfe") + exit_with(0) + code
    vmm = Vmm(flat(code, mode, address=address, size_mib=8, **rest))
    if mode != "real16":
        vmm.memory.write(PAGE, b"\x01")
        vmm.memory.write(OTHER_PAGE, b"\x02")
    return vmm


def by_guest(vmm: Vmm) -> None:
    vmm.memory.write(CHOICE_AT, bytes([FLAG]))
    assert vmm.run(DEADLINE_S).code in (1, 2)


def by_all(vmm: Vmm) -> None:
    by_guest(vmm)
    for poison in POISONS:
        # What a guest without these chips does not have.
        with suppress(KvmError, StateError):
            poison(vmm)
    vmm.memory.fill(0x3000, 0x5000, 0xA5)


def state(vmm: Vmm) -> tuple[Any, bytes]:
    return comparable(vmm.snapshot()), vmm.memory.read(0, 8 * MIB)


@pytest.mark.parametrize("kind", GUESTS)
@pytest.mark.parametrize("poison", [by_guest, by_all])
def test_nothing_is_left_after_a_reset(kind: str, poison: Callable[[Vmm], None]) -> None:
    with machine(kind) as vmm:
        vmm.run(DEADLINE_S)
        snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            want = state(fork)
            found = fork.run(DEADLINE_S).code
            assert found == 1
        vmm.reset(snapshot)
        for number in range(4):
            poison(vmm)
            if number % 2:  # a look at the vCPUs gives them what waits for the entry
                assert state(vmm) != want
            vmm.reset(snapshot)
            if number > 1:
                assert state(vmm) == want, f"reset {number}"
                vmm.reset(snapshot)
            assert vmm.run(DEADLINE_S).code == found, f"reset {number}: what the guest finds"
            vmm.reset(snapshot)
        assert state(vmm) == want


@pytest.mark.parametrize("kind", GUESTS)
def test_nothing_is_left_in_a_fork_of_a_poisoned_machine(kind: str, tmp_path: Path) -> None:
    with machine(kind) as vmm:
        vmm.run(DEADLINE_S)
        snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            want = state(fork)
        vmm.reset(snapshot)
        by_all(vmm)
        snapshot.save(tmp_path / "file")
        for source in (snapshot, Snapshot.load(tmp_path / "file")):
            with source.fork() as fork:
                assert state(fork) == want
                assert fork.run(DEADLINE_S).code == 1


@pytest.mark.parametrize("kind", GUESTS)
def test_what_the_host_sets_after_a_reset_reaches_the_guest(kind: str) -> None:
    with machine(kind) as vmm:
        vmm.run(DEADLINE_S)
        snapshot = vmm.snapshot()
        vmm.reset(snapshot)
        for _ in range(3):
            vcpu = vmm.vcpus[0]
            vcpu.sregs.cr2, vcpu.events.interrupt_shadow, vcpu.regs.r12 = 0x1230, 1, 7
            assert (vcpu.sregs.cr2, bool(vcpu.events.interrupt_shadow), vcpu.regs.r12) == (0x1230, True, 7)
            other = vmm.snapshot()
            vmm.reset(snapshot)
            assert (vcpu.sregs.cr2, bool(vcpu.events.interrupt_shadow), vcpu.regs.r12) == (0, False, 0)
            vmm.reset(other)
            assert (vcpu.sregs.cr2, bool(vcpu.events.interrupt_shadow), vcpu.regs.r12) == (0x1230, True, 7)
            assert vmm.run(DEADLINE_S).code == 1
            vmm.reset(snapshot)


def test_an_nmi_after_a_reset_is_not_dropped() -> None:
    with machine("long64") as vmm:
        vmm.run(DEADLINE_S)
        snapshot = vmm.snapshot()
        for _ in range(3):
            vmm.reset(snapshot)
            vmm.nmi(0)
            assert vmm.vcpus[0].events.nmi_pending
            assert vmm.run(DEADLINE_S).code is None, "there is no IDT: a triple fault"

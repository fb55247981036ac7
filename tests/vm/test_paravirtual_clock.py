"""KVM's clock tells a guest that it was away, so that its watchdogs take no pause for a hang."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from guests import SPIN, flat
from pyvmm import KvmError, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
SYSTEM_TIME = 0x4B56_4D01
FLAGS_AT = 0x5000 + 29
SEEN_AT = 0x3000
STABLE, STOPPED = 1, 2

# 64 bits, ring 0: asks for the clock at 0x5000, and gathers its flags at 0x3000.
WATCH = (
    b"\xb9\x01\x4d\x56\x4b"  #              mov ecx, 0x4b564d01
    b"\xb8\x01\x50\x00\x00\x31\xd2\x0f\x30"  #  mov eax, 0x5001; xor edx, edx; wrmsr
    b"\x8a\x04\x25\x1d\x50\x00\x00"  # back: mov al, [0x501d]
    b"\x08\x04\x25\x00\x30\x00\x00"  #      or [0x3000], al
    b"\xeb\xf0"  #                          jmp back
)


@pytest.fixture
def machine() -> Vmm:
    vmm = Vmm(flat(WATCH, "long64", address=0x10000, size_mib=2))
    try:
        assert vmm.vcpus[0].msrs[SYSTEM_TIME] == 0
    except KvmError:
        pytest.skip("this KVM has no clock for guests")
    return vmm


def sees(vmm: Vmm, flag: int) -> bool:
    """Whether the guest, which runs, comes to see it."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if vmm.memory.read_u8(SEEN_AT) & flag:
            return True
    return False


def forget(vmm: Vmm) -> None:
    vmm.memory.write_u8(FLAGS_AT, 0)
    vmm.memory.write_u8(SEEN_AT, 0)


def pause_and_resume(vmm: Vmm) -> None:
    vmm.pause()
    forget(vmm)
    vmm.resume()


def stop_and_start(vmm: Vmm) -> None:
    vmm.stop()
    vmm.wait(DEADLINE_S)
    forget(vmm)
    vmm.start()


def take_a_snapshot(vmm: Vmm) -> None:
    forget(vmm)
    vmm.snapshot()


def reset_in_place(vmm: Vmm) -> None:
    vmm.pause()
    forget(vmm)
    snapshot = vmm.snapshot()
    vmm.resume()
    vmm.reset(snapshot)


@pytest.mark.parametrize("pause", [pause_and_resume, stop_and_start, take_a_snapshot, reset_in_place])
def test_guest_is_notified_of_a_pause(machine: Vmm, pause: Callable[[Vmm], None]) -> None:
    with machine as vmm:
        vmm.start()
        deadline = time.monotonic() + DEADLINE_S
        while vmm.memory.read(0x5000, 32) == bytes(32) and time.monotonic() < deadline:
            pass  # until it has the clock
        assert not vmm.memory.read_u8(SEEN_AT) & STOPPED
        for _ in range(2):
            pause(vmm)
            assert sees(vmm, STOPPED)
        vmm.stop()
        vmm.wait(DEADLINE_S)


def test_fork_is_notified_of_it(machine: Vmm) -> None:
    with machine as vmm:
        while vmm.memory.read(0x5000, 32) == bytes(32):
            vmm.run(0.01)
        forget(vmm)
        snapshot = vmm.snapshot()
    with snapshot.fork() as fork:
        fork.start()
        assert sees(fork, STOPPED)
        fork.stop()
        fork.wait(DEADLINE_S)


def test_guest_without_the_clock_is_paused_all_the_same() -> None:
    with Vmm(flat(SPIN)) as vmm:
        vmm.start()
        for _ in range(3):
            vmm.pause()
            vmm.resume()
        vmm.stop()
        assert vmm.wait(DEADLINE_S) is not None

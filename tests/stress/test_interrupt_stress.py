"""A guest that sleeps until its device interrupts always wakes up, whatever is done to its machine.

It is paused and resumed, captured, forked and reset while its requests are on their way. A short
sequence in CI; PYVMM_STRESS_S sets for how many seconds each device is tried with further seeds.
"""

from __future__ import annotations

import os
import random
import struct
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from guests import exit_with
from pyvmm import Disk, Rng, Snapshot, StateError, Vmm
from virtio_driver import BUFFERS, QUEUES, Buffer, Driver, machine, readable, writable

pytestmark = pytest.mark.kvm
SECONDS = float(os.environ.get("PYVMM_STRESS_S", "0"))
DEADLINE_S = 200.0
ROUNDS = 1000
MOST_FORKS, MOST_RESETS = 6, 2
CODE, HANDLER, IDT, COUNT = 0x2000, 0x2200, 0x3000, 0x2800
FIRST_VECTOR = 0x20
AVAILABLE_INDEX, USED_INDEX = QUEUES + 0x402, QUEUES + 0x802

DEVICES: dict[str, tuple[dict[str, Any], list[Buffer]]] = {
    # On the loop's thread, and on the device's own.
    "rng": ({"rng": Rng()}, [writable(BUFFERS, 8)]),
    "disk": ({"disks": [Disk(bytes(4096))]}, [readable(BUFFERS, 16), writable(BUFFERS + 16, 513)]),
}


def absolute(address: int) -> bytes:
    return struct.pack("<I", address)


def out(port: int, value: int) -> bytes:
    return bytes([0xB0, value, 0xE6, port])  # mov al, value; out port, al


def guest(line: int) -> bytes:
    """Make a chain available, notify, and sleep until it is given back: `ebp` times. `ebx` is the device."""
    unmasked = ~(1 << line | 1 << 2)
    set_up = (
        b"\x0f\x01\x1d" + absolute(IDT + 0x800)  # lidt [IDT + 0x800]
        + out(0x20, 0x11) + out(0x21, FIRST_VECTOR) + out(0x21, 4) + out(0x21, 1) + out(0x21, unmasked & 0xFF)
        + out(0xA0, 0x11) + out(0xA1, FIRST_VECTOR + 8) + out(0xA1, 2) + out(0xA1, 1) + out(0xA1, unmasked >> 8 & 0xFF)
    )  # fmt: skip
    again = (
        b"\x66\xff\x05" + absolute(AVAILABLE_INDEX)  #    inc word [AVAILABLE_INDEX]
        + b"\x66\x8b\x15" + absolute(AVAILABLE_INDEX)  #  mov dx, [AVAILABLE_INDEX]
        + b"\xc7\x43\x50\0\0\0\0"  #                      mov dword [ebx + 0x50], 0
        + b"\xfa\x66\x3b\x15" + absolute(USED_INDEX)  #   wait: cli; cmp dx, [USED_INDEX]
        + b"\x74\x04\xfb\xf4\xeb\xf2"  #                  je done; sti; hlt; jmp wait
        + b"\xfb\x4d"  #                                  done: sti; dec ebp
    )  # fmt: skip
    return set_up + again + b"\x0f\x85" + struct.pack("<i", -len(again) - 6) + exit_with(7)  # jnz again


# Acknowledge what the device says, count it, end the interrupt. KVM's emulator has no IRET in
# protected mode.
HANDLE = (
    b"\x50\x8b\x43\x60\x89\x43\x64"  #      push eax; mov eax, [ebx + 0x60]; mov [ebx + 0x64], eax
    + b"\xff\x05" + absolute(COUNT)  #      inc dword [COUNT]
    + out(0xA0, 0x20) + out(0x20, 0x20)
    + b"\x58\xff\x74\x24\x08\x9d\xc2\x08\0"  # pop eax; push [esp + 8]; popfd; ret 8
)  # fmt: skip


def prepare(vmm: Vmm, buffers: list[Buffer]) -> None:
    """Set up the device, and let the guest continue with the code above."""
    driver = Driver(vmm)
    assert driver.start() == 15
    driver.add(0, buffers)
    regs, memory, line = vmm.vcpus[0].regs, vmm.memory, vmm.virtio[0].irq
    assert line is not None
    assert line < 16
    memory.write(AVAILABLE_INDEX, b"\0\0")
    memory.write(BUFFERS, bytes(16))
    memory.write(CODE, guest(line))
    memory.write(HANDLER, HANDLE)
    selector = vmm.vcpus[0].sregs.cs.selector
    memory.write(IDT + 8 * (FIRST_VECTOR + line), struct.pack("<HHHH", HANDLER, selector, 0x8E00, 0))
    memory.write(IDT + 0x800, struct.pack("<HI", 0x7FF, IDT))
    regs.update(rip=CODE, rbx=driver.base, rbp=ROUNDS, rsp=0x9000)


def given_back(vmm: Vmm) -> int:
    return int.from_bytes(vmm.memory.read(USED_INDEX, 2), "little")


def check(vmm: Vmm, exit_code: int | None) -> None:
    assert (exit_code, given_back(vmm)) == (7, ROUNDS), f"asleep: {vmm.virtio}"
    assert vmm.virtio[0].failure is None


def finish(snapshot: Snapshot) -> None:
    with snapshot.fork() as fork:
        check(fork, fork.run(DEADLINE_S).code)


def disturb(vmm: Vmm, ended: Future[Any], chance: random.Random) -> list[Snapshot]:
    """Do what disturbs a running machine until it ends."""
    snapshots: list[Snapshot] = []
    resets = 0
    while not ended.done():
        act = chance.randrange(4)
        with suppress(StateError):  # the guest has ended
            if act == 0 and len(snapshots) < MOST_FORKS:
                snapshots.append(vmm.snapshot(DEADLINE_S))
            elif act == 1 and snapshots and resets < MOST_RESETS:
                vmm.reset(chance.choice(snapshots))
                resets += 1
            else:
                vmm.pause(DEADLINE_S)
                if act == 3 and len(snapshots) < MOST_FORKS:
                    snapshots.append(vmm.snapshot(DEADLINE_S))
                vmm.resume()
    return snapshots


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.timeout(4 * DEADLINE_S + SECONDS)
def test_a_guest_that_waits_for_interrupts_gets_each(device: str) -> None:
    config, buffers = DEVICES[device]
    until, seed = time.monotonic() + SECONDS, 0
    with ThreadPoolExecutor(2) as pool:
        while seed == 0 or time.monotonic() < until:
            with Vmm(machine(irqchip=True, **config)) as vmm:
                prepare(vmm, buffers)
                vmm.start()
                ended = pool.submit(vmm.wait, DEADLINE_S)
                snapshots = disturb(vmm, ended, random.Random(seed))
                exit = ended.result()
                code = None if exit is None else exit.code
                if code == 7 and given_back(vmm) < ROUNDS:  # the last reset was after the end
                    code = vmm.run(DEADLINE_S).code
                check(vmm, code)
            assert snapshots
            for done in [pool.submit(finish, snapshot) for snapshot in snapshots]:
                done.result()
            seed += 1

"""A driver of virtio devices in a flat guest: it carries out a script of register accesses, and polls the used ring.

The test lays out the queues in guest memory, and the guest does what only a guest can do.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm import FlatBoot, MemoryConfig, VmmConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm import Vmm

# POLL waits while 16 bits of memory have a value, POLL_REGISTER while a register has it.
STOP, WRITE, READ, POLL, POLL_REGISTER = range(5)
SCRIPT = 0x4000
QUEUES = 0x10000
BUFFERS = 0x100000
SIZE = 16

CODE = bytes.fromhex(
    "be00400000"  #   mov esi, SCRIPT
    "8b06"  #         next: mov eax, [esi]
    "8b5e04"  #       mov ebx, [esi + 4]
    "8b4e08"  #       mov ecx, [esi + 8]
    "83f8017418"  #   cmp eax, WRITE; je write
    "83f8027417"  #   cmp eax, READ; je read
    "83f8037419"  #   cmp eax, POLL; je poll
    "83f804741e"  #   cmp eax, POLL_REGISTER; je poll_register
    "66baf803"  #     mov dx, 0x3f8
    "b021ee"  #       mov al, '!'; out dx, al
    "eb1b"  #         jmp step
    "890beb17"  #     write: mov [ebx], ecx; jmp step
    "8b0389460c"  #   read: mov eax, [ebx]; mov [esi + 12], eax
    "eb10"  #         jmp step
    "668b03"  #       poll: mov ax, [ebx]
    "6639c8"  #       cmp ax, cx
    "74f8"  #         je poll
    "eb06"  #         jmp step
    "8b0339c8"  #     poll_register: mov eax, [ebx]; cmp eax, ecx
    "74fa"  #         je poll_register
    "83c610"  #       step: add esi, 16
    "ebbb"  #         jmp next
)


def machine(**changes: Any) -> VmmConfig:
    """The configuration of such a guest, with devices."""
    boot = FlatBoot(CODE, mode="protected32", address=0x1000)
    return VmmConfig(**{"boot": boot, "memory": MemoryConfig(size_mib=16), **changes})


class Buffer(NamedTuple):
    """A buffer of a chain."""

    address: int
    length: int
    writable: bool


class Ring:
    """The driver's side of a queue."""

    def __init__(self, number: int) -> None:
        start = QUEUES + number * 0x1000
        self.number = number
        self.descriptors, self.available, self.used = start, start + 0x400, start + 0x800
        self.added = self.taken = 0


class Driver:
    """The driver of one device of a machine. `fork` is the same driver in a copy of the machine."""

    def __init__(self, vmm: Vmm, device: int = 0, timeout: float = 60) -> None:
        self.vmm, self.base, self.timeout = vmm, vmm.virtio[device].address, timeout
        self.rings: dict[int, Ring] = {}
        self.at = SCRIPT

    def script(self, *steps: tuple[int, int, int]) -> list[int]:
        """Let the guest carry out steps, and return what it has read."""
        steps = (*steps, (STOP, 0, 0))
        if self.at + 16 * len(steps) > QUEUES:
            self.vmm.vcpus[0].regs.rsi = SCRIPT - 16  # the guest adds 16 when it continues
            self.at = SCRIPT
        packed = b"".join(struct.pack("<IIII", *step, 0) for step in steps)
        self.vmm.memory.write(self.at, packed)
        start, self.at = self.at, self.at + len(packed)
        self.vmm.run_until(b"!", timeout=self.timeout)
        reads = range(start + 12, self.at, 16)
        values = [struct.unpack("<I", self.vmm.memory.read(at, 4))[0] for at in reads]
        return [value for value, (kind, _, _) in zip(values, steps, strict=True) if kind == READ]

    def write(self, register: int, value: int) -> None:
        """Write a register."""
        self.script((WRITE, self.base + register, value))

    def read(self, register: int) -> int:
        """Read a register."""
        return self.script((READ, self.base + register, 0))[0]

    def start(self, features: int = 0, queues: int = 1) -> int:
        """Reset the device, accept features, set up its queues and start it. Returns the status."""
        features |= 1 << 32
        steps = [(0x70, 0), (0x70, 1), (0x70, 3)]
        steps += [(0x24, 0), (0x20, features & 0xFFFFFFFF), (0x24, 1), (0x20, features >> 32), (0x70, 11)]
        for number in range(queues):
            ring = self.rings[number] = Ring(number)
            self.vmm.memory.write(ring.descriptors, bytes(0x1000))
            steps += [(0x30, number), (0x38, SIZE), (0x80, ring.descriptors), (0x84, 0), (0x90, ring.available)]
            steps += [(0x94, 0), (0xA0, ring.used), (0xA4, 0), (0x44, 1)]
        steps += [(0x70, 15)]
        self.script(*((WRITE, self.base + register, value) for register, value in steps))
        return self.read(0x70)

    def add(self, queue: int, buffers: Sequence[Buffer]) -> None:
        """Make a chain available. At most one chain of a queue is in flight here, from its first descriptor on."""
        ring, memory = self.rings[queue], self.vmm.memory
        for index, buffer in enumerate(buffers):
            flags = (2 if buffer.writable else 0) | (1 if index + 1 < len(buffers) else 0)
            raw = struct.pack("<QIHH", buffer.address, buffer.length, flags, index + 1)
            memory.write(ring.descriptors + 16 * index, raw)
        memory.write(ring.available + 4 + 2 * (ring.added % SIZE), b"\0\0")
        ring.added = (ring.added + 1) & 0xFFFF
        memory.write(ring.available + 2, struct.pack("<H", ring.added))

    def exchange(self, queue: int, *buffers: Buffer) -> int:
        """Add a chain, notify the device, and poll until it is given back. Returns the bytes written."""
        self.add(queue, buffers)
        ring = self.rings[queue]
        self.script((WRITE, self.base + 0x50, queue), (POLL, ring.used + 2, ring.taken))
        return self.take(queue)

    def take(self, queue: int) -> int:
        """Take the chain that was given back, and return the bytes written."""
        ring = self.rings[queue]
        entry = ring.used + 4 + 8 * (ring.taken % SIZE)
        ring.taken = (ring.taken + 1) & 0xFFFF
        head, length = struct.unpack("<II", self.vmm.memory.read(entry, 8))
        assert head == 0
        return int(length)

    def fork(self, vmm: Vmm) -> Driver:
        """The driver in a fork, where the guest has not noticed."""
        other = Driver(vmm, timeout=self.timeout)
        other.base, other.at = self.base, self.at
        for number, ring in self.rings.items():
            other.rings[number] = Ring(number)
            other.rings[number].added, other.rings[number].taken = ring.added, ring.taken
        return other


def readable(address: int, length: int) -> Buffer:
    """What the device reads."""
    return Buffer(address, length, writable=False)


def writable(address: int, length: int) -> Buffer:
    """What the device writes."""
    return Buffer(address, length, writable=True)

"""A virtio keyboard in Python (virtio 1.2, 5.8), and a guest of a few instructions that reads it.

Linux's own driver, virtio_input, makes an input device of it. The guest here gives the device four
buffers, waits until they are used, and ends.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING

from pyvmm import FlatBoot, Vmm, VmmConfig

if TYPE_CHECKING:
    from pyvmm import DescriptorChain, VirtioTransport, Virtqueue

EV_SYN, EV_KEY = 0, 1
NAME, EVENTS = 1, 0x11  # what the driver selects in the configuration space
KEYS = dict(zip("qwertyuiop", range(16, 26), strict=True)) | dict(zip("asdfghjkl", range(30, 39), strict=True))


class Keyboard:
    """Types what `type` is given, on any thread."""

    device_type = 18
    queues = (64, 64)
    config = bytes(136)

    def __init__(self) -> None:
        self.transport: VirtioTransport
        self.buffers: deque[DescriptorChain] = deque()
        self.events: deque[bytes] = deque()

    def attach(self, transport: VirtioTransport) -> None:
        """Keep what answers the driver."""
        self.transport = transport

    def write_config(self, offset: int, data: bytes) -> None:
        """Answer what the driver selects."""
        selected = bytearray(self.transport.config[:2])
        selected[offset : offset + len(data)] = data
        keys = sum(1 << key for key in KEYS.values()).to_bytes(128, "little").rstrip(b"\0")
        answers = {(NAME, 0): b"pyvmm keyboard", (EVENTS, EV_KEY): keys}
        answer = answers.get((selected[0], selected[1]), b"")
        self.transport.set_config_quietly(struct.pack("<BBB5x128s", *selected[:2], len(answer), answer))

    def reset(self) -> None:
        """Forget the driver's buffers."""
        self.buffers.clear()

    def process(self, queue: Virtqueue) -> None:
        """Keep buffers for events. The other queue is for the keyboard's lights, which it has not."""
        if queue.index == 0:
            self.buffers.extend(queue)
            self.send()
        else:
            for chain in queue:
                chain.complete()

    def type(self, text: str) -> None:
        """Press and release keys."""
        for key in (KEYS[character] for character in text):
            for event in ((EV_KEY, key, 1), (EV_SYN, 0, 0), (EV_KEY, key, 0), (EV_SYN, 0, 0)):
                self.events.append(struct.pack("<HHI", *event))
        self.send()

    def send(self) -> None:
        """Give the driver the events that it has buffers for."""
        while self.events and self.buffers:
            with self.buffers.popleft() as chain:
                chain.write(self.events.popleft())


DEVICE, DESCRIPTORS, AVAILABLE, USED, BUFFERS, SCRIPT = 0xFEB00000, 0x8000, 0x8400, 0x8800, 0x9000, 0x7000

# Writes registers from a list, and waits until four buffers are used: 32 bits.
GUEST = bytes.fromhex(
    "be00700000"  #     mov esi, SCRIPT
    "ad85c07406"  #     next: lodsd; test eax, eax; jz wait
    "93ad8903ebf5"  #   xchg eax, ebx; lodsd; mov [ebx], eax; jmp next
    "66813d028800000400"  # wait: cmp word [USED + 2], 4
    "75f5"  #           jne wait
    "b000e6f4"  #       mov al, 0; out 0xf4, al
)


def set_up(vmm: Vmm) -> None:
    """Lay out a queue with four buffers, and the registers that start the device."""
    buffers = (struct.pack("<QIHH", BUFFERS + 8 * number, 8, 2, 0) for number in range(4))
    vmm.memory.write(DESCRIPTORS, b"".join(buffers))
    vmm.memory.write(AVAILABLE, struct.pack("<HHHHHH", 0, 4, 0, 1, 2, 3))
    steps = [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)]
    steps += zip((0x38, 0x80, 0x90, 0xA0, 0x44), (4, DESCRIPTORS, AVAILABLE, USED, 1), strict=True)
    steps += [(0x70, 15), (0x50, 0)]
    vmm.memory.write(SCRIPT, b"".join(struct.pack("<II", DEVICE + register, value) for register, value in steps))


def main() -> None:
    """Press a key, and show what the guest gets."""
    keyboard = Keyboard()
    with Vmm(VmmConfig(boot=FlatBoot(GUEST, mode="protected32"), virtio=[keyboard])) as vmm:
        set_up(vmm)
        keyboard.type("a")
        vmm.run(timeout=10)
        pressed, _, released, _ = struct.iter_unpack("<HHI", vmm.memory.read(BUFFERS, 32))
        print(pressed, released)  # (1, 30, 1) (1, 30, 0)


if __name__ == "__main__":
    main()

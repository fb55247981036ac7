"""A virtio device in Python, a key-value store, and a guest of a few instructions that drives it.

The guest starts the device, polls the used ring until two chains are answered, and prints the
second answer.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from pyvmm import FlatBoot, Vmm, VmmConfig

if TYPE_CHECKING:
    from pyvmm import Virtqueue


class KeyValueStore:
    """Requests are "key=value", which is stored, or "key", which is answered."""

    device_type = 63  # a type that no specification uses
    queues = (8,)

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def process(self, queue: Virtqueue) -> None:
        """Answer all requests."""
        for chain in queue:
            key, is_store, value = chain.read().partition(b"=")
            if is_store:
                self.values[key] = value
            else:
                chain.write(self.values.get(key, b""))
            chain.complete()

    def save(self) -> bytes:
        """Return its state for a snapshot."""
        return b"\0".join(key + b"=" + value for key, value in self.values.items())

    def restore(self, state: bytes) -> None:
        """Restore what `save` returned."""
        self.values = {item.partition(b"=")[0]: item.partition(b"=")[2] for item in state.split(b"\0") if item}


DEVICE, DESCRIPTORS, AVAILABLE, USED, BUFFERS, SCRIPT = 0xFEB00000, 0x8000, 0x8400, 0x8800, 0x9000, 0x7000

# Writes registers from a list, waits until two chains are used, and prints 5 bytes: 32 bits.
GUEST = bytes.fromhex(
    "be00700000"  #     mov esi, SCRIPT
    "ad85c07406"  #     next: lodsd; test eax, eax; jz wait
    "93ad8903ebf5"  #   xchg eax, ebx; lodsd; mov [ebx], eax; jmp next
    "66813d028800000200"  # wait: cmp word [USED + 2], 2
    "75f5"  #           jne wait
    "be00920000"  #     mov esi, BUFFERS + 0x200
    "b905000000"  #     mov ecx, 5
    "66baf803f36e"  #   mov dx, 0x3f8; rep outsb
    "b000e6f4"  #       mov al, 0; out 0xf4, al
)


def set_up(vmm: Vmm) -> None:
    """Lay out a queue with two chains, and the registers that start the device."""
    memory = vmm.memory
    requests = [b"color=green", b"color"]
    for number, request in enumerate(requests):
        memory.write(BUFFERS + 0x100 * number, request)
    chains = [(BUFFERS, len(requests[0]), 0, 0), (BUFFERS + 0x100, len(requests[1]), 1, 2), (BUFFERS + 0x200, 16, 2, 0)]
    memory.write(DESCRIPTORS, b"".join(struct.pack("<QIHH", *descriptor) for descriptor in chains))
    memory.write(AVAILABLE, struct.pack("<HHHH", 0, 2, 0, 1))
    status, features, queue = 0x70, (0x24, 0x20), (0x38, 0x80, 0x90, 0xA0, 0x44)
    steps = [(status, 1), (status, 3), (features[0], 1), (features[1], 1), (status, 11)]
    steps += zip(queue, (8, DESCRIPTORS, AVAILABLE, USED, 1), strict=True)
    steps += [(status, 15), (0x50, 0)]
    memory.write(SCRIPT, b"".join(struct.pack("<II", DEVICE + register, value) for register, value in steps))


def main() -> None:
    """Run the guest, and show what it was answered."""
    store = KeyValueStore()
    config = VmmConfig(boot=FlatBoot(GUEST, mode="protected32"), virtio=[store])
    with Vmm(config) as vmm:
        set_up(vmm)
        vmm.run(timeout=10)
        print(vmm.serial.take_output().decode())  # green
    print(store.values)  # {b'color': b'green'}


if __name__ == "__main__":
    main()

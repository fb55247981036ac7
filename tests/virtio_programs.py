"""Virtio devices in Python that keep the chains of a queue, and drivers that give them some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtio_driver import BUFFERS, writable

if TYPE_CHECKING:
    from pyvmm import DescriptorChain, VirtioTransport, Virtqueue
    from virtio_driver import Buffer, Driver


class Keeper:
    """Keeps the chains of queue 1, and answers those of queue 0 with "ok"."""

    device_type = 42
    queues = (16, 16)

    def __init__(self) -> None:
        self.kept: list[DescriptorChain] = []
        self.calls: list[Any] = []
        self.transport: VirtioTransport

    def attach(self, transport: VirtioTransport) -> None:
        self.transport = transport

    def activate(self, features: int) -> None:
        self.calls.append(features)

    def reset(self) -> None:
        self.calls.append("reset")

    def process(self, queue: Virtqueue) -> object:
        for chain in queue:
            if queue.index == 1:
                self.kept.append(chain)
            else:
                self.answer(chain)
        return None

    def answer(self, chain: DescriptorChain) -> None:
        """Answer a chain of queue 0."""
        chain.write(b"ok")
        chain.complete()


def keep(driver: Driver, device: Keeper, *buffers: Buffer) -> DescriptorChain:
    """Have the device keep a chain of these buffers, or of one to write 8 bytes to, at BUFFERS."""
    count = len(device.kept)
    driver.add(1, buffers or [writable(BUFFERS, 8)])
    driver.write(0x50, 1)
    while len(device.kept) == count:
        driver.read(0)
    return device.kept[-1]

"""A flat guest with a driver of the socket device, which is the test's."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm import Vsock
from virtio_driver import BUFFERS, POLL, STOP, WRITE, Driver, machine, readable, writable

if TYPE_CHECKING:
    import socket

    from pyvmm import Vmm, VmmConfig

DEADLINE_S = 60
RX, TX, EVENT = range(3)
REQUEST, RESPONSE, RST, SHUTDOWN, RW = range(1, 6)
FIRST_PORT = 1 << 30
# The guest continues when it is not zero.
GO = 0x3000
SENT = BUFFERS + 0x20000
HEADER = struct.Struct("<QQIIIHHIII")


class Packet(NamedTuple):
    """What the guest has received."""

    host: int
    guest: int
    op: int
    flags: int
    forwarded: int
    data: bytes


class Guest:
    """A guest with a driver. It receives one packet at a time."""

    def __init__(self, vmm: Vmm, driver: Driver | None = None) -> None:
        self.driver = driver or Driver(vmm, timeout=DEADLINE_S)
        if driver is None:
            assert self.driver.start(features=1, queues=3) == 15
        self.vmm, self.consumed, self.cid = vmm, 0, 3

    def header(self, host: int, guest: int, op: int, size: int = 0, flags: int = 0) -> bytes:
        return HEADER.pack(self.cid, 2, guest, host, size, 1, op, flags, 1 << 20, self.consumed)

    def send(self, host: int, guest: int, op: int, data: bytes = b"", flags: int = 0) -> None:
        self.vmm.memory.write(SENT, self.header(host, guest, op, len(data), flags) + data)
        rest = [readable(SENT + 44, len(data))] if data else []
        self.driver.exchange(TX, readable(SENT, 44), *rest)

    def receive(self) -> Packet:
        """Wait for a packet."""
        length = self.driver.exchange(RX, writable(BUFFERS, 44), writable(BUFFERS + 44, 0x10000))
        return self.received(length)

    def received(self, length: int) -> Packet:
        found = HEADER.unpack(self.vmm.memory.read(BUFFERS, 44))
        src, dst, host, guest, size, kind, op, flags, _, forwarded = found
        assert (src, dst, kind, length) == (2, self.cid, 1, 44 + size)
        self.consumed += size
        return Packet(host, guest, op, flags, forwarded, self.vmm.memory.read(BUFFERS + 44, size))

    def prepare(self, answer: int, port: int = 52) -> None:
        """Have the guest answer the first request by itself, when it runs."""
        driver, memory = self.driver, self.vmm.memory
        memory.write(SENT, self.header(FIRST_PORT, port, answer))
        driver.add(RX, [writable(BUFFERS, 0x1000)])
        driver.add(TX, [readable(SENT, 44)])
        rx, tx = driver.rings[RX], driver.rings[TX]
        steps = [(WRITE, driver.base + 0x50, RX), (POLL, rx.used + 2, rx.taken)]
        steps += [(WRITE, driver.base + 0x50, TX), (POLL, tx.used + 2, tx.taken)]
        steps += [(POLL, GO, 0), (STOP, 0, 0)]
        packed = b"".join(struct.pack("<IIII", *step, 0) for step in steps)
        memory.write(driver.at, packed)
        driver.at += len(packed)

    def finish(self) -> Packet:
        """Let the guest come to its next step."""
        if self.vmm.state == "running":
            # `connect` has started it. `run_until` stops only a guest in time that it started.
            self.vmm.stop()
            self.vmm.wait(DEADLINE_S)
        self.vmm.memory.write(GO, b"\1")
        self.vmm.run_until(b"!", timeout=DEADLINE_S)
        self.driver.take(TX)
        return self.received(self.driver.take(RX))


def config(**changes: Any) -> VmmConfig:
    return machine(vsock=Vsock(**changes))


def connected(vmm: Vmm) -> tuple[Guest, socket.socket]:
    """A guest with a connection from its port 52 to the host's port `FIRST_PORT`."""
    guest = Guest(vmm)
    guest.prepare(RESPONSE)
    end = vmm.vsock.connect(52, timeout=DEADLINE_S)
    assert guest.finish()[:3] == (FIRST_PORT, 52, REQUEST)
    end.settimeout(DEADLINE_S)
    return guest, end


def accepted(vmm: Vmm, listener: socket.socket, port: int) -> tuple[Guest, socket.socket]:
    """A guest with a connection to a port of the host."""
    guest = Guest(vmm)
    guest.send(port, 1025, REQUEST)
    assert guest.receive().op == RESPONSE
    listener.settimeout(DEADLINE_S)
    end, _ = listener.accept()
    end.settimeout(DEADLINE_S)
    return guest, end

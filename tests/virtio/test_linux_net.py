"""Linux has a network: bytes with checksums to the host and to another machine, and a partition."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from pyvmm import Net, Network, UserNet
from virtio_linux import MOVED, Guest, Ready, forked, running, said, sum_of

if TYPE_CHECKING:
    from pyvmm import NetworkPort

pytestmark = [pytest.mark.linux, pytest.mark.timeout(900)]
PORT = 5201
PATIENCE_MS = 30_000
USER = "net eth0 10.0.2.15 255.255.255.0 10.0.2.2"


def read_all(stream: socket.socket) -> bytes:
    """Everything up to the end."""
    got = bytearray()
    while piece := stream.recv(1 << 20):
        got += piece
    return bytes(got)


def both_ways(guest: Guest, data: bytes) -> None:
    """Through the host's loopback interface: the guest sends, and then receives."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        guest.type(f"send tcp:10.0.2.2:{port} {len(data)}")
        with server.accept()[0] as stream:
            got = read_all(stream)
        assert said(guest.end(), "sent") == sum_of(got)
        assert len(got) == len(data)
        guest.type(f"receive tcp:10.0.2.2:{port} {len(data)}")
        with server.accept()[0] as stream:
            stream.sendall(data)
            assert said(guest.end(), "received") == sum_of(data)


def test_tcp_with_the_host_in_both_directions(linux_ready: Ready) -> None:
    with forked(linux_ready.snapshot, net0=Net(UserNet(host_loopback=True))) as guest:
        guest(USER)
        both_ways(guest, bytes(range(256)) * (MOVED // 256))
        guest.stop()
        second = guest.vmm.snapshot()
    with forked(second) as guest:
        both_ways(guest, b"of the fork" * 100)


def configured(guest: Guest, number: int) -> None:
    """Each machine is a copy of the same, and gets its own addresses."""
    guest(f"mac eth0 {number}")
    guest(f"net eth0 10.9.0.{number} 255.255.255.0")


def answers(guest: Guest, number: int, patience_ms: int = PATIENCE_MS) -> int:
    """How many of two echo requests the other machine has answered."""
    return int(guest(f"ping 10.9.0.{number} 2 {patience_ms}").split()[-1])


def on(stack: ExitStack, ready: Ready, port: NetworkPort, number: int) -> Guest:
    """A machine at a port."""
    guest = stack.enter_context(forked(ready.snapshot, net0=Net(port)))
    configured(guest, number)
    return guest


def test_two_machines_and_a_partition_that_is_healed(linux_ready: Ready) -> None:
    network = Network(seed=1)
    one, other = network.port("one"), network.port("other")
    with ExitStack() as stack:
        first, second = on(stack, linux_ready, one, 1), on(stack, linux_ready, other, 2)
        assert answers(first, 2) == 2
        network.partition([one], [other])
        assert answers(first, 2, 300) == 0
        network.heal()
        assert answers(second, 1) == 2
        second.type(f"receive tcp::{PORT} {MOVED}")
        second.expect("listening")
        sent = said(first(f"send tcp:10.9.0.2:{PORT} {MOVED}"), "sent")
        assert said(second.end(), "received") == sent
        assert sent.size == MOVED
        for guest in (first, second):
            guest.stop()
        copies = network.snapshot([first.vmm, second.vmm])
    with ExitStack() as stack:
        first, second = (stack.enter_context(running(vmm)) for vmm in copies.fork().machines)
        assert answers(first, 2) == 2
        assert answers(second, 1) == 2

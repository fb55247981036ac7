"""A user network with frames made here, against sockets of this host.

Covers python/pyvmm/user_net.py, src/py/user_net.rs.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pyvmm import ConfigError, EventManager, Forward, UserNet, UserNetwork
from pyvmm.user_net import connect

MAC = bytes.fromhex("020000000001")
GATEWAY_MAC = bytes.fromhex("52550a000202")
GUEST, GATEWAY, DNS = ("10.0.2.15", "10.0.2.2", "10.0.2.3")
FIN, SYN, RST, ACK = 1, 2, 4, 16
DEADLINE = 60


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def ipv4(protocol: int, payload: bytes, source: str = GUEST, target: str = GATEWAY) -> bytes:
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0) + ends
    header = header[:10] + struct.pack("!H", checksum(header)) + ends
    return GATEWAY_MAC + MAC + b"\x08\x00" + header + payload


def udp(from_port: int, to_port: int, data: bytes, **ends: str) -> bytes:
    # A checksum of zero is none.
    return ipv4(17, struct.pack("!HHHH", from_port, to_port, 8 + len(data), 0) + data, **ends)


def tcp(source: int, target: int, numbers: tuple[int, int], flags: int, data: bytes = b"") -> bytes:
    ends = socket.inet_aton(GUEST) + socket.inet_aton(GATEWAY)
    segment = struct.pack("!HHIIBBHHH", source, target, *numbers, 5 << 4, flags, 65535, 0, 0) + data
    pseudo = ends + struct.pack("!HH", 6, len(segment))
    segment = segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]
    return ipv4(6, segment)


def frames(network: UserNetwork) -> Iterator[bytes]:
    """The frames that come, until the deadline."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        yield from network.receive()
        select.select([network], [], [], 0.1)
    pytest.fail("nothing has come in time")


def packet(network: UserNetwork, protocol: int) -> bytes:
    """The payload of the next IP packet of a protocol."""
    return next(frame[34:] for frame in frames(network) if frame[12:14] == b"\x08\x00" and frame[23] == protocol)


def segment(network: UserNetwork) -> tuple[int, int, int, bytes]:
    """Sequence number, acknowledgement, flags and data of the next segment."""
    found = packet(network, 6)
    sequence, acknowledged, length, flags = struct.unpack("!4xIIBB", found[:14])
    return sequence, acknowledged, flags, found[length >> 4 << 2 :]


@contextmanager
def server() -> Iterator[tuple[socket.socket, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(DEADLINE)
        yield listening, listening.getsockname()[1]


def test_the_guest_gets_an_address_by_dhcp() -> None:
    network = UserNetwork(UserNet(hostname="box", mtu=9000))
    discover = struct.pack("!BBBBIHH16x6s10x192x", 1, 1, 6, 0, 7, 0, 0x8000, MAC) + b"\x63\x82\x53\x63\x35\x01\x01\xff"
    network.send(udp(68, 67, discover, source="0.0.0.0", target="255.255.255.255"))
    offer = packet(network, 17)[8:]
    assert (offer[0], offer[4:8], offer[16:20]) == (2, b"\0\0\0\7", socket.inet_aton(GUEST))
    for option in (b"\x35\x01\x02", b"\x0c\x03box", b"\x1a\x02\x23\x28", b"\x06\x04\x0a\x00\x02\x03"):
        assert option in offer[240:]


def test_datagrams_go_to_the_host_and_come_back() -> None:
    network = UserNetwork(UserNet(host_loopback=True))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("127.0.0.1", 0))
        host.settimeout(DEADLINE)
        network.send(udp(5000, host.getsockname()[1], b"ping"))
        data, address = host.recvfrom(100)
        assert data == b"ping"
        assert network.flows == 1
        host.sendto(b"pong", address)
        answer = packet(network, 17)
    assert answer[8:] == b"pong"
    assert struct.unpack("!H", answer[2:4]) == (5000,)


def test_a_dns_query_goes_to_the_resolver() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        resolver.bind(("127.0.0.1", 0))
        resolver.settimeout(DEADLINE)
        network = UserNetwork(UserNet(resolver=f"127.0.0.1:{resolver.getsockname()[1]}"))
        network.send(udp(5000, 53, b"query", target=DNS))
        data, address = resolver.recvfrom(100)
        resolver.sendto(data + b" answered", address)
        assert packet(network, 17)[8:] == b"query answered"
        closed = UserNetwork(UserNet(dns=False))
        closed.send(udp(5000, 53, b"query", target=DNS))
        assert packet(closed, 1)[:2] == b"\x03\x0d"


def test_a_connection_is_made_used_and_ended() -> None:
    network = UserNetwork(UserNet(host_loopback=True))
    with server() as (listening, port):
        network.send(tcp(4000, port, (100, 0), SYN))
        sequence, acknowledged, flags, _ = segment(network)
        assert (acknowledged, flags) == (101, SYN | ACK)
        network.send(tcp(4000, port, (101, sequence + 1), ACK, b"hello"))
        host, _ = listening.accept()
        with host:
            host.settimeout(DEADLINE)
            assert host.recv(100) == b"hello"
            host.sendall(b"bye")
        received, flags = b"", 0
        while not flags & FIN:
            _, _, flags, data = segment(network)
            received += data
        assert received == b"bye"
        assert network.connections == 1
        network.send(tcp(4000, port, (106, sequence + 5), ACK | FIN))
        assert segment(network)[1] == 107
        assert network.connections == 0


def test_the_loopback_is_closed_by_default_and_opened_by_a_line() -> None:
    with server() as (listening, port):
        closed = UserNetwork()
        closed.send(tcp(4000, port, (100, 0), SYN))
        assert segment(closed)[2] == RST | ACK
        opened = UserNetwork(UserNet(allow=[f"tcp:{GATEWAY}:{port}"]))
        opened.send(tcp(4000, port, (100, 0), SYN))
        assert segment(opened)[2] == SYN | ACK
        opened.reset()
        assert opened.connections == 0
        listening.accept()[0].close()


def test_a_port_of_the_host_leads_to_the_guest() -> None:
    network = UserNetwork(UserNet(forward=[(0, 80), Forward(host_port=0, guest_port=53, protocol="udp")]))
    (first, second) = network.forwards
    assert (first[0], first[1], first[3]) == ("tcp", "127.0.0.1", 80)
    assert (second[0], second[1], second[3]) == ("udp", "127.0.0.1", 53)
    # The network learns where the guest is.
    network.send(ipv4(1, b"\x08\x00\xf7\xff\0\0\0\0"))
    with socket.create_connection(first[1:3], timeout=DEADLINE) as client:
        _, _, flags, _ = segment(network)
        assert flags == SYN
        network.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert network.receive() == []


def decide(network: UserNetwork, policy: Callable[[str, str, int], Any]) -> None:
    """Run a loop until the policy was called, or its exception comes out."""
    manager = EventManager()
    connect(network, manager, policy)
    assert manager.run_with_timeout(DEADLINE * 1000) == 1


def test_a_policy_decides_on_the_thread_of_the_loop() -> None:
    asked: list[tuple[str, str, int, threading.Thread]] = []

    def policy(protocol: str, address: str, port: int) -> bool:
        asked.append((protocol, address, port, threading.current_thread()))
        return protocol == "tcp"

    network = UserNetwork(UserNet(host_loopback=True, policy=policy))
    with server() as (_, port):
        network.send(tcp(4000, port, (100, 0), SYN))
        assert network.receive() == []
        decide(network, policy)
        assert segment(network)[2] == SYN | ACK
        network.send(udp(5000, 9, b"x"))
        decide(network, policy)
        assert packet(network, 1)[:2] == b"\x03\x0d"
    here = threading.current_thread()
    assert asked == [("tcp", GATEWAY, port, here), ("udp", GATEWAY, 9, here)]


def test_a_policy_that_raises_denies() -> None:
    def policy(protocol: str, address: str, port: int) -> bool:
        raise LookupError(address)

    network = UserNetwork(UserNet(policy=policy))
    for source in (4000, 4001):
        network.send(udp(source, 9, b"x", target="192.0.2.1"))
    with pytest.raises(LookupError, match=r"192\.0\.2\.1"):
        decide(network, policy)
    errors = [frame[34:36] for frame in network.receive() if frame[12:14] == b"\x08\x00"]
    assert errors == [b"\x03\x0d"] * 2
    assert network.take_questions() == []


def test_questions_can_be_answered_without_a_loop() -> None:
    network = UserNetwork(UserNet(policy=lambda *_: True))
    network.send(udp(4000, 9, b"x", target="192.0.2.1"))
    assert select.select([network.questions_fd], [], [], DEADLINE)[0]
    ((number, *destination),) = network.take_questions()
    assert destination == ["udp", "192.0.2.1", 9]
    network.answer(number, False)
    assert packet(network, 1)[:2] == b"\x03\x0d"


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (UserNet(network="10.0.2.0/30"), r"user\.network: .*fewer than 8"),
        (UserNet(network="10.0.2.1/24"), r"user\.network: .*host bits"),
        (UserNet(network="127.0.0.0/8"), r"user network\.gateway: .*cannot be"),
        (UserNet(forward=[(80,)]), r"user\.forward\[0\]: expected \(host port"),  # type: ignore[list-item]
        (UserNet(forward=[(8080, 70000)]), r"user\.forward\[0\]\.guest_port: 70000"),
        (UserNet(forward=[(0, 0)]), r"forward: port 0 of the guest"),
        (UserNet(forward=[Forward(guest_port=1, address="here")]), r"user\.forward\[0\]\.address"),
        (UserNet(forward=[Forward(guest_port=1, protocol="sctp")]), r"user\.forward\[0\]\.protocol"),  # type: ignore[arg-type]
        (UserNet(allow=["192.0.2.0/33"]), r"user\.allow\[0\]"),
        (UserNet(allow=["192.0.2.1:x"]), r"user\.allow\[0\]: 'x' is neither"),
        (UserNet(allow=["192.0.2.1:9-8"]), r"user\.allow\[0\]: '9-8' is not a range"),
        (UserNet(allow=["name.invalid:80"]), r"user\.allow\[0\]: 'name\.invalid' is not found"),
        (UserNet(allow=[80]), r"user\.allow\[0\]: expected text"),  # type: ignore[list-item]
        (UserNet(resolver="nowhere"), r"user\.resolver: 'nowhere'"),
        (UserNet(resolver="0.0.0.0"), r"resolver: 0\.0\.0\.0 is no address"),
        (UserNet(policy=1), r"user\.policy: expected a callable"),  # type: ignore[arg-type]
        (UserNet(hostname="a b"), r"hostname"),
        (UserNet(mtu=100), r"mtu: 100"),
        (UserNet(max_flows=0), r"max_flows: 0"),
        (UserNet(max_connections=4097), r"max_connections: 4097"),
        (1, r"user: expected a UserNet, not 1"),
    ],
)
def test_an_error_names_the_key(config: Any, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        UserNetwork(config)


def test_a_port_that_is_taken_is_an_error() -> None:
    with server() as (_, port), pytest.raises(OSError, match=r"forward\[0\].*cannot listen"):
        UserNetwork(UserNet(forward=[(port, 80)]))


def test_a_name_of_the_allow_list_is_looked_up() -> None:
    network = UserNetwork(UserNet(allow=["localhost:80"]))
    assert repr(network) == "UserNetwork(user network 10.0.2.2/24)"
    assert network.dropped == 0

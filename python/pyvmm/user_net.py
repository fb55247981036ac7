"""User-mode networking: its configuration, and the policy that Python decides. docs/user-net.md describes it."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv4Network, ip_address
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from pyvmm._pyvmm import Events
from pyvmm.config_parts import Part
from pyvmm.events import EventSet
from pyvmm.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from pyvmm._pyvmm import EventManager, EventOps, SubscriberId, UserNetwork

    Policy: TypeAlias = Callable[[str, str, int], bool]
else:
    Policy = Any

DNS_PORT = 53
ALL_PORTS = (0, 65_535)
_Port = Annotated[int, Meta(ge=0, le=65_535)]


class Forward(Part, frozen=True, kw_only=True):
    """A port of the host that leads to the guest.

    Attributes:
        host_port: the port to listen at; 0 lets the host choose, see `UserNetwork.forwards`.
        guest_port: the port of the guest.
        protocol: "tcp" or "udp".
        address: the address of the host to listen at. The default is reached from the host alone.
    """

    host_port: _Port = 0
    guest_port: _Port
    protocol: Literal["tcp", "udp"] = "tcp"
    address: str = "127.0.0.1"


class UserNet(Part, frozen=True, kw_only=True):
    """A network behind a gateway that needs no privilege: the guest reaches what this process may reach.

    Attributes:
        network: the guest's network. The gateway is its second address, DNS its third, the guest
            its fifteenth, or its fourth in a small network.
        forward: ports of the host that lead to the guest: (host port, guest port) for TCP at
            127.0.0.1, or `Forward`.
        allow: what the guest may reach, such as "192.0.2.0/24", "example.org:443" or
            "udp:192.0.2.1:5000-5010"; None allows everything outside the host. Names are looked up
            when the machine is created.
        policy: called on the loop's thread for each new connection and UDP flow that `allow` lets
            through, with protocol ("tcp" or "udp"), address and port; the guest may connect if it
            returns true.
        host_loopback: the guest may reach the host's loopback interface at the gateway's address.
        dns: whether queries to the third address go to the host's resolver.
        resolver: where they go instead, an address with or without a port.
        hostname: the name that the guest gets by DHCP.
        mtu: the MTU that the guest's driver is offered, 576 to 65,520. One that does not accept it
            (VIRTIO_NET_F_MTU) has 1,500 at most. Long packets cost a guest less.
        max_connections: the most TCP connections at a time, 1 to 4,096. Each takes up to 512 KiB.
        max_flows: the most UDP flows at a time, 1 to 4,096. Above it, the one that was idle longest
            ends.
    """

    network: str = "10.0.2.0/24"
    forward: Sequence[tuple[_Port, _Port] | Forward] = ()
    allow: Sequence[str] | None = None
    policy: Policy | None = None
    host_loopback: bool = False
    dns: bool = True
    resolver: str | None = None
    hostname: str | None = None
    mtu: Annotated[int, Meta(ge=576, le=65_520)] = 65_520
    max_connections: Annotated[int, Meta(ge=1, le=4096)] = 512
    max_flows: Annotated[int, Meta(ge=1, le=4096)] = 256


def resolved(config: UserNet, key: str) -> tuple[Any, ...]:
    """The values of a configuration for the native module, with names looked up. `key` is where errors are."""
    network = _network(config.network, f"{key}.network")
    guest = 15 if network.num_addresses > 16 else 4  # noqa: PLR2004
    addresses = (str(network[2]), network.prefixlen, str(network[guest]), str(network[3]))
    resolver = config.resolver and _endpoint(config.resolver, DNS_PORT, f"{key}.resolver")
    forwards = [_forward(one, f"{key}.forward[{at}]") for at, one in enumerate(config.forward)]
    allow = None
    if config.allow is not None:
        allow = [rule for at, text in enumerate(config.allow) for rule in _rules(text, f"{key}.allow[{at}]")]
    if config.policy is not None and not callable(config.policy):
        raise ConfigError(f"{key}.policy: expected a callable, not {config.policy!r}")
    return (
        addresses,
        (config.dns, resolver or None, config.hostname, config.mtu),
        forwards,
        (allow, config.host_loopback, config.policy is not None),
        (config.max_connections, config.max_flows),
    )


def connect(network: UserNetwork, manager: EventManager, policy: Policy) -> SubscriberId:
    """Have `policy` decide for a network, on the thread that runs the loop."""
    return manager.add_subscriber(_Decider(network, policy))


class _Decider:
    """A subscriber that answers a network's questions."""

    def __init__(self, network: UserNetwork, policy: Policy) -> None:
        self._network = network
        self._policy = policy

    def init(self, ops: EventOps) -> None:
        """Watch for questions."""
        ops.add(Events(self._network.questions_fd, EventSet.IN))

    def process(self, _events: Events, _ops: EventOps) -> None:
        """Answer them. An exception denies the connection, and those that wait behind it."""
        questions = self._network.take_questions()
        try:
            while questions:
                number, protocol, address, port = questions[0]
                is_allowed = bool(self._policy(protocol, address, port))
                questions.pop(0)
                self._network.answer(number, is_allowed)
        finally:
            for number, *_ in questions:
                self._network.answer(number, False)


def _network(text: str, at: str) -> IPv4Network:
    try:
        network = IPv4Network(text)
    except ValueError as error:
        raise ConfigError(f"{at}: {error}") from None
    if network.num_addresses < 8:  # noqa: PLR2004
        raise ConfigError(f"{at}: {text} has fewer than 8 addresses")
    return network


def _forward(one: tuple[int, int] | Forward, at: str) -> tuple[str, str, int]:
    if not isinstance(one, Forward):
        try:
            host, guest = one
        except (TypeError, ValueError):
            raise ConfigError(f"{at}: expected (host port, guest port) or a Forward, not {one!r}") from None
        one = Forward(host_port=host, guest_port=guest)
    for name, port in (("host_port", one.host_port), ("guest_port", one.guest_port)):
        if not isinstance(port, int) or not 0 <= port <= ALL_PORTS[1]:
            raise ConfigError(f"{at}.{name}: {port!r} is not a port from 0 to 65,535")
    if one.protocol not in ("tcp", "udp"):
        raise ConfigError(f"{at}.protocol: {one.protocol!r} is neither 'tcp' nor 'udp'")
    try:
        address = ip_address(one.address)
    except ValueError as error:
        raise ConfigError(f"{at}.address: {error}") from None
    host_text = f"[{address}]" if address.version == 6 else str(address)  # noqa: PLR2004
    return (one.protocol, f"{host_text}:{one.host_port}", one.guest_port)


def _endpoint(text: str, port: int, at: str) -> str:
    host, _, number = text.rpartition(":") if text.count(":") == 1 or text.startswith("[") else (text, "", str(port))
    try:
        address = ip_address(host.strip("[]"))
        port = int(number)
    except ValueError:
        raise ConfigError(f"{at}: {text!r} is no address with or without a port") from None
    if not 0 < port <= ALL_PORTS[1]:
        raise ConfigError(f"{at}: {port} is not a port from 1 to 65,535")
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"  # noqa: PLR2004


def _rules(text: object, at: str) -> list[tuple[str | None, str, int, int, int]]:
    if not isinstance(text, str):
        raise ConfigError(f"{at}: expected text such as 'example.org:443', not {text!r}")
    protocol, rest = None, text
    for name in ("tcp", "udp"):
        if text.startswith(f"{name}:"):
            protocol, rest = name, text[len(name) + 1 :]
    host, _, ports = rest.partition(":")
    first, last = _ports(ports, at) if ports else ALL_PORTS
    networks = [_cidr(host, at)] if "/" in host else [IPv4Network(address) for address in _addresses(host, at)]
    return [(protocol, str(one.network_address), one.prefixlen, first, last) for one in networks]


def _ports(text: str, at: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        found = (int(first), int(last or first))
    except ValueError:
        raise ConfigError(f"{at}: {text!r} is neither a port nor a range of ports") from None
    if not 0 <= found[0] <= found[1] <= ALL_PORTS[1]:
        raise ConfigError(f"{at}: {text!r} is not a range within 0 to 65,535")
    return found


def _cidr(text: str, at: str) -> IPv4Network:
    try:
        return IPv4Network(text, strict=False)
    except ValueError as error:
        raise ConfigError(f"{at}: {error}") from None


def _addresses(host: str, at: str) -> list[IPv4Address]:
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{at}: {host!r} is not found: {error}") from None
    return sorted({IPv4Address(address[0]) for *_, address in found})

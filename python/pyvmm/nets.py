"""The configuration of network devices, and frames in Python. docs/net.md describes them."""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from msgspec import Meta

from pyvmm import user_net
from pyvmm._pyvmm import Events, FrameQueue, UserNetwork
from pyvmm.config_parts import Part
from pyvmm.events import EventSet
from pyvmm.exceptions import ConfigError
from pyvmm.user_net import UserNet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pyvmm._pyvmm import EventManager, EventOps, SubscriberId

MAX_PORT = 65_535
MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
KINDS = "user, tap:NAME, stream:PATH, stream:HOST:PORT, datagram:PATH or datagram:HOST:PORT"
# In a file, backends are text; peers are paths or (host, port).
Source: TypeAlias = Annotated[Any, Meta(extra_json_schema={"type": "string"})]
Peer: TypeAlias = Annotated[Any, Meta(extra_json_schema={"type": ["string", "array"]})]


class Tap(Part, frozen=True):
    """A tap interface of the host.

    Attributes:
        interface: its name, or an open file descriptor of one, which the machine duplicates.
    """

    interface: Annotated[Any, Meta(extra_json_schema={"type": ["string", "integer"]})]


class StreamSocket(Part, frozen=True):
    """A stream socket with a length before each frame, as QEMU's `-netdev stream` and passt have it.

    Attributes:
        peer: the path of a unix socket, (host, port) of TCP, or a connected socket or file
            descriptor, which the machine duplicates.
    """

    peer: Peer


class DatagramSocket(Part, frozen=True):
    """A datagram socket with a frame in each message, as QEMU's `-netdev dgram` has it.

    Attributes:
        peer: the path of a unix socket, (host, port) of UDP, or a connected socket or file
            descriptor, which the machine duplicates.
        own: the path or (host, port) that the peer sends to; None if the peer answers senders.
    """

    peer: Peer
    own: Peer | None = None


class PythonNet:
    """Frames in Python: the program takes those of the guest, and gives it others.

    It belongs to one machine at a time. Any thread may use it.

    Args:
        receive: called with a list of the guest's frames, on the thread that runs the loop. None
            keeps them for `receive`.
        queue: the most frames that wait in each direction, 1 to 1,048,576. More are dropped.

    Raises:
        ConfigError: the queue is not in this range.
    """

    def __init__(self, receive: Callable[[list[bytes]], object] | None = None, *, queue: int = 1024) -> None:
        if receive is not None and not callable(receive):
            raise ConfigError(f"receive: expected a callable, not {receive!r}", at="receive")
        self.callback = receive
        self._queue = FrameQueue(queue)

    def send(self, frame: bytes) -> bool:
        """Give the guest an Ethernet frame. False if the queue is full, and the frame is dropped."""
        return self._queue.send(frame)

    def receive(self, most: int = 1024) -> list[bytes]:
        """Take at most this many of the guest's frames, which may be none."""
        return self._queue.receive(most)

    def fileno(self) -> int:
        """A file descriptor that is readable while frames of the guest wait. Do not read it."""
        return self._queue.fileno()

    @property
    def dropped(self) -> int:
        """How many frames were dropped, in both directions, because a queue was full."""
        return self._queue.dropped

    def __repr__(self) -> str:
        return f"PythonNet({self.callback!r})"


class _Backend(Part, frozen=True):
    backend: Source


class Net(_Backend, frozen=True, kw_only=True):
    """A network device: `Net(backend)`.

    Attributes:
        backend: what is behind it: a `UserNet`, `Tap`, `StreamSocket`, `DatagramSocket`,
            `PythonNet`, a `NetworkPort` that nothing else uses, or a `Network`, which makes a port
            for it. In TOML and JSON, and also in Python, text: "user", "tap:NAME", "stream:PATH",
            "stream:HOST:PORT", "datagram:PATH" or "datagram:HOST:PORT".
        mac: the guest's hardware address, such as "02:00:00:00:00:01". None derives a locally
            administered one from the backend and the device's number.
        mtu: the MTU that the guest uses, 68 to 65,535; None means the backend's, or the guest's
            default.
    """

    mac: str | None = None
    mtu: Annotated[int, Meta(ge=68, le=MAX_PORT)] | None = None


# In a file, a list.
if TYPE_CHECKING:
    Nets: TypeAlias = Sequence[Net]
else:
    Nets = tuple[Net, ...]


def parsed(text: str, at: str) -> Any:
    """The backend that a text is: `KINDS`."""
    kind, _, rest = text.partition(":")
    if text == "user":
        return UserNet()
    if kind == "tap" and rest:
        return Tap(rest)
    if kind in {"stream", "datagram"} and rest:
        host, colon, port = rest.rpartition(":")
        is_address = colon and host and "/" not in rest and port.isdecimal()
        peer = (host.strip("[]"), int(port)) if is_address else rest
        return StreamSocket(peer) if kind == "stream" else DatagramSocket(peer)
    raise ConfigError(f"{at}: expected {KINDS}, not {text!r}", at=at)


def option(text: str) -> Net:
    """The network device of an option of the command line: ``BACKEND[,mac=MAC][,mtu=N]``.

    Raises:
        ValueError: a part is none of these.
    """
    backend, *parts = text.split(",")
    values: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if key == "mac" and equals:
            values["mac"] = value
        elif key == "mtu" and value.isdecimal():
            values["mtu"] = int(value)
        else:
            raise ValueError(f"'{part}' is neither mac=MAC nor mtu=N")
    return Net(backend, **values)


def resolved(net: Net, key: str) -> tuple[str, Any, bytes | None]:
    """For the native module: the kind of backend, what it needs, and the hardware address."""
    at = f"{key}.backend"
    backend = parsed(net.backend, at) if isinstance(net.backend, str) else net.backend
    return (*_source(backend, at), _mac(net.mac, f"{key}.mac"))


def source(backend: Any) -> tuple[str, Any]:
    """For the native module: the kind of backend, and what it needs."""
    return _source(parsed(backend, "backend") if isinstance(backend, str) else backend, "backend")


def _source(backend: Any, at: str) -> tuple[str, Any]:
    if isinstance(backend, Tap):
        if isinstance(backend.interface, str):
            return "tap", backend.interface
        return "tap_fd", _descriptor(backend.interface, f"{at}.interface")
    if isinstance(backend, (StreamSocket, DatagramSocket)):
        kind = "stream" if isinstance(backend, StreamSocket) else "datagram"
        peer = _peer(backend.peer, f"{at}.peer")
        if peer is None:
            return f"{kind}_fd", _descriptor(backend.peer, f"{at}.peer")
        own = getattr(backend, "own", None)
        return kind, (peer, None if own is None else _own(own, f"{at}.own"))
    if isinstance(backend, PythonNet):
        return "made", backend._queue
    return "made", backend


def _peer(peer: Any, at: str) -> tuple[str, int] | None:
    """A path with port -1, or host and port; None for a descriptor."""
    if isinstance(peer, (str, os.PathLike)):
        return os.fsdecode(peer), -1
    if isinstance(peer, (tuple, list)):
        try:
            host, port = peer
        except ValueError:
            host, port = None, None
        if not isinstance(host, str) or not isinstance(port, int) or not 0 < port <= MAX_PORT:
            raise ConfigError(f"{at}: expected (host, port), not {peer!r}", at=at)
        return host, port
    return None


def _own(own: Any, at: str) -> tuple[str, int]:
    found = _peer(own, at)
    if found is None:
        raise ConfigError(f"{at}: expected a path or (host, port), not {own!r}", at=at)
    return found


def _descriptor(source: Any, at: str) -> int:
    number = source if isinstance(source, int) and not isinstance(source, bool) else None
    if number is None and callable(getattr(source, "fileno", None)):
        number = source.fileno()
    if not isinstance(number, int) or number < 0:
        is_closed = isinstance(source, socket.socket)
        detail = "the socket is closed" if is_closed else f"expected a socket or a file descriptor, not {source!r}"
        raise ConfigError(f"{at}: {detail}", at=at)
    return number


def _mac(text: str | None, at: str) -> bytes | None:
    if text is None:
        return None
    if not isinstance(text, str) or not MAC.fullmatch(text):
        raise ConfigError(f"{at}: expected an address such as '02:00:00:00:00:01', not {text!r}", at=at)
    address = bytes.fromhex(text.replace(":", ""))
    if address[0] & 1 or not any(address):
        raise ConfigError(f"{at}: {text} is not the address of one interface", at=at)
    return address


def plain(net: Net, at: str) -> Net:
    """The device with its backend as text, for a file.

    Raises:
        ConfigError: the backend cannot be written to a file.
    """
    backend = net.backend
    if isinstance(backend, str):
        return net
    if isinstance(backend, UserNet) and backend == UserNet():
        return net.replace(backend="user")
    if isinstance(backend, Tap) and isinstance(backend.interface, str):
        return net.replace(backend=f"tap:{backend.interface}")
    if isinstance(backend, (StreamSocket, DatagramSocket)) and getattr(backend, "own", None) is None:
        kind = "stream" if isinstance(backend, StreamSocket) else "datagram"
        peer = _peer(backend.peer, at)
        if peer is not None:
            host, port = peer
            return net.replace(backend=f"{kind}:{host}" if port < 0 else f"{kind}:{host}:{port}")
    raise ConfigError(f"{at}.backend: {type(backend).__name__} cannot be written to a file", at=f"{at}.backend")


def as_text(config: Any) -> Any:
    """The configuration with all backends as text, for a file."""
    return config.replace(nets=tuple(plain(net, f"nets[{at}]") for at, net in enumerate(config.nets)))


def given(config: Any, virtio: dict[str, Any]) -> Any:
    """The configuration of a fork whose devices of these names are others."""
    nets = list(config.nets)
    for at in range(len(nets)):
        if isinstance(net := virtio.get(f"net{at}"), Net):
            nets[at] = net
    return config.replace(nets=tuple(nets))


def connect(manager: EventManager, backends: Iterable[tuple[Any, Any]]) -> list[SubscriberId]:
    """Add subscribers for the backends that call Python. Each comes with what is behind its device."""
    ids = []
    for backend, native in backends:
        if isinstance(backend, PythonNet) and backend.callback is not None and backend._queue == native:
            ids.append(manager.add_subscriber(_Receiver(backend._queue, backend.callback)))
        if isinstance(backend, UserNet) and backend.policy is not None and isinstance(native, UserNetwork):
            ids.append(user_net.connect(native, manager, backend.policy))
    return ids


class _Receiver:
    """A subscriber that passes the guest's frames to a callable."""

    def __init__(self, queue: FrameQueue, receive: Callable[[list[bytes]], object]) -> None:
        self._queue = queue
        self._receive = receive

    def init(self, ops: EventOps) -> None:
        """Watch for frames."""
        ops.add(Events(self._queue.fileno(), EventSet.IN))

    def process(self, _events: Events, _ops: EventOps) -> None:
        """Pass them on, all at once."""
        if frames := self._queue.receive(1024):
            self._receive(frames)

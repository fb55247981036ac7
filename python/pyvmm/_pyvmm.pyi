"""The native module: the event manager, the machine and its parts, written in Rust.

Everything here is exported by `pyvmm`, under the same name.
"""
# Long because `stubtest` checks only what the stub of the module itself declares.

import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextvars import Context
from os import PathLike
from pathlib import Path
from socket import socket
from types import TracebackType
from typing import Any, Final, Literal, Never, Protocol, Self, TypeAlias, TypeVar, final, overload

from typing_extensions import Buffer, disjoint_base

from pyvmm.callbacks import TimerHandle
from pyvmm.config import CpuConfig, SerialConfig, VmmConfig
from pyvmm.config_parts import Part
from pyvmm.console import Console
from pyvmm.devices import Device, Resource, Unanswered
from pyvmm.events import EventSet, Subscriber
from pyvmm.exits import Answer, Exit, ExitHandler, ExitKind, VmRunState
from pyvmm.network import LinkConditions, NetworkSnapshot, PortStats
from pyvmm.patterns import Expected
from pyvmm.registers import CpuidEntry, DebugRegs, Fpu, Lapic, MpState, Msrs, Regs, Sregs, VcpuEvents, Xcrs
from pyvmm.screen import Screen
from pyvmm.stats import ExitCount, VcpuTime, VirtioCount
from pyvmm.user_net import UserNet
from pyvmm.virtio_device import VirtioProgram
from pyvmm.vsock import VsockHost

__all__ = [
    "BalloonDevice",
    "ConsoleDevice",
    "DescriptorChain",
    "DirtyPages",
    "DiskDevice",
    "EventFd",
    "EventManager",
    "EventOps",
    "Events",
    "FrameQueue",
    "GuestMemory",
    "IrqLine",
    "Kvm",
    "KvmVm",
    "MemorySlot",
    "MsrBytes",
    "NetDevice",
    "Network",
    "NetworkPort",
    "Register",
    "RegisterBytes",
    "RegisterView",
    "RemoteEndpoint",
    "Serial",
    "Snapshot",
    "Stats",
    "SubscriberId",
    "TimerFd",
    "Trace",
    "UserNetwork",
    "Vcpu",
    "VcpuExit",
    "VirtioDevice",
    "VirtioTransport",
    "Virtqueue",
    "Vmm",
    "VmmExitHandler",
    "WrappedExitHandler",
    "__version__",
    "close_all",
    "cpu_features",
    "cpuid_features",
    "cpuid_table",
    "embedded_guest",
    "kick_signal",
    "kvm_info",
    "set_kick_signal",
]

__version__: Final[str]

class _HasFileno(Protocol):
    def fileno(self) -> int: ...

@final
class EventFd:
    """A counter in the kernel, accessed through a file descriptor: eventfd(2).

    Args:
        initial: the initial count, 0 to 2^64 - 2.
        nonblocking: if true, `read` of an empty counter and `write` to a full one raise
            BlockingIOError; otherwise they wait.
        semaphore: `read` takes one at a time instead of the whole count.
    """

    def __new__(cls, initial: int = 0, *, nonblocking: bool = True, semaphore: bool = False) -> Self: ...
    def read(self) -> int:
        """Return the count and set it to zero; in semaphore mode, return 1 and subtract 1.

        Raises:
            BlockingIOError: the count is zero and the EventFd is nonblocking.
            ClosedError: the EventFd is closed.
        """

    def write(self, value: int = 1) -> None:
        """Add to the count.

        Raises:
            BlockingIOError: the count would exceed 2^64 - 2 and the EventFd is nonblocking.
            OverflowError: the value is not from 0 to 2^64 - 1.
            OSError: the value is 2^64 - 1, which the kernel refuses.
            ClosedError: the EventFd is closed.
        """

    def fileno(self) -> int:
        """The file descriptor's number."""

    def close(self) -> None:
        """Close the file descriptor. This ends an `async for` over it.

        If another thread is waiting in `read`, the descriptor stays open until that call returns.
        """

    @property
    def closed(self) -> bool:
        """Whether the EventFd is closed."""

    def __aiter__(self) -> AsyncIterator[int]: ...
    def _take(self) -> int: ...
    def _begin_wait(self, waiter: object) -> int: ...
    def _end_wait(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class TimerFd:
    """A timer with a file descriptor, on the monotonic clock: timerfd_create(2). It is a source of events."""

    def __new__(cls) -> Self: ...
    def set(self, delay: float, interval: float = 0.0) -> None:
        """Expire after `delay` seconds, and then every `interval` seconds if it is not 0. Clears previous expirations.

        Raises:
            ValueError: a time is negative, NaN or too long.
            ClosedError: the timer is closed.
        """

    def set_at(self, time: float, interval: float = 0.0) -> None:
        """Expire at a time of `time.monotonic()`. If that time has passed, the timer expires at once."""

    def clear(self) -> None:
        """Disarm the timer and clear previous expirations."""

    def read(self) -> int:
        """Return the number of expirations since the last read or set, including missed ticks.

        Raises:
            BlockingIOError: the timer has not expired.
            ClosedError: the timer is closed.
        """

    def fileno(self) -> int:
        """The file descriptor's number."""

    def close(self) -> None:
        """Close the file descriptor. This ends an `async for` over it."""

    @property
    def closed(self) -> bool:
        """Whether the timer is closed."""

    def __aiter__(self) -> AsyncIterator[int]: ...
    def _take(self) -> int: ...
    def _begin_wait(self, waiter: object) -> int: ...
    def _end_wait(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

@final
class Network:
    """A network inside the process: a switch that joins machines and programs.

    Each machine and each port may be used on a thread of its own. `port` connects a program,
    and `Net(network)` in a configuration a machine.

    Args:
        seed: decides which frames are lost, duplicated, reordered and delayed by how much.
            docs/network.md says what can be repeated with it.
    """

    def __new__(cls, *, seed: int = 0) -> Self: ...
    @property
    def seed(self) -> int:
        """The seed."""

    def port(self, name: str | None = None, *, queue: int = 4096) -> NetworkPort:
        """Make a port.

        Args:
            name: for `stats` and messages; None for its number, such as "port0".
            queue: how many frames on their way to the port are kept, at most. Others are dropped,
                and counted as `overflowed`. All of them together have at most 16 MiB.

        Raises:
            ConfigError: the network has a port of this name, or the queue has no room for a frame.
        """

    @property
    def ports(self) -> list[NetworkPort]:
        """The ports that are open, in the order in which they were made."""

    def set_link(
        self,
        one: NetworkPort,
        other: NetworkPort,
        *,
        one_way: bool = False,
        delay: float | None = None,
        jitter: float | None = None,
        loss: float | None = None,
        duplicate: float | None = None,
        reorder: float | None = None,
        bandwidth: int | None = None,
        backlog: float | None = None,
    ) -> None:
        """Change the conditions of the frames between two ports, in addition to those of the ports.

        Args:
            one: a port.
            other: another port.
            one_way: change only those of the frames from `one` to `other`.
            delay: as for `NetworkPort.set`.
            jitter: as for `NetworkPort.set`.
            loss: as for `NetworkPort.set`.
            duplicate: as for `NetworkPort.set`.
            reorder: as for `NetworkPort.set`.
            bandwidth: as for `NetworkPort.set`.
            backlog: as for `NetworkPort.set`.

        Raises:
            ConfigError: a value is out of range, or a port is of another network.
            ClosedError: a port is closed.
        """

    def link(self, one: NetworkPort, other: NetworkPort) -> LinkConditions:
        """The conditions that `set_link` has set for the frames from `one` to `other`.

        Raises:
            ConfigError: a port is of another network.
        """

    def is_partitioned(self, one: NetworkPort, other: NetworkPort) -> bool:
        """Whether a partition separates two ports.

        Raises:
            ConfigError: a port is of another network.
        """

    def partition(self, *groups: Iterable[NetworkPort]) -> None:
        """Separate groups of ports: no frame goes from a port of one group to a port of another.

        Frames between them that have not arrived yet are dropped. Ports in no group still reach all
        others. A second partition adds to the first.

        Args:
            groups: two or more lists of ports.

        Raises:
            ConfigError: a port is in two groups, or of another network. Nothing is changed.
            ClosedError: a port is closed.
        """

    def heal(self, *groups: Iterable[NetworkPort]) -> None:
        """Join groups of ports that a partition has separated; without groups, all ports.

        Raises:
            ConfigError: a port is in two groups, or of another network.
            ClosedError: a port is closed.
        """

    def capture(self, path: str | PathLike[str] | None) -> None:
        """Record every frame that is sent into a new pcap file, once, and also if it is lost later.

        None ends the recording, as does another path.

        Raises:
            StreamError: the file cannot be written.
        """

    def snapshot(self, machines: Iterable[Vmm], timeout: float | None = None) -> NetworkSnapshot:
        """Capture machines of this network, and the network itself, at one instant.

        All machines are held still meanwhile. The frames on their way are captured with the
        network: in each copy, every frame arrives once. Frames between programs do not stop.

        Args:
            machines: the machines. Other machines of the network are not in its copies; their ports
                are.
            timeout: how many seconds may pass until all machines are still; None means no limit.

        Raises:
            ValueError: no machine is given, or one twice.
            StateError: a machine is closed, cannot be captured, or is not connected to the network.
            WaitTimeoutError: a callback of a machine did not return in time.
        """

    def _capture(
        self, machines: Sequence[Vmm], timeout: float | None
    ) -> tuple[list[Snapshot], Any, list[list[tuple[str, int]]]]: ...
    @staticmethod
    def _connect(vmm: Vmm, device: str, port: NetworkPort) -> None: ...
    def __hash__(self) -> int: ...

@final
class NetworkPort:
    """A place where a machine or a program is connected to a `Network`. `Network.port` makes it.

    It is closed when neither a machine nor the program has it any more. It can be used on any
    thread.
    """

    @property
    def name(self) -> str:
        """Its name, which is its network's only one."""

    @property
    def network(self) -> Network:
        """The network."""

    def send(self, frame: bytes | bytearray) -> None:
        """Send an Ethernet frame into the network, without its checksum. It never waits.

        Raises:
            ValueError: the frame is shorter than 14 bytes or longer than 65,553.
            ClosedError: the port is closed.
        """

    def receive(self, timeout: float | None = None) -> bytes:
        """Wait for the next frame, and return it.

        Raises:
            WaitTimeoutError: no frame arrived within `timeout` seconds; with 0, no frame was there.
            StateError: a machine uses the port.
            ClosedError: the port is closed.
        """

    def capture(self, path: str | PathLike[str] | None) -> None:
        """Record the frames that the port sends and takes into a new pcap file, which Wireshark opens.

        Frames that are lost on their way to the port are not in it. None ends the recording, as
        does another path.

        Raises:
            StreamError: the file cannot be written.
            ClosedError: the port is closed.
        """

    def set(
        self,
        direction: Literal["in", "out", "both"] = "both",
        *,
        delay: float | None = None,
        jitter: float | None = None,
        loss: float | None = None,
        duplicate: float | None = None,
        reorder: float | None = None,
        bandwidth: int | None = None,
        backlog: float | None = None,
    ) -> None:
        """Change the conditions of the frames that this port sends and gets, for any other port.

        What is not given stays as it is. docs/network.md describes each condition, and how those of
        both ports and of `Network.set_link` add up.

        Args:
            direction: "out" for the frames that it sends, "in" for those that it gets, or "both".
            delay: seconds.
            jitter: the delay varies by this many seconds, in both directions.
            loss: the probability that a frame is lost.
            duplicate: the probability that a frame arrives twice.
            reorder: the probability that the next frame overtakes a frame.
            bandwidth: bits per second; 0 means no limit.
            backlog: how many seconds a frame may wait for bandwidth before it is dropped.

        Raises:
            ConfigError: a value is out of range. Nothing is changed.
            ClosedError: the port is closed.
        """

    @property
    def conditions(self) -> tuple[LinkConditions, LinkConditions]:
        """The conditions that `set` has set, of the frames that it sends and of those that it gets.

        Raises:
            ClosedError: the port is closed.
        """

    @property
    def stats(self) -> PortStats:
        """What has become of its frames, as a `PortStats`.

        Raises:
            ClosedError: the port is closed.
        """

    def fileno(self) -> int:
        """A file descriptor that is readable while a frame is there, or the port is closed.

        It is only to wait for: `receive` takes the frame.
        """

    def close(self) -> None:
        """Disconnect the port from its network, also if a machine uses it.

        Frames on their way to it are dropped. This ends an `async for` over it.
        """

    @property
    def closed(self) -> bool:
        """Whether the port is closed."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...
    def __hash__(self) -> int: ...
    def _take(self) -> bytes: ...
    def _begin_wait(self, waiter: object) -> int: ...
    def _end_wait(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

@final
class Events:
    """Events of a file descriptor: what to watch for, or what happened.

    Args:
        source: an int, or an object with `fileno()`; the object is kept alive while it is
            registered.
        event_set: what to watch for.
        data: a number from 0 to 2^32 - 1 that is passed back with each event.
        drain: read the source, a nonblocking `EventFd` or a `TimerFd`, before each call of the
            subscriber, and pass the result in `count`. The source stays open while it is
            registered.

    Raises:
        ValueError: the source is closed, or a flag has no meaning.
        TypeError: `drain` is set and the source cannot be drained.
    """

    def __new__(
        cls, source: int | _HasFileno, event_set: EventSet | int = ..., data: int = 0, *, drain: bool = False
    ) -> Self: ...
    @property
    def count(self) -> int | None:
        """With `drain`, the number that was read: an eventfd's count or a timer's expirations. Otherwise None."""

    @property
    def fd(self) -> int:
        """The file descriptor's number."""

    @property
    def data(self) -> int:
        """The number given at registration."""

    @property
    def event_set(self) -> EventSet:
        """What to watch for, or what happened."""

@final
class SubscriberId:
    """Identifies a subscriber of one event manager. Hashable."""

    def __hash__(self) -> int: ...

@final
class EventOps:
    """Changes the file descriptors that a subscriber watches.

    An EventOps passed to `init` or `process` is usable only during that call; later use raises
    RuntimeError. One from `EventManager.event_ops` is usable as long as its subscriber is
    registered.
    """

    def add(self, events: Events) -> None:
        """Watch a file descriptor.

        Raises:
            EventError: it is already registered, it is closed, or it is a regular file, which epoll
                does not support.
        """

    def modify(self, events: Events) -> None:
        """Watch a file descriptor of this subscriber for other events, or re-arm a one-shot registration.

        Raises:
            EventError: this subscriber does not watch it.
        """

    def remove(self, source: Events | int | _HasFileno) -> None:
        """Stop watching a file descriptor of this subscriber.

        If it is given by number or `Events`, it may already be closed.

        Raises:
            EventError: this subscriber does not watch it.
        """

# A text, or a regular expression.
_PatternStr: TypeAlias = str | re.Pattern[str]
_PatternBytes: TypeAlias = bytes | re.Pattern[bytes]
_T = TypeVar("_T")
_I = TypeVar("_I")
_C = TypeVar("_C")
_F = TypeVar("_F", bound=Callable[..., object])
# A hook of each kind of exit, and one of a kind that is known only at run time.
_IoHook = TypeVar("_IoHook", bound=Callable[["Vcpu", "VcpuExit.IoIn | VcpuExit.IoOut"], object])
_MmioHook = TypeVar("_MmioHook", bound=Callable[["Vcpu", "VcpuExit.MmioRead | VcpuExit.MmioWrite"], object])
_MsrHook = TypeVar("_MsrHook", bound=Callable[["Vcpu", "VcpuExit.Rdmsr | VcpuExit.Wrmsr"], object])
_HltHook = TypeVar("_HltHook", bound=Callable[["Vcpu", "VcpuExit.Hlt"], object])
_ShutdownHook = TypeVar("_ShutdownHook", bound=Callable[["Vcpu", "VcpuExit.Shutdown"], object])
_DebugHook = TypeVar("_DebugHook", bound=Callable[["Vcpu", "VcpuExit.Debug"], object])
_InternalErrorHook = TypeVar("_InternalErrorHook", bound=Callable[["Vcpu", "VcpuExit.InternalError"], object])
_SystemEventHook = TypeVar("_SystemEventHook", bound=Callable[["Vcpu", "VcpuExit.SystemEvent"], object])
_FailEntryHook = TypeVar("_FailEntryHook", bound=Callable[["Vcpu", "VcpuExit.FailEntry"], object])
_MemoryFaultHook = TypeVar("_MemoryFaultHook", bound=Callable[["Vcpu", "VcpuExit.MemoryFault"], object])
_UnknownHook = TypeVar("_UnknownHook", bound=Callable[["Vcpu", "VcpuExit.Unknown"], object])
_Hook = TypeVar("_Hook", bound=Callable[["Vcpu", "VcpuExit"], object])
# The same for answers.
_IoAnswer = TypeVar("_IoAnswer", bound=Callable[["Vcpu", "VcpuExit.IoIn | VcpuExit.IoOut", Answer], object])
_MmioAnswer = TypeVar("_MmioAnswer", bound=Callable[["Vcpu", "VcpuExit.MmioRead | VcpuExit.MmioWrite", Answer], object])
_MsrAnswer = TypeVar("_MsrAnswer", bound=Callable[["Vcpu", "VcpuExit.Rdmsr | VcpuExit.Wrmsr", Answer], object])
_HltAnswer = TypeVar("_HltAnswer", bound=Callable[["Vcpu", "VcpuExit.Hlt", Answer], object])
_ShutdownAnswer = TypeVar("_ShutdownAnswer", bound=Callable[["Vcpu", "VcpuExit.Shutdown", Answer], object])
_DebugAnswer = TypeVar("_DebugAnswer", bound=Callable[["Vcpu", "VcpuExit.Debug", Answer], object])
_InternalErrorAnswer = TypeVar(
    "_InternalErrorAnswer", bound=Callable[["Vcpu", "VcpuExit.InternalError", Answer], object]
)
_SystemEventAnswer = TypeVar("_SystemEventAnswer", bound=Callable[["Vcpu", "VcpuExit.SystemEvent", Answer], object])
_FailEntryAnswer = TypeVar("_FailEntryAnswer", bound=Callable[["Vcpu", "VcpuExit.FailEntry", Answer], object])
_MemoryFaultAnswer = TypeVar("_MemoryFaultAnswer", bound=Callable[["Vcpu", "VcpuExit.MemoryFault", Answer], object])
_UnknownAnswer = TypeVar("_UnknownAnswer", bound=Callable[["Vcpu", "VcpuExit.Unknown", Answer], object])
_AnswerHook = TypeVar("_AnswerHook", bound=Callable[["Vcpu", "VcpuExit", Answer], object])

@final
class EventManager:
    """Subscribers, and the loop that dispatches events to them by file descriptor.

    One thread at a time may run the loop. Any thread may add and remove subscribers meanwhile. The
    manager needs no machine and no /dev/kvm.
    """

    def __new__(cls) -> Self: ...
    def add_subscriber(self, subscriber: Subscriber | WrappedExitHandler | VmmExitHandler) -> SubscriberId:
        """Register an object with `init(ops)` and `process(events, ops)`. Calls its `init` before it returns.

        Raises:
            TypeError: a method is missing.
            Exception: the exception raised by `init`; the subscriber is not registered.
        """

    def remove_subscriber(self, id: SubscriberId) -> object:
        """Unregister a subscriber and all its file descriptors, and return it.

        Raises:
            EventError: this manager does not have the subscriber, or no longer has it.
        """

    def event_ops(self, id: SubscriberId) -> EventOps:
        """Return an `EventOps` for a subscriber. It is usable from any thread while the subscriber is registered.

        Raises:
            EventError: this manager does not have the subscriber, or no longer has it.
        """

    def run(self) -> int:
        """Wait for events, dispatch them once, and return how many there were.

        The first exception of a callback ends the dispatch and is raised here. The next run reports
        the remaining events again.

        Raises:
            StateError: `run` is in progress in another thread, or further up in this one.
        """

    def run_with_timeout(self, milliseconds: int) -> int:
        """Like `run`, but wait at most this long, and return 0 after the timeout. A negative number means no limit."""

    def run_forever(self) -> None:
        """Dispatch until `stop` is called or a callback raises. Raises the same exceptions as `run`."""

    def stop(self) -> None:
        """End `run_forever` or `run_async`. If none is in progress, the next one ends at once.

        May be called from any thread or callback.
        """

    def remote_endpoint(self) -> RemoteEndpoint:
        """Return an endpoint that reaches this loop from other threads."""

    def on(
        self, source: int | _HasFileno, event_set: EventSet | int = ..., data: int = 0, *, drain: bool = False
    ) -> Callable[[_F], _F]:
        """Decorate a function to be called with each event of a source.

        `data` and `drain` are the same as for `Events`.

        The function gets the attributes `subscriber_id`, for `remove_subscriber`, and
        `subscriber_ids`, which has the ids of all its decorators. If the function cannot take
        attributes, as a bound method, the decorator returns a callable that has them.
        """

    def call_later(
        self, seconds: float, function: Callable[..., object], *arguments: object, context: Context | None = None
    ) -> TimerHandle:
        """Call a function once with these arguments, after `seconds`. The result has `cancel()`.

        If the time is in the past, the call is made in the next iteration. Calls are made in the
        order of their times, and share one file descriptor. The function runs in `context`, or in a
        copy of the caller's context.

        Raises:
            ValueError: the time is NaN.
        """

    def run_async(self) -> Coroutine[Any, Any, None]:
        """Run the loop like `run_forever`, hosted by the running asyncio loop, which stays responsive.

        A subscriber's `process` may be a coroutine function: it runs as a task, and its exception
        ends the run. After `stop`, running coroutines have one second to finish. Then they are
        cancelled, and their names are passed to the asyncio loop's exception handler.

        Raises:
            StateError: the manager already has a host, or is already in a run.
            Exception: the first exception of a callback or a coroutine. Further ones are added to
                its notes and passed to the asyncio loop's exception handler.
        """

    @property
    def slow_callback_duration(self) -> float | None:
        """The seconds after which a callback counts as slow; None disables the check.

        A slow callback is logged with its name, as a warning of the logger "pyvmm".

        Raises:
            ValueError: it is set to a negative number or NaN.
        """

    @slow_callback_duration.setter
    def slow_callback_duration(self, seconds: float | None) -> None: ...
    @property
    def slowest_callback(self) -> tuple[str, float] | None:
        """The name of the slowest callback and its seconds, or None before a callback was timed.

        Callbacks are timed while `slow_callback_duration` is set.
        """

    @property
    def turns(self) -> int:
        """The number of loop iterations."""

    @property
    def dispatched(self) -> int:
        """The number of dispatched events."""

    def _cancel_later(self, number: int) -> bool: ...
    def _has_removed(self, id: SubscriberId) -> bool: ...
    def _note_callback(self, name: str, seconds: float) -> None: ...
    def _begin_hosting(self, awaiter: Callable[[Any, str], None]) -> None: ...
    def _end_hosting(self) -> None: ...
    def _take_stop(self) -> bool: ...
    def fileno(self) -> int:
        """A file descriptor for other loops to wait on. It is readable when an event is ready.

        It stays the same for the life of the manager.

        Raises:
            StateError: the process is a forked child, and the manager belongs to its parent.
        """

@final
class _Cancel:
    """Ends one run of a machine, and no other run."""

    def set(self) -> None:
        """Request the end of the run. May be called from any thread, at any time."""

@final
class RemoteEndpoint:
    """Reaches an event manager's loop from other threads. Created by `EventManager.remote_endpoint`."""

    def call_blocking(self, function: Callable[[EventManager], _T], timeout: float | None = None) -> _T:
        """Call `function(manager)` on the loop's thread, and return its value or raise its exception.

        On the loop's own thread, the function is called directly. Otherwise another thread must be
        running the loop.

        Raises:
            TimeoutError: the call was not made within `timeout` seconds; it may still be made
                later.
        """

    def fire(self, function: Callable[[EventManager], object]) -> None:
        """Queue a call of `function(manager)` on the loop's thread, and return at once.

        An exception of the function ends the run there.
        """

    def kick(self) -> None:
        """Make the loop iterate once."""

@final
class VmmExitHandler:
    """Stops a run loop: a kick writes its `exit_event`, and the loop reads its `keep_running` flag.

    It is a subscriber: on IN it clears the flag, on ERROR it removes itself.
    """

    def __new__(cls) -> Self: ...
    @property
    def exit_event(self) -> EventFd:
        """The eventfd that a kick writes to."""

    def keep_running(self) -> bool:
        """False once the loop has processed a kick."""

    def kick(self) -> None:
        """Write to the exit event. May be called from any thread."""

    def rearm(self) -> None:
        """Set the flag again and discard previous kicks."""

    def init(self, ops: EventOps) -> None:
        """Register the exit event for IN."""

    def process(self, events: Events, ops: EventOps) -> None:
        """Handle an event of the exit event."""

@final
class WrappedExitHandler:
    """A `VmmExitHandler` as the loop, the machine and its vCPUs share it. A clone is the same handler.

    Args:
        handler: the handler to share; None for a new one.
    """

    def __new__(cls, handler: VmmExitHandler | None = None) -> Self: ...
    @property
    def handler(self) -> VmmExitHandler:
        """The shared handler."""

    def keep_running(self) -> bool:
        """False once the loop has processed a kick."""

    def kick(self) -> None:
        """Write to the exit event. May be called from any thread."""

    def rearm(self) -> None:
        """Set the flag again and discard previous kicks."""

    def clone(self) -> WrappedExitHandler:
        """Return another object for the same handler."""

    def init(self, ops: EventOps) -> None:
        """Register the exit event for IN."""

    def process(self, events: Events, ops: EventOps) -> None:
        """Handle an event of the exit event."""

    def __copy__(self) -> WrappedExitHandler: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class GuestMemory:
    """The memory of a machine, by guest-physical address. It can be read and written at any time, from any thread.

    Numbers are little-endian. Addresses and lengths are from 0 to 2^64 - 1; others raise
    OverflowError.
    """

    def read(self, address: int, length: int, *, vcpu: Vcpu | None = None) -> bytes:
        """Return a copy of guest memory.

        With `vcpu`, which must not be running, the address is guest-virtual and translated by that
        vCPU's page tables.

        Raises:
            GuestMemoryError: a part of the range is not memory, or not mapped.
            StateError: the machine is closed, or the vCPU is running.
        """

    def readinto(self, address: int, buffer: Buffer, *, vcpu: Vcpu | None = None) -> None:
        """Fill a writable buffer with a copy of guest memory. Raises the same exceptions as `read`."""

    def write(self, address: int, data: Buffer, *, vcpu: Vcpu | None = None) -> None:
        """Copy the bytes of a buffer to guest memory.

        Raises:
            GuestMemoryError: a part of the range is not memory; nothing is written.
            StateError: the machine is closed, or the vCPU is running.
        """

    def read_u8(self, address: int) -> int:
        """Read an 8-bit number."""

    def read_u16(self, address: int) -> int:
        """Read a 16-bit number, in a single access if the address is aligned."""

    def read_u32(self, address: int) -> int:
        """Read a 32-bit number, in a single access if the address is aligned."""

    def read_u64(self, address: int) -> int:
        """Read a 64-bit number, in a single access if the address is aligned."""

    def write_u8(self, address: int, value: int) -> None:
        """Write an 8-bit number."""

    def write_u16(self, address: int, value: int) -> None:
        """Write a 16-bit number, in a single access if the address is aligned."""

    def write_u32(self, address: int, value: int) -> None:
        """Write a 32-bit number, in a single access if the address is aligned."""

    def write_u64(self, address: int, value: int) -> None:
        """Write a 64-bit number, in a single access if the address is aligned."""

    def fill(self, address: int, length: int, value: int = 0) -> None:
        """Set every byte of a range. Raises the same exceptions as `write`."""

    def find(self, data: bytes | bytearray, start: int = 0, end: int | None = None) -> int | None:
        """Return the first address of these bytes, at or after `start` and entirely before `end`, or None.

        Raises:
            ValueError: `data` is empty.
            ClosedError: the machine is closed.
        """

    def view(self, address: int, length: int, *, readonly: bool = False) -> memoryview:
        """Return a memoryview of guest memory, without a copy. The range must be in one memory slot.

        The memory stays mapped while the view is alive, even if the slot is removed or the machine
        is closed. In a forked child, writes through the view are private to the child.

        While dirty pages are logged, the log includes every page of a view that can be written, for
        as long as the view is alive: writes through it cannot be seen.

        Args:
            address: the guest-physical start.
            length: the number of bytes.
            readonly: the view cannot be written, and is not in the log.

        Raises:
            GuestMemoryError: a part of the range is not memory, or the range spans several slots.
            ClosedError: the machine is closed.
        """

    def overlay(self, address: int, type: type[_C]) -> _C:
        """Return a ctypes structure, union or array in guest memory: `type.from_buffer(view(...))`.

        Raises:
            TypeError: `type` is not a ctypes type.
            GuestMemoryError, StateError: as for `view`.
        """

    def add(
        self,
        address: int,
        size: int | None = None,
        *,
        source: int | _HasFileno | None = None,
        offset: int = 0,
        read_only: bool = False,
    ) -> MemorySlot:
        """Add memory, also while the guest runs.

        Args:
            address: the guest-physical start, a multiple of 4 KiB.
            size: the number of bytes, a multiple of 4 KiB; optional with a source.
            source: a file or memfd whose pages the guest shares with everyone who maps them, or
                None for zeroed pages.
            offset: the offset in the source, a multiple of 4 KiB.
            read_only: the guest cannot write to the memory; its writes are MMIO accesses.

        Raises:
            GuestMemoryError: the range overlaps other memory, a device, or KVM's own pages; it is
                not a whole number of pages; or the source is too short or open only for reading.
                Nothing changes.
            KvmError: KVM refuses it.
            ClosedError: the machine is closed.
        """

    def remove(self, slot: MemorySlot) -> None:
        """Remove memory, also while the guest runs. Accesses to it become MMIO.

        Raises:
            GuestMemoryError: the machine does not have the slot, or no longer has it.
            ClosedError: the machine is closed.
        """

    @property
    def slots(self) -> tuple[MemorySlot, ...]:
        """The memory slots, by address."""

    @property
    def log_dirty(self) -> bool:
        """Whether written pages are logged for `take_dirty`: KVM_MEM_LOG_DIRTY_PAGES. This slows the guest down."""

    @log_dirty.setter
    def log_dirty(self, is_on: bool) -> None: ...
    def take_dirty(self) -> DirtyPages:
        """Return the pages written since the last call, or since `log_dirty` was set.

        This covers writes of the guest and of calls of this object. Every written page is included.
        So is every page of a writable view that was alive since the last call. KVM may add pages
        that the guest has only read.

        Raises:
            StateError: `log_dirty` is not set, or the machine is closed.
        """

    @property
    def size(self) -> int:
        """The number of bytes of memory."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Start and length of each range of memory, by address."""

    def _repr_html_(self) -> str: ...

@final
class MemorySlot:
    """A memory slot of a machine: KVM_SET_USER_MEMORY_REGION."""

    @property
    def number(self) -> int:
        """The slot's number in KVM."""

    @property
    def start(self) -> int:
        """Guest-physical start."""

    @property
    def size(self) -> int:
        """The number of bytes."""

    @property
    def read_only(self) -> bool:
        """Whether the guest cannot write to it."""

    @property
    def shared(self) -> bool:
        """Whether the memory is that of a file or memfd."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class DirtyPages:
    """The written pages of 4 KiB, of all memory slots."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Start and length of each run of written pages, by address."""

    @property
    def bitmaps(self) -> dict[int, bytes]:
        """A bitmap for the start address of each slot, with one bit a page.

        Bit 0 of the first byte is the first page; the length is a multiple of 8 bytes.
        """

    def __len__(self) -> int:
        """The number of pages."""

@final
class Serial:
    """The host's side of a serial port, a 16550A."""

    def send(self, data: bytes | bytearray) -> None:
        """Send input to the guest, which reads it at its own pace.

        Raises:
            ClosedError: the machine is closed.
        """

    def send_break(self) -> None:
        """Send the guest a break, after the input sent so far. On Linux's console, a break and a letter are a SysRq.

        Raises:
            ClosedError: the machine is closed.
        """

    def take_output(self) -> bytes:
        """Return the buffered output and clear it. Without a configured output, at most the newest MiB is kept."""

    def stop_at(self, text: bytes | bytearray) -> None:
        """End the current run, or the next one, at the byte that completes this text. This happens once.

        Output printed before this call does not count. The run ends with `Exit(reason="stopped",
        value=text)`. The guest stops after the instruction that printed the byte, and the next run
        continues there. An empty text cancels the request.

        Raises:
            ClosedError: the machine is closed.
        """

    @overload
    def expect(self, pattern: _PatternStr | Sequence[_PatternStr], timeout: float | None = None) -> Expected[str]: ...
    @overload
    def expect(
        self, pattern: _PatternBytes | Sequence[_PatternBytes], timeout: float | None = None
    ) -> Expected[bytes]: ...
    @overload
    def expect(self, pattern: Sequence[_PatternStr | _PatternBytes], timeout: float | None = None) -> Expected[Any]:
        """Wait until the console shows a pattern, and return the match.

        Output that an earlier call has matched, and everything before it, does not count. The match
        takes nothing from the configured output or `take_output`. docs/console.md describes
        machines that are run by other threads, several waiters, and the limits.

        If no thread runs the machine, this call runs the event loop. If the machine is not running,
        it is started, and continues to run after the match: another `expect`, `wait` or `run`
        continues the loop.

        Args:
            pattern: bytes or str for that text, a compiled regular expression of either, or a list
                or tuple of these. The earliest match counts, then the first pattern in the list.
            timeout: seconds; None means no limit.

        Raises:
            ExpectTimeoutError: nothing matched in this time; the guest keeps running. It shows the
                last lines of the console.
            GuestEndedError: the run ended before a match; it says how.
            StateError: a callback of the machine made the call, or the machine is a `KvmVm`.
            ClosedError: the machine is closed.
            Exception: the first exception of a callback, if this call runs the loop.
        """
    @overload
    def expect_async(
        self, pattern: _PatternStr | Sequence[_PatternStr], timeout: float | None = None
    ) -> Coroutine[Any, Any, Expected[str]]: ...
    @overload
    def expect_async(
        self, pattern: _PatternBytes | Sequence[_PatternBytes], timeout: float | None = None
    ) -> Coroutine[Any, Any, Expected[bytes]]: ...
    @overload
    def expect_async(
        self, pattern: Sequence[_PatternStr | _PatternBytes], timeout: float | None = None
    ) -> Coroutine[Any, Any, Expected[Any]]:
        """`expect` in a running asyncio loop, which stays responsive. Cancelling it does not stop the guest."""
    def sendline(self, text: str | bytes | bytearray = "", *, end: str | bytes | bytearray = "\n") -> None:
        """Send a line of input: the text, as UTF-8 if it is a str, and `end`.

        Raises:
            ClosedError: the machine is closed.
        """

    def _kept(self) -> tuple[int, bytes, int]: ...
    def _watch(self) -> _OutputWatch: ...
    def _watches(self) -> int: ...
    def _run_until(self, texts: list[bytes]) -> bool: ...
    def _take(self, most: int) -> bytes: ...
    def _finish_write(self, written: int, again_s: float | None) -> None: ...
    @property
    def input_waiting(self) -> int:
        """The number of input bytes that the guest has not read yet."""

    def fileno(self) -> int:
        """A file descriptor that is readable when output is available for `take_output`.

        A configured output takes what is available too. To wait for output beside it, use `expect`.
        """

    @property
    def input_wanted(self) -> EventFd:
        """Readable when the guest has read all its input, and at the start."""

@final
class _OutputWatch:
    """A thread's wait for the output of a serial port."""

    def look(self) -> tuple[int, bytes]:
        """The position of the output since the last call, and its bytes."""

    def match_up_to(self, position: int) -> None:
        """The output up to this position is matched."""

    def cancel(self) -> None:
        """End the wait. May be called from any thread."""

    def is_cancelled(self) -> bool:
        """Whether it was cancelled."""

@final
class Snapshot:
    """The state of a machine, created by `Vmm.snapshot` or `Snapshot.load`.

    It never changes, and threads may share it.
    """

    def fork(
        self,
        *,
        serial: SerialConfig | None = None,
        event_manager: EventManager | None = None,
        setup: Callable[[Vmm], object] | None = None,
        entropy: Callable[[Vmm], object] | tuple[int, int] | None = None,
        virtio: dict[str, Part | VirtioProgram] | None = None,
    ) -> Vmm:
        """Create a new machine that continues from this snapshot.

        The fork does not affect the snapshot, the original machine or other forks.

        Args:
            serial: the streams of its serial port; None keeps the output for
                `serial.take_output()`.
            event_manager: a loop shared with others; None creates one.
            setup: called with the machine before the devices are restored. It adds the Python
                devices of the snapshot, and hooks, eventfds and subscribers if the program uses
                them.
            entropy: writes new randomness to the guest before it runs: a callable that takes the
                machine, or a guest-physical address and a number of bytes that are filled from
                os.urandom. With None, every fork draws the same random numbers.
            virtio: configurations of virtio devices by name, such as {"disk0": Disk("other.img")},
                in place of what the fork gets without it. docs/virtio.md says what that is.

        Raises:
            ConfigError: what is given for a virtio device cannot be used, or the snapshot has no
                device of the name.
            KvmError: KVM refused a part.
            SnapshotError: the snapshot's file has changed since it was loaded.
            StateError: the snapshot has a device that this machine does not have.
        """

    def fork_many(
        self,
        count: int,
        changes: Callable[[int], dict[str, Any]] | None = None,
        *,
        entropy: Callable[[Vmm], object] | tuple[int, int] | None = None,
    ) -> list[Vmm]:
        """Create `count` forks in parallel. If one fails, all are closed.

        `changes`, if given, is called with the number of each fork and returns a dict of arguments
        for `fork`. `entropy` applies to the forks whose arguments do not include it.

        Raises:
            ValueError: the count is not from 0 to 1,048,576.
        """

    def save(
        self,
        path: str | PathLike[str],
        base: Snapshot | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Write the snapshot to a file for `load`: see docs/snapshot-format.md.

        Pages of zeros take no space. The file gets its name once all data is on disk; until then,
        and after any error, an existing file of that name is unchanged.

        Args:
            path: the file.
            base: write only the pages that differ from this snapshot; loading needs it again.
            progress: called with the number of bytes written and the total; an exception that it
                raises ends the save.

        Raises:
            OSError: (a StreamError) the file cannot be written.
            SnapshotError: the base's memory has another size, a file of this snapshot has changed,
                or the state of the devices exceeds 256 MiB.
        """

    @staticmethod
    def load(
        path: str | PathLike[str],
        base: Snapshot | str | PathLike[str] | None = None,
        *,
        force: bool = False,
        copy: bool = False,
        verify: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> Snapshot:
        """Load a snapshot from its file. Pages are mapped on demand, so the time does not depend on the size.

        The file must not change while the snapshot or one of its forks is alive. `save` to the same
        name is safe, because it creates a new file. A change is detected at the next fork or reset.

        Args:
            path: the file.
            base: the snapshot that the file was saved against, or its file.
            force: load it although this host lacks something that the original one had.
            copy: read the pages to memory; the file may then change.
            verify: read all pages and check their checksum. The other checksums are always checked.
            progress: called with the number of bytes read and the total, if `copy` or `verify`
                reads the pages; an exception that it raises ends the load. A base that is given as
                a file is read first.

        Raises:
            SnapshotError: the file is damaged, of another version or host, or needs another base.
            OSError: (a StreamError) the file cannot be read.
        """

    @staticmethod
    def inspect(path: str | PathLike[str]) -> dict[str, Any]:
        """Describe a file without loading it: sizes, ids, the machine, and each record's name, number and length.

        Raises:
            SnapshotError: the file is damaged, or of another version.
        """

    @overload
    def map(
        self,
        function: Callable[[Vmm, _I], _T],
        inputs: Iterable[_I],
        *,
        workers: int | None = None,
        timeout: float | None = None,
        entropy: Callable[[Vmm], object] | tuple[int, int] | None = None,
        return_exceptions: Literal[False] = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> list[_T]: ...
    @overload
    def map(
        self,
        function: Callable[[Vmm, _I], _T],
        inputs: Iterable[_I],
        *,
        workers: int | None = None,
        timeout: float | None = None,
        entropy: Callable[[Vmm], object] | tuple[int, int] | None = None,
        return_exceptions: bool,
        progress: Callable[[int, int], object] | None = None,
    ) -> list[_T | BaseException]:
        """Call `function(fork, input)` for each input, on several forks at once, and return the results in order.

        Each job starts from this snapshot and is isolated from other jobs. See
        `pyvmm.ForkExecutor`.

        `entropy` is the same as for `fork`, and is written again for each job. Without it, the
        result of a job depends only on its input.

        Args:
            function: called on the thread of a worker, with a machine and an input.
            inputs: the inputs.
            workers: the number of forks at once; None means the number of processors.
            timeout: seconds for each job; None means no limit.
            entropy: writes new randomness to the guest before each job.
            return_exceptions: the exception of a job is its result, and the other jobs continue.
            progress: called on this thread with the number of jobs that have ended and the number
                of all, after each job. An exception that it raises ends the call.

        Raises:
            TimeoutError: a job took longer than `timeout` seconds.
            Exception: the first exception of a job, unless they are returned. The jobs in progress
                are ended, and the others dropped.
        """

    def flatten(self) -> Snapshot:
        """Return the same snapshot with its memory in one piece, which shares nothing with other snapshots.

        Its forks need fewer mappings, and the snapshots that it was based on can be released.
        """

    @property
    def config(self) -> VmmConfig:
        """The configuration of the original machine, as far as it is known."""

    @property
    def path(self) -> Path | None:
        """The file it was loaded from, or None."""

    @property
    def id(self) -> str:
        """32 hexadecimal digits that identify the snapshot; a file keeps them."""

    @property
    def vcpus(self) -> int:
        """The number of vCPUs."""

    @property
    def memory_size(self) -> int:
        """The number of bytes of guest memory."""

    @property
    def memory_bytes(self) -> int:
        """The number of bytes of host memory that its pages use. Other snapshots and machines may share them."""

    @property
    def file_bytes(self) -> int:
        """The number of bytes of files that its pages use."""

    @property
    def mappings(self) -> int:
        """The number of mappings that each fork needs for its memory: one, and more for each layer of changes.

        See `flatten`.
        """

    @property
    def state(self) -> tuple[tuple[str, int, bytes], ...]:
        """The state other than memory: the name of each record, its vCPU or chip, and its bytes.

        Snapshots of two identical machines have the same state, except for what depends on time:
        `clock`, `pit`, the TSC in `msrs`, and the counter in `lapic`.
        """

    def __reduce__(self) -> tuple[Any, ...]: ...
    def _repr_html_(self) -> str: ...

@final
class RegisterBytes:
    """One class of a vCPU's registers, as the bytes of the kernel's structure. `pyvmm.registers` names them."""

    def load(self, offset: int, size: int) -> int:
        """Return the little-endian number of 1 to 8 bytes at an offset.

        Raises:
            StateError: the guest is running, or the machine is closed.
        """

    def store(self, offset: int, size: int, value: int) -> None:
        """Write a number of 1 to 8 bytes at an offset.

        Raises:
            OverflowError: the number has more bits.
            KvmError: KVM refuses it; nothing changes.
            StateError: the guest is running, or the machine is closed.
        """

    def read(self) -> bytes:
        """Return all bytes.

        Raises:
            StateError: the guest is running, or the machine is closed.
        """

    def replace(self, offset: int, bytes: bytes) -> None:
        """Write bytes at an offset. Raises the same exceptions as `store`."""

@disjoint_base
class RegisterView:
    """What every view of registers has: the bytes of a kernel's structure, from an offset on."""

    def __new__(cls, registers: RegisterBytes, base: int = 0) -> Self: ...
    @property
    def _registers(self) -> RegisterBytes: ...
    @property
    def _base(self) -> int: ...

@final
class Register:
    """A register of a view: an int of this many bytes, at an offset.

    Written in Rust, because hooks read registers at each exit.
    """

    def __new__(cls, offset: int, size: int = 8) -> Self: ...
    @property
    def offset(self) -> int:
        """Where it is in the view."""

    @property
    def size(self) -> int:
        """Its bytes."""

    @overload
    def __get__(self, view: None, owner: object = None, /) -> Self: ...
    @overload
    def __get__(self, view: RegisterView, owner: object = None, /) -> int: ...
    def __set__(self, view: RegisterView, value: int, /) -> None: ...

@final
class MsrBytes:
    """Model-specific registers by number. `pyvmm.registers` names them."""

    def load(self, index: int) -> int:
        """Return the register's value.

        Raises:
            KvmError: KVM does not know the register.
            StateError: the guest is running, or the machine is closed.
        """

    def store(self, index: int, value: int) -> None:
        """Set the register. Raises the same exceptions as `load`."""

@final
class Vcpu:
    """A virtual CPU of a machine. Its state can be read and changed while its guest is not running.

    The registers are views: each access reads or changes the vCPU itself. While the guest runs, an
    access raises StateError. `vcpus` and hooks always return the same object for a vCPU.
    """

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    @property
    def id(self) -> int:
        """The vCPU's number."""

    @property
    def regs(self) -> Regs:
        """The general registers, RIP and RFLAGS."""

    @property
    def sregs(self) -> Sregs:
        """Segments, descriptor tables, control registers, EFER."""

    @property
    def fpu(self) -> Fpu:
        """x87, SSE and AVX."""

    @property
    def xcrs(self) -> Xcrs:
        """XCR0."""

    @property
    def debugregs(self) -> DebugRegs:
        """DR0 to DR3, DR6, DR7."""

    @property
    def events(self) -> VcpuEvents:
        """Exceptions, interrupts and NMIs that are pending or being delivered."""

    @property
    def lapic(self) -> Lapic:
        """The local APIC, if the machine has an interrupt controller."""

    @property
    def msrs(self) -> Msrs:
        """Model-specific registers, by number or name."""

    @property
    def mp_state(self) -> MpState:
        """Whether the vCPU runs, waits for INIT and SIPI, or is halted: KVM_GET_MP_STATE."""

    @mp_state.setter
    def mp_state(self, state: int) -> None: ...
    @property
    def cpuid(self) -> tuple[CpuidEntry, ...]:
        """The CPUID that the guest sees: a tuple of `CpuidEntry`. It can be changed until the vCPU has run."""

    @cpuid.setter
    def cpuid(self, entries: Sequence[CpuidEntry]) -> None: ...
    def run_once(self) -> VcpuExit:
        """Enter the guest on this thread and return its next exit. No device answers the exit.

        After a read, call `answer`; the next `run_once` completes it. Ctrl-C on the main thread
        ends the call.

        Raises:
            StateError: the guest is running, or the machine is closed.
            KvmError: KVM_RUN failed.
        """

    def kick(self) -> None:
        """Make the current or next `run_once` return `VcpuExit.Interrupted`. May be called from any thread."""

    def answer(self, data: int | bytes | bytearray) -> None:
        """Set the value that the guest reads after `VcpuExit.IoIn` or `MmioRead`: bytes, or a little-endian number.

        Raises:
            StateError: the guest does not wait for an answer, or is running.
            ValueError: the guest reads a different number of bytes.
            OverflowError: the number has more bits, or is negative.
        """

    def translate(self, address: int) -> int | None:
        """Translate a guest-virtual address by the vCPU's page tables.

        Return the guest-physical address, or None if it is not mapped.

        Raises:
            StateError: the guest is running, or the machine is closed.
        """

    def debug(self, *, single_step: bool = False, breakpoints: Sequence[int] | None = None) -> None:
        """Exit with kind "debug" after each instruction, or before execution at up to four linear addresses.

        Uses KVM_SET_GUEST_DEBUG; without arguments, both are switched off. To continue from a
        breakpoint, remove it for one step.

        Raises:
            StateError: the guest is running, or the machine is closed.
            ConfigError: there are more than four breakpoints.
        """

    def _repr_html_(self) -> str: ...

@disjoint_base
class VcpuExit:
    """Why a vCPU exited the guest: the exits of the kernel's KVM documentation, chapter 5, for `match`.

    Exits of the same kind with equal fields are equal. They can be hashed and pickled.
    """

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
    def as_dict(self) -> dict[str, Any]:
        """Return the exit as a dict. "type" is the name of its class, such as "IoIn"; the fields follow by name.

        The dict and its values belong to the caller.
        """

    @final
    class IoIn(VcpuExit):
        """`IN` or `INS`: `count` reads of `size` bytes from a port.

        `Vcpu.answer` sets the value; the default is all one bits.
        """

        __match_args__ = ("port", "size", "count")
        def __new__(cls, port: int, size: int, count: int) -> Self: ...
        @property
        def port(self) -> int: ...
        @property
        def size(self) -> int: ...
        @property
        def count(self) -> int: ...

    @final
    class IoOut(VcpuExit):
        """`OUT` or `OUTS`: writes of `size` bytes each to a port."""

        __match_args__ = ("port", "size", "data")
        def __new__(cls, port: int, size: int, data: bytes) -> Self: ...
        @property
        def port(self) -> int: ...
        @property
        def size(self) -> int: ...
        @property
        def data(self) -> bytes: ...

    @final
    class MmioRead(VcpuExit):
        """A read where there is no memory. `Vcpu.answer` sets the value; the default is all one bits."""

        __match_args__ = ("address", "length")
        def __new__(cls, address: int, length: int) -> Self: ...
        @property
        def address(self) -> int: ...
        @property
        def length(self) -> int: ...

    @final
    class MmioWrite(VcpuExit):
        """A write where there is no memory, or read-only memory."""

        __match_args__ = ("address", "data")
        def __new__(cls, address: int, data: bytes) -> Self: ...
        @property
        def address(self) -> int: ...
        @property
        def data(self) -> bytes: ...

    @final
    class Rdmsr(VcpuExit):
        """`RDMSR` of a register that KVM does not know, or that a hook selected.

        Without an answer the guest gets a fault.
        """

        __match_args__ = ("index", "reason")
        def __new__(cls, index: int, reason: str) -> Self: ...
        @property
        def index(self) -> int: ...
        @property
        def reason(self) -> str: ...

    @final
    class Wrmsr(VcpuExit):
        """`WRMSR` to such a register."""

        __match_args__ = ("index", "value", "reason")
        def __new__(cls, index: int, value: int, reason: str) -> Self: ...
        @property
        def index(self) -> int: ...
        @property
        def value(self) -> int: ...
        @property
        def reason(self) -> str: ...

    @final
    class Hlt(VcpuExit):
        """`HLT`."""

        __match_args__ = ()
        def __new__(cls) -> Self: ...

    @final
    class Shutdown(VcpuExit):
        """A triple fault."""

        __match_args__ = ()
        def __new__(cls) -> Self: ...

    @final
    class Interrupted(VcpuExit):
        """`Vcpu.kick` ended the call; the guest caused no exit."""

        __match_args__ = ()
        def __new__(cls) -> Self: ...

    @final
    class IrqWindowOpen(VcpuExit):
        """The guest can accept an interrupt now."""

        __match_args__ = ()
        def __new__(cls) -> Self: ...

    @final
    class FailEntry(VcpuExit):
        """The processor refused to enter the guest."""

        __match_args__ = ("reason", "cpu")
        def __new__(cls, reason: int, cpu: int) -> Self: ...
        @property
        def reason(self) -> int: ...
        @property
        def cpu(self) -> int: ...

    @final
    class InternalError(VcpuExit):
        """KVM could not continue.

        Suberror 1 means that KVM cannot emulate an instruction. The exit then has the instruction's
        bytes, perhaps with following ones, its disassembly in nasm syntax, and the registers by
        name: the general ones, rip, rflags, efer, cr0 to cr4 and the selectors.
        """

        __match_args__ = ("suberror", "instruction", "data", "disassembly", "registers")
        def __new__(
            cls,
            suberror: int,
            instruction: bytes,
            data: tuple[int, ...],
            disassembly: str | None,
            registers: dict[str, int],
        ) -> Self: ...
        @property
        def suberror(self) -> int: ...
        @property
        def instruction(self) -> bytes: ...
        @property
        def data(self) -> tuple[int, ...]: ...
        @property
        def disassembly(self) -> str | None: ...
        @property
        def registers(self) -> dict[str, int]: ...

    @final
    class Debug(VcpuExit):
        """A breakpoint or a single step."""

        __match_args__ = ("exception", "pc", "dr6", "dr7")
        def __new__(cls, exception: int, pc: int, dr6: int, dr7: int) -> Self: ...
        @property
        def exception(self) -> int: ...
        @property
        def pc(self) -> int: ...
        @property
        def dr6(self) -> int: ...
        @property
        def dr7(self) -> int: ...

    @final
    class SystemEvent(VcpuExit):
        """The guest's platform code requests a reset or power-off."""

        __match_args__ = ("kind", "data")
        def __new__(cls, kind: int, data: tuple[int, ...]) -> Self: ...
        @property
        def kind(self) -> int: ...
        @property
        def data(self) -> tuple[int, ...]: ...

    @final
    class MemoryFault(VcpuExit):
        """An access that the memory's attributes forbid."""

        __match_args__ = ("flags", "address", "size")
        def __new__(cls, flags: int, address: int, size: int) -> Self: ...
        @property
        def flags(self) -> int: ...
        @property
        def address(self) -> int: ...
        @property
        def size(self) -> int: ...

    @final
    class Unknown(VcpuExit):
        """Another exit."""

        __match_args__ = ("number",)
        def __new__(cls, number: int) -> Self: ...
        @property
        def number(self) -> int: ...

@final
class Kvm:
    """KVM's system interface: /dev/kvm.

    Raises:
        KvmUnavailableError: this host has no usable KVM.
    """

    def __new__(cls) -> Self: ...
    @property
    def api_version(self) -> int:
        """KVM_GET_API_VERSION: 12."""

    def check_extension(self, capability: int) -> int:
        """Return the result of KVM_CHECK_EXTENSION for a capability, given by number or as `Cap`: 0 if KVM lacks it."""

    @property
    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """The CPUID that guests can have on this host: a tuple of `CpuidEntry`, suitable for `Vcpu.cpuid`."""

    @property
    def msr_list(self) -> tuple[int, ...]:
        """The numbers of the MSRs that belong to a guest's state: KVM_GET_MSR_INDEX_LIST."""

    @property
    def max_vcpus(self) -> int:
        """The maximum number of vCPUs of a machine."""

    def fileno(self) -> int:
        """The file descriptor, for ioctls of your own."""

@final
class KvmVm:
    """A KVM virtual machine without an event loop. A kick of the exit handler reports the end of the guest.

    Args:
        config: the configuration, whose serial port must have no streams. None creates a bare VM:
            no memory, devices or vCPUs until `memory.add` and `create_vcpu` are called.
        exit_handler: an object with `kick()`, called on the thread of the vCPU whose guest has
            ended. None creates one.

    Raises:
        VmmError: as for `Vmm`.
    """

    def __new__(cls, config: VmmConfig | None = None, exit_handler: ExitHandler | None = None) -> Self: ...
    def create_vcpu(self, id: int = 0) -> Vcpu:
        """Add a vCPU to a machine that has not run.

        It is in KVM's initial state: at the reset vector, with an empty `cpuid`.

        Raises:
            KvmError: the number is already used, or KVM refuses it.
            StateError: the machine has run, or is closed.
        """

    def run(self, vcpu_run_addr: int | None = None) -> None:
        """Start a thread `vcpu_{id}` for each vCPU and return.

        With an address, the vCPUs start there. Otherwise they start at `entry`, or continue where
        they stopped.

        Raises:
            StateError: the machine is running, its guest has ended, or it is closed.
        """

    def wait(self, timeout: float | None = None) -> Exit | None:
        """Wait until the machine no longer runs, and return how the guest ended. Return None after the timeout.

        Raises:
            StateError: the call was made from the exit handler, on the thread of one of its vCPUs.
            Exception: the exception raised by the exit handler's `kick`.
        """

    def pause(self, timeout: float | None = None) -> None:
        """Stop all vCPUs and wait until they are out of the guest. Does nothing if the machine is already paused.

        Raises:
            StateError: the machine is not running.
            WaitTimeoutError: a vCPU did not leave its guest within `timeout` seconds. The machine
                continues.
        """

    def resume(self) -> None:
        """Continue the vCPUs that `pause` stopped. Does nothing if they are running.

        Raises:
            StateError: the machine has been shut down, or the guest has ended.
        """

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """The vCPUs, by number; the same objects each time. Before the first run their RIP is `entry`."""

    def shutdown(self) -> None:
        """Stop the vCPUs and wait for callbacks in progress. If the guest has not ended, `run` continues it.

        An exception of a signal handler, such as Ctrl-C's, ends the wait; the vCPUs are stopped.
        """

    def close(self) -> None:
        """Shut down and release all resources. A second call does nothing.

        An exception of a signal handler, such as Ctrl-C's, is raised here. The machine is still
        closed, and another `close` waits for that.
        """

    @property
    def entry(self) -> int:
        """The address where the configured code starts."""

    @property
    def state(self) -> VmRunState:
        """The machine's run state."""

    @property
    def exit(self) -> Exit | None:
        """How the guest ended, or None if it has not ended."""

    @property
    def memory(self) -> GuestMemory:
        """Guest memory, by guest-physical address; the same object each time, which keeps the machine alive."""

    @property
    def serial(self) -> Serial:
        """The first serial port; the same object each time, which keeps the machine alive.

        Raises:
            StateError: the machine was created without a configuration.
        """

    @property
    def resources(self) -> list[Resource]:
        """The owner of each range of addresses, ports and lines: memory, devices, KVM's own chips, eventfds.

        The list is sorted by kind and start, and follows the memory and devices that are added and
        removed. Ranges never overlap, except shared ones: an overlapping addition is refused.

        Raises:
            StateError: the machine is closed, or the process is a forked child.
        """

    @property
    def unanswered(self) -> list[Unanswered]:
        """Accesses that no device answered, counted by address."""

    @property
    def fixups(self) -> dict[str, int]:
        """The instructions that KVM refused and pyvmm executed, counted by mnemonic: as for `Vmm`."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@disjoint_base
class Vmm:
    """A virtual machine: the constructor builds it, `run` runs it, and `close` or the end of a `with` releases it.

    A subclass's `__init__` may take any arguments and calls `super().__init__`. Forks and pools
    create plain `Vmm` objects.

    Args:
        config: the configuration; None uses the built-in guest.
        event_manager: a loop shared with others; None creates one. In a shared loop, the `run` of
            each machine runs the loop for all machines, on its own thread, and ends only for its
            own machine.

    Raises:
        ConfigError: a value cannot be used; the text starts with its key.
        BootError: the kernel, RAM disk or code cannot be loaded.
        KvmUnavailableError: there is no usable /dev/kvm; `hint` says what to do.
        KvmError: KVM refused a part.
    """

    def __init__(self, config: VmmConfig | None = None, *, event_manager: EventManager | None = None) -> None: ...
    def run(self, timeout: float | None = None) -> Exit:
        """Run the guest until it ends, `stop` is called, or `timeout` seconds have passed.

        The call runs the event loop meanwhile: subscribers are called on this thread, devices and
        exit hooks on those of the vCPUs. After a stop, a timeout or an exception, the next `run`
        continues where this one ended.

        Raises:
            StateError: a run is in progress, the guest has ended, or the machine is closed.
            StreamError: a stream of the serial port failed.
            KeyboardInterrupt: Ctrl-C, within 100 ms.
            Exception: the first exception of a callback.
        """

    def run_here(self, timeout: float | None = None) -> Exit:
        """Run the guest like `run`, on this thread alone: it enters the guest itself.

        The machine must have one vCPU. Devices and exit hooks are called on this thread too. No
        other thread is started or waited for, which makes short runs faster. The event loop is
        checked every 2 ms: subscribers are called that much later than in `run`, and a device must
        not wait for one.

        Raises:
            StateError: the machine has several vCPUs; otherwise as for `run`.
            Exception: the first exception of a callback.
        """

    def run_async(self, timeout: float | None = None) -> Coroutine[Any, Any, Exit]:
        """Run the guest like `run`, in a running asyncio loop, which stays responsive.

        The guest's loop runs in its own thread.

        Cancelling the call stops the guest. A subscriber's `process` may be a coroutine function:
        it runs as a task of the asyncio loop, and its exception ends the run. When the guest has
        ended, running coroutines have one second to finish. Then they are cancelled, and their
        names are passed to the asyncio loop's exception handler.
        """

    def _new_cancel(self) -> _Cancel: ...
    def _run_cancellable(
        self, timeout: float | None, cancel: _Cancel, awaiter: Callable[[Any, str], None]
    ) -> Exit | None: ...
    def __aenter__(self) -> Coroutine[Any, Any, Self]: ...
    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> Coroutine[Any, Any, None]: ...
    def start(self) -> None:
        """Start the vCPUs and return. `wait` runs the event loop for them.

        Raises:
            StateError: a run is in progress, the guest has ended, or the machine is closed.
        """

    def wait(self, timeout: float | None = None) -> Exit | None:
        """Wait for a started machine, as `run` does. Return None after the timeout; the guest keeps running.

        Raises:
            StateError: the machine was not started, or another thread is waiting.
            Exception: as for `run`; it ends the run.
        """

    @property
    def console(self) -> Console:
        """The text on the console: what the guest has printed to the first serial port."""

    @property
    def screen(self) -> Screen:
        """The guest's VGA text screen. docs/pc.md describes it."""

    def _vsock_status(self) -> tuple[int, int]: ...
    def _vsock_connect(self, port: int) -> int: ...
    def _vsock_listen(self, port: int, listener: int) -> None: ...
    def _vsock_unlisten(self, port: int) -> None: ...
    def _screen(self) -> tuple[int, int | None] | None: ...
    @overload
    def run_until(
        self, pattern: _PatternStr | Sequence[_PatternStr], timeout: float | None = None
    ) -> Expected[str]: ...
    @overload
    def run_until(
        self, pattern: _PatternBytes | Sequence[_PatternBytes], timeout: float | None = None
    ) -> Expected[bytes]: ...
    @overload
    def run_until(self, pattern: Sequence[_PatternStr | _PatternBytes], timeout: float | None = None) -> Expected[Any]:
        """Run the guest until its console shows a pattern, and stop it there.

        Like `run`, but the result is that of `Serial.expect`, with the same patterns. The next
        `run` continues the guest. A machine that `expect` or `start` has started is stopped too.

        If all patterns are bytes or str, the guest stops after the instruction that printed the
        last byte. With a regular expression it stops a few milliseconds later.

        Raises:
            ExpectTimeoutError: nothing matched within `timeout` seconds; the guest is stopped.
            GuestEndedError: the run ended before a match.
            StateError: another thread runs the machine; otherwise as for `run`.
            Exception: the first exception of a callback.
        """
    @overload
    def run_until_async(
        self, pattern: _PatternStr | Sequence[_PatternStr], timeout: float | None = None
    ) -> Coroutine[Any, Any, Expected[str]]: ...
    @overload
    def run_until_async(
        self, pattern: _PatternBytes | Sequence[_PatternBytes], timeout: float | None = None
    ) -> Coroutine[Any, Any, Expected[bytes]]: ...
    @overload
    def run_until_async(
        self, pattern: Sequence[_PatternStr | _PatternBytes], timeout: float | None = None
    ) -> Coroutine[Any, Any, Expected[Any]]:
        """`run_until` in a running asyncio loop, which stays responsive."""
    def _await_output(
        self,
        watch: _OutputWatch,
        timeout: float | None,
        how: tuple[bool, bool],
        awaiter: Callable[[Any, str], None] | None,
    ) -> tuple[bool, tuple[Exit | None] | None]: ...
    def _keep_exit(self, exit: Exit) -> None: ...
    def pause(self, timeout: float | None = None) -> None:
        """Stop all vCPUs and wait until they are out of the guest.

        May be called from any thread or callback; the loop keeps running.

        The registers can then be read and changed. Does nothing if the machine is already paused.

        Raises:
            StateError: the machine is not running.
            WaitTimeoutError: a vCPU did not leave its guest within `timeout` seconds. The machine
                continues.
        """

    def resume(self) -> None:
        """Continue the vCPUs that `pause` stopped. Does nothing if they are running.

        Raises:
            StateError: no run is in progress, or the guest has ended.
        """

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """The vCPUs, by number; the same objects each time. Before the first run they have their initial registers.

        Raises:
            ClosedError: the machine is closed.
        """

    def stop(self) -> None:
        """End the current run. If none is in progress, the next one ends at once.

        May be called from any thread or callback.
        """

    def close(self) -> None:
        """Stop the guest, wait for the run in progress to end, and release all resources. A second call does nothing.

        In a callback, it takes effect when the run ends. If a signal handler raises during the
        wait, as Ctrl-C's does, the exception is raised here. The machine is still closed, and
        another `close` waits for that.
        """

    def add_subscriber(self, subscriber: Subscriber | WrappedExitHandler | VmmExitHandler) -> SubscriberId:
        """Register a subscriber with the machine's event manager; see `EventManager.add_subscriber`."""

    def snapshot(self, timeout: float | None = None) -> Snapshot:
        """Capture everything that a guest can see of this machine: vCPUs, memory, devices, clock.

        The result can be forked, saved, and reset to.

        A running machine is paused meanwhile. Memory is not copied: the machine continues with
        private copies of the pages that it writes from now on. If the guest has ended, the snapshot
        continues after the instruction that ended it.

        Raises:
            StateError: the machine is closed, a device cannot be saved, memory is shared with
                others, or another thread resumed the machine meanwhile.
            WaitTimeoutError: a callback of the machine did not return within `timeout` seconds. The
                machine is as before.
        """

    def reset(self, snapshot: Snapshot, timeout: float | None = None) -> int:
        """Restore the state of a snapshot in place. Return the number of memory pages that changed.

        If the guest has ended, the machine can be run again. If it is running, it continues from
        the snapshot. Output that was not collected is dropped.

        Raises:
            StateError: the machine is closed, its run is ending, or the snapshot is of a machine
                with other vCPUs, interrupt controllers or devices, or with another CPUID.
            WaitTimeoutError: a callback of the machine did not return within `timeout` seconds. The
                machine is as before.
        """

    def remove_subscriber(self, id: SubscriberId) -> object:
        """Unregister a subscriber and return it; see `EventManager.remove_subscriber`."""

    @property
    def config(self) -> VmmConfig:
        """The configuration."""

    @property
    def event_manager(self) -> EventManager:
        """The event manager whose loop runs inside `run`.

        Raises:
            ClosedError: the machine is closed. A manager obtained earlier stays usable.
        """

    @property
    def exit(self) -> Exit | None:
        """How the guest ended, or None if it has not ended."""

    @property
    def exit_handler(self) -> WrappedExitHandler:
        """The handler that ends a run.

        Raises:
            ClosedError: the machine is closed.
        """

    @property
    def memory(self) -> GuestMemory:
        """Guest memory, by guest-physical address; the same object each time, which keeps the machine alive."""

    @property
    def serial(self) -> Serial:
        """The host's side of the first serial port; the same object each time, which keeps the machine alive."""

    @property
    def serials(self) -> dict[str, Serial]:
        """The host's side of every port that prints, by its key.

        The keys are "com1", which is `serial`, "com2" to "com4", and "debug_port", as far as the
        machine has them.
        """

    @property
    def state(self) -> VmRunState:
        """The machine's run state."""

    @property
    def nets(self) -> tuple[NetDevice, ...]:
        """The network devices, in the order of `VmmConfig.nets`; the same objects each time.

        Raises:
            ClosedError: the machine is closed.
        """

    @property
    def balloon(self) -> BalloonDevice:
        """The memory balloon; the same object each time.

        Raises:
            ConfigError: the machine has none: `VmmConfig(balloon=Balloon())`.
        """

    @property
    def vsock(self) -> VsockHost:
        """The host's side of the guest's sockets.

        Raises:
            ConfigError: the machine has none: `VmmConfig(vsock=Vsock())`.
        """

    @property
    def disks(self) -> tuple[DiskDevice, ...]:
        """The disks, in the order of their configuration; the same objects each time.

        Raises:
            ClosedError: the machine is closed.
        """

    @property
    def virtio_console(self) -> ConsoleDevice:
        """The virtio console; the same object each time.

        Raises:
            ConfigError: the machine has none: `VmmConfig(console=VirtioConsole())`.
        """

    @property
    def virtio(self) -> tuple[VirtioDevice, ...]:
        """The virtio devices, in the order of their addresses; the same objects each time.

        Raises:
            ClosedError: the machine is closed.
        """

    @property
    def stats(self) -> Stats:
        """Counters of exits and of the time inside and outside the guest; the same object each time.

        They count only while they are enabled.
        """

    def trace(self, path: str | PathLike[str]) -> Trace:
        """Write a trace with every hop of the machine and its times, for Perfetto: `with vmm.trace(path): ...`.

        Each thread has a track, with the time inside the guest, exits, calls of devices, events of
        the loop, and calls of Python code. If the machine is already running, the trace starts with
        each vCPU's next entry and the loop's next iteration.

        Raises, when it is entered or left:
            StateError: another trace of this machine is being written.
            StreamError: the file cannot be created or written; this does not end a run.
        """

    @property
    def resources(self) -> list[Resource]:
        """The owner of each range of addresses, ports and lines: memory, devices, KVM's own chips, eventfds.

        The list is sorted by kind and start, and follows the memory and devices that are added and
        removed. Ranges never overlap, except shared ones: an overlapping addition is refused.

        Raises:
            StateError: the machine is closed, or the process is a forked child.
        """

    @property
    def unanswered(self) -> list[Unanswered]:
        """Accesses that no device answered, counted by address."""

    @property
    def symbols(self) -> dict[str, int]:
        """The addresses of the functions, variables and labels of the program of `ElfBoot`, by name.

        Empty if its file has no symbols, or the machine runs something else. Forks have them too.
        """

    @property
    def fixups(self) -> dict[str, int]:
        """The instructions that KVM refused and pyvmm executed, counted by mnemonic.

        Empty without `CpuConfig(fixups=True)`. docs/fixups.md lists the instructions.
        """

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    def add_pio_device(self, base: int, length: int, device: Device) -> None:
        """Answer the guest's accesses to ports by a Python object.

        It has `read(offset, size)`, `write(offset, size, value)`, or both.

        May be called while the guest runs and from callbacks. The methods are looked up now and
        called on the thread of the vCPU; see `pyvmm.devices`.

        Raises:
            ConfigError: the range is not a range of ports, or overlaps another device's.
            TypeError: the object has no device method.
            ClosedError: the machine is closed.
        """

    def add_mmio_device(self, base: int, length: int, device: Device) -> None:
        """Answer the guest's accesses to guest-physical addresses without memory.

        Otherwise the same as `add_pio_device`.

        Raises:
            ConfigError: the range overlaps memory or another device's.
        """

    def remove_pio_device(self, base: int) -> object:
        """Remove the device whose ports start here, and return it. An access in progress is still answered.

        Raises:
            ConfigError: no added device starts there.
        """

    def remove_mmio_device(self, base: int) -> object:
        """Remove the device whose addresses start here, and return it. Otherwise the same as `remove_pio_device`."""

    def _pio_device(self, base: int) -> object: ...
    def _lend(self) -> Vmm: ...
    @staticmethod
    def _check(config: VmmConfig) -> None: ...
    @staticmethod
    def _boot_kind(path: str | Path) -> str: ...
    def _accept_changes(self) -> None: ...
    def _is_clean(self) -> bool: ...
    def _is_running(self) -> bool: ...
    def _renew(self, snapshot: Snapshot) -> bool: ...
    def _write_entropy(self, entropy: Callable[[Vmm], object] | tuple[int, int]) -> None: ...
    def irq(self, line: int) -> IrqLine:
        """Return an interrupt line: pin 0 to 23 of the I/O APIC. The first sixteen are also lines of the PICs.

        Raises:
            StateError: the machine has no interrupt controller, or is closed.
            ConfigError: the machine has no such line.
        """

    def msi(self, address: int, data: int) -> bool:
        """Send a message-signalled interrupt (KVM_SIGNAL_MSI). Return whether a vCPU accepted it.

        Args:
            address: 0xfee00000 plus the destination's APIC id shifted left by 12 (Intel SDM volume
                3, 11.11.1).
            data: the vector, with the delivery mode in the higher bits.

        Raises:
            StateError: the machine has no interrupt controller, or is closed.
        """

    def nmi(self, vcpu: int = 0) -> None:
        """Send a non-maskable interrupt to a vCPU. May be called from any thread.

        Raises:
            ConfigError: there is no such vCPU.
        """

    def add_irqfd(self, event_fd: EventFd, line: int) -> None:
        """In the kernel, pulse an interrupt line for each write to an eventfd: KVM_IRQFD.

        Raises:
            StateError: the machine has no interrupt controller, or is closed.
            KvmError: KVM refuses it, for example because the eventfd already pulses a line.
        """

    def remove_irqfd(self, event_fd: EventFd, line: int) -> None:
        """Undo `add_irqfd`."""

    def add_ioeventfd(
        self, address: int, event_fd: EventFd, *, length: int = 0, datamatch: int | None = None, pio: bool = False
    ) -> None:
        """In the kernel, add one to an eventfd for each guest write to an address: KVM_IOEVENTFD.

        The writes cause no exits.

        Args:
            address: a guest-physical address, or a port if `pio` is set.
            event_fd: the eventfd; a subscriber that watches it is called.
            length: the size of the matching writes: 1, 2, 4 or 8; required with `datamatch`.
            datamatch: the only value that matches; None matches every write.
            pio: the address is a port.

        Raises:
            ConfigError: no such write is possible.
            KvmError: KVM refuses it, for example because another eventfd uses the address.
        """

    def remove_ioeventfd(
        self, address: int, event_fd: EventFd, *, length: int = 0, datamatch: int | None = None, pio: bool = False
    ) -> None:
        """Undo `add_ioeventfd`, with the same arguments."""

    @overload
    def on_exit(self, kind: Literal[ExitKind.IO, "io"], function: _IoHook) -> _IoHook: ...
    @overload
    def on_exit(self, kind: Literal[ExitKind.IO, "io"]) -> Callable[[_IoHook], _IoHook]: ...
    @overload
    def on_exit(self, kind: Literal[ExitKind.MMIO, "mmio"], function: _MmioHook) -> _MmioHook: ...
    @overload
    def on_exit(self, kind: Literal[ExitKind.MMIO, "mmio"]) -> Callable[[_MmioHook], _MmioHook]: ...
    @overload
    def on_exit(
        self, kind: Literal[ExitKind.MSR, "msr"], function: _MsrHook, *, msrs: Sequence[int] | None = None
    ) -> _MsrHook: ...
    @overload
    def on_exit(
        self, kind: Literal[ExitKind.MSR, "msr"], *, msrs: Sequence[int] | None = None
    ) -> Callable[[_MsrHook], _MsrHook]: ...
    @overload
    def on_exit(self, kind: Literal[ExitKind.HLT, "hlt"], function: _HltHook) -> _HltHook: ...
    @overload
    def on_exit(self, kind: Literal[ExitKind.HLT, "hlt"]) -> Callable[[_HltHook], _HltHook]: ...
    @overload
    def on_exit(self, kind: Literal[ExitKind.SHUTDOWN, "shutdown"], function: _ShutdownHook) -> _ShutdownHook: ...
    @overload
    def on_exit(self, kind: Literal[ExitKind.SHUTDOWN, "shutdown"]) -> Callable[[_ShutdownHook], _ShutdownHook]: ...
    @overload
    def on_exit(self, kind: Literal[ExitKind.DEBUG, "debug"], function: _DebugHook) -> _DebugHook: ...
    @overload
    def on_exit(self, kind: Literal[ExitKind.DEBUG, "debug"]) -> Callable[[_DebugHook], _DebugHook]: ...
    @overload
    def on_exit(
        self, kind: Literal[ExitKind.INTERNAL_ERROR, "internal-error"], function: _InternalErrorHook
    ) -> _InternalErrorHook: ...
    @overload
    def on_exit(
        self, kind: Literal[ExitKind.INTERNAL_ERROR, "internal-error"]
    ) -> Callable[[_InternalErrorHook], _InternalErrorHook]: ...
    @overload
    def on_exit(
        self, kind: Literal[ExitKind.SYSTEM_EVENT, "system-event"], function: _SystemEventHook
    ) -> _SystemEventHook: ...
    @overload
    def on_exit(
        self, kind: Literal[ExitKind.SYSTEM_EVENT, "system-event"]
    ) -> Callable[[_SystemEventHook], _SystemEventHook]: ...
    @overload
    def on_exit(self, kind: Literal[ExitKind.FAIL_ENTRY, "fail-entry"], function: _FailEntryHook) -> _FailEntryHook: ...
    @overload
    def on_exit(
        self, kind: Literal[ExitKind.FAIL_ENTRY, "fail-entry"]
    ) -> Callable[[_FailEntryHook], _FailEntryHook]: ...
    @overload
    def on_exit(
        self, kind: Literal[ExitKind.MEMORY_FAULT, "memory-fault"], function: _MemoryFaultHook
    ) -> _MemoryFaultHook: ...
    @overload
    def on_exit(
        self, kind: Literal[ExitKind.MEMORY_FAULT, "memory-fault"]
    ) -> Callable[[_MemoryFaultHook], _MemoryFaultHook]: ...
    @overload
    def on_exit(self, kind: Literal[ExitKind.UNKNOWN, "unknown"], function: _UnknownHook) -> _UnknownHook: ...
    @overload
    def on_exit(self, kind: Literal[ExitKind.UNKNOWN, "unknown"]) -> Callable[[_UnknownHook], _UnknownHook]: ...
    @overload
    def on_exit(
        self, kind: ExitKind | str, function: Callable[[Vcpu, VcpuExit], object], *, msrs: Sequence[int] | None = None
    ) -> Callable[[Vcpu, Never], object]: ...
    @overload
    def on_exit(
        self, kind: ExitKind | str, function: None = None, *, msrs: Sequence[int] | None = None
    ) -> Callable[[_Hook], _Hook]:
        """Register a function that is called for each exit of a kind before pyvmm answers it: `function(vcpu, exit)`.

        It takes effect at the next exit, and is called on the vCPU's thread. It returns None for
        the usual answer, an `ExitAction`, a `Stop`, or for a read the value that the guest reads.
        Without a function, this is a decorator. The hooks of a kind are called in the order they
        were added.

        Args:
            kind: an `ExitKind` or its name, or "any" for the exits of every kind.
            function: the hook.
            msrs: for the kinds "msr" and "any", the numbers of additional registers whose accesses
                exit. Accesses to registers that KVM does not know always do.

        Raises:
            ValueError: there is no such kind.
            ClosedError: the machine is closed.
        """

    def off_exit(self, kind: ExitKind | str, function: Callable[[Vcpu, Never], object]) -> None:
        """Remove a hook. When the last hook of the kind "msr" is removed, KVM handles the selected registers again.

        Raises:
            ValueError: the function is not a hook of this kind.
        """

    @overload
    def on_answer(self, kind: Literal[ExitKind.IO, "io"], function: _IoAnswer) -> _IoAnswer: ...
    @overload
    def on_answer(self, kind: Literal[ExitKind.IO, "io"]) -> Callable[[_IoAnswer], _IoAnswer]: ...
    @overload
    def on_answer(self, kind: Literal[ExitKind.MMIO, "mmio"], function: _MmioAnswer) -> _MmioAnswer: ...
    @overload
    def on_answer(self, kind: Literal[ExitKind.MMIO, "mmio"]) -> Callable[[_MmioAnswer], _MmioAnswer]: ...
    @overload
    def on_answer(self, kind: Literal[ExitKind.MSR, "msr"], function: _MsrAnswer) -> _MsrAnswer: ...
    @overload
    def on_answer(self, kind: Literal[ExitKind.MSR, "msr"]) -> Callable[[_MsrAnswer], _MsrAnswer]: ...
    @overload
    def on_answer(self, kind: Literal[ExitKind.HLT, "hlt"], function: _HltAnswer) -> _HltAnswer: ...
    @overload
    def on_answer(self, kind: Literal[ExitKind.HLT, "hlt"]) -> Callable[[_HltAnswer], _HltAnswer]: ...
    @overload
    def on_answer(self, kind: Literal[ExitKind.SHUTDOWN, "shutdown"], function: _ShutdownAnswer) -> _ShutdownAnswer: ...
    @overload
    def on_answer(
        self, kind: Literal[ExitKind.SHUTDOWN, "shutdown"]
    ) -> Callable[[_ShutdownAnswer], _ShutdownAnswer]: ...
    @overload
    def on_answer(self, kind: Literal[ExitKind.DEBUG, "debug"], function: _DebugAnswer) -> _DebugAnswer: ...
    @overload
    def on_answer(self, kind: Literal[ExitKind.DEBUG, "debug"]) -> Callable[[_DebugAnswer], _DebugAnswer]: ...
    @overload
    def on_answer(
        self, kind: Literal[ExitKind.INTERNAL_ERROR, "internal-error"], function: _InternalErrorAnswer
    ) -> _InternalErrorAnswer: ...
    @overload
    def on_answer(
        self, kind: Literal[ExitKind.INTERNAL_ERROR, "internal-error"]
    ) -> Callable[[_InternalErrorAnswer], _InternalErrorAnswer]: ...
    @overload
    def on_answer(
        self, kind: Literal[ExitKind.SYSTEM_EVENT, "system-event"], function: _SystemEventAnswer
    ) -> _SystemEventAnswer: ...
    @overload
    def on_answer(
        self, kind: Literal[ExitKind.SYSTEM_EVENT, "system-event"]
    ) -> Callable[[_SystemEventAnswer], _SystemEventAnswer]: ...
    @overload
    def on_answer(
        self, kind: Literal[ExitKind.FAIL_ENTRY, "fail-entry"], function: _FailEntryAnswer
    ) -> _FailEntryAnswer: ...
    @overload
    def on_answer(
        self, kind: Literal[ExitKind.FAIL_ENTRY, "fail-entry"]
    ) -> Callable[[_FailEntryAnswer], _FailEntryAnswer]: ...
    @overload
    def on_answer(
        self, kind: Literal[ExitKind.MEMORY_FAULT, "memory-fault"], function: _MemoryFaultAnswer
    ) -> _MemoryFaultAnswer: ...
    @overload
    def on_answer(
        self, kind: Literal[ExitKind.MEMORY_FAULT, "memory-fault"]
    ) -> Callable[[_MemoryFaultAnswer], _MemoryFaultAnswer]: ...
    @overload
    def on_answer(self, kind: Literal[ExitKind.UNKNOWN, "unknown"], function: _UnknownAnswer) -> _UnknownAnswer: ...
    @overload
    def on_answer(self, kind: Literal[ExitKind.UNKNOWN, "unknown"]) -> Callable[[_UnknownAnswer], _UnknownAnswer]: ...
    @overload
    def on_answer(
        self, kind: ExitKind | str, function: Callable[[Vcpu, VcpuExit, Answer], object]
    ) -> Callable[[Vcpu, Never, Answer], object]: ...
    @overload
    def on_answer(self, kind: ExitKind | str, function: None = None) -> Callable[[_AnswerHook], _AnswerHook]:
        """Register a function that is called after each exit of a kind has been answered.

        It takes effect at the next exit, and is called on the vCPU's thread before the guest
        continues: `function(vcpu, exit, answer)`. `answer` is an `Answer`: what answered the exit,
        and the data that the guest reads or has written. The function returns None, or a `Stop` to
        end the run. Without a function, this is a decorator. All hooks of a kind are called, in the
        order they were added.

        Args:
            kind: an `ExitKind` or its name, or "any" for the exits of every kind. Of registers,
                those exit that KVM does not know, and those that `on_exit` has selected.
            function: the hook.

        Raises:
            ValueError: there is no such kind.
            ClosedError: the machine is closed.
        """

    def off_answer(self, kind: ExitKind | str, function: Callable[[Vcpu, Never, Answer], object]) -> None:
        """Remove a hook that `on_answer` has added.

        Raises:
            ValueError: the function is not a hook of this kind.
        """

    @overload
    def hostcall(self, number: int | None = None, /) -> Callable[[_F], _F]: ...
    @overload
    def hostcall(self, number: _F, /) -> _F:
        """Decorate a function that the guest can call by a number.

        Its arguments are integers and parts of guest memory: see `pyvmm.hostcalls`.

        Args:
            number: the function's number. If a function is passed instead, it gets the next unused
                number.

        Raises:
            ValueError: the number is taken, or does not fit in 32 bits.
            ClosedError: the machine is closed.
        """

    def _time_answers(self, count: int) -> float: ...
    def _repr_html_(self) -> str: ...

@final
class IrqLine:
    """An interrupt line of a machine: `Vmm.irq`. Usable from any thread."""

    @property
    def line(self) -> int:
        """The line's number."""

    def raise_(self) -> None:
        """Raise the line: KVM_IRQ_LINE.

        Raises:
            ClosedError: the machine is closed.
        """

    def lower(self) -> None:
        """Lower the line."""

    def pulse(self) -> None:
        """Raise and lower the line, for an edge-triggered interrupt."""

@final
class BalloonDevice:
    """The memory balloon of a machine: `Vmm.balloon`. It holds the machine."""

    @property
    def target_mib(self) -> int:
        """How much memory the guest is to give, in MiB. Set it to ask for more, or to give some back."""

    @target_mib.setter
    def target_mib(self, mib: int) -> None: ...
    @property
    def actual_mib(self) -> int:
        """How much memory the guest says that it has given, in MiB."""

    @property
    def statistics(self) -> dict[str, int]:
        """The guest's newest statistics, by name: bytes of memory, and counts.

        Linux sends "swap_in", "swap_out", "major_faults", "minor_faults", "free_memory",
        "total_memory", "available_memory", "disk_caches", and since 4.16 also
        "hugetlb_allocations" and "hugetlb_failures". Empty before the first, and without
        `Balloon(statistics_s=...)`.
        """

@final
class DiskDevice:
    """A disk of a machine: an item of `Vmm.disks`.

    It holds the machine. Its counts begin with the machine, or the fork.
    """

    @property
    def name(self) -> str:
        """Its name, such as "disk0"."""

    @property
    def size(self) -> int:
        """The size in bytes. The guest sees whole sectors of 512 bytes."""

    @property
    def read_only(self) -> bool:
        """Whether the guest cannot write it."""

    @property
    def serial(self) -> str:
        """The serial number that the guest sees."""

    @property
    def failure(self) -> str | None:
        """The last request that failed, and why; None if none did."""

    @property
    def reads(self) -> int:
        """How many requests to read there were."""

    @property
    def writes(self) -> int:
        """How many requests to write there were."""

    @property
    def flushes(self) -> int:
        """How many requests to flush there were."""

    @property
    def discards(self) -> int:
        """How many requests to discard, or to write zeroes, there were."""

    @property
    def bytes_read(self) -> int:
        """How many bytes the guest has read."""

    @property
    def bytes_written(self) -> int:
        """How many bytes the guest has written."""

    @property
    def errors(self) -> int:
        """How many requests failed."""

    def resize(self, size: int) -> None:
        """Change the size, also while the guest runs, and tell the guest.

        A file grows or shrinks with it. The object of a program is not changed: it has the new size
        already.

        Args:
            size: in bytes, a multiple of 512.

        Raises:
            ConfigError: the size is no multiple of 512, or too large.
            StateError: a snapshot needs what would be cut off, or the disk has a fixed size.
            StreamError: the file cannot have this size.
            ClosedError: the machine is closed.
        """

@final
class ConsoleDevice:
    """The virtio console of a machine: `Vmm.virtio_console`. It holds the machine."""

    @property
    def ports(self) -> tuple[str, ...]:
        """The names of its ports. The first is the console."""

    def connect(self, port: str | None = None) -> socket:
        """Connect to a port, and return the host's end as a `socket.socket` of type SOCK_STREAM.

        The socket blocks by default, and works with asyncio. It first has the newest MiB that the
        guest wrote before. A guest that writes more than the socket holds waits until it is read.
        The machine's loop moves the bytes, so it has to run. The end of the machine is an end of
        the stream.

        Raises:
            ConfigError: there is no such port.
            StateError: the port is connected already.
        """

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the console, in characters."""

@final
class VirtioTransport:
    """The device's side of its transport: what `attach(transport)` of a virtio device in Python gets."""

    @property
    def name(self) -> str:
        """The name of the device, such as "virtio0"."""

    @property
    def features(self) -> int | None:
        """The feature bits that the driver has accepted, or None while it has not started the device."""

    @property
    def config(self) -> bytes:
        """The configuration space. To set it interrupts the driver, which reads it again."""

    @config.setter
    def config(self, space: bytes) -> None: ...
    def set_config_quietly(self, space: bytes) -> None:
        """Change the configuration space without an interrupt: the answer to what the driver writes."""

    def queue(self, number: int) -> Virtqueue:
        """A queue, for chains that the driver has made available. From any thread.

        Raises:
            IndexError: the device has no such queue.
        """

    def fail(self, reason: str) -> None:
        """Tell the driver that the device needs a reset. `VirtioDevice.failure` is the reason."""

    def _descriptors(self) -> list[int]: ...
    def _left(self, fd: int) -> None: ...
    def _take(self, fd: int) -> tuple[list[int | None], Virtqueue | None]: ...

@final
class Virtqueue:
    """A queue of a virtio device in Python. An iteration takes the chains that are available now."""

    @property
    def index(self) -> int:
        """Its number."""

    def pop(self) -> DescriptorChain | None:
        """Take the next chain, or return None if there is none, or the machine is paused.

        Raises:
            StateError: in a forked child.
        """

    def __iter__(self) -> Self: ...
    def __next__(self) -> DescriptorChain: ...

@final
class DescriptorChain:
    """A descriptor chain: buffers of the driver that the device reads, then those that it writes.

    `complete` gives it back to the driver; at the latest, the end of the object does. From any
    thread, also after `process` has returned. If the driver has reset the device meanwhile, the
    chain is void: `read` raises StateError, and `complete` does nothing.
    """

    @property
    def readable(self) -> int:
        """How many bytes the device can read."""

    @property
    def writable(self) -> int:
        """How many bytes the device can write."""

    def read(self, size: int = -1, /) -> bytes:
        """Read the next bytes, at most `size`, or all that are left.

        Raises:
            StateError: the chain is completed, or void.
        """

    def write(self, data: Buffer) -> int:
        """Add to what the driver gets, and return how many of the bytes there is room for.

        They are in guest memory once the chain is completed.

        Raises:
            StateError: the chain is completed.
            TypeError: the data is not bytes or another buffer.
        """

    def complete(self) -> None:
        """Give the chain back to the driver, with what was written.

        If the machine is paused, this happens when it continues. A second call does nothing.
        """

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

@final
class NetDevice:
    """A network device of a machine: an item of `Vmm.nets`. It holds the machine."""

    @property
    def name(self) -> str:
        """Its name, such as "net0"."""

    @property
    def mac(self) -> str:
        """The guest's hardware address."""

    @property
    def mtu(self) -> int | None:
        """The MTU that the guest is asked to use, or None."""

    @property
    def backend(self) -> str:
        """What is behind it, such as "tap tap0"."""

    @property
    def network(self) -> UserNetwork | NetworkPort | None:
        """The `UserNetwork` or `NetworkPort` behind it; None for any other backend."""

    @property
    def link(self) -> bool:
        """Whether the guest has a link. Set it to plug the cable in or out.

        It is False if the program has set it, and once the backend has failed. Without a link,
        frames are dropped in both directions.
        """

    @link.setter
    def link(self, is_up: bool) -> None: ...
    @property
    def failure(self) -> str | None:
        """Why the backend takes and gives no more frames, or None."""

    @property
    def counts(self) -> dict[str, int]:
        """Counts since the machine was made.

        "received" and "received_bytes" are what the guest has received, "sent" and "sent_bytes"
        what it has sent. "receive_dropped" and "send_dropped" had no link, or were malformed or
        longer than the guest's buffers; "backend_dropped" is what the backend has dropped.
        """

    def connect(self, backend: object) -> None:
        """Put another backend behind the device, as `Net` takes it. The former one is closed.

        Raises:
            ConfigError: it is no backend.
            StreamError: it cannot be opened.
        """

    def capture(self, path: str | Path | None) -> int:
        """Record frames of both directions into a new file; None ends the recording.

        Wireshark opens the file: pcap, with nanoseconds. A former recording ends; the number of its
        frames is returned. A frame whose checksum is left to the receiver is recorded without it.

        Raises:
            StreamError: the file cannot be written.
        """

@final
class FrameQueue:
    """The frames between a guest and a program, in two bounded queues. `PythonNet` has one."""

    def __new__(cls, most: int) -> Self:
        """With room for this many frames in each direction."""

    def send(self, frame: bytes) -> bool:
        """Give the guest a frame. False if there is no room for it."""

    def receive(self, most: int) -> list[bytes]:
        """Take at most this many frames of the guest."""

    def fileno(self) -> int:
        """Readable while frames of the guest wait."""

    @property
    def dropped(self) -> int:
        """How many frames were dropped."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class VirtioDevice:
    """A virtio device of a machine: an item of `Vmm.virtio`.

    It holds the machine. Its counts begin with the machine, or the fork.
    """

    @property
    def name(self) -> str:
        """Its name, such as "disk0"."""

    @property
    def device_type(self) -> int:
        """The device type (virtio 1.2, section 5), such as 2 for a disk."""

    @property
    def address(self) -> int:
        """The guest-physical address of its registers."""

    @property
    def irq(self) -> int | None:
        """Its interrupt line, or None without an interrupt controller."""

    @property
    def offered(self) -> int:
        """The feature bits that the device offers."""

    @property
    def features(self) -> int | None:
        """The feature bits that the driver has accepted, or None while it has not started the device."""

    @property
    def status(self) -> int:
        """The status field, as the driver reads it: 0 after a reset, 15 for a device in use."""

    @property
    def failure(self) -> str | None:
        """Why the device needed a reset, or what failed behind it, most recently; otherwise None."""

    @property
    def notifications(self) -> int:
        """How often the loop was notified by the driver."""

    @property
    def taken(self) -> int:
        """How many descriptor chains the device has taken from the driver."""

    @property
    def chains(self) -> int:
        """How many descriptor chains were given back to the driver."""

    @property
    def interrupts(self) -> int:
        """How often the device has interrupted the guest."""

    @property
    def bytes_from_guest(self) -> int:
        """How many bytes those chains had for the device, with the headers of requests."""

    @property
    def bytes_to_guest(self) -> int:
        """How many bytes the device has written to those chains, with the headers of replies."""

@final
class Stats:
    """Counters of a machine's exits, of its vCPUs' time, and of the work of its virtio devices: `Vmm.stats`.

    They count between `enable` and `disable`, or inside `with vmm.stats:`. They can be read at any
    time, from any thread, also after the machine is closed. In a forked child every call raises
    StateError.
    """

    def enable(self) -> None:
        """Start counting, at each vCPU's next entry to the guest. May be called while the guest runs."""

    def disable(self) -> None:
        """Stop counting. The counts are kept."""

    def reset(self) -> None:
        """Set all counters to zero."""

    @property
    def enabled(self) -> bool:
        """Whether the counters are enabled."""

    @property
    def exits(self) -> list[ExitCount]:
        """The exits by vCPU, kind, direction and address, as `ExitCount`s, the most frequent first."""

    @property
    def vcpus(self) -> list[VcpuTime]:
        """The time of each vCPU, by number, as `VcpuTime`s."""

    @property
    def virtio(self) -> list[VirtioCount]:
        """The work of each virtio device, as `VirtioCount`s, in the order of `Vmm.virtio`."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...
    def _repr_html_(self) -> str: ...

@final
class Trace:
    """A trace of a machine, written inside `with vmm.trace(path): ...`. Created by `Vmm.trace`."""

    @property
    def path(self) -> Path:
        """The file."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

def close_all() -> None:
    """Close every machine that is alive. Called at interpreter exit."""

def cpu_features() -> list[str]:
    """Names of the CPUID features that `CpuConfig.hide` and `expose` know."""

def cpuid_features(entry: CpuidEntry) -> dict[str, tuple[str, ...]]:
    """Return the names of the features in a `CpuidEntry`, as in /proc/cpuinfo, by register: a dict of tuples.

    Registers without a known feature are left out.
    """

def cpuid_table(cpu: CpuConfig | None = None) -> tuple[CpuidEntry, ...]:
    """Return the CPUID table of vCPU 0 in a machine with this `CpuConfig`: a tuple of `CpuidEntry`.

    None means all that KVM supports on this host, which is more than any template offers.

    Raises:
        ConfigError: the configuration is invalid, or the host lacks a feature of its template.
        KvmUnavailableError: there is no usable /dev/kvm.
    """

def embedded_guest() -> bytes:
    """The machine code of the built-in guest: 64-bit ring 3, position-independent."""

def kvm_info() -> dict[str, object]:
    """Describe /dev/kvm: api_version, capabilities, max_vcpus, software_kvm, hidden_features.

    Raises:
        KvmUnavailableError: there is no usable /dev/kvm; `hint` says what to do.
    """

def kick_signal() -> int:
    """Return the number of the signal that makes vCPUs leave the guest. The first call claims the signal.

    Raises:
        StateError: the program uses every real-time signal.
    """

def set_kick_signal(signal: int) -> None:
    """Choose the kick signal before the first machine is created.

    By default it is the first real-time signal that has no handler then. If the chosen signal
    already has a handler, that handler is still called for signals that are not kicks.

    Raises:
        ConfigError: the signal cannot be used.
        StateError: another signal is already in use.
    """

@final
class UserNetwork:
    """A user network: the gateway that a `UserNet` configures. docs/user-net.md describes it.

    It takes and gives Ethernet frames on its own: a program that has a loop calls `receive` when
    the file descriptor is readable, and after `send`.

    Args:
        config: a `UserNet`; None means the default.

    Raises:
        ConfigError: a value cannot be used.
        OSError: a port cannot be listened at.
    """

    def __new__(cls, config: UserNet | None = None) -> Self: ...
    @property
    def forwards(self) -> list[tuple[str, str, int, int]]:
        """The ports of the host that lead to the guest: (protocol, address, port, guest port) of each.

        The ports are those that the host has chosen if 0 was configured, and in a fork.
        """

    @property
    def connections(self) -> int:
        """The number of TCP connections."""

    @property
    def flows(self) -> int:
        """The number of UDP flows: pairs of an endpoint of the guest and a destination."""

    @property
    def dropped(self) -> int:
        """The number of frames that were dropped because the guest did not take them."""

    def send(self, frame: bytes) -> None:
        """Take a frame of the guest, from its Ethernet header on."""

    def receive(self) -> list[bytes]:
        """The frames for the guest that have come. The list is empty if there are none."""

    def fileno(self) -> int:
        """A file descriptor that is readable when `receive` has something to do. Do not read it."""

    @property
    def questions_fd(self) -> int:
        """A file descriptor that is readable while `take_questions` has something. Do not read it."""

    def take_questions(self) -> list[tuple[int, str, str, int]]:
        """The questions to the policy, each to be answered: (number, protocol, address, port)."""

    def answer(self, number: int, is_allowed: bool) -> None:
        """Answer a question by its number."""

    def reset(self) -> None:
        """End all connections with a reset."""

    def close(self) -> None:
        """End all connections and stop listening. Frames are dropped from then on."""

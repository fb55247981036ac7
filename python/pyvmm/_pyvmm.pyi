"""The native module: the event manager, the machine and its parts, written in Rust.

Everything here is exported by `pyvmm`, under the same name.
"""

from collections.abc import AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, final

from typing_extensions import Buffer

from pyvmm.callbacks import Later
from pyvmm.config import VmmConfig
from pyvmm.devices import Unanswered
from pyvmm.events import EventSet, Subscriber
from pyvmm.exits import Exit, ExitHandler, VmRunState

__all__ = [
    "EventFd",
    "EventManager",
    "EventOps",
    "Events",
    "GuestMemory",
    "KvmVm",
    "RemoteEndpoint",
    "Serial",
    "SubscriberId",
    "TimerFd",
    "Vmm",
    "VmmExitHandler",
    "WrappedExitHandler",
    "close_all",
    "cpu_features",
    "embedded_guest",
    "kvm_info",
]

class _HasFileno(Protocol):
    def fileno(self) -> int: ...

@final
class EventFd:
    """A counter that the kernel keeps behind a file descriptor: eventfd(2).

    Args:
        initial: the count it starts with, 0 to 2^64 - 2.
        nonblocking: `read` of an empty counter and `write` to a full one raise BlockingIOError; else they wait.
        semaphore: `read` takes one at a time instead of all.
    """

    def __new__(cls, initial: int = 0, *, nonblocking: bool = True, semaphore: bool = False) -> Self: ...
    def read(self) -> int:
        """Take the count, or one in semaphore mode.

        Raises:
            BlockingIOError: the count is zero and the EventFd is nonblocking.
            ValueError: it is closed.
        """

    def write(self, value: int = 1) -> None:
        """Add to the count.

        Raises:
            BlockingIOError: the count would pass 2^64 - 2 and the EventFd is nonblocking.
            OverflowError: the value is not from 0 to 2^64 - 1.
            OSError: the value is 2^64 - 1, which the kernel refuses.
            ValueError: it is closed.
        """

    def fileno(self) -> int:
        """The file descriptor's number."""

    def close(self) -> None:
        """Close the descriptor. A `read` that waits in another thread keeps it until it returns."""

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

    def __aiter__(self) -> AsyncIterator[int]: ...
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
    """A timer behind a file descriptor, on the monotonic clock: timerfd_create(2). A source of events."""

    def __new__(cls) -> Self: ...
    def set(self, delay: float, interval: float = 0.0) -> None:
        """Expire so many seconds later, and with an interval again and again. Expirations so far are forgotten.

        Raises:
            ValueError: a time is negative, NaN or too long, or the timer is closed.
        """

    def set_at(self, time: float, interval: float = 0.0) -> None:
        """Expire at a time of `time.monotonic()`; one that has passed is at once."""

    def clear(self) -> None:
        """Unset it and forget the expirations so far."""

    def read(self) -> int:
        """How often it has expired since the last read or set; missed ticks are counted.

        Raises:
            BlockingIOError: it has not.
        """

    def fileno(self) -> int:
        """The file descriptor's number."""

    def close(self) -> None:
        """Close the descriptor."""

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

    def __aiter__(self) -> AsyncIterator[int]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

@final
class Events:
    """Events of a file descriptor: what to watch it for, or what happened there.

    Args:
        source: an int, or an object with `fileno()`; it is kept alive while it is registered.
        event_set: what to watch for.
        data: a number from 0 to 2^32 - 1 that comes back with each event.
        drain: read the source, a nonblocking `EventFd` or a `TimerFd`, before each call of the subscriber, which
            finds what was read in `count`. The source stays open while it is registered.

    Raises:
        ValueError: the source is closed, or a flag has no meaning.
        TypeError: `drain` for a source that cannot be drained.
    """

    def __new__(
        cls, source: int | _HasFileno, event_set: EventSet | int = ..., data: int = 0, *, drain: bool = False
    ) -> Self: ...
    @property
    def count(self) -> int | None:
        """What was read of a source watched with `drain`: an eventfd's count, a timer's expirations. Else None."""

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
    """Names a subscriber of one event manager. Hashable."""

    def __hash__(self) -> int: ...

@final
class EventOps:
    """Changes what a subscriber watches.

    One passed to `init` or `process` is usable only during that call; later use raises RuntimeError. One from
    `EventManager.event_ops` is usable as long as its subscriber is registered.
    """

    def add(self, events: Events) -> None:
        """Watch a file descriptor.

        Raises:
            EventError: it is registered already, closed, or a regular file, which epoll does not watch.
        """

    def modify(self, events: Events) -> None:
        """Watch a file descriptor of this subscriber for other events, or re-arm a one-shot.

        Raises:
            EventError: it is not this subscriber's.
        """

    def remove(self, source: Events | int | _HasFileno) -> None:
        """Stop watching a file descriptor of this subscriber. By number or `Events` it may be closed already.

        Raises:
            EventError: it is not this subscriber's.
        """

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., object])

@final
class EventManager:
    """Subscribers, and the loop that dispatches events to them by file descriptor.

    One thread at a time turns the loop; any thread may add and remove subscribers meanwhile. It needs no
    machine and no /dev/kvm.
    """

    def __new__(cls) -> Self: ...
    def add_subscriber(self, subscriber: Subscriber | WrappedExitHandler | VmmExitHandler) -> SubscriberId:
        """Register an object with `init(ops)` and `process(events, ops)`; calls its `init` before it returns.

        Raises:
            TypeError: a method is missing.
            Exception: what `init` raised; the subscriber is not registered then.
        """

    def remove_subscriber(self, id: SubscriberId) -> object:
        """Unregister a subscriber with all its file descriptors and return it.

        Raises:
            EventError: this manager has no such subscriber, or no longer.
        """

    def event_ops(self, id: SubscriberId) -> EventOps:
        """What changes the registrations of a subscriber, from any thread, while it is registered.

        Raises:
            EventError: this manager has no such subscriber, or no longer.
        """

    def run(self) -> int:
        """Wait for events, dispatch them once, and return how many there were.

        The first exception of a callback ends the dispatch and comes out of here. Level-triggered events
        behind it are reported again by the next run.

        Raises:
            StateError: another thread, or a callback's caller, is in `run`.
        """

    def run_with_timeout(self, milliseconds: int) -> int:
        """`run` for at most this long, 0 when the time passed. A negative number is no limit."""

    def run_forever(self) -> None:
        """Dispatch until `stop` is called or a callback raises; raises as `run` does."""

    def stop(self) -> None:
        """End `run_forever` or `run_async`, or at once the next one. From any thread or callback."""

    def remote_endpoint(self) -> RemoteEndpoint:
        """A way to reach this loop from other threads."""

    def on(self, source: int | _HasFileno, event_set: EventSet | int = ...) -> Callable[[_F], _F]:
        """Decorate a function to be called with each event of a source.

        The function gets an attribute `subscriber_id`, for `remove_subscriber`.
        """

    def call_later(self, seconds: float, function: Callable[[], object]) -> Later:
        """Call a function once, so many seconds later. The result has `cancel()`."""

    def run_async(self) -> Coroutine[Any, Any, None]:
        """`run_forever` inside a running asyncio loop, which stays responsive.

        A subscriber's `process` may be a coroutine function: it runs as a task, and its exception ends the run.
        """

    @property
    def slow_callback_duration(self) -> float | None:
        """Seconds above which a callback is logged with its name, as a warning of the logger "pyvmm"; None for none.

        Raises:
            ValueError: set to a negative number or NaN.
        """

    @slow_callback_duration.setter
    def slow_callback_duration(self, seconds: float | None) -> None: ...
    @property
    def slowest_callback(self) -> tuple[str, float] | None:
        """The name of the callback that took longest and its seconds; None before one was timed.

        Callbacks are timed while `slow_callback_duration` is set.
        """

    @property
    def turns(self) -> int:
        """How often the loop has turned."""

    @property
    def dispatched(self) -> int:
        """How many events it has dispatched."""

    def _set_awaiter(self, awaiter: Callable[[Any], object] | None) -> None: ...
    def _take_stop(self) -> bool: ...
    def fileno(self) -> int:
        """The epoll set's file descriptor: readable when an event is ready."""

@final
class RemoteEndpoint:
    """Reaches an event manager's loop from other threads. Made by `EventManager.remote_endpoint`."""

    def call_blocking(self, function: Callable[[EventManager], _T], timeout: float | None = None) -> _T:
        """Call a function with the manager, on the loop's thread; its value, or its exception, comes back here.

        On the loop's own thread it is called at once. Else some thread has to be in a run of the loop.

        Raises:
            TimeoutError: the call was not made within so many seconds; it may still be made.
        """

    def fire(self, function: Callable[[EventManager], object]) -> None:
        """Have a function called with the manager on the loop's thread. Its exception ends the run there."""

    def kick(self) -> None:
        """Have the loop turn once."""

@final
class VmmExitHandler:
    """Stops a run loop: an `exit_event` that a kick writes and a `keep_running` flag that the loop reads.

    A subscriber: on IN it clears the flag, on ERROR it removes itself.
    """

    def __new__(cls) -> Self: ...
    @property
    def exit_event(self) -> EventFd:
        """The eventfd that a kick writes."""

    @property
    def keep_running(self) -> bool:
        """False once the loop has processed a kick."""

    def kick(self) -> None:
        """Write the exit event. From any thread."""

    def rearm(self) -> None:
        """Set the flag again and forget the kicks so far."""

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
        """Write the exit event. From any thread."""

    def rearm(self) -> None:
        """Set the flag again and forget the kicks so far."""

    def clone(self) -> WrappedExitHandler:
        """Another object for the same handler."""

    def init(self, ops: EventOps) -> None:
        """Register the exit event for IN."""

    def process(self, events: Events, ops: EventOps) -> None:
        """Handle an event of the exit event."""

    def __copy__(self) -> WrappedExitHandler: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class GuestMemory:
    """The RAM of a machine, by guest-physical address. Readable and writable at any time, from any thread."""

    def read(self, address: int, length: int) -> bytes:
        """A copy of guest memory.

        Raises:
            GuestMemoryError: a byte of the range is not RAM.
            StateError: the machine is closed.
        """

    def write(self, address: int, data: Buffer) -> None:
        """Copy bytes into guest memory.

        Raises:
            GuestMemoryError: a byte of the range is not RAM; nothing is written then.
            StateError: the machine is closed.
        """

    @property
    def size(self) -> int:
        """Bytes of RAM."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Start and length of each range of RAM: one, or two around the gap from 3 to 4 GiB."""

@final
class Serial:
    """The host's side of the first serial port, a 16550A."""

    def send(self, data: bytes | bytearray) -> None:
        """Give the guest input; it reads it at its own pace."""

    def read(self) -> bytes:
        """Take the output there is. Without a configured output, at most the newest MiB."""

    @property
    def input_waiting(self) -> int:
        """Bytes of input that the guest has not read yet."""

    def fileno(self) -> int:
        """A file descriptor that is readable when there is output to take, on a machine whose output Python takes.

        Raises:
            ValueError: the machine's output goes nowhere else, so that nobody takes it as it comes.
        """

    @property
    def input_wanted(self) -> EventFd:
        """Readable when the guest has read all its input; readable at first, too."""

@final
class KvmVm:
    """One KVM virtual machine, without an event loop: whoever made it is told of the guest's end by a kick.

    Args:
        config: what it is made of; the serial port must have no streams.
        exit_handler: an object with `kick()`, called on the thread of the vCPU whose guest has ended.

    Raises:
        VmmError: as for `Vmm`.
    """

    def __new__(cls, config: VmmConfig, exit_handler: ExitHandler) -> Self: ...
    def run(self, vcpu_run_addr: int | None = None) -> None:
        """Start a thread `vcpu_{id}` for each vCPU and return.

        With an address the vCPUs start there. Without one they start at `entry`, or go on where they stopped.

        Raises:
            StateError: the machine is running, its guest has ended, or it is closed.
        """

    def wait(self, timeout: float | None = None) -> Exit | None:
        """Wait until the machine no longer runs; how the guest ended, or None when the time passed first.

        Raises:
            Exception: what the exit handler's `kick` raised.
        """

    def shutdown(self) -> None:
        """Stop the vCPUs and wait for their threads. A guest that had not ended can go on with `run`."""

    def close(self) -> None:
        """Shut down and release everything. Does nothing the second time."""

    @property
    def entry(self) -> int:
        """Where the configuration's code starts."""

    @property
    def state(self) -> VmRunState:
        """Where the machine stands."""

    @property
    def exit(self) -> Exit | None:
        """How the guest ended; None while it has not."""

    @property
    def memory(self) -> GuestMemory:
        """Guest memory."""

    @property
    def serial(self) -> Serial:
        """The first serial port."""

    @property
    def unanswered(self) -> list[Unanswered]:
        """Accesses that no device answered."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class Vmm:
    """A virtual machine: built by this call, run by `run`, released by `close` or at the end of a `with`.

    Args:
        config: what it is made of; None for the guest inside the package.
        event_manager: a loop to share with others; None for one of its own. In a shared loop the `run` of each
            machine turns it for all, on its own thread, and ends for that machine alone.

    Raises:
        ConfigError: a value cannot be used; the text starts with its key.
        BootError: the kernel, RAM disk or code cannot be loaded.
        KvmUnavailableError: there is no usable /dev/kvm; `hint` says what to do.
        KvmError: KVM refused a part.
    """

    def __new__(cls, config: VmmConfig | None = None, *, event_manager: EventManager | None = None) -> Self: ...
    def run(self, timeout: float | None = None) -> Exit:
        """Run the guest until it ends, `stop` is called, or the time passes, in seconds.

        Turns the event manager's loop meanwhile: subscribers are called on this thread. After a stop, a
        timeout or an exception, another `run` goes on where this one ended.

        Raises:
            StateError: a run is in progress, the guest has ended, or the machine is closed.
            StreamError: a stream of the serial port failed.
            KeyboardInterrupt: Ctrl-C, within 100 ms.
            Exception: the first exception of a callback.
        """

    def run_async(self, timeout: float | None = None) -> Coroutine[Any, Any, Exit]:
        """`run` inside a running asyncio loop, which stays responsive: the guest's loop turns in another thread.

        Cancelling it stops the guest. A subscriber's `process` may be a coroutine function: it runs as a task of
        the asyncio loop, and its exception ends the run.
        """

    def __aenter__(self) -> Coroutine[Any, Any, Self]: ...
    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> Coroutine[Any, Any, None]: ...
    def stop(self) -> None:
        """End the run in progress, or at once the next one if there is none. From any thread or callback."""

    def close(self) -> None:
        """Stop, wait for the run in progress to end, and release everything. Does nothing the second time.

        In a callback it takes effect when the run ends.
        """

    def add_subscriber(self, subscriber: Subscriber | WrappedExitHandler | VmmExitHandler) -> SubscriberId:
        """Register a subscriber with the machine's event manager; see `EventManager.add_subscriber`."""

    def remove_subscriber(self, id: SubscriberId) -> object:
        """Unregister a subscriber and return it; see `EventManager.remove_subscriber`."""

    @property
    def config(self) -> VmmConfig:
        """What it is made of."""

    @property
    def event_manager(self) -> EventManager:
        """The event manager whose loop `run` turns."""

    @property
    def exit_handler(self) -> WrappedExitHandler:
        """The handler that ends a run."""

    @property
    def memory(self) -> GuestMemory:
        """Guest memory."""

    @property
    def serial(self) -> Serial:
        """The first serial port."""

    @property
    def state(self) -> VmRunState:
        """Where the machine stands."""

    @property
    def unanswered(self) -> list[Unanswered]:
        """Accesses that no device answered, counted by address."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

def close_all() -> None:
    """Close every machine that is alive. Called at interpreter exit."""

def cpu_features() -> list[str]:
    """Names of CPUID features that `CpuConfig.hide` knows."""

def embedded_guest() -> bytes:
    """The machine code of the guest inside the package: 64-bit ring 3, position-independent."""

def kvm_info() -> dict[str, object]:
    """What /dev/kvm offers: api_version, capabilities, max_vcpus, software_kvm, hidden_features.

    Raises:
        KvmUnavailableError: there is no usable /dev/kvm; `hint` says what to do.
    """

"""The native module: the event manager, the machine and its parts, written in Rust.

Everything here is exported by `pyvmm`, under the same name.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextvars import Context
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, final, overload

from typing_extensions import Buffer, disjoint_base

from pyvmm.callbacks import Later
from pyvmm.config import SerialConfig, VmmConfig
from pyvmm.devices import Device, Resource, Unanswered
from pyvmm.events import EventSet, Subscriber
from pyvmm.exits import Exit, ExitHandler, ExitKind, VmRunState
from pyvmm.registers import CpuidEntry, DebugRegs, Fpu, Lapic, MpState, Msrs, Regs, Sregs, VcpuEvents, Xcrs
from pyvmm.stats import ExitCount, VcpuTime

__all__ = [
    "DirtyPages",
    "EventFd",
    "EventManager",
    "EventOps",
    "Events",
    "GuestMemory",
    "IrqLine",
    "Kvm",
    "KvmVm",
    "MemorySlot",
    "MsrBytes",
    "RegisterBytes",
    "RemoteEndpoint",
    "Serial",
    "Snapshot",
    "Stats",
    "SubscriberId",
    "TimerFd",
    "Trace",
    "Vcpu",
    "VcpuExit",
    "Vmm",
    "VmmExitHandler",
    "WrappedExitHandler",
    "close_all",
    "cpu_features",
    "embedded_guest",
    "kick_signal",
    "kvm_info",
    "set_kick_signal",
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
            ClosedError: it is closed.
        """

    def write(self, value: int = 1) -> None:
        """Add to the count.

        Raises:
            BlockingIOError: the count would pass 2^64 - 2 and the EventFd is nonblocking.
            OverflowError: the value is not from 0 to 2^64 - 1.
            OSError: the value is 2^64 - 1, which the kernel refuses.
            ClosedError: it is closed.
        """

    def fileno(self) -> int:
        """The file descriptor's number."""

    def close(self) -> None:
        """Close the descriptor, which ends an `async for` over it.

        A `read` that waits in another thread keeps it until it returns.
        """

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

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
    """A timer behind a file descriptor, on the monotonic clock: timerfd_create(2). A source of events."""

    def __new__(cls) -> Self: ...
    def set(self, delay: float, interval: float = 0.0) -> None:
        """Expire so many seconds later, and with an interval again and again. Expirations so far are forgotten.

        Raises:
            ValueError: a time is negative, NaN or too long.
            ClosedError: it is closed.
        """

    def set_at(self, time: float, interval: float = 0.0) -> None:
        """Expire at a time of `time.monotonic()`; one that has passed is at once."""

    def clear(self) -> None:
        """Unset it and forget the expirations so far."""

    def read(self) -> int:
        """How often it has expired since the last read or set; missed ticks are counted.

        Raises:
            BlockingIOError: it has not.
            ClosedError: it is closed.
        """

    def fileno(self) -> int:
        """The file descriptor's number."""

    def close(self) -> None:
        """Close the descriptor, which ends an `async for` over it."""

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

    def __aiter__(self) -> AsyncIterator[int]: ...
    def _take(self) -> int: ...
    def _begin_wait(self, waiter: object) -> int: ...
    def _end_wait(self) -> None: ...
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
_C = TypeVar("_C")
_F = TypeVar("_F", bound=Callable[..., object])
_H = TypeVar("_H", bound=Callable[["Vcpu", Any], object])

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

    def on(
        self, source: int | _HasFileno, event_set: EventSet | int = ..., data: int = 0, *, drain: bool = False
    ) -> Callable[[_F], _F]:
        """Decorate a function to be called with each event of a source; `data` and `drain` are as for `Events`.

        The function gets the attributes `subscriber_id`, for `remove_subscriber`, and `subscriber_ids`, which has those
        of the decorators beneath too. In place of what takes no attributes, as a method, comes a callable that does.
        """

    def call_later(
        self, seconds: float, function: Callable[..., object], *arguments: object, context: Context | None = None
    ) -> Later:
        """Call a function once with these arguments, so many seconds later. The result has `cancel()`.

        A time that has passed is at once, in the next turn. Calls are made in the order of their times. All share one
        file descriptor. The function runs in this context, or in a copy of the caller's.

        Raises:
            ValueError: the time is NaN.
        """

    def run_async(self) -> Coroutine[Any, Any, None]:
        """`run_forever` inside a running asyncio loop, which stays responsive.

        A subscriber's `process` may be a coroutine function: it runs as a task, and its exception ends the run.
        Coroutines that still run after `stop` have a second to come to their end; those that do not are cancelled, and
        the asyncio loop's exception handler is told which.

        Raises:
            StateError: the manager is hosted or in a run already.
            Exception: the first exception of a callback or a coroutine. The others are in its notes and go to the
                asyncio loop's exception handler.
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

    def _cancel_later(self, number: int) -> bool: ...
    def _has_removed(self, id: SubscriberId) -> bool: ...
    def _note_callback(self, name: str, seconds: float) -> None: ...
    def _begin_hosting(self, awaiter: Callable[[Any, str], None]) -> None: ...
    def _end_hosting(self) -> None: ...
    def _take_stop(self) -> bool: ...
    def fileno(self) -> int:
        """A file descriptor for other loops to wait on: readable when an event is ready.

        It is the same as long as the manager lives.

        Raises:
            StateError: in a forked child, whose parent's it is.
        """

@final
class _Cancel:
    """Ends one run of a machine and no other."""

    def set(self) -> None:
        """From any thread, at any time."""

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
    """The memory of a machine, by guest-physical address. Readable and writable at any time, from any thread.

    Numbers are little-endian. An address or length is 0 to 2^64 - 1; others raise OverflowError.
    """

    def read(self, address: int, length: int, *, vcpu: Vcpu | None = None) -> bytes:
        """A copy of guest memory.

        With a vCPU, which must not be running, the address is guest-virtual and goes through that vCPU's page tables.

        Raises:
            GuestMemoryError: a byte of the range is not memory, or not mapped.
            StateError: the machine is closed, or the vCPU is running.
        """

    def readinto(self, address: int, buffer: Buffer, *, vcpu: Vcpu | None = None) -> None:
        """Fill a writable buffer with a copy of guest memory; raises as `read` does."""

    def write(self, address: int, data: Buffer, *, vcpu: Vcpu | None = None) -> None:
        """Copy a buffer's bytes into guest memory.

        Raises:
            GuestMemoryError: a byte of the range is not memory; nothing is written then.
            StateError: the machine is closed, or the vCPU is running.
        """

    def read_u8(self, address: int) -> int:
        """The number of 8 bits at an address."""

    def read_u16(self, address: int) -> int:
        """The number of 16 bits at an address; in one access where it is aligned."""

    def read_u32(self, address: int) -> int:
        """The number of 32 bits at an address; in one access where it is aligned."""

    def read_u64(self, address: int) -> int:
        """The number of 64 bits at an address; in one access where it is aligned."""

    def write_u8(self, address: int, value: int) -> None:
        """Put a number of 8 bits at an address."""

    def write_u16(self, address: int, value: int) -> None:
        """Put a number of 16 bits at an address; in one access where it is aligned."""

    def write_u32(self, address: int, value: int) -> None:
        """Put a number of 32 bits at an address; in one access where it is aligned."""

    def write_u64(self, address: int, value: int) -> None:
        """Put a number of 64 bits at an address; in one access where it is aligned."""

    def fill(self, address: int, length: int, value: int = 0) -> None:
        """Set every byte of a range; raises as `write` does."""

    def find(self, data: bytes | bytearray, start: int = 0, end: int | None = None) -> int | None:
        """Where these bytes first stand, at or after `start` and wholly before `end`; None where they do not.

        Raises:
            ValueError: there are no bytes to look for.
            ClosedError: the machine is closed.
        """

    def view(self, address: int, length: int) -> memoryview:
        """A memoryview of guest memory itself, without a copy. It has to lie in one memory slot.

        The memory stays mapped as long as the view lives, also when the slot is removed or the machine closed. In a
        forked child a view shows what the memory held, and what the child writes is the child's own.

        Raises:
            GuestMemoryError: a byte of the range is not memory, or the range lies in several slots.
            ClosedError: the machine is closed.
        """

    def overlay(self, address: int, type: type[_C]) -> _C:
        """A ctypes structure, union or array that lies in guest memory itself: `type.from_buffer(view(...))`.

        Raises:
            TypeError: it is no ctypes type.
            GuestMemoryError, StateError: as `view` does.
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
            address: guest-physical start, at a page of 4 KiB.
            size: bytes, whole pages; not needed with a source.
            source: a file or memfd whose pages the guest shares with all who map them; None for zeroed pages.
            offset: where in the source the memory begins, at a page.
            read_only: the guest cannot write; what it writes is an MMIO access.

        Raises:
            GuestMemoryError: it overlaps other memory, a device, or what KVM itself has there; it is no whole number of
                pages, or the source is shorter or open for reading only. Nothing is changed then.
            KvmError: KVM refuses it.
            ClosedError: the machine is closed.
        """

    def remove(self, slot: MemorySlot) -> None:
        """Take memory away, also while the guest runs; its accesses are MMIO then.

        Raises:
            GuestMemoryError: the machine has no such slot, or no longer.
            ClosedError: the machine is closed.
        """

    @property
    def slots(self) -> tuple[MemorySlot, ...]:
        """The memory slots, by address."""

    @property
    def log_dirty(self) -> bool:
        """Whether written pages are noted for `dirty`: KVM_MEM_LOG_DIRTY_PAGES. It costs the guest time."""

    @log_dirty.setter
    def log_dirty(self, is_on: bool) -> None: ...
    def dirty(self) -> DirtyPages:
        """The pages written since `log_dirty` was set or since the last call, by the guest and by calls of this object.

        No written page is left out. KVM may add pages that the guest has only read.

        What is written through a view is not noted.

        Raises:
            StateError: `log_dirty` is not set, or the machine is closed.
        """

    @property
    def size(self) -> int:
        """Bytes of memory."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Start and length of each range of memory, by address."""

@final
class MemorySlot:
    """A memory slot of a machine: KVM_SET_USER_MEMORY_REGION."""

    @property
    def number(self) -> int:
        """KVM's number for it."""

    @property
    def start(self) -> int:
        """Guest-physical start."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def read_only(self) -> bool:
        """Whether the guest cannot write it."""

    @property
    def shared(self) -> bool:
        """Whether a file or memfd stands behind it."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class DirtyPages:
    """The pages of 4 KiB that were written, of every memory slot."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Start and length of each run of written pages, by address."""

    @property
    def bitmaps(self) -> dict[int, bytes]:
        """For each slot's start one bit a page, the lowest bit of the first byte for the first page; whole 8 bytes."""

    def __len__(self) -> int:
        """How many pages."""

@final
class Serial:
    """The host's side of the first serial port, a 16550A."""

    def send(self, data: bytes | bytearray) -> None:
        """Give the guest input; it reads it at its own pace.

        Raises:
            ClosedError: the machine is closed.
        """

    def read(self) -> bytes:
        """Take the output there is. Without a configured output, at most the newest MiB."""

    def stop_at(self, text: bytes | bytearray) -> None:
        """End the run in progress or the next one, once, at the byte that completes this text.

        What the guest has printed before does not count. The run ends with `Exit(reason="stopped", value=text)`, and
        the guest stands behind the instruction that printed the byte; the next run goes on from there. An empty text
        takes the request back.

        Raises:
            ClosedError: the machine is closed.
        """

    def _take(self, most: int) -> bytes: ...
    def _settle(self, written: int, again_s: float | None) -> None: ...
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
class Snapshot:
    """A machine as it was, made by `Vmm.snapshot` or `Snapshot.load`. Nothing changes it; threads may share it."""

    def fork(
        self,
        *,
        serial: SerialConfig | None = None,
        event_manager: EventManager | None = None,
        setup: Callable[[Vmm], object] | None = None,
        entropy: Callable[[Vmm], object] | tuple[int, int] | None = None,
    ) -> Vmm:
        """A new machine that goes on from here.

        The snapshot, the machine it was taken of and other forks see nothing of it.

        Args:
            serial: the streams of its serial port; None: its output is kept for `serial.read()`.
            event_manager: a loop to share with others; None for one of its own.
            setup: called with the machine before its devices are given their state: adds the Python devices that the
                snapshot has, and what else is the program's own: hooks, eventfds in the kernel, subscribers.
            entropy: writes new randomness into the guest before it runs: a callable that is given the machine, or a
                guest-physical address and a number of bytes, which are filled from os.urandom. None: the fork draws the
                same random numbers as every other.

        Raises:
            KvmError: KVM refused a part.
            SnapshotError: the snapshot's file has been changed since it was loaded.
            StateError: the snapshot has a device that this machine has not.
        """

    def fork_many(
        self,
        count: int,
        changes: Callable[[int], dict[str, Any]] | None = None,
        *,
        entropy: Callable[[Vmm], object] | tuple[int, int] | None = None,
    ) -> list[Vmm]:
        """So many forks, made in parallel. When one cannot be made, none is left.

        `changes`, if given, is called with each one's number for its arguments of `fork`, as a dict; `entropy` is that
        of all whose arguments have none.
        """

    def save(
        self,
        path: str | PathLike[str],
        base: Snapshot | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Write it to a file, which `load` reads: see docs/snapshot-format.md.

        Pages of zeros take no room. The file gets its name when all of it is on the disk: until then, and whatever
        fails, a file of that name is as it was.

        Args:
            path: the file.
            base: write only the pages that differ from those of this snapshot; loading needs it again.
            progress: called with how many bytes of how many have been written; what it raises ends the writing.

        Raises:
            OSError: (a StreamError) the file cannot be written.
            SnapshotError: the base's memory has another size, a file under this snapshot has been changed, or
                the state of devices is larger than 256 MiB.
        """

    @staticmethod
    def load(
        path: str | PathLike[str],
        base: Snapshot | str | PathLike[str] | None = None,
        *,
        force: bool = False,
        copy: bool = False,
        verify: bool = False,
    ) -> Snapshot:
        """A snapshot from its file. Its pages are mapped when they are needed: it takes the same time for any size.

        The file must stay as it is for as long as the snapshot or a fork of it lives; `save` to the same name does not
        change it, but puts another in its place. What was written to it is noticed at the next fork or reset.

        Args:
            path: the file.
            base: the snapshot that the file was saved against, or its file.
            force: load it although this machine lacks something of the one it was taken on.
            copy: read its pages into memory: then nothing that happens to the file matters.
            verify: read all pages and check their checksum. That of the rest is always checked.

        Raises:
            SnapshotError: the file is damaged, of another version or machine, or needs another base.
            OSError: (a StreamError) the file cannot be read.
        """

    @staticmethod
    def inspect(path: str | PathLike[str]) -> dict[str, Any]:
        """What a file holds, without loading it: sizes, ids, the machine, and each record's name, number and length.

        Raises:
            SnapshotError: the file is damaged, or of another version.
        """

    def map(
        self,
        function: Callable[[Vmm, Any], _T],
        inputs: Iterable[Any],
        *,
        workers: int | None = None,
        timeout: float | None = None,
        entropy: Callable[[Vmm], object] | tuple[int, int] | None = None,
    ) -> list[_T]:
        """`function(fork, input)` for each input, on so many forks at once: what they returned, in order.

        Each job finds a machine that stands here, of which no other job has a part. See `pyvmm.ForkExecutor`.

        `entropy` is that of `fork`, new for each job. Without it a job's result depends on its input alone.

        Raises:
            TimeoutError: a job took longer than `timeout` seconds.
            Exception: the first exception of a job.
        """

    def flatten(self) -> Snapshot:
        """The same machine with its memory in one piece, which shares nothing with other snapshots.

        Its forks need fewer mappings, and the snapshots under it may go.
        """

    @property
    def config(self) -> VmmConfig:
        """Of the machine it was taken of, as far as that is known."""

    @property
    def path(self) -> Path | None:
        """The file it was loaded from, or None."""

    @property
    def id(self) -> str:
        """32 hexadecimal digits that tell it from every other; a file keeps them."""

    @property
    def vcpus(self) -> int:
        """How many vCPUs."""

    @property
    def memory_size(self) -> int:
        """Bytes of guest memory."""

    @property
    def memory_bytes(self) -> int:
        """Bytes of host memory that its pages take; other snapshots and machines may share them."""

    @property
    def file_bytes(self) -> int:
        """Bytes of files that its pages take."""

    @property
    def mappings(self) -> int:
        """How many mappings each fork needs for its memory: one, and more for each layer of changes; see `flatten`."""

    @property
    def state(self) -> tuple[tuple[str, int, bytes], ...]:
        """Its state beside the memory: what, of which vCPU or chip, and the bytes.

        Two snapshots of machines that nothing tells apart have the same, but for what time changes: `clock`, `pit`, the
        TSC in `msrs`, and what counts down in `lapic`.
        """

    def __reduce__(self) -> tuple[Any, ...]: ...

@final
class RegisterBytes:
    """One class of a vCPU's registers, as the bytes of the kernel's structure. `pyvmm.registers` names them."""

    def load(self, offset: int, size: int) -> int:
        """The little-endian number of 1 to 8 bytes at an offset.

        Raises:
            StateError: the guest is running, or the machine is closed.
        """

    def store(self, offset: int, size: int, value: int) -> None:
        """Put a number of 1 to 8 bytes at an offset.

        Raises:
            OverflowError: the number has more bits.
            KvmError: KVM refuses it; nothing has changed.
            StateError: the guest is running, or the machine is closed.
        """

    def read(self) -> bytes:
        """All of them.

        Raises:
            StateError: the guest is running, or the machine is closed.
        """

    def replace(self, offset: int, bytes: bytes) -> None:
        """Put bytes at an offset; raises as `store` does."""

@final
class MsrBytes:
    """Model-specific registers by number. `pyvmm.registers` names them."""

    def load(self, index: int) -> int:
        """The register's value.

        Raises:
            KvmError: KVM does not know it.
            StateError: the guest is running, or the machine is closed.
        """

    def store(self, index: int, value: int) -> None:
        """Change the register; raises as `load` does."""

@final
class Vcpu:
    """A virtual processor of a machine. While its guest does not run its state can be read and changed.

    The registers are views: each access reads or changes the vCPU itself. While the guest runs they raise StateError.
    The machine's `vcpus` gives the same object each time, and so does a hook.
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
        """The local APIC, of a machine with an interrupt controller."""

    @property
    def msrs(self) -> Msrs:
        """Model-specific registers, by number or name."""

    @property
    def mp_state(self) -> MpState:
        """Whether it runs, waits for INIT and SIPI, or is halted: KVM_GET_MP_STATE."""

    @mp_state.setter
    def mp_state(self, state: int) -> None: ...
    @property
    def cpuid(self) -> tuple[CpuidEntry, ...]:
        """What CPUID says to the guest: a tuple of `CpuidEntry`. It can be changed until the vCPU has run."""

    @cpuid.setter
    def cpuid(self, entries: Sequence[CpuidEntry]) -> None: ...
    def run_once(self) -> VcpuExit:
        """Enter the guest on this thread until its next exit, and return that. No device answers it.

        A read waits for `answer`; the next `run_once` completes it. Ctrl-C on the main thread ends it.

        Raises:
            StateError: the guest is running, or the machine is closed.
            KvmError: KVM_RUN failed.
        """

    def kick(self) -> None:
        """Bring `run_once` back with `VcpuExit.Interrupted`: the one in progress, else the next. From any thread."""

    def answer(self, data: int | bytes | bytearray) -> None:
        """Say what the guest reads, after `VcpuExit.IoIn` or `MmioRead`: bytes, or a number in little-endian order.

        Raises:
            StateError: the guest does not wait for an answer, or runs.
            ValueError: it is another number of bytes than the guest reads.
            OverflowError: the number has more bits, or is negative.
        """

    def translate(self, address: int) -> int | None:
        """The guest-physical address behind a guest-virtual one, by the vCPU's page tables; None where none is mapped.

        Raises:
            StateError: the guest is running, or the machine is closed.
        """

    def debug(self, *, single_step: bool = False, breakpoints: Sequence[int] | None = None) -> None:
        """Have each instruction, or execution at up to four linear addresses, come out as an exit of kind "debug".

        KVM_SET_GUEST_DEBUG; without arguments no more. To go on from a breakpoint, take it away for one step.

        Raises:
            StateError: the guest is running, or the machine is closed.
            ConfigError: more than four breakpoints.
        """

@disjoint_base
class VcpuExit:
    """Why a vCPU came out of its guest: the exits of the kernel's KVM documentation, chapter 5, for `match`.

    Exits of the same kind with equal fields are equal, and can be hashed and pickled.
    """

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
    def as_dict(self) -> dict[str, Any]:
        """The exit as a dict: "type" is the name of its class, such as "IoIn", and each field follows by name."""

    @final
    class IoIn(VcpuExit):
        """`IN` or `INS`: `count` reads of `size` bytes from a port. `Vcpu.answer` says what they read; ones else."""

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
        """A read where there is no memory. `Vcpu.answer` says what it reads; ones else."""

        __match_args__ = ("address", "length")
        def __new__(cls, address: int, length: int) -> Self: ...
        @property
        def address(self) -> int: ...
        @property
        def length(self) -> int: ...

    @final
    class MmioWrite(VcpuExit):
        """A write where there is no memory, or only for reading."""

        __match_args__ = ("address", "data")
        def __new__(cls, address: int, data: bytes) -> Self: ...
        @property
        def address(self) -> int: ...
        @property
        def data(self) -> bytes: ...

    @final
    class Rdmsr(VcpuExit):
        """`RDMSR` of a register that KVM does not know, or that a hook asked for: it waits for an answer, or faults."""

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
        """`Vcpu.kick`: nothing of the guest's."""

        __match_args__ = ()
        def __new__(cls) -> Self: ...

    @final
    class IrqWindowOpen(VcpuExit):
        """The guest can take an interrupt now."""

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
        """KVM could not go on.

        For suberror 1, an instruction that it cannot emulate: its bytes and perhaps some behind it, its text in the
        syntax of nasm, and the registers it stood with by name: the general ones, rip, rflags, efer, cr0 to cr4 and
        the selectors.
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
        """The guest's platform code asks for a reset or to be turned off."""

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
        KvmUnavailableError: this machine offers no usable KVM.
    """

    def __new__(cls) -> Self: ...
    @property
    def api_version(self) -> int:
        """KVM_GET_API_VERSION: 12."""

    def check_extension(self, capability: int) -> int:
        """What KVM_CHECK_EXTENSION says of a capability, by number or as `Cap`: 0 where KVM has it not, else more."""

    @property
    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """What CPUID can say to a guest on this machine: a tuple of `CpuidEntry`, as `Vcpu.cpuid` takes it."""

    @property
    def msr_list(self) -> tuple[int, ...]:
        """The numbers of the model-specific registers that belong to a guest's state: KVM_GET_MSR_INDEX_LIST."""

    @property
    def max_vcpus(self) -> int:
        """The most vCPUs of one machine."""

    def fileno(self) -> int:
        """The file descriptor, for ioctls of one's own."""

@final
class KvmVm:
    """One KVM virtual machine, without an event loop: whoever made it is told of the guest's end by a kick.

    Args:
        config: what it is made of; the serial port must have no streams. None for a bare machine: no memory, no devices
            and no vCPUs, until `memory.add` and `create_vcpu`.
        exit_handler: an object with `kick()`, called on the thread of the vCPU whose guest has ended; None for one of
            its own.

    Raises:
        VmmError: as for `Vmm`.
    """

    def __new__(cls, config: VmmConfig | None = None, exit_handler: ExitHandler | None = None) -> Self: ...
    def create_vcpu(self, id: int = 0) -> Vcpu:
        """Add a vCPU to a machine that has not run. It is as KVM makes it: at the reset vector, with an empty `cpuid`.

        Raises:
            KvmError: there is one of this number, or KVM refuses it.
            StateError: the machine has run, or is closed.
        """

    def run(self, vcpu_run_addr: int | None = None) -> None:
        """Start a thread `vcpu_{id}` for each vCPU and return.

        With an address the vCPUs start there. Without one they start at `entry`, or go on where they stopped.

        Raises:
            StateError: the machine is running, its guest has ended, or it is closed.
        """

    def wait(self, timeout: float | None = None) -> Exit | None:
        """Wait until the machine no longer runs; how the guest ended, or None when the time passed first.

        Raises:
            StateError: the call comes from the exit handler, on the thread of one of its vCPUs.
            Exception: what the exit handler's `kick` raised.
        """

    def pause(self) -> None:
        """Bring every vCPU out of its guest and wait until it is. Does nothing when the machine is paused already.

        Raises:
            StateError: the machine is not running.
        """

    def resume(self) -> None:
        """Let the vCPUs that `pause` stopped go on. Does nothing when they are running.

        Raises:
            StateError: the machine has been shut down, or the guest has ended.
        """

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """The vCPUs, by number; the same objects each time. Before the first run they stand at `entry`."""

    def shutdown(self) -> None:
        """Stop the vCPUs and wait for their threads. A guest that had not ended can go on with `run`."""

    def close(self) -> None:
        """Shut down and release everything. Does nothing the second time.

        What a signal handler raises meanwhile, as with Ctrl-C, comes out of it. The machine closes all the same, and
        another `close` waits for that.
        """

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
        """Guest memory, by guest-physical address; the same object each time, which keeps the machine alive."""

    @property
    def serial(self) -> Serial:
        """The first serial port; the same object each time, which keeps the machine alive.

        Raises:
            StateError: the machine was made without a configuration.
        """

    @property
    def resources(self) -> list[Resource]:
        """What answers where: memory, devices, KVM's own chips, and lines and addresses of eventfds.

        By kind and start. Memory and devices that are added or removed come and go in it. Ranges that
        are not shared never overlap: what would is refused.

        Raises:
            StateError: the machine is closed, or in a forked child.
        """

    @property
    def unanswered(self) -> list[Unanswered]:
        """Accesses that no device answered."""

    @property
    def fixups(self) -> dict[str, int]:
        """The instructions that KVM refused and pyvmm executed: as for `Vmm`."""

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
    """A virtual machine: built by this call, run by `run`, released by `close` or at the end of a `with`.

    A subclass's `__init__` has the arguments that it wants and calls `super().__init__`. Forks and pools make a plain
    `Vmm`.

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

    def __init__(self, config: VmmConfig | None = None, *, event_manager: EventManager | None = None) -> None: ...
    def run(self, timeout: float | None = None) -> Exit:
        """Run the guest until it ends, `stop` is called, or the time passes, in seconds.

        Turns the event manager's loop meanwhile: subscribers are called on this thread, devices and exit hooks on those
        of the vCPUs. After a stop, a timeout or an exception, another `run` goes on where this one ended.

        Raises:
            StateError: a run is in progress, the guest has ended, or the machine is closed.
            StreamError: a stream of the serial port failed.
            KeyboardInterrupt: Ctrl-C, within 100 ms.
            Exception: the first exception of a callback.
        """

    def run_async(self, timeout: float | None = None) -> Coroutine[Any, Any, Exit]:
        """`run` inside a running asyncio loop, which stays responsive: the guest's loop turns in a thread of its own.

        Cancelling it stops the guest. A subscriber's `process` may be a coroutine function: it runs as a task of the
        asyncio loop, and its exception ends the run. Coroutines that still run when the guest has ended have a second
        to come to their end; those that do not are cancelled, and the asyncio loop's exception handler is told which.
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
        """Start the vCPUs and return. `wait` turns the event manager's loop for them.

        Raises:
            StateError: a run is in progress, the guest has ended, or the machine is closed.
        """

    def wait(self, timeout: float | None = None) -> Exit | None:
        """What `run` does, for a machine that was started; None when the time passed: then the guest goes on.

        Raises:
            StateError: the machine was not started, or another thread waits.
            Exception: as for `run`; it ends the run.
        """

    def pause(self) -> None:
        """Bring every vCPU out of its guest and wait until it is. From any thread or callback; the loop turns on.

        Then the registers can be read and changed. Does nothing when the machine is paused already.

        Raises:
            StateError: the machine is not running.
        """

    def resume(self) -> None:
        """Let the vCPUs that `pause` stopped go on. Does nothing when they are running.

        Raises:
            StateError: no run is in progress, or the guest has ended.
        """

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """The vCPUs, by number; the same objects each time. Before the first run they stand where it will start.

        Raises:
            ClosedError: the machine is closed.
        """

    def stop(self) -> None:
        """End the run in progress, or at once the next one if there is none. From any thread or callback."""

    def close(self) -> None:
        """Stop, wait for the run in progress to end, and release everything. Does nothing the second time.

        In a callback it takes effect when the run ends. What a signal handler raises while it waits, as with Ctrl-C,
        comes out of it: the machine closes all the same, and another `close` waits for that.
        """

    def add_subscriber(self, subscriber: Subscriber | WrappedExitHandler | VmmExitHandler) -> SubscriberId:
        """Register a subscriber with the machine's event manager; see `EventManager.add_subscriber`."""

    def snapshot(self) -> Snapshot:
        """Everything a guest can see of this machine, to be forked, reset to and saved: vCPUs, memory, devices, clock.

        A running machine is paused for it and goes on. Memory is not copied: the machine goes on with private copies of
        the pages that it writes from now on. Of a machine whose guest has ended the snapshot goes on behind that.

        Raises:
            StateError: the machine is closed, a device cannot be saved, memory is shared with others, or another thread
                resumed it meanwhile.
        """

    def reset(self, snapshot: Snapshot) -> int:
        """Be what the machine was at a snapshot, in place. Returns how many pages of memory were changed for it.

        A machine whose guest has ended can be run again; one that is running goes on from there. What was printed since
        and nobody has taken is dropped.

        Raises:
            StateError: the machine is closed, its run is ending, or the snapshot is of another shape, device or CPUID.
        """

    def remove_subscriber(self, id: SubscriberId) -> object:
        """Unregister a subscriber and return it; see `EventManager.remove_subscriber`."""

    @property
    def config(self) -> VmmConfig:
        """What it is made of."""

    @property
    def event_manager(self) -> EventManager:
        """The event manager whose loop `run` turns.

        Raises:
            ClosedError: the machine is closed. A manager that was asked for before goes on.
        """

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
    def state(self) -> VmRunState:
        """Where the machine stands."""

    @property
    def stats(self) -> Stats:
        """Counters of its exits and of the time inside the guest and outside; they count when they are told to."""

    def trace(self, path: str | PathLike[str]) -> Trace:
        """Write every hop of the machine with its times to a file that Perfetto opens: `with vmm.trace(path): ...`.

        One track a thread: the time inside the guest, exits, calls of devices, events of the loop, calls of Python
        code. A machine that runs already is recorded from each vCPU's next entry and the loop's next turn on.

        Raises, when it is entered or left:
            StateError: another trace of this machine is being written.
            StreamError: the file cannot be made or written; a run is not ended by that.
        """

    @property
    def resources(self) -> list[Resource]:
        """What answers where: memory, devices, KVM's own chips, and lines and addresses of eventfds.

        By kind and start. Memory and devices that are added or removed come and go in it. Ranges that
        are not shared never overlap: what would is refused.

        Raises:
            StateError: the machine is closed, or in a forked child.
        """

    @property
    def unanswered(self) -> list[Unanswered]:
        """Accesses that no device answered, counted by address."""

    @property
    def fixups(self) -> dict[str, int]:
        """The instructions that KVM refused and pyvmm executed, counted by mnemonic.

        Empty without `CpuConfig(fixups=True)`. What they are is in docs/fixups.md.
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
        """Answer the guest's accesses to ports by an object with `read(offset, size)`, `write(offset, size, value)`.

        One of the two is enough.

        Also while the guest runs and from callbacks. Its methods are looked up now and called on the thread of the
        vCPU; see `pyvmm.devices`.

        Raises:
            ConfigError: the range is not one of ports, or overlaps another device's.
            TypeError: the object has no method of a device's.
            ClosedError: the machine is closed.
        """

    def add_mmio_device(self, base: int, length: int, device: Device) -> None:
        """Answer the guest's accesses to guest-physical addresses, where there is no memory; as `add_pio_device` does.

        Raises:
            ConfigError: the range overlaps memory or another device's.
        """

    def remove_pio_device(self, base: int) -> object:
        """Take the device away whose ports start here, and return it. An access in progress is still answered.

        Raises:
            ConfigError: no device that was added starts there.
        """

    def remove_mmio_device(self, base: int) -> object:
        """Take the device away whose addresses start here, and return it; as `remove_pio_device` does."""

    def _pio_device(self, base: int) -> object: ...
    def _lend(self) -> Vmm: ...
    def _settle(self) -> None: ...
    def _is_clean(self) -> bool: ...
    def _is_running(self) -> bool: ...
    def _renew(self, snapshot: Snapshot) -> bool: ...
    def _stir(self, entropy: Callable[[Vmm], object] | tuple[int, int]) -> None: ...
    def irq(self, line: int) -> IrqLine:
        """An interrupt line: pin 0 to 23 of the I/O APIC, of which the PICs have the first sixteen.

        Raises:
            StateError: the machine has no interrupt controller, or is closed.
            ConfigError: it has no such line.
        """

    def msi(self, address: int, data: int) -> bool:
        """Send a message-signalled interrupt (KVM_SIGNAL_MSI); whether a vCPU took it.

        Args:
            address: 0xfee00000 and the destination's APIC id shifted by 12 (Intel SDM volume 3, 11.11.1).
            data: the vector, and the delivery mode above it.

        Raises:
            StateError: the machine has no interrupt controller, or is closed.
        """

    def nmi(self, vcpu: int = 0) -> None:
        """Send a vCPU a non-maskable interrupt. From any thread.

        Raises:
            ConfigError: there is no such vCPU.
        """

    def add_irqfd(self, event_fd: EventFd, line: int) -> None:
        """Have each write of an eventfd pulse an interrupt line, in the kernel: KVM_IRQFD.

        Raises:
            StateError: the machine has no interrupt controller, or is closed.
            KvmError: KVM refuses it: an eventfd pulses one line.
        """

    def remove_irqfd(self, event_fd: EventFd, line: int) -> None:
        """Undo `add_irqfd`."""

    def add_ioeventfd(
        self, address: int, event_fd: EventFd, *, length: int = 0, datamatch: int | None = None, pio: bool = False
    ) -> None:
        """Have the guest's writes to an address add one to an eventfd, in the kernel: KVM_IOEVENTFD. They are no exits.

        Args:
            address: a guest-physical address, or with `pio` a port.
            event_fd: what is written; a subscriber that watches it is told.
            length: bytes of the writes that match: 1, 2, 4 or 8; with `datamatch`.
            datamatch: the one value that matches; None for every write.
            pio: a port is meant.

        Raises:
            ConfigError: there is no such write.
            KvmError: KVM refuses it, as for one that another eventfd has.
        """

    def remove_ioeventfd(
        self, address: int, event_fd: EventFd, *, length: int = 0, datamatch: int | None = None, pio: bool = False
    ) -> None:
        """Undo `add_ioeventfd`, with the same arguments."""

    @overload
    def on_exit(self, kind: ExitKind | str, function: _H, *, msrs: Sequence[int] | None = None) -> _H: ...
    @overload
    def on_exit(
        self, kind: ExitKind | str, function: None = None, *, msrs: Sequence[int] | None = None
    ) -> Callable[[_H], _H]:
        """Have a function look at each exit of a kind before it is answered: `function(vcpu, exit)`.

        It is called on the vCPU's thread and takes effect at the next exit. It returns None for the usual answer, an
        `ExitAction`, a `Stop`, or for a read what the guest reads. Without a function this is a decorator. Hooks of a
        kind are asked in the order they were added.

        Args:
            kind: an `ExitKind` or its name.
            function: the hook.
            msrs: for the kind "msr", numbers of registers whose accesses come out besides those that KVM does not know.

        Raises:
            ValueError: there is no such kind.
            ClosedError: the machine is closed.
        """

    def off_exit(self, kind: ExitKind | str, function: Callable[[Vcpu, Any], object]) -> None:
        """Remove a hook. With the last one of the kind "msr" the registers that its hooks asked for are KVM's again.

        Raises:
            ValueError: it is none of this kind.
        """

    @overload
    def hostcall(self, number: int | None = None, /) -> Callable[[_F], _F]: ...
    @overload
    def hostcall(self, number: _F, /) -> _F:
        """Decorate a function that the guest calls by a number, with integers and its memory: see `pyvmm.hostcalls`.

        Args:
            number: what the guest calls it by; a function instead gets the next free one.

        Raises:
            ValueError: the number is taken, or none of 32 bits.
            ClosedError: the machine is closed.
        """

@final
class IrqLine:
    """An interrupt line of a machine: `Vmm.irq`. From any thread."""

    @property
    def line(self) -> int:
        """Its number."""

    def raise_(self) -> None:
        """Raise the line: KVM_IRQ_LINE.

        Raises:
            ClosedError: the machine is closed.
        """

    def lower(self) -> None:
        """Lower it."""

    def pulse(self) -> None:
        """Raise and lower it, for an edge-triggered interrupt."""

@final
class Stats:
    """Counters of a machine's exits, and of the time its vCPUs spend inside the guest and outside: `Vmm.stats`.

    They count between `enable` and `disable`, or inside `with vmm.stats:`, and can be read at any time, from any
    thread, also when the machine is closed. In a forked child every call raises StateError.
    """

    def enable(self) -> None:
        """Count, from each vCPU's next entry on. Also while the guest runs."""

    def disable(self) -> None:
        """Count no more. What was counted stays."""

    def reset(self) -> None:
        """Start from zero."""

    @property
    def enabled(self) -> bool:
        """Whether they count."""

    @property
    def exits(self) -> list[ExitCount]:
        """The exits by vCPU, kind, direction and address, as `ExitCount`s: the most frequent first."""

    @property
    def vcpus(self) -> list[VcpuTime]:
        """The time of each vCPU, by number, as `VcpuTime`s."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...
    def _repr_html_(self) -> str: ...

@final
class Trace:
    """A trace of a machine, written while it is entered: `with vmm.trace(path): ...`. Made by `Vmm.trace`."""

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
    """Names of CPUID features that `CpuConfig.hide` and `expose` know."""

def embedded_guest() -> bytes:
    """The machine code of the guest inside the package: 64-bit ring 3, position-independent."""

def kvm_info() -> dict[str, object]:
    """What /dev/kvm offers: api_version, capabilities, max_vcpus, software_kvm, hidden_features.

    Raises:
        KvmUnavailableError: there is no usable /dev/kvm; `hint` says what to do.
    """

def kick_signal() -> int:
    """The signal that brings vCPUs out of their guests. Asking for it claims it.

    Raises:
        StateError: every real-time signal is in use by the program.
    """

def set_kick_signal(signal: int) -> None:
    """Choose that signal, before the first machine is made.

    Without a choice it is the first real-time signal that has no handler then. A handler that the signal has already is
    called for every signal that is no kick.

    Raises:
        ConfigError: the signal cannot be used for this.
        StateError: another one is in use already.
    """

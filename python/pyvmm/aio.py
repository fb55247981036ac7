"""The event loop and machines inside asyncio: `run_async`, `async for`, `async with`."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import sys
import threading
import time
import types
import weakref
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from pyvmm.exceptions import ClosedError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pyvmm._pyvmm import EventFd, EventManager, NetworkPort, TimerFd, Vmm
    from pyvmm.exits import Exit

# How long coroutines may continue after a run has ended.
GRACE_S = 1.0


class AsyncReader:
    """The async iterator of a source: yields each count or frame until the source is closed."""

    def __init__(self, source: EventFd | TimerFd | NetworkPort) -> None:
        self._source = source

    def __aiter__(self) -> AsyncReader:
        return self

    async def __anext__(self) -> int | bytes:
        # Let other tasks run, even if the source is always ready. A cancellation here loses no
        # count.
        await asyncio.sleep(0)
        try:
            while True:
                try:
                    return self._source._take()
                except BlockingIOError:
                    await ReadinessWait().until_ready(self._source)
        except ClosedError:
            raise StopAsyncIteration from None


class ReadinessWait:
    """One wait of a task for a source. It removes its registration when it ends."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] = self._loop.create_future()

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    def closed(self) -> None:
        """End the wait because the source is closed. May be called from any thread."""
        with suppress(RuntimeError):  # the asyncio loop is closed
            self._loop.call_soon_threadsafe(self._wake)

    async def until_ready(self, source: EventFd | TimerFd | NetworkPort) -> None:
        """Wait until the source is readable or closed."""
        # Use a duplicate: the source's number may be closed and reused before the loop removes it.
        fd = os.dup(source._begin_wait(self))
        try:
            self._loop.add_reader(fd, self._wake)
            try:
                await self._woken
            finally:
                forget_reader(self._loop, fd)
        finally:
            source._end_wait()
            os.close(fd)


def forget_reader(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Stop watching a file descriptor number."""
    with suppress(RuntimeError):  # the asyncio loop is closed, and watches nothing
        loop.remove_reader(fd)


class Tasks:
    """The awaitables returned by the callbacks of one run, as tasks. The first failure ends the run."""

    def __init__(self, manager: EventManager, end: Callable[[], None]) -> None:
        self._manager = manager
        self._end_run = end
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._errors: list[BaseException] = []
        self._is_over = False

    def fail(self, error: BaseException) -> None:
        """End the run with an exception."""
        self._errors.append(error)
        self._end_run()

    def take(self, awaitable: Any, name: str) -> None:
        """Run the awaitable that a callback returned. May be called from any thread."""
        if threading.get_ident() == self._thread:
            self._start(awaitable, name)
        else:
            self._loop.call_soon_threadsafe(self._start, awaitable, name)

    def _start(self, awaitable: Any, name: str) -> None:
        if self._is_over:
            dismiss(awaitable)
            self._tell(f"{name} returned an awaitable after the run had ended; it is not awaited")
            return
        task: asyncio.Future[Any]
        if asyncio.isfuture(awaitable):
            task = awaitable
        else:
            if self._manager.slow_callback_duration is not None:
                coroutine = wait_for(timed(awaitable, name, self._manager))
            else:
                coroutine = awaitable if inspect.iscoroutine(awaitable) else wait_for(awaitable)
            task = self._loop.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def _tell(self, text: str, **more: object) -> None:
        self._loop.call_exception_handler({"message": f"pyvmm: {text}", **more})

    async def end(self, error: BaseException | None = None) -> None:
        """Wait for the tasks of an ended run, cancel the remaining ones, and raise `error` or the first failure."""
        if error is not None:
            self._errors.insert(0, error)
        elif not self._errors:
            try:
                async with asyncio.timeout(GRACE_S):
                    while self._tasks and not self._errors:
                        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
                        await asyncio.sleep(0)  # let the done callbacks run
            except TimeoutError:
                pass
            except asyncio.CancelledError as late:
                self._errors.append(late)
        cancelled = await self._cancel()
        if not self._errors:
            for name in cancelled:
                self._tell(f"{name} was cancelled: it was still running {GRACE_S:g} s after the end of the run")
            return
        first, *others = self._errors
        for name in cancelled:
            first.add_note(f"{name} was cancelled: it had not finished")
        for other in others:
            if other is not first:
                first.add_note(f"another callback raised {other!r}")
                self._tell("another callback of a failed run raised as well", exception=other)
        self._errors.clear()
        raise first

    async def _cancel(self) -> list[str]:
        """Cancel the running tasks and return their names."""
        self._is_over = True
        left = list(self._tasks)
        for task in left:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)
            await asyncio.sleep(0)
        return [task.get_name() if isinstance(task, asyncio.Task) else repr(task) for task in left if task.cancelled()]


async def wait_for(awaitable: Any) -> Any:
    """An awaitable as a coroutine."""
    return await awaitable


@types.coroutine
def timed(awaitable: Any, name: str, manager: EventManager) -> Generator[Any, Any, Any]:
    """Await the awaitable that a callback returned, and time each of its steps."""
    steps = awaitable.__await__() if hasattr(awaitable, "__await__") else awaitable
    step = partial(next, steps)
    while True:
        start = time.perf_counter()
        try:
            waits_for = step()
        except StopIteration as end:
            return end.value
        finally:
            manager._note_callback(name, time.perf_counter() - start)
        try:
            value = yield waits_for
        except GeneratorExit:
            if hasattr(steps, "close"):
                steps.close()
            raise
        except BaseException as error:
            step = partial(steps.throw, error)
        else:
            step = partial(steps.send, value) if value is not None else partial(next, steps)


def needs_await(value: Any) -> bool:
    """Whether a value does nothing unless it is awaited. Futures complete without being awaited."""
    if "asyncio" in sys.modules and asyncio.isfuture(value):
        return False
    return inspect.isawaitable(value) or inspect.isasyncgen(value)


def dismiss(value: Any) -> None:
    """Close a coroutine that will not be awaited, to suppress Python's warning."""
    if inspect.iscoroutine(value):
        value.close()


def take_returned(awaiter: Callable[[Any, str], None] | None, value: Any, name: str) -> None:
    """Pass the result of a callback to the awaiter. Without one, refuse an awaitable, which would never run."""
    if awaiter is not None and inspect.isawaitable(value):
        awaiter(value, name)
    elif needs_await(value):
        dismiss(value)
        kind = type(value).__name__
        raise StateError(
            f"{name} returned a {kind}, which is not awaited",
            hint="only await run_async() runs coroutines; no asyncio loop hosts this run",
        )


def refuse_awaitable(value: Any, name: str) -> None:
    """Refuse an awaitable returned by a callback that cannot be awaited."""
    if needs_await(value):
        dismiss(value)
        raise TypeError(f"{name} cannot be a coroutine function: it returned a {type(value).__name__}")


async def run_manager(manager: EventManager) -> None:
    """See `EventManager.run_async`."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        if not ended.done():
            ended.set_result(None)

    def turn() -> None:
        try:
            if not (ended.done() or manager._take_stop()):
                manager.run_with_timeout(0)
                if not manager._take_stop():
                    return
        except BaseException as error:
            tasks.fail(error)
        else:
            end()

    tasks = Tasks(manager, end)
    manager._begin_hosting(tasks.take)
    try:
        # Use a duplicate: the program may also watch the manager itself.
        fd = os.dup(manager.fileno())
        try:
            loop.add_reader(fd, turn)
            loop.call_soon(turn)
            await ended
        finally:
            forget_reader(loop, fd)
            os.close(fd)
    except GeneratorExit:  # the asyncio loop is closed, so nothing can be awaited
        raise
    except BaseException as error:
        manager._end_hosting()
        await tasks.end(error)
    finally:
        manager._end_hosting()
    await tasks.end()


class ThreadCall:
    """A call in its own thread. An asyncio executor has few threads, which are meant for short calls."""

    def __init__(self, call: Callable[[], Any], name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._value: Any = None
        self._error: BaseException | None = None
        # The thread holds no reference to the waiting task, so that the task is released when its
        # asyncio loop is closed and dropped.
        arguments = (run_for, weakref.ref(self), call)
        # A daemon thread: at interpreter exit, machines are closed only after all non-daemon
        # threads have ended.
        threading.Thread(target=contextvars.copy_context().run, args=arguments, name=name, daemon=True).start()

    def deliver(self, value: Any, error: BaseException | None) -> bool:
        """Store the result of the call; called from its thread. False if the asyncio loop is closed."""
        self._value, self._error = value, error
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:
            return False
        return True

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def result(self) -> Any:
        """Return the value of the call, or raise its exception."""
        if self._error is not None:
            raise self._error
        return self._value


def run_for(background: weakref.ref[ThreadCall], call: Callable[[], Any]) -> None:
    """Run a call for a `ThreadCall`, in its thread."""
    value, error = None, None
    try:
        value = call()
    except BaseException as raised:
        error = raised
    waiting = background()
    # If no task waits any more, the exception ends the thread, and Python reports it.
    if not (waiting and waiting.deliver(value, error)) and error is not None:
        raise error


async def run_vmm(vmm: Vmm, timeout: float | None) -> Exit:
    """See `Vmm.run_async`."""
    cancel = vmm._new_cancel()
    tasks = Tasks(vmm.event_manager, cancel.set)
    run = ThreadCall(lambda: vmm._run_cancellable(timeout, cancel, tasks.take), "pyvmm run_async")
    exit: Exit | None = await supervise(run, tasks, cancel.set)
    if exit is None:
        raise AssertionError("a run ends with an exit, an exception or a cancellation")
    return exit


async def supervise(call: ThreadCall, tasks: Tasks, cancel: Callable[[], None]) -> Any:
    """Await a call and the coroutines of its callbacks, and return its value. `cancel` ends the call."""
    cancelled: BaseException | None = None
    while not call.ended.done():
        try:
            await asyncio.wait({call.ended})
        except GeneratorExit:  # the asyncio loop is closed, so nothing can be awaited
            cancel()
            raise
        except BaseException as error:  # keep the first of several cancellations
            cancelled = cancelled or error
            cancel()
    value: Any = None
    try:
        value = call.result()
    except BaseException as error:
        tasks.fail(error)
    await tasks.end(cancelled)
    return value


async def entered(vmm: Vmm) -> Vmm:
    """Return the machine, as the value of `async with`."""
    return vmm


async def close_vmm(vmm: Vmm) -> None:
    """Close without blocking the asyncio loop: releasing an interrupt controller takes milliseconds."""
    closing = ThreadCall(vmm.close, "pyvmm close")
    await closing.ended
    closing.result()

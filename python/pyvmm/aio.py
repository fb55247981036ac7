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

    from pyvmm._pyvmm import EventFd, EventManager, TimerFd, Vmm
    from pyvmm.exits import Exit

# How long coroutines may go on after a run has ended.
GRACE_S = 1.0


class Reads:
    """What `read` gives, each time the source is readable, until it is closed. For `async for`."""

    def __init__(self, source: EventFd | TimerFd) -> None:
        self._source = source

    def __aiter__(self) -> Reads:
        return self

    async def __anext__(self) -> int:
        # Others have their turn, also where the source is always ready. A cancellation here loses
        # no count.
        await asyncio.sleep(0)
        try:
            while True:
                try:
                    return self._source._take()
                except BlockingIOError:
                    await Wait().until_ready(self._source)
        except ClosedError:
            raise StopAsyncIteration from None


class Wait:
    """One wait of a task for a source. Nothing of it is left when it ends."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] = self._loop.create_future()

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    def closed(self) -> None:
        """End it: the source is closed. From any thread."""
        with suppress(RuntimeError):  # the asyncio loop is closed
            self._loop.call_soon_threadsafe(self._wake)

    async def until_ready(self, source: EventFd | TimerFd) -> None:
        """Until the source is readable or closed."""
        # A number of its own: that of the source may be closed, and somebody else's, before the
        # loop has forgotten it.
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
    """Watch a number no longer."""
    with suppress(RuntimeError):  # the asyncio loop is closed, and watches nothing
        loop.remove_reader(fd)


class Tasks:
    """What the callbacks of one run return to be awaited, as tasks; the first that fails ends the run."""

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
        """Run what a callback returned. From any thread."""
        if threading.get_ident() == self._thread:
            self._start(awaitable, name)
        else:
            self._loop.call_soon_threadsafe(self._start, awaitable, name)

    def _start(self, awaitable: Any, name: str) -> None:
        if self._is_over:
            dismiss(awaitable)
            self._tell(f"{name} returned what the run that ended meanwhile does not await")
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
        """The run has ended: wait for its tasks, cancel those that go on, and raise what failed first, or `error`."""
        if error is not None:
            self._errors.insert(0, error)
        elif not self._errors:
            try:
                async with asyncio.timeout(GRACE_S):
                    while self._tasks and not self._errors:
                        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
                        await asyncio.sleep(0)  # what is done is noted by its callback
            except TimeoutError:
                pass
            except asyncio.CancelledError as late:
                self._errors.append(late)
        cancelled = await self._cancel()
        if not self._errors:
            for name in cancelled:
                self._tell(f"{name} was cancelled: it went on for {GRACE_S:g} s after the run had ended")
            return
        first, *others = self._errors
        for name in cancelled:
            first.add_note(f"{name} was cancelled: it had not come to its end")
        for other in others:
            if other is not first:
                first.add_note(f"another callback raised {other!r}")
                self._tell("another callback of a run that failed raised, too", exception=other)
        self._errors.clear()
        raise first

    async def _cancel(self) -> list[str]:
        """Cancel what still runs, and say what that was."""
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
    """Await what a callback returned and time each of its steps, as the callback itself was timed."""
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
    """Whether a value does nothing unless it is awaited. A future runs by itself."""
    if "asyncio" in sys.modules and asyncio.isfuture(value):
        return False
    return inspect.isawaitable(value) or inspect.isasyncgen(value)


def dismiss(value: Any) -> None:
    """Have a coroutine that will not be awaited not warn of it."""
    if inspect.iscoroutine(value):
        value.close()


def take_returned(awaiter: Callable[[Any, str], None] | None, value: Any, name: str) -> None:
    """Give what a callback returned to whoever awaits it, or refuse what would never run."""
    if awaiter is not None and inspect.isawaitable(value):
        awaiter(value, name)
    elif needs_await(value):
        dismiss(value)
        kind = type(value).__name__
        raise StateError(
            f"{name} returned a {kind}, which nobody awaits",
            hint="await run_async() runs coroutines: here no asyncio loop hosts the run",
        )


def refuse_awaitable(value: Any, name: str) -> None:
    """Refuse what a callback that nobody can await returned."""
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
        # A number of its own: the program may host the manager by hand beside.
        fd = os.dup(manager.fileno())
        try:
            loop.add_reader(fd, turn)
            loop.call_soon(turn)
            await ended
        finally:
            forget_reader(loop, fd)
            os.close(fd)
    except GeneratorExit:  # the asyncio loop is closed: nothing can be awaited any more
        raise
    except BaseException as error:
        manager._end_hosting()
        await tasks.end(error)
    finally:
        manager._end_hosting()
    await tasks.end()


class Background:
    """A call in a thread of its own. An asyncio loop's executor has few threads, which are for short calls."""

    def __init__(self, call: Callable[[], Any], name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._value: Any = None
        self._error: BaseException | None = None
        # The thread does not hold the task that waits for it: that ends when its asyncio loop is
        # closed and forgotten.
        arguments = (run_for, weakref.ref(self), call)
        # A daemon: at the interpreter's end machines are closed, but only after all other threads
        # have ended.
        threading.Thread(target=contextvars.copy_context().run, args=arguments, name=name, daemon=True).start()

    def give(self, value: Any, error: BaseException | None) -> bool:
        """What the call came to, from its thread. False when the asyncio loop is closed."""
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
        """What the call returned or raised."""
        if self._error is not None:
            raise self._error
        return self._value


def run_for(background: weakref.ref[Background], call: Callable[[], Any]) -> None:
    """The thread of a `Background`."""
    value, error = None, None
    try:
        value = call()
    except BaseException as raised:
        error = raised
    waiting = background()
    # Where nobody waits any more the thread ends with the exception, which Python reports.
    if not (waiting and waiting.give(value, error)) and error is not None:
        raise error


async def run_vmm(vmm: Vmm, timeout: float | None) -> Exit:
    """See `Vmm.run_async`."""
    cancel = vmm._new_cancel()
    tasks = Tasks(vmm.event_manager, cancel.set)
    run = Background(lambda: vmm._run_cancellable(timeout, cancel, tasks.take), "pyvmm run_async")
    cancelled: BaseException | None = None
    while not run.ended.done():
        try:
            await asyncio.wait({run.ended})
        except GeneratorExit:  # the asyncio loop is closed: nothing can be awaited any more
            cancel.set()
            raise
        except BaseException as error:  # of two cancellations the first is the one
            cancelled = cancelled or error
            cancel.set()
    exit: Exit | None = None
    try:
        exit = run.result()
    except BaseException as error:
        tasks.fail(error)
    await tasks.end(cancelled)
    if exit is None:
        raise AssertionError("a run ends with an exit, an exception or a cancellation")
    return exit


async def give(vmm: Vmm) -> Vmm:
    """What `async with` binds."""
    return vmm


async def close_vmm(vmm: Vmm) -> None:
    """Close without holding up the loop: an interrupt controller takes milliseconds."""
    closing = Background(vmm.close, "pyvmm close")
    await closing.ended
    closing.result()

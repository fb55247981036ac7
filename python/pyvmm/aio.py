"""The event loop and machines inside asyncio: `run_async`, `async for`, `async with`."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pyvmm._pyvmm import EventFd, EventManager, TimerFd, Vmm
    from pyvmm.exits import Exit


async def reads(source: EventFd | TimerFd) -> AsyncIterator[int]:
    """What `read` gives, each time the source is readable. For `async for`."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    fd = source.fileno()
    loop.add_reader(fd, ready.set)
    try:
        while True:
            await ready.wait()
            ready.clear()
            try:
                count = source.read()
            except BlockingIOError:
                continue
            yield count
    finally:
        loop.remove_reader(fd)


async def run_manager(manager: EventManager) -> None:
    """See `EventManager.run_async`."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def turn() -> None:
        try:
            manager.run_with_timeout(0)
        except BaseException as error:
            _fail(ended, error)
        else:
            if manager._take_stop() and not ended.done():
                ended.set_result(None)

    tasks = Tasks(ended)
    manager._set_awaiter(tasks.start)
    loop.add_reader(manager.fileno(), turn)
    try:
        loop.call_soon(turn)
        await ended
    finally:
        loop.remove_reader(manager.fileno())
        manager._set_awaiter(None)
        await tasks.cancel()


class Tasks:
    """Coroutines that subscribers returned, run as tasks; the first that fails ends the run."""

    def __init__(self, ended: asyncio.Future[Any]) -> None:
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, awaitable: Any) -> None:
        """Run what a subscriber's `process` returned. On the loop's thread."""
        if inspect.iscoroutine(awaitable):
            task = self._loop.create_task(awaitable)
            self._tasks.add(task)
            task.add_done_callback(self._finish)

    def start_threadsafe(self, awaitable: Any) -> None:
        """The same, from another thread."""
        self._loop.call_soon_threadsafe(self.start, awaitable)

    def _finish(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _fail(self._ended, error)

    async def cancel(self) -> None:
        """End those that still run."""
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _fail(ended: asyncio.Future[Any], error: BaseException) -> None:
    if not ended.done():
        ended.set_exception(error)


async def run_vmm(vmm: Vmm, timeout: float | None) -> Exit:
    """See `Vmm.run_async`. The machine's loop turns in a thread of the executor."""
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()
    tasks = Tasks(failed)
    vmm.event_manager._set_awaiter(tasks.start_threadsafe)
    run = asyncio.ensure_future(loop.run_in_executor(None, vmm.run, timeout))
    try:
        either: set[asyncio.Future[Any]] = {run, failed}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not run.done():
            vmm.stop()
            await asyncio.wait({run})
        vmm.event_manager._set_awaiter(None)
        await tasks.cancel()
    if failed.done():
        failed.result()
    failed.cancel()
    return run.result()


async def give(vmm: Vmm) -> Vmm:
    """What `async with` binds."""
    return vmm


async def close_vmm(vmm: Vmm) -> None:
    """Close without holding up the loop: an interrupt controller takes milliseconds."""
    await asyncio.get_running_loop().run_in_executor(None, vmm.close)

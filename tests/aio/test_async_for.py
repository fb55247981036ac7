"""`async for` over an EventFd or a TimerFd: each wait is its own, and closing the source ends it.

Covers src/py/event/reader.rs.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from alone import alone
from loops import LOOPS, run_in
from pyvmm import EventFd, TimerFd

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

DEADLINE = 60.0


async def first_ring() -> tuple[int, int]:
    """An iteration that is left at once, of a source that is closed with it."""
    with EventFd() as fd:
        asyncio.get_running_loop().call_later(0.001, fd.write, 3)
        async for count in fd:
            return fd.fileno(), count
    raise AssertionError


async def first_tick() -> tuple[int, int]:
    with TimerFd() as timer:
        timer.set(0.001)
        async for count in timer:
            return timer.fileno(), min(count, 1)
    raise AssertionError


async def next_of(source: EventFd) -> int:
    return await anext(aiter(source))


async def until_waiting(task: asyncio.Task[Any]) -> None:
    """Let a task come to its wait: it makes a few steps, and each is one turn of the loop."""
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()


@pytest.mark.parametrize("wait", [first_ring, first_tick])
def test_a_number_used_again_is_waited_for_again(run: Any, wait: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    async def main() -> None:
        again, last = 0, -1
        # Everything that the process opens or closes meanwhile changes the lowest free number.
        for _ in range(200):
            number, count = await wait()
            assert count == (3 if wait is first_ring else 1)
            again += number == last
            if again == 5:
                return
            last = number
        pytest.fail("no number came again")

    run(main())


@alone
def test_a_stranger_that_got_the_number_is_left_alone() -> None:
    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        fd = EventFd()
        waiting = loop.create_task(next_of(fd))
        await until_waiting(waiting)
        one, other = socket.socketpair()
        number = fd.fileno()
        fd.close()
        # Before the task that waits has its turn the number is a socket's, which the loop watches
        # for somebody else.
        with socket.socket(fileno=os.dup2(one.fileno(), number)) as stranger, one, other:
            stranger.setblocking(False)
            receiving = loop.create_task(loop.sock_recv(stranger, 1))
            with pytest.raises(StopAsyncIteration):
                await waiting
            await until_waiting(receiving)
            other.send(b"x")
            return await receiving

    for loop in LOOPS:
        assert run_in(loop, main()) == b"x"


@pytest.mark.parametrize("where", ["here", "thread"])
@pytest.mark.parametrize("source", [EventFd, TimerFd])
def test_closing_the_source_ends_the_iteration(run: Any, source: type[EventFd | TimerFd], where: str) -> None:
    async def main() -> list[int]:
        fd = source()

        async def read() -> list[int]:
            return [count async for count in fd]

        reading = asyncio.create_task(read())
        await until_waiting(reading)
        if where == "here":
            fd.close()
        else:
            thread = threading.Thread(target=fd.close)
            thread.start()
            thread.join(DEADLINE)
        return await reading

    assert run(main()) == []


def test_closing_the_source_in_the_body_ends_the_iteration(run: Any) -> None:
    async def main() -> list[int]:
        fd = EventFd(7)
        counts = []
        async for count in fd:
            counts.append(count)
            fd.close()
        return counts

    assert run(main()) == [7]


@pytest.mark.parametrize("source", [EventFd, TimerFd])
def test_a_closed_source_is_not_iterated(run: Any, source: type[EventFd | TimerFd]) -> None:
    async def main() -> None:
        fd = source()
        fd.close()
        async for _ in fd:
            pass

    with pytest.raises(ValueError, match="closed"):
        run(main())


def test_one_task_at_a_time_waits(run: Any) -> None:
    async def main() -> None:
        fd = EventFd(semaphore=True)
        first = asyncio.ensure_future(anext(aiter(fd)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="already waiting"):
            await anext(aiter(fd))
        fd.write(2)
        assert await first == 1
        assert await anext(aiter(fd)) == 1, "and the next one after it"

    run(main())


@alone
def test_a_cancelled_wait_loses_nothing_and_leaves_nothing() -> None:
    async def main() -> None:
        fd = EventFd()
        open_before = len(os.listdir("/proc/self/fd"))
        for number in range(1, 20):
            waiting = asyncio.ensure_future(anext(aiter(fd)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if number % 2:
                fd.write(number)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            if number % 2:
                assert await anext(aiter(fd)) == number
        assert len(os.listdir("/proc/self/fd")) == open_before

    for loop in LOOPS:
        run_in(loop, main())


def test_a_source_that_is_always_ready_leaves_others_their_turn(run: Any) -> None:
    async def main() -> int:
        fd = EventFd(2**40, semaphore=True)
        taken = 0

        async def take() -> None:
            nonlocal taken
            async for count in fd:
                taken += count

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(take(), 0.05)
        return taken

    assert run(main()) > 0


def test_a_blocking_source_is_refused_and_stays_blocking(run: Any) -> None:
    async def main() -> None:
        fd = EventFd(1, nonblocking=False)
        with pytest.raises(TypeError, match="only a nonblocking EventFd can be iterated"):
            aiter(fd)
        assert os.get_blocking(fd.fileno())
        made: EventFd | TimerFd
        for made in EventFd(), TimerFd():
            os.set_blocking(made.fileno(), True)
            with pytest.raises(TypeError, match="only a nonblocking"):
                await anext(aiter(made))
            assert os.get_blocking(made.fileno())

    run(main())


@alone
def test_a_loop_that_is_closed_early_leaves_nothing() -> None:
    fd = EventFd()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(next_of(fd))
    loop.call_later(0.01, loop.stop)
    loop.run_forever()
    loop.close()
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    del waiting, loop
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before

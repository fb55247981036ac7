"""Exceptions of runs inside asyncio: each comes out, and none is lost.

Covers src/py/returned.rs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from guests import flat
from pyvmm import EventManager, EventOps, Events, Vmm
from subscribers import Once

if TYPE_CHECKING:
    from collections.abc import Callable


DEADLINE = 60.0


class OwnError(BaseException):
    pass


EXCEPTIONS = [
    StopIteration("on purpose"),
    StopAsyncIteration("on purpose"),
    GeneratorExit("on purpose"),
    KeyboardInterrupt("on purpose"),
    SystemExit("on purpose"),
    asyncio.CancelledError("on purpose"),
    OwnError("on purpose"),
    BaseExceptionGroup("on purpose", [OwnError(), ValueError()]),
    ExceptionGroup("on purpose", [ValueError()]),
]


def name_of(error: BaseException) -> str:
    return type(error).__name__


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: object) -> None:
        raise error

    return function


def out_of(call: Callable[[], Any]) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("it raised nothing")


def is_same(found: BaseException, error: BaseException) -> bool:
    """StopIteration cannot come out of a coroutine: Python makes a RuntimeError of it, with the cause."""
    return found is error or (
        isinstance(error, StopIteration) and isinstance(found, RuntimeError) and found.__cause__ is error
    )


@pytest.mark.parametrize("error", EXCEPTIONS, ids=name_of)
def test_any_exception_of_a_callback_comes_out_of_run(error: BaseException) -> None:
    manager = EventManager()
    manager.add_subscriber(Once(raising(error)))
    assert out_of(manager.run) is error


@pytest.mark.parametrize("error", EXCEPTIONS, ids=name_of)
def test_any_exception_of_init_comes_out_of_add_subscriber(error: BaseException) -> None:
    class Subscriber:
        init = staticmethod(raising(error))

        def process(self, events: Events, ops: EventOps) -> None: ...

    assert out_of(lambda: EventManager().add_subscriber(Subscriber())) is error


@pytest.mark.parametrize("error", EXCEPTIONS, ids=name_of)
def test_any_exception_of_a_callback_comes_out_of_run_async(error: BaseException) -> None:
    async def main() -> BaseException:
        manager = EventManager()
        manager.add_subscriber(Once(raising(error)))
        try:
            await manager.run_async()
        except BaseException as found:
            return found
        raise AssertionError("it raised nothing")

    assert is_same(asyncio.run(asyncio.wait_for(main(), DEADLINE)), error)


@pytest.mark.kvm
@pytest.mark.parametrize("error", EXCEPTIONS, ids=name_of)
@pytest.mark.parametrize("place", ["device", "hook"])
def test_any_exception_on_a_vcpus_thread_comes_out_of_run_async(error: BaseException, place: str) -> None:
    async def main() -> BaseException:
        async with Vmm(flat(b"\xba\x00\x05\xee\xeb\xfe")) as vmm:  # out dx, al; and spin
            if place == "hook":
                vmm.on_exit("io", raising(error))
            else:
                device = type("Device", (), {"write": staticmethod(raising(error))})()
                vmm.add_pio_device(0x500, 1, device)
            try:
                await vmm.run_async(DEADLINE)
            except BaseException as found:
                return found
        raise AssertionError("it raised nothing")

    assert is_same(asyncio.run(asyncio.wait_for(main(), DEADLINE)), error)


def test_every_failure_is_heard(run: Any) -> None:
    heard: list[BaseException] = []

    async def fail(error: BaseException) -> None:
        raise error

    async def fail_to_clean_up() -> None:
        try:
            await asyncio.sleep(DEADLINE)
        finally:
            raise OSError("not cleaned up")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: heard.append(context["exception"]))
        manager = EventManager()
        first, second = LookupError("first"), ValueError("second")
        for work in fail_to_clean_up, lambda: fail(first), lambda: fail(second), lambda: asyncio.sleep(DEADLINE):
            manager.add_subscriber(Once(work))
        await manager.run_async()

    with pytest.raises(LookupError, match="first") as raised:
        run(main())
    notes = "\n".join(raised.value.__notes__)
    assert "ValueError('second')" in notes
    assert "OSError('not cleaned up')" in notes
    assert "Once.process was cancelled" in notes
    assert sorted(map(str, heard)) == ["not cleaned up", "second"]


def test_a_clean_up_that_fails_after_a_stop_comes_out(run: Any) -> None:
    async def main() -> None:
        manager = EventManager()

        async def work() -> None:
            manager.stop()
            try:
                await asyncio.sleep(DEADLINE)
            finally:
                raise OSError("not cleaned up")

        manager.add_subscriber(Once(work))
        await manager.run_async()

    with pytest.raises(OSError, match="not cleaned up"):
        run(main())


def test_a_cancelled_run_tells_of_clean_ups_that_fail(run: Any) -> None:
    heard: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: heard.append(str(context["exception"])))
        manager = EventManager()
        begun = asyncio.Event()

        async def work() -> None:
            begun.set()
            try:
                await asyncio.sleep(DEADLINE)
            finally:
                raise OSError("not cleaned up")

        manager.add_subscriber(Once(work))
        running = asyncio.ensure_future(manager.run_async())
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    run(main())
    assert heard == ["not cleaned up"]


async def nothing(*_: object) -> None:
    raise AssertionError("never awaited")

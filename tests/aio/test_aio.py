"""The loop and machines inside asyncio, with the standard loop and with uvloop."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from guests import SPIN, exit_with, flat, print_text
from pyvmm import EventFd, EventManager, EventOps, Events, ExitReason, SerialConfig, TimerFd, Vmm, VmRunState

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

FACTORIES = [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.fixture(params=FACTORIES, ids=lambda factory: factory.__module__.split(".")[0])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run a coroutine in a fresh loop, with a deadline."""

    def run_it(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(asyncio.wait_for(main, 60))

    return run_it


class Calls:
    def __init__(self, function: Callable[[], Any]) -> None:
        self.fd = EventFd(1)
        self.function = function

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd))

    def process(self, events: Events, ops: EventOps) -> Any:
        self.fd.read()
        return self.function()


def test_manager_runs_inside_asyncio_until_it_is_stopped(run: Any) -> None:
    async def main() -> list[str]:
        manager = EventManager()
        order: list[str] = []

        def last() -> None:
            order.append("event")
            manager.stop()

        task = asyncio.ensure_future(manager.run_async())
        await asyncio.sleep(0)
        order.append("asyncio goes on")
        manager.add_subscriber(Calls(last))
        await task
        return order

    assert run(main()) == ["asyncio goes on", "event"]


def test_exception_of_a_callback_comes_out_of_run_async(run: Any) -> None:
    async def main() -> None:
        manager = EventManager()
        manager.add_subscriber(Calls(lambda: 1 // 0))
        await manager.run_async()

    with pytest.raises(ZeroDivisionError):
        run(main())


def test_coroutine_subscribers_run_as_tasks(run: Any) -> None:
    async def main() -> str:
        manager = EventManager()
        said = "nothing"

        async def work() -> None:
            nonlocal said
            await asyncio.sleep(0)
            said = "worked"
            manager.stop()

        manager.add_subscriber(Calls(work))
        await manager.run_async()
        return said

    assert run(main()) == "worked"


def test_exception_of_a_coroutine_ends_the_run(run: Any) -> None:
    async def main() -> None:
        async def fail() -> None:
            raise LookupError("on purpose")

        manager = EventManager()
        manager.add_subscriber(Calls(fail))
        await manager.run_async()

    with pytest.raises(LookupError, match="on purpose"):
        run(main())


def test_sources_are_iterated(run: Any) -> None:
    async def main() -> tuple[list[int], int]:
        with EventFd() as fd, TimerFd() as timer:
            counts: list[int] = []
            fd.write(3)
            async for count in fd:
                counts.append(count)
                if len(counts) == 2:
                    break
                fd.write(4)
            timer.set_at(time.monotonic() - 1, 0.1)
            async for ticks in timer:
                return counts, ticks
        raise AssertionError

    counts, ticks = run(main())
    assert counts == [3, 4]
    assert ticks >= 10


@pytest.mark.kvm
def test_machine_runs_inside_asyncio(run: Any) -> None:
    async def main() -> Any:
        console: list[bytes] = []
        config = flat(print_text(b"hello") + exit_with(3), serial=SerialConfig(output=console.append))
        async with Vmm(config) as vmm:
            exit = await vmm.run_async(60)
        assert vmm.state is VmRunState.CLOSED
        return exit, b"".join(console)

    exit, said = run(main())
    assert (exit.reason, exit.code, said) == (ExitReason.CODE, 3, b"hello")


@pytest.mark.kvm
def test_asyncio_is_responsive_while_the_guest_spins_and_cancellation_stops_it(run: Any) -> None:
    async def main() -> int:
        ticks = 0
        async with Vmm(flat(SPIN)) as vmm:
            task = asyncio.ensure_future(vmm.run_async())
            for _ in range(20):
                await asyncio.sleep(0.001)
                ticks += 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert vmm.state is VmRunState.PAUSED
            assert (await vmm.run_async(0.01)).reason is ExitReason.TIMEOUT
        return ticks

    assert run(main()) == 20


@pytest.mark.kvm
def test_coroutine_subscriber_of_a_machine_runs_in_asyncio(run: Any) -> None:
    async def main() -> ExitReason:
        async with Vmm(flat(SPIN)) as vmm:

            async def work() -> None:
                await asyncio.sleep(0)
                vmm.stop()

            vmm.add_subscriber(Calls(work))
            exit = await vmm.run_async(60)
            return exit.reason

    assert run(main()) is ExitReason.STOPPED


@pytest.mark.kvm
def test_failed_coroutine_stops_the_machine(run: Any) -> None:
    async def main() -> None:
        async def fail() -> None:
            raise LookupError("on purpose")

        async with Vmm(flat(SPIN)) as vmm:
            vmm.add_subscriber(Calls(fail))
            await vmm.run_async(60)

    with pytest.raises(LookupError, match="on purpose"):
        run(main())


def test_manager_is_hosted_by_hand(run: Any) -> None:
    """Whatever takes an object with `fileno` hosts it."""

    async def main() -> int:
        manager = EventManager()
        loop = asyncio.get_running_loop()
        turned: asyncio.Future[int] = loop.create_future()
        manager.add_subscriber(Calls(lambda: None))

        def turn() -> None:
            loop.remove_reader(manager)
            turned.set_result(manager.run_with_timeout(0))

        loop.add_reader(manager, turn)
        return await turned

    assert run(main()) == 1

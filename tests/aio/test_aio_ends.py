"""How runs inside asyncio end: with no coroutine lost in silence, and no later run stopped.

Covers src/py/vmm/run.rs.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from guests import SPIN, exit_with, flat
from pyvmm import EventFd, EventManager, EventOps, Events, ExitReason, StateError, Vmm, VmRunState
from subscribers import Once

if TYPE_CHECKING:
    from collections.abc import Callable


DEADLINE = 60.0


def test_coroutines_in_flight_come_to_their_end(run: Any) -> None:
    async def main() -> list[str]:
        done: list[str] = []
        manager = EventManager()

        async def work() -> None:
            manager.stop()
            for _ in range(20):
                await asyncio.sleep(0.001)
            done.append("done")

        manager.add_subscriber(Once(work))
        await manager.run_async()
        return done

    assert run(main()) == ["done"]


def test_a_coroutine_that_is_still_running_is_cancelled_and_reported(run: Any) -> None:
    heard: list[str] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context["message"]))
        manager = EventManager()

        async def work() -> None:
            manager.stop()
            await asyncio.sleep(DEADLINE)

        manager.add_subscriber(Once(work))
        await manager.run_async()

    run(main())
    assert len(heard) == 1
    assert "Once.process was cancelled" in heard[0]


@pytest.mark.kvm
def test_coroutines_of_a_guest_that_has_ended_come_to_their_end(run: Any) -> None:
    ring_and_exit = b"\xba\x00\x05\xb0\x01\xee" + exit_with(3)

    async def main() -> list[int]:
        got: list[int] = []
        fd = EventFd()

        class Bell:
            def init(self, ops: EventOps) -> None:
                ops.add(Events(fd, drain=True))

            async def process(self, events: Events, ops: EventOps) -> None:
                for _ in range(20):
                    await asyncio.sleep(0.001)
                got.append(events.count or 0)

        async with Vmm(flat(ring_and_exit)) as vmm:
            vmm.add_ioeventfd(0x500, fd, length=1, datamatch=1, pio=True)
            vmm.add_subscriber(Bell())
            assert (await vmm.run_async(DEADLINE)).code == 3
        return got

    assert run(main()) == [1]


@pytest.mark.parametrize("kind", ["future", "task", "awaitable", "async callable", "method"])
def test_whatever_can_be_awaited_is(run: Any, kind: str) -> None:
    async def main() -> None:
        async def work() -> None:
            raise LookupError("heard")

        class Awaitable:
            def __await__(self) -> Any:
                return work().__await__()

        class Work:
            async def __call__(self) -> None:
                await work()

        makers: dict[str, Callable[[], Any]] = {
            "future": lambda: asyncio.gather(work()),
            "task": lambda: asyncio.get_running_loop().create_task(work()),
            "awaitable": Awaitable,
            "async callable": Work(),
            "method": work,
        }
        manager = EventManager()
        manager.add_subscriber(Once(makers[kind]))
        await manager.run_async()

    with pytest.raises(LookupError, match="heard"):
        run(main())


async def nothing(*_: object) -> None:
    raise AssertionError("never awaited")


async def no_items(*_: object) -> Any:
    yield 5


@pytest.mark.parametrize("function", [nothing, no_items])
def test_a_coroutine_that_is_not_awaited_is_refused(function: Callable[..., Any]) -> None:
    manager = EventManager()
    manager.add_subscriber(Once(function))
    with pytest.raises(StateError, match=r"Once\.process returned an? .*, which is not awaited"):
        manager.run()
    with pytest.raises(TypeError, match="cannot be a coroutine function"):
        manager.add_subscriber(type("Subscriber", (), {"init": function, "process": print})())
    assert repr(manager) == "EventManager(subscribers=1)"
    manager.remote_endpoint().fire(function)
    with pytest.raises(StateError, match="is not awaited"):
        manager.run_with_timeout(0)


@pytest.mark.kvm
def test_a_device_that_is_a_coroutine_function_is_refused() -> None:
    with Vmm(flat(b"\xba\x00\x05\xee\xeb\xfe")) as vmm:
        vmm.add_pio_device(0x500, 1, type("Device", (), {"write": nothing})())
        with pytest.raises(TypeError, match="cannot be a coroutine function"):
            vmm.run(DEADLINE)


@pytest.mark.kvm
def test_many_machines_run_at_once_and_leave_the_executor_alone(run: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        machines = [Vmm(flat(SPIN)) for _ in range(12)]
        running = [asyncio.ensure_future(machine.run_async()) for machine in machines]
        while any(machine.state is not VmRunState.RUNNING for machine in machines):
            for failed in (each for each in running if each.done()):
                raise AssertionError("a run ended by itself") from failed.exception()
            await asyncio.sleep(0.001)
        assert await loop.getaddrinfo("127.0.0.1", 80)
        async with Vmm(flat(SPIN)) as another:
            assert (await another.run_async(0.01)).reason is ExitReason.TIMEOUT
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(another.run_async(), 0.01)
        async with asyncio.TaskGroup() as group:
            for each in running:
                each.cancel()
            for machine in machines:
                group.create_task(machine.__aexit__(None, None, None))
        await asyncio.wait(running)
        assert all(each.cancelled() for each in running), running

    run(main())


@pytest.mark.kvm
def test_a_cancellation_that_meets_the_end_stops_no_later_run(run: Any) -> None:
    async def main() -> None:
        async with Vmm(flat(SPIN)) as vmm:
            for _ in range(5):
                running = asyncio.ensure_future(vmm.run_async(0.01))
                while vmm.state is not VmRunState.RUNNING and not running.done():
                    await asyncio.sleep(0)
                # The run ends in its thread; here nobody has heard of it when the cancellation
                # comes.
                while vmm.state is VmRunState.RUNNING:
                    time.sleep(0.001)
                running.cancel()
                await asyncio.wait({running})
                assert (await vmm.run_async(0.01)).reason is ExitReason.TIMEOUT

    run(main())


@pytest.mark.kvm
def test_machines_that_share_a_loop_await_all_coroutines(run: Any) -> None:
    async def main() -> list[int]:
        manager, ran, fd = EventManager(), [], EventFd()
        heard = asyncio.Event()

        class Bell:
            def init(self, ops: EventOps) -> None:
                ops.add(Events(fd, drain=True))

            async def process(self, events: Events, ops: EventOps) -> None:
                await asyncio.sleep(0)
                ran.append(events.count or 0)
                heard.set()

        async def ring(count: int) -> None:
            heard.clear()
            fd.write(count)
            await heard.wait()

        manager.add_subscriber(Bell())
        one, other = (Vmm(flat(SPIN), event_manager=manager) for _ in range(2))
        async with one, other:
            first = asyncio.ensure_future(one.run_async())
            await ring(1)
            second = asyncio.ensure_future(other.run_async())
            await ring(2)
            other.stop()
            await second
            await ring(3)
            one.stop()
            await first
        return ran

    assert run(main()) == [1, 2, 3]


@pytest.mark.kvm
def test_a_loop_that_is_closed_early_stops_the_guest() -> None:
    manager = EventManager()
    with Vmm(flat(SPIN)) as vmm:
        loop = asyncio.new_event_loop()
        tasks = [loop.create_task(vmm.run_async()), loop.create_task(manager.run_async())]
        while vmm.state is not VmRunState.RUNNING:
            loop.run_until_complete(asyncio.sleep(0.001))
        loop.close()
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        del tasks, task, loop
        gc.collect()
        end = time.monotonic() + DEADLINE / 2
        while vmm.state is VmRunState.RUNNING and time.monotonic() < end:
            time.sleep(0.001)
        assert str(vmm.state) == str(VmRunState.PAUSED)
        while any(thread.name == "pyvmm run_async" for thread in threading.enumerate()) and time.monotonic() < end:
            time.sleep(0.001)
        assert vmm.run(0.01).reason is ExitReason.TIMEOUT
    assert manager.run_with_timeout(0) == 0, "it is hosted no more"


def test_a_manager_that_is_hosted_by_hand_may_be_forgotten() -> None:
    async def main() -> None:
        manager = EventManager()
        asyncio.get_running_loop().add_reader(manager.fileno(), print)
        number = manager.fileno()
        del manager
        gc.collect()
        await asyncio.sleep(0.01)
        asyncio.get_running_loop().remove_reader(number)

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


@pytest.mark.kvm
def test_a_run_in_progress_does_not_hold_up_the_interpreters_end() -> None:
    code = (
        "import asyncio\n"
        "from pyvmm import FlatBoot, Vmm, VmmConfig\n"
        "vmm = Vmm(VmmConfig(boot=FlatBoot(b'\\xeb\\xfe')))\n"
        "loop = asyncio.new_event_loop()\n"
        "task = loop.create_task(vmm.run_async())\n"
        "loop.run_until_complete(asyncio.sleep(0.1))\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=DEADLINE, capture_output=True)

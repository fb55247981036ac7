"""`expect_async` and `run_until_async`, hosted in asyncio, beside `run_async` and alone."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
from guests import SPIN, echo_until, flat, print_text
from pyvmm import EventFd, Events, Exit, ExitReason, Expected, ExpectTimeoutError, GuestEndedError, Vmm, VmRunState

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from pyvmm import EventOps

    Run = Callable[[Coroutine[Any, Any, Any]], Any]

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120)]
DEADLINE_S = 60
PROMPT = print_text(b"> ") + echo_until(ord("!"))


def test_expect_async_starts_the_machine(run: Run) -> None:
    async def main() -> None:
        async with Vmm(flat(PROMPT)) as vmm:
            assert await vmm.serial.expect_async("> ", DEADLINE_S) == Expected(0, "> ", "")
            vmm.serial.sendline("line!")
            assert (await vmm.serial.expect_async(b"line", DEADLINE_S)).before == b""
            assert await vmm.run_async(DEADLINE_S) == Exit(ExitReason.CODE, 0, 0)

    run(main())


def test_expect_async_waits_beside_run_async(run: Run) -> None:
    async def main() -> None:
        async with Vmm(flat(PROMPT)) as vmm:
            running = asyncio.create_task(vmm.run_async(DEADLINE_S))
            await vmm.serial.expect_async("> ", DEADLINE_S)
            waits = [vmm.serial.expect_async(text, DEADLINE_S) for text in ("a", "b", "a")]
            typing = asyncio.get_running_loop().call_later(0.05, vmm.serial.send, b"ab!")
            found = await asyncio.gather(*waits)
            assert {one.matched for one in found} == {"a", "b"}
            typing.cancel()
            assert (await running).code == 0

    run(main())


def test_other_tasks_run_meanwhile(run: Run) -> None:
    async def main() -> None:
        async with Vmm(flat(PROMPT)) as vmm:
            await vmm.run_until_async("> ", DEADLINE_S)
            assert vmm.state is VmRunState.PAUSED
            waiting = asyncio.create_task(vmm.serial.expect_async("typed", DEADLINE_S))
            for _ in range(10):
                await asyncio.sleep(0)
            vmm.serial.send(b"typed")
            assert (await waiting).matched == "typed"

    run(main())


def test_cancelled_wait_leaves_the_guest_running(run: Run) -> None:
    async def main() -> None:
        async with Vmm(flat(PROMPT)) as vmm:
            await vmm.serial.expect_async("> ", DEADLINE_S)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(vmm.serial.expect_async("never"), 0.05)
            assert vmm.state is VmRunState.RUNNING
            vmm.serial.send(b"on")
            assert (await vmm.serial.expect_async("on", DEADLINE_S)).before == ""
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(vmm.run_until_async("never"), 0.05)
            assert str(vmm.state) == "paused"

    run(main())


def test_errors_are_those_of_expect(run: Run) -> None:
    async def main() -> None:
        async with Vmm(flat(SPIN)) as vmm:
            with pytest.raises(ExpectTimeoutError, match="shown nothing"):
                await vmm.serial.expect_async("never", 0.01)
            threading.Timer(0.05, vmm.stop).start()
            with pytest.raises(GuestEndedError):
                await vmm.serial.expect_async("never", DEADLINE_S)
            with pytest.raises(TypeError, match="pattern"):
                await vmm.serial.expect_async(7)  # type: ignore[call-overload]

    run(main())


def test_coroutines_of_callbacks_run_meanwhile(run: Run) -> None:
    class Answers:
        def __init__(self, vmm: Vmm) -> None:
            self.fd = EventFd()
            self.vmm = vmm

        def init(self, ops: EventOps) -> None:
            ops.add(Events(self.fd, drain=True))

        async def process(self, events: Events, ops: EventOps) -> None:
            await asyncio.sleep(0.01)
            self.vmm.serial.send(b"answer")

    async def main() -> None:
        async with Vmm(flat(PROMPT)) as vmm:
            answers = Answers(vmm)
            vmm.add_subscriber(answers)
            answers.fd.write()
            assert (await vmm.serial.expect_async("answer", DEADLINE_S)).before == "> "

    run(main())

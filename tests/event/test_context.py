"""Context variables by asyncio's rules: a callback runs in the context in which it was registered or asked for."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import Any

import pytest
from guests import SPIN, flat
from pyvmm import EventFd, EventManager, EventOps, Events, Vmm

DEADLINE = 60.0
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")


@pytest.fixture(autouse=True)
def context() -> Any:
    """Whatever a test sets is gone after it."""
    token = variable.set("test")
    yield
    variable.reset(token)


def in_context(value: str, function: Any, *arguments: Any) -> Any:
    context = contextvars.copy_context()
    context.run(variable.set, value)
    return context.run(function, *arguments)


class Noting:
    def __init__(self, seen: list[str]) -> None:
        self.fd = EventFd(1)
        self.seen = seen

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd, drain=True))

    def process(self, events: Events, ops: EventOps) -> Any:
        self.seen.append(variable.get())
        variable.set(f"{variable.get()}+")


def test_a_subscriber_runs_in_the_context_in_which_it_was_added_and_leaves_others_alone() -> None:
    manager = EventManager()
    seen: list[str] = []
    one, other = Noting(seen), Noting(seen)
    in_context("one", manager.add_subscriber, one)
    manager.add_subscriber(other)
    manager.run()
    assert seen == ["one", "test"]
    assert variable.get() == "test"
    one.fd.write()
    manager.run()
    assert seen[2:] == ["one+"], "its own changes are there the next time"
    seen.clear()
    bell = EventFd(1)
    in_context("on", manager.on(bell, drain=True), lambda _: seen.append(variable.get()))
    manager.run()
    assert seen == ["on"]


def test_calls_from_other_threads_run_in_the_context_of_who_asked() -> None:
    manager = EventManager()
    loop = threading.Thread(target=manager.run_forever)
    loop.start()
    endpoint = manager.remote_endpoint()
    seen: list[str] = []
    in_context("fired", endpoint.fire, lambda _: seen.append(variable.get()))
    assert endpoint.call_blocking(lambda _: variable.get(), DEADLINE) == "test"
    manager.stop()
    loop.join(DEADLINE)
    assert seen == ["fired"]


def test_a_coroutine_runs_in_the_context_of_its_subscriber() -> None:
    async def main() -> list[str]:
        manager = EventManager()
        seen: list[str] = []

        class Subscriber(Noting):
            async def process(self, events: Events, ops: EventOps) -> None:
                seen.append(variable.get())
                await asyncio.sleep(0)
                seen.append(variable.get())
                manager.stop()

        in_context("registrar", manager.add_subscriber, Subscriber(seen))
        variable.set("host")
        await manager.run_async()
        return seen

    assert asyncio.run(asyncio.wait_for(main(), DEADLINE)) == ["registrar"] * 2


@pytest.mark.kvm
def test_coroutines_of_a_machine_run_in_the_context_of_their_subscriber() -> None:
    async def main() -> list[str]:
        seen: list[str] = []
        async with Vmm(flat(SPIN)) as vmm:

            class Subscriber(Noting):
                async def process(self, events: Events, ops: EventOps) -> None:
                    seen.append(variable.get())
                    vmm.stop()

            in_context("registrar", vmm.add_subscriber, Subscriber(seen))
            await vmm.run_async(DEADLINE)
        return seen

    assert asyncio.run(asyncio.wait_for(main(), DEADLINE)) == ["registrar"]


def test_a_context_that_the_thread_is_in_already_is_copied() -> None:
    manager, seen = EventManager(), []
    context = contextvars.copy_context()

    def change() -> None:
        seen.append(variable.get())
        variable.set("changed")

    def run() -> None:
        variable.set("entered")
        manager.call_later(0, change, context=context)
        manager.run()

    context.run(run)
    assert seen == ["entered"]
    assert context[variable] == "entered"

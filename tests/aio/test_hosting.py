"""A manager hosted by other loops: its events arrive whatever happens to its sources, and it has one host."""

from __future__ import annotations

import asyncio
import os
import select
import selectors
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
import uvloop
from pyvmm import EventFd, EventManager, EventOps, Events, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE = 60.0


class Bell:
    def __init__(self) -> None:
        self.fd = EventFd()
        self.rung = 0

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd, drain=True))

    def process(self, events: Events, ops: EventOps) -> None:
        self.rung += events.count or 0


class Silent:
    def __init__(self, source: socket.socket) -> None:
        self.source = source

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.source))

    def process(self, events: Events, ops: EventOps) -> None:
        raise AssertionError("it never says anything that its subscriber hears")


def turn_in_asyncio(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> Callable[..., None]:
    def turn(manager: EventManager, steps: list[Callable[[], Any]], is_done: Callable[[int], bool]) -> None:
        async def main() -> None:
            loop = asyncio.get_running_loop()
            turned = asyncio.Event()

            def host() -> None:
                manager.run_with_timeout(0)
                turned.set()

            loop.add_reader(manager, host)
            for number, step in enumerate(steps):
                step()
                while not is_done(number):
                    turned.clear()
                    await asyncio.wait_for(turned.wait(), DEADLINE)
            loop.remove_reader(manager)

        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())

    return turn


def turn_by_waiting(wait: Callable[[EventManager], Callable[[], Any]]) -> Callable[..., None]:
    def turn(manager: EventManager, steps: list[Callable[[], Any]], is_done: Callable[[int], bool]) -> None:
        ready = wait(manager)
        for number, step in enumerate(steps):
            step()
            while not is_done(number):
                assert ready(), "the host hears nothing"
                manager.run_with_timeout(0)

    return turn


def selector(manager: EventManager) -> Callable[[], Any]:
    known = selectors.DefaultSelector()
    known.register(manager, selectors.EVENT_READ)
    return lambda: known.select(DEADLINE)


def poll(manager: EventManager) -> Callable[[], Any]:
    known = select.poll()
    known.register(manager)
    return lambda: known.poll(DEADLINE * 1000)


def other_manager(manager: EventManager) -> Callable[[], Any]:
    outer = EventManager()
    outer.on(manager)(lambda _: manager.run_with_timeout(0))
    return lambda: outer.run_with_timeout(int(DEADLINE * 1000))


def turn_in_trio(manager: EventManager, steps: list[Callable[[], Any]], is_done: Callable[[int], bool]) -> None:
    async def main() -> None:
        with trio.fail_after(DEADLINE):
            for number, step in enumerate(steps):
                step()
                while not is_done(number):
                    await trio.lowlevel.wait_readable(manager)
                    manager.run_with_timeout(0)

    trio.run(main)


HOSTS: dict[str, Callable[..., None]] = {
    "asyncio": turn_in_asyncio(asyncio.new_event_loop),
    "uvloop": turn_in_asyncio(uvloop.new_event_loop),
    "selectors": turn_by_waiting(selector),
    "poll": turn_by_waiting(poll),
    "manager": turn_by_waiting(other_manager),
    "trio": turn_in_trio,
}


@pytest.fixture(params=["duplicate", "child", "none"])
def keep(request: pytest.FixtureRequest) -> Iterator[Callable[[socket.socket], None]]:
    """What keeps a socket's file alive when its number is closed."""
    children: list[subprocess.Popen[bytes]] = []
    duplicates: list[int] = []

    def keep_it(source: socket.socket) -> None:
        if request.param == "duplicate":
            duplicates.append(os.dup(source.fileno()))
        elif request.param == "child":
            children.append(subprocess.Popen(["sleep", "1000"], pass_fds=[source.fileno()]))

    yield keep_it
    for number in duplicates:
        os.close(number)
    for child in children:
        child.kill()
        child.wait()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("by", ["subscriber", "ops"])
def test_a_host_hears_on_after_a_source_was_closed(host: str, by: str, keep: Callable[..., None]) -> None:
    manager, bell = EventManager(), Bell()
    manager.add_subscriber(bell)
    others: list[socket.socket] = []

    def ring() -> None:
        bell.fd.write()

    def close_and_ring() -> None:
        source, other = socket.socketpair()
        others.append(other)
        number = source.fileno()
        id = manager.add_subscriber(Silent(source))
        keep(source)
        source.close()
        if by == "ops":
            manager.event_ops(id).remove(number)
        manager.remove_subscriber(id)
        bell.fd.write()

    before = manager.fileno()
    HOSTS[host](manager, [ring, close_and_ring, close_and_ring, ring], lambda number: bell.rung > number)
    assert bell.rung == 4
    assert manager.fileno() == before
    for other in others:
        other.close()


def test_a_stale_source_does_not_keep_the_host_awake() -> None:
    manager = EventManager()
    source, other = socket.socketpair()
    id = manager.add_subscriber(Silent(source))
    duplicate = os.dup(source.fileno())
    source.close()
    other.send(b"ready, and nobody's")
    manager.remove_subscriber(id)
    known = select.poll()
    known.register(manager, select.POLLIN)
    manager.run_with_timeout(0)
    assert known.poll(0) == []
    os.close(duplicate)
    other.close()


def test_removing_a_closed_source_needs_no_descriptor() -> None:
    """A number whose file is gone is known to be gone without a look at the list."""
    code = (
        "import resource\n"
        "from pyvmm import EventFd, EventManager, Events\n"
        "manager, fd = EventManager(), EventFd()\n"
        "class Subscriber:\n"
        "    def init(self, ops): ops.add(Events(fd.fileno()))\n"
        "    def process(self, events, ops): pass\n"
        "id = manager.add_subscriber(Subscriber())\n"
        "fd.close()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "manager.remove_subscriber(id)\n"
        "assert manager.run_with_timeout(0) == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE)


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_second_host_is_refused_and_the_first_continues(factory: Callable[[], Any]) -> None:
    async def main() -> int:
        manager = EventManager()
        ran = 0

        async def work(_: Events) -> None:
            nonlocal ran
            ran += 1
            manager.stop()

        fd = EventFd()
        manager.on(fd)(lambda events: (fd.read(), work(events))[1])
        first = asyncio.ensure_future(manager.run_async())
        await asyncio.sleep(0)
        with pytest.raises(StateError, match="already runs or has a host"):
            await manager.run_async()
        fd.write()
        await first
        return ran

    with asyncio.Runner(loop_factory=factory) as runner:
        assert runner.run(asyncio.wait_for(main(), DEADLINE)) == 1


def test_a_hosted_manager_is_run_by_no_other_thread() -> None:
    async def main() -> None:
        manager = EventManager()
        hosting = asyncio.ensure_future(manager.run_async())
        await asyncio.sleep(0)
        with pytest.raises(StateError, match="hosted by an asyncio loop"):
            await asyncio.to_thread(manager.run_with_timeout, 0)
        # On the host's own thread a turn by hand, and a call, are made at once.
        assert manager.run_with_timeout(0) == 0
        assert manager.remote_endpoint().call_blocking(lambda _: 5, 0.0) == 5
        manager.stop()
        await hosting

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


def test_a_manager_in_a_run_is_not_hosted() -> None:
    manager = EventManager()
    running = threading.Event()
    manager.remote_endpoint().fire(lambda _: running.set())
    thread = threading.Thread(target=manager.run_forever)
    thread.start()
    assert running.wait(DEADLINE)
    with pytest.raises(StateError, match="already runs or has a host"):
        asyncio.run(asyncio.wait_for(manager.run_async(), DEADLINE))
    manager.stop()
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_hosting_leaves_a_reader_that_the_program_added_by_hand() -> None:
    async def main() -> bool:
        manager = EventManager()
        loop = asyncio.get_running_loop()
        loop.add_reader(manager, lambda: None)
        manager.stop()
        await manager.run_async()
        return loop.remove_reader(manager)

    assert asyncio.run(asyncio.wait_for(main(), DEADLINE))


def test_a_stop_from_before_ends_run_async_at_once() -> None:
    async def main() -> None:
        manager = EventManager()
        bell = Bell()
        manager.add_subscriber(bell)
        bell.fd.write()
        manager.stop()
        await manager.run_async()
        assert bell.rung == 0

    asyncio.run(asyncio.wait_for(main(), DEADLINE))

"""The event loop against uvloop, asyncio, selectors and select.epoll, and against event-manager in pure Rust.

Each dispatch reads one EventFd and writes it, in a Python callback. pyvmm's loop can read it for
the callback. In the other loops the callback reads it by its number, with `os.eventfd_read`, which
is faster there than `EventFd.read`.
Patterns: one descriptor; 64 ready at once; 1,024 registered and one ready.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import resource
import select
import selectors
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import uvloop
from pyvmm import EventFd, EventManager, EventOps, Events

from benches.measure import Result, UnmeasurableError, compare

DISPATCHES = 20_000
RUNS = 21
# Name, registered, ready at once, and the goal against uvloop.
PATTERNS = [("one fd", 1, 1, 1.2), ("64 ready", 64, 64, 1.1), ("1 of 1,024", 1024, 1, 1.2)]
CALLS = 2_000
FILES = 17_000


class Links:
    """Eventfds and the callbacks that read and write them; each is dispatched as often as the others."""

    def __init__(self, registered: int, ready: int, dispatches: int, stop: Callable[[], object]) -> None:
        gc.collect()  # the links of the run before are a cycle
        self.is_over = False
        self.stop = stop
        self.fds = [EventFd() for _ in range(registered)]
        self.callbacks = [self.link(fd, dispatches // ready) for fd in self.fds]
        for fd in self.fds[:ready]:
            fd.write()

    def end(self) -> None:
        self.is_over = True
        self.stop()

    def link(self, fd: EventFd, left: int) -> Callable[..., None]:
        def callback(_events: object = None, _ops: object = None) -> None:
            nonlocal left
            fd.read()
            fd.write(1)
            left -= 1
            if not left:
                self.end()

        return callback


class NumberedLinks(Links):
    """Links that read their eventfds by number."""

    def link(self, fd: EventFd, left: int) -> Callable[..., None]:
        number = fd.fileno()

        def callback() -> None:
            nonlocal left
            os.eventfd_read(number)
            fd.write(1)
            left -= 1
            if not left:
                self.end()

        return callback


class DrainedLinks(Links):
    """Links whose eventfds the loop reads."""

    def link(self, fd: EventFd, left: int) -> Callable[..., None]:
        def callback(_events: object, _ops: object) -> None:
            nonlocal left
            fd.write(1)
            left -= 1
            if not left:
                self.end()

        return callback


class Subscriber:
    """One link as a subscriber."""

    def __init__(self, events: Events, process: Callable[..., None]) -> None:
        self.events = events
        self.process = process

    def init(self, ops: EventOps) -> None:
        ops.add(self.events)


def pyvmm_loop(registered: int, ready: int, dispatches: int = DISPATCHES, *, drain: bool = True) -> float:
    manager = EventManager()
    links = (DrainedLinks if drain else Links)(registered, ready, dispatches, manager.stop)
    for fd, callback in zip(links.fds, links.callbacks, strict=True):
        manager.add_subscriber(Subscriber(Events(fd, drain=drain), callback))
    start = time.perf_counter()
    manager.run_forever()
    return dispatches / (time.perf_counter() - start)


def asyncio_loop(new: Callable[[], Any], registered: int, ready: int, dispatches: int = DISPATCHES) -> float:
    loop = new()
    links = NumberedLinks(registered, ready, dispatches, loop.stop)
    for fd, callback in zip(links.fds, links.callbacks, strict=True):
        loop.add_reader(fd.fileno(), callback)
    start = time.perf_counter()
    loop.run_forever()
    seconds = time.perf_counter() - start
    for fd in links.fds:
        loop.remove_reader(fd.fileno())
    loop.close()
    return dispatches / seconds


def selectors_loop(registered: int, ready: int, dispatches: int = DISPATCHES) -> float:
    with selectors.DefaultSelector() as selector:
        links = NumberedLinks(registered, ready, dispatches, lambda: None)
        for fd, callback in zip(links.fds, links.callbacks, strict=True):
            selector.register(fd, selectors.EVENT_READ, callback)
        start = time.perf_counter()
        while not links.is_over:
            for key, _ in selector.select():
                key.data()
        return dispatches / (time.perf_counter() - start)


def epoll_loop(registered: int, ready: int, dispatches: int = DISPATCHES) -> float:
    with select.epoll() as epoll:
        links = NumberedLinks(registered, ready, dispatches, lambda: None)
        by_fd = {fd.fileno(): callback for fd, callback in zip(links.fds, links.callbacks, strict=True)}
        for number in by_fd:
            epoll.register(number, select.EPOLLIN)
        start = time.perf_counter()
        while not links.is_over:
            for number, _ in epoll.poll():
                by_fd[number]()
        return dispatches / (time.perf_counter() - start)


@cache
def rust_program() -> str:
    command = ["cargo", "build", "--quiet", "--release", "--no-default-features", "--example", "event_manager"]
    try:
        subprocess.run(command, check=True)
        metadata = subprocess.run(
            ["cargo", "metadata", "--no-deps", "--format-version=1"], check=True, capture_output=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise UnmeasurableError(f"the Rust limit cannot be built: {error}") from error
    return f"{json.loads(metadata.stdout)['target_directory']}/release/examples/event_manager"


def rust_loop(registered: int, ready: int, dispatches: int = 10 * DISPATCHES, *options: str) -> float:
    command = [rust_program(), str(registered), str(ready), str(dispatches), *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def dispatches() -> Iterator[Result]:
    """Dispatches to Python with few, many ready and many idle descriptors, against other loops."""
    for name, registered, ready, goal in PATTERNS:
        peers: list[tuple[str, Callable[[int, int], float], float]] = [
            ("uvloop", partial(asyncio_loop, uvloop.new_event_loop), goal),
            ("select.epoll", epoll_loop, 1.0),
            ("selectors", selectors_loop, 1.0),
            ("asyncio", partial(asyncio_loop, asyncio.new_event_loop), 1.0),
            ("event-manager in Rust", rust_loop, 0.75),
        ]
        for peer, run, peer_goal in peers:
            ours, theirs = partial(pyvmm_loop, registered, ready), partial(run, registered, ready)
            yield compare(f"loop, {name}", "dispatches/s", ours, theirs, peer, peer_goal, RUNS)
        undrained = partial(pyvmm_loop, registered, ready, drain=False)
        theirs = partial(asyncio_loop, uvloop.new_event_loop, registered, ready)
        yield compare(f"loop, {name}, read in Python", "dispatches/s", undrained, theirs, "uvloop", goal, RUNS)


def least(registered: int, ready: int) -> float:
    """What no binding can be faster than: event-manager in Rust, reading, and calls of the callback, which writes."""
    with select.epoll() as epoll:
        links = DrainedLinks(registered, ready, 2 * DISPATCHES, lambda: None)
        for fd in links.fds:
            epoll.register(fd, select.EPOLLIN)
        callbacks = itertools.cycle(links.callbacks[:ready])
        start = time.perf_counter()
        for callback in itertools.islice(callbacks, DISPATCHES):
            callback(None, None)
        calls = time.perf_counter() - start
        start = time.perf_counter()
        for _ in itertools.islice(callbacks, DISPATCHES):
            pass
        calls -= time.perf_counter() - start
    return 1 / (calls / DISPATCHES + 1 / rust_loop(registered, ready, 10 * DISPATCHES, "read"))


def floors() -> Iterator[Result]:
    """A dispatch against a minimal loop, and the minimal loop against uvloop."""
    for name, registered, ready, goal in PATTERNS:
        limit = partial(least, registered, ready)
        uvloops = partial(asyncio_loop, uvloop.new_event_loop, registered, ready)
        yield compare(
            f"loop, {name}", "dispatches/s", partial(pyvmm_loop, registered, ready), limit, "the least", 0.95, RUNS
        )
        yield compare(f"loop, {name}, the least", "dispatches/s", limit, uvloops, "uvloop", goal, RUNS)


def scaling() -> Iterator[Result]:
    """One ready of 16 and of 16,384 registered: a dispatch costs the same."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        if hard < FILES:
            raise UnmeasurableError(f"{FILES} open files are needed, {hard} are allowed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    many, few = partial(pyvmm_loop, 16_384, 1), partial(pyvmm_loop, 16, 1)
    yield compare("loop, 1 of 16,384", "dispatches/s", many, few, "1 of 16", 1 / 1.2, RUNS)


def calls() -> Iterator[Result]:
    """Calls made on the loop's thread from another, one after the other."""

    def ours() -> float:
        manager = EventManager()
        thread = threading.Thread(target=manager.run_forever)
        thread.start()
        endpoint = manager.remote_endpoint()
        start = time.perf_counter()
        for _ in range(CALLS):
            endpoint.call_blocking(lambda _: None)
        seconds = time.perf_counter() - start
        manager.stop()
        thread.join()
        return CALLS / seconds

    async def nothing() -> None:
        pass

    def theirs() -> float:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        start = time.perf_counter()
        for _ in range(CALLS):
            asyncio.run_coroutine_threadsafe(nothing(), loop).result()
        seconds = time.perf_counter() - start
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        return CALLS / seconds

    yield compare("call_blocking", "calls/s", ours, theirs, "run_coroutine_threadsafe", 2.0, RUNS)

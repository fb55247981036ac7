"""The event manager against a plain reference over `select.epoll`: the same calls give the same events."""

from __future__ import annotations

import contextlib
import os
import select
from typing import Generic, TypeAlias, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from pyvmm import EventFd, EventManager, EventOps, Events, EventSet, SubscriberId, TimerFd

FLAGS = [EventSet.IN, EventSet.IN | EventSet.EDGE_TRIGGERED, EventSet.IN | EventSet.ONE_SHOT, EventSet.OUT]


Fd = TypeVar("Fd", EventFd, TimerFd)


class Watched(Generic[Fd]):
    """A subscriber of one source, which notes what it is told."""

    def __init__(self, log: list[tuple[int, int]], flags: EventSet, fd: Fd) -> None:
        self.fd: Fd = fd
        self.flags = flags
        self.log = log

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd, self.flags))

    def process(self, events: Events, ops: EventOps) -> None:
        self.log.append((events.fd, int(events.event_set)))


Entry: TypeAlias = tuple[Watched[EventFd], SubscriberId]


class Model(RuleBasedStateMachine):
    """Each rule does the same to both loops."""

    subscribers = Bundle("subscribers")
    timers = Bundle("timers")

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[int, int]] = []
        self.manager = EventManager()
        self.epoll = select.epoll()
        self.alive: dict[int, object] = {}
        self.opened: list[EventFd | TimerFd] = []

    @rule(target=subscribers, flags=st.sampled_from(FLAGS))
    def add(self, flags: EventSet) -> Entry:
        watched = Watched(self.log, flags, EventFd())
        self.opened.append(watched.fd)
        id = self.manager.add_subscriber(watched)
        self.epoll.register(watched.fd, int(flags))
        self.alive[watched.fd.fileno()] = id
        return watched, id

    @rule(target=timers, flags=st.sampled_from(FLAGS[:3]))
    def add_timer(self, flags: EventSet) -> TimerFd:
        timer = TimerFd()
        self.opened.append(timer)
        self.alive[timer.fileno()] = self.manager.add_subscriber(Watched(self.log, flags, timer))
        self.epoll.register(timer, int(flags))
        return timer

    @rule(entry=consumes(subscribers), close_first=st.booleans())
    def remove(self, entry: Entry, close_first: bool) -> None:
        watched, id = entry
        del self.alive[watched.fd.fileno()]
        self.epoll.unregister(watched.fd)
        if close_first:
            watched.fd.close()
        assert self.manager.remove_subscriber(id) is watched
        watched.fd.close()

    @rule(entry=subscribers, value=st.integers(1, 3))
    def write(self, entry: Entry, value: int) -> None:
        entry[0].fd.write(value)

    @rule(entry=subscribers)
    def read(self, entry: Entry) -> None:
        with contextlib.suppress(BlockingIOError):
            entry[0].fd.read()

    @rule(entry=subscribers, flags=st.sampled_from(FLAGS))
    def modify(self, entry: Entry, flags: EventSet) -> None:
        self.manager.event_ops(entry[1]).modify(Events(entry[0].fd, flags))
        self.epoll.modify(entry[0].fd, int(flags))

    @rule(timer=timers, expired=st.booleans())
    def set(self, timer: TimerFd, expired: bool) -> None:
        """In the past it has expired, in an hour it has not."""
        timer.set(0.0 if expired else 3600.0)
        if expired:
            poll = select.poll()  # select() ends at 1,024 descriptors
            poll.register(timer)
            poll.poll()

    @rule(timer=timers)
    def clear(self, timer: TimerFd) -> None:
        timer.clear()

    @rule()
    def run(self) -> None:
        self.log.clear()
        count = self.manager.run_with_timeout(0)
        expected = sorted(self.epoll.poll(0))
        assert sorted(self.log) == expected
        assert count == len(expected)

    @rule()
    def stop(self) -> None:
        self.manager.stop()
        self.manager.run_forever()

    @invariant()
    def subscribers_are_counted(self) -> None:
        assert repr(self.manager) == f"EventManager(subscribers={len(self.alive)})"

    def teardown(self) -> None:
        self.epoll.close()
        for source in self.opened:
            source.close()


TestModel = Model.TestCase
# 50,000 steps, and ten times as many under `make stress`.
EXAMPLES = 5000 if "PYVMM_STRESS_S" in os.environ else 500
TestModel.settings = settings(max_examples=EXAMPLES, stateful_step_count=100, deadline=None)

"""The event manager against a plain reference over `select.epoll`: the same calls give the same events."""

from __future__ import annotations

import contextlib
import os
import select
from typing import Any, Generic, TypeAlias, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from pyvmm import EventFd, EventManager, EventOps, Events, EventSet, SubscriberId, TimerFd

FLAGS = [EventSet.IN, EventSet.IN | EventSet.EDGE_TRIGGERED, EventSet.IN | EventSet.ONE_SHOT, EventSet.OUT]


Fd = TypeVar("Fd", EventFd, TimerFd)


class Watched(Generic[Fd]):
    """A subscriber of one source, which records its events."""

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
        self.duplicates: list[int] = []
        self.flags: dict[int, EventSet] = {}
        # Another loop that watches this one from the first to the last step.
        self.host = select.poll()
        self.host.register(self.manager, select.POLLIN)
        self.calls: dict[int, Any] = {}
        self.due: list[int] = []
        self.called: list[int] = []
        self.number = 0

    @rule(target=subscribers, flags=st.sampled_from(FLAGS))
    def add(self, flags: EventSet) -> Entry:
        watched = Watched(self.log, flags, EventFd())
        self.opened.append(watched.fd)
        id = self.manager.add_subscriber(watched)
        self.epoll.register(watched.fd, int(flags))
        self.flags[watched.fd.fileno()] = flags
        self.alive[watched.fd.fileno()] = id
        return watched, id

    @rule(target=timers, flags=st.sampled_from(FLAGS[:3]))
    def add_timer(self, flags: EventSet) -> TimerFd:
        timer = TimerFd()
        self.opened.append(timer)
        self.alive[timer.fileno()] = self.manager.add_subscriber(Watched(self.log, flags, timer))
        self.epoll.register(timer, int(flags))
        self.flags[timer.fileno()] = flags
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

    def registrations_are_made_anew(self) -> None:
        """What is edge-triggered and ready is reported once more then."""
        for number in self.alive:
            if self.flags[number] & EventSet.EDGE_TRIGGERED:
                self.epoll.modify(number, int(self.flags[number]))

    @rule(entry=consumes(subscribers), how=st.sampled_from(["subscriber", "number"]), ready=st.booleans())
    def close_while_a_duplicate_lives(self, entry: Entry, how: str, ready: bool) -> None:
        """No number refers to the source any more, and the kernel still watches it."""
        watched, id = entry
        number = watched.fd.fileno()
        del self.alive[number]
        self.epoll.unregister(watched.fd)
        self.duplicates.append(os.dup(number))
        if ready:
            watched.fd.write()
        watched.fd.close()
        if how == "number":
            self.manager.event_ops(id).remove(number)
        assert self.manager.remove_subscriber(id) is watched
        self.registrations_are_made_anew()

    @rule(entry=subscribers, flags=st.sampled_from(FLAGS))
    def give_the_number_to_another(self, entry: Entry, flags: EventSet) -> None:
        """The source is closed, with a duplicate alive, and its number is registered again before it was removed."""
        watched, id = entry
        number = watched.fd.fileno()
        self.epoll.unregister(watched.fd)
        self.duplicates.append(os.dup(number))
        watched.fd.close()
        watched.fd = EventFd()
        self.opened.append(watched.fd)
        if watched.fd.fileno() == number:
            self.manager.event_ops(id).add(Events(watched.fd, flags))
        else:  # an older number was free
            self.manager.event_ops(id).remove(number)
            self.manager.event_ops(id).add(Events(watched.fd, flags))
            self.alive[watched.fd.fileno()] = self.alive.pop(number)
        self.epoll.register(watched.fd, int(flags))
        self.flags[watched.fd.fileno()] = flags
        self.registrations_are_made_anew()

    @rule(due=st.booleans())
    def call_later(self, due: bool) -> None:
        self.number += 1
        number = self.number
        self.calls[number] = self.manager.call_later(-1 if due else 3600, self.called.append, number)
        if due:
            self.due.append(number)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.calls:
            number = data.draw(st.sampled_from(sorted(self.calls)))
            self.calls.pop(number).cancel()
            self.due = [each for each in self.due if each != number]

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
        self.flags[entry[0].fd.fileno()] = flags

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
        self.called.clear()
        expected = sorted(self.epoll.poll(0))
        if expected or self.due:
            assert self.host.poll(0), "the host does not hear of it"
        count = self.manager.run_with_timeout(0)
        assert sorted(self.log) == expected
        assert self.called == self.due
        assert count == len(expected) + len(self.due)
        for number in self.due:
            del self.calls[number]
        self.due = []

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
        for number in self.duplicates:
            os.close(number)


TestModel = Model.TestCase
# 10,000 steps, and fifty times as many under `make stress`.
EXAMPLES = 5000 if "PYVMM_STRESS_S" in os.environ else 100
TestModel.settings = settings(max_examples=EXAMPLES, stateful_step_count=100, deadline=None)

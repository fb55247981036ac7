"""The event manager against a plain reference over `select.epoll`: the same calls give the same events."""

from __future__ import annotations

import contextlib
import select

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from pyvmm import EventFd, EventManager, EventOps, Events, EventSet

FLAGS = [EventSet.IN, EventSet.IN | EventSet.EDGE_TRIGGERED, EventSet.IN | EventSet.ONE_SHOT, EventSet.OUT]


class Watched:
    """A subscriber of one eventfd, and what it has been told."""

    def __init__(self, log: list[tuple[int, int]], flags: EventSet) -> None:
        self.fd = EventFd()
        self.flags = flags
        self.log = log
        self.drain = False
        self.modify: EventSet | None = None

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd, self.flags))

    def process(self, events: Events, ops: EventOps) -> None:
        self.log.append((events.fd, int(events.event_set)))


class Model(RuleBasedStateMachine):
    """Each rule does the same to both loops."""

    subscribers = Bundle("subscribers")

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[int, int]] = []
        self.manager = EventManager()
        self.epoll = select.epoll()
        self.alive: dict[int, object] = {}

    @rule(target=subscribers, flags=st.sampled_from(FLAGS))
    def add(self, flags: EventSet) -> tuple[Watched, object]:
        watched = Watched(self.log, flags)
        id = self.manager.add_subscriber(watched)
        self.epoll.register(watched.fd, int(flags))
        self.alive[watched.fd.fileno()] = id
        return watched, id

    @rule(entry=consumes(subscribers), close_first=st.booleans())
    def remove(self, entry: tuple[Watched, object], close_first: bool) -> None:
        watched, id = entry
        del self.alive[watched.fd.fileno()]
        self.epoll.unregister(watched.fd)
        if close_first:
            watched.fd.close()
        assert self.manager.remove_subscriber(id) is watched  # type: ignore[arg-type]
        watched.fd.close()

    @rule(entry=subscribers, value=st.integers(1, 3))
    def write(self, entry: tuple[Watched, object], value: int) -> None:
        entry[0].fd.write(value)

    @rule(entry=subscribers)
    def read(self, entry: tuple[Watched, object]) -> None:
        with contextlib.suppress(BlockingIOError):
            entry[0].fd.read()

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


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=500, stateful_step_count=100, deadline=None)

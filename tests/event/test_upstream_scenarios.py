"""The scenarios of event-manager's own tests, in Python."""

from __future__ import annotations

import threading

import pytest
from pyvmm import EventError, EventFd, EventManager, EventOps, Events, EventSet


class Counter:
    """Counts the events of one eventfd; what is in `toggle` changes the registration in the next call."""

    def __init__(self, flags: EventSet = EventSet.IN) -> None:
        self.fd = EventFd()
        self.flags = flags
        self.count = 0
        self.total = 0
        self.last: EventSet | None = None
        self.do: str | None = None

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd, self.flags))

    def process(self, events: Events, ops: EventOps) -> None:
        if self.do == "remove":
            ops.remove(Events(self.fd))
        elif self.do == "modify":
            ops.modify(Events(self.fd, EventSet.OUT))
        elif self.do == "add":
            ops.add(Events(self.fd))
        self.do = None
        self.count += 1
        self.last = events.event_set
        if EventSet.IN in events.event_set:
            self.total += self.fd.read()


# Basic use


def test_a_hundred_subscribers_each_get_their_own_events() -> None:
    manager = EventManager()
    counters = [Counter() for _ in range(100)]
    ids = [manager.add_subscriber(counter) for counter in counters]
    for _ in range(5):
        for counter in counters:
            counter.fd.write()
        assert manager.run() == 100
    assert [counter.count for counter in counters] == [5] * 100
    assert [manager.remove_subscriber(id) for id in ids] == counters


def test_events_are_changed_and_removed_in_their_own_callback() -> None:
    manager = EventManager()
    counter = Counter()
    manager.add_subscriber(counter)
    counter.do = "modify"
    counter.fd.write()
    assert manager.run() == 1
    seen = [counter.last]
    counter.do = "remove"
    assert manager.run() == 1
    assert [*seen, counter.last] == [EventSet.IN, EventSet.OUT]
    counter.fd.write()
    assert manager.run_with_timeout(0) == 0


def test_subscriber_that_is_removed_can_be_added_again() -> None:
    manager = EventManager()
    counter = Counter()
    for expected in (1, 2):
        id = manager.add_subscriber(counter)
        counter.fd.write()
        assert manager.run() == 1
        assert counter.count == expected
        assert manager.remove_subscriber(id) is counter


def test_one_subscriber_watches_many_descriptors_and_tells_them_by_their_data() -> None:
    fds = [EventFd() for _ in range(8)]
    seen: list[int] = []

    class Many:
        def init(self, ops: EventOps) -> None:
            for data, fd in enumerate(fds):
                ops.add(Events(fd, EventSet.IN, data))

        def process(self, events: Events, _ops: EventOps) -> None:
            seen.append(events.data)
            fds[events.data].read()

    manager = EventManager()
    manager.add_subscriber(Many())
    for data in (3, 5):
        fds[data].write()
    assert manager.run() == 2
    assert sorted(seen) == [3, 5]


# The remote endpoint


def test_everything_is_done_through_the_endpoint() -> None:
    manager = EventManager()
    thread = threading.Thread(target=manager.run_forever)
    thread.start()
    endpoint = manager.remote_endpoint()
    counter, extra = Counter(), EventFd()
    id = endpoint.call_blocking(lambda manager: manager.add_subscriber(counter))
    endpoint.call_blocking(lambda manager: manager.event_ops(id).add(Events(extra)))
    with pytest.raises(EventError, match="already registered"):
        endpoint.call_blocking(lambda manager: manager.event_ops(id).add(Events(extra)))
    endpoint.call_blocking(lambda manager: manager.event_ops(id).remove(Events(extra)))
    assert endpoint.call_blocking(lambda manager: manager.remove_subscriber(id)) is counter
    with pytest.raises(EventError, match="no subscriber"):
        endpoint.call_blocking(lambda manager: manager.remove_subscriber(id))
    endpoint.fire(lambda manager: manager.stop())
    thread.join(60)
    assert not thread.is_alive()


def test_endpoint_outlives_the_thread_that_ran_the_loop() -> None:
    manager = EventManager()
    endpoint = manager.remote_endpoint()
    done: list[bool] = []
    for _ in range(3):
        thread = threading.Thread(target=manager.run_forever)
        thread.start()
        done.append(endpoint.call_blocking(lambda _manager: threading.get_ident()) == thread.ident)
        manager.stop()
        thread.join(60)
    assert done == [True] * 3


# Several threads


def test_writers_in_threads_are_counted_by_the_loop() -> None:
    manager = EventManager()
    counters = [Counter(EventSet.IN | EventSet.EDGE_TRIGGERED) for _ in range(4)]
    for counter in counters:
        manager.add_subscriber(counter)

    def write(counter: Counter) -> None:
        for _ in range(100):
            counter.fd.write()

    threads = [threading.Thread(target=write, args=(counter,)) for counter in counters]
    for thread in threads:
        thread.start()
    while sum(counter.total for counter in counters) < 400:
        assert manager.run_with_timeout(60_000) > 0
    for thread in threads:
        thread.join(60)
    assert [counter.total for counter in counters] == [100] * 4


def test_loop_in_a_thread_is_moved_to_another() -> None:
    manager = EventManager()
    counter = Counter()
    manager.add_subscriber(counter)
    for expected in range(1, 6):
        thread = threading.Thread(target=manager.run)
        thread.start()
        counter.fd.write()
        thread.join(60)
        assert counter.count == expected


# Wrong uses


def test_adding_twice_is_an_error_and_changes_nothing() -> None:
    manager = EventManager()
    counter = Counter()
    manager.add_subscriber(counter)
    counter.do = "add"
    counter.fd.write()
    with pytest.raises(EventError, match="already registered"):
        manager.run()
    counter.do = None
    assert manager.run() == 1
    assert counter.count == 1


def test_changing_what_is_not_registered_is_an_error() -> None:
    manager = EventManager()
    id = manager.add_subscriber(Counter())
    ops, stranger = manager.event_ops(id), EventFd()
    with pytest.raises(EventError, match="not registered"):
        ops.modify(Events(stranger))
    with pytest.raises(EventError, match="not registered"):
        ops.remove(Events(stranger))


def test_descriptor_of_another_subscriber_is_out_of_reach() -> None:
    manager = EventManager()
    first, second = Counter(), Counter()
    manager.add_subscriber(first)
    ops = manager.event_ops(manager.add_subscriber(second))
    with pytest.raises(EventError, match="another subscriber"):
        ops.remove(first.fd)
    with pytest.raises(EventError, match="already registered"):
        ops.add(Events(first.fd))
    first.fd.write()
    assert manager.run() == 1
    assert first.count == 1


def test_unknown_subscriber_is_an_error() -> None:
    manager = EventManager()
    id = manager.add_subscriber(Counter())
    manager.remove_subscriber(id)
    with pytest.raises(EventError, match="no subscriber"):
        manager.remove_subscriber(id)


# What once went wrong


def test_event_fetched_for_one_that_another_removes_is_not_dispatched() -> None:
    """In the crate itself this ended in `unreachable!`."""
    manager = EventManager()
    counters = [Counter(), Counter()]
    ids = [manager.add_subscriber(counter) for counter in counters]

    class Remover:
        def __init__(self) -> None:
            self.fd = EventFd(1)

        def init(self, ops: EventOps) -> None:
            ops.add(Events(self.fd))

        def process(self, _events: Events, ops: EventOps) -> None:
            for id in ids:
                manager.remove_subscriber(id)
            ops.remove(self.fd)

    manager.add_subscriber(Remover())
    for counter in counters:
        counter.fd.write()
    dispatched = manager.run()
    assert dispatched == 1 + sum(counter.count for counter in counters)
    assert manager.run_with_timeout(0) == 0


def test_more_events_than_one_wait_can_return_are_all_dispatched() -> None:
    """The crate fetches 256 at most at a time."""
    manager = EventManager()
    counters = [Counter() for _ in range(600)]
    for counter in counters:
        manager.add_subscriber(counter)
        counter.fd.write()
    while manager.run_with_timeout(0):
        pass
    assert [counter.count for counter in counters] == [1] * 600

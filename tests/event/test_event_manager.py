"""The event loop with no machine: subscribers, dispatch by fd, and what goes wrong in a day.

Covers src/event/errors.rs, src/event/registering.rs, src/event/registrations.rs, src/event/run.rs,
src/event/subscriber.rs, src/py/event/queue.rs, src/py/event/delivery.rs, src/py/descriptor.rs,
src/py/event/run.rs, src/py/event/events.rs, src/py/event/registration.rs, src/py/event/owners.rs,
python/pyvmm/events.py.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from typing import TYPE_CHECKING

import pytest
from alone import alone
from held import is_collected
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import EventError, EventFd, EventManager, EventOps, Events, EventSet, StateError

if TYPE_CHECKING:
    from collections.abc import Callable


class Recorder:
    """Watches descriptors and remembers what happened."""

    def __init__(self, *events: Events, on_event: Callable[[Events, EventOps], object] | None = None) -> None:
        self.watched = events
        self.seen: list[tuple[int, int, EventSet]] = []
        self.on_event = on_event
        self.ops: EventOps | None = None

    def init(self, ops: EventOps) -> None:
        for events in self.watched:
            ops.add(events)

    def process(self, events: Events, ops: EventOps) -> None:
        self.seen.append((events.fd, events.data, events.event_set))
        self.ops = ops
        if self.on_event is not None:
            self.on_event(events, ops)


def test_events_are_dispatched_by_fd_and_counted() -> None:
    manager = EventManager()
    fds = [EventFd(), EventFd(), EventFd()]
    recorders = [Recorder(Events(fd, EventSet.IN, data)) for data, fd in enumerate(fds)]
    for recorder in recorders:
        manager.add_subscriber(recorder)
    assert manager.run_with_timeout(0) == 0
    fds[0].write()
    fds[2].write()
    assert manager.run() == 2
    assert [r.seen for r in recorders] == [
        [(fds[0].fileno(), 0, EventSet.IN)], [], [(fds[2].fileno(), 2, EventSet.IN)],
    ]  # fmt: skip
    assert manager.run() == 2, "level-triggered: still ready"


def test_out_hang_up_and_edges() -> None:
    manager = EventManager()
    left, right = socket.socketpair()
    with left, right:
        recorder = Recorder(Events(left, EventSet.OUT | EventSet.READ_HANG_UP | EventSet.EDGE_TRIGGERED))
        manager.add_subscriber(recorder)
        assert manager.run() == 1
        assert manager.run_with_timeout(0) == 0, "an edge is reported once"
        right.shutdown(socket.SHUT_WR)
        assert manager.run() == 1
    assert [seen[2] for seen in recorder.seen] == [EventSet.OUT, EventSet.OUT | EventSet.READ_HANG_UP]


def test_one_shot_is_rearmed_by_modify() -> None:
    manager = EventManager()
    fd = EventFd(1)
    one_shot = Events(fd, EventSet.IN | EventSet.ONE_SHOT)
    recorder = Recorder(one_shot)
    manager.add_subscriber(recorder)
    assert manager.run() == 1
    assert manager.run_with_timeout(0) == 0
    recorder.on_event = lambda _, ops: ops.modify(one_shot)

    class Rearm:
        def init(self, ops: EventOps) -> None:
            with pytest.raises(EventError, match="another subscriber"):
                ops.modify(one_shot)

        def process(self, events: Events, ops: EventOps) -> None: ...

    manager.add_subscriber(Rearm())


def test_removed_subscriber_is_returned_and_hears_no_more() -> None:
    manager = EventManager()
    fd = EventFd(1)
    recorder = Recorder(Events(fd))
    id = manager.add_subscriber(recorder)
    assert manager.remove_subscriber(id) is recorder
    assert manager.run_with_timeout(0) == 0
    with pytest.raises(EventError, match="no subscriber has this id"):
        manager.remove_subscriber(id)
    with pytest.raises(EventError, match="another event manager"):
        EventManager().remove_subscriber(id)


def test_subscriber_removes_itself_in_its_own_callback() -> None:
    manager = EventManager()
    fds = [EventFd(1), EventFd(1)]
    recorder = Recorder(*(Events(fd) for fd in fds))
    itself = manager.add_subscriber(recorder)
    recorder.on_event = lambda *_: manager.remove_subscriber(itself)
    assert manager.run() == 1, "the second event of the batch is dropped"
    assert len(recorder.seen) == 1
    assert manager.run_with_timeout(0) == 0


def test_subscriber_added_in_a_callback_is_dispatched() -> None:
    manager = EventManager()
    late = Recorder(Events(EventFd(1)))
    first = EventFd(1)
    manager.add_subscriber(Recorder(Events(first), on_event=lambda *_: (first.read(), manager.add_subscriber(late))))
    assert (manager.run(), manager.run()) == (1, 1)
    assert len(late.seen) == 1


def test_ops_are_usable_only_during_their_call() -> None:
    manager = EventManager()
    fd = EventFd(1)
    recorder = Recorder(Events(fd))
    manager.add_subscriber(recorder)
    manager.run()
    assert recorder.ops is not None
    for call in (recorder.ops.add, recorder.ops.modify, recorder.ops.remove):
        with pytest.raises(RuntimeError, match="no longer usable"):
            call(Events(fd))


def test_fd_closed_while_registered_is_dropped() -> None:
    manager = EventManager()
    fd, other = EventFd(1), EventFd(1)
    recorder = Recorder(Events(fd), Events(other))
    manager.add_subscriber(recorder)
    fd.close()
    assert manager.run() == 1
    assert [seen[0] for seen in recorder.seen] == [other.fileno()]


def test_fd_closed_with_a_duplicate_alive_does_not_spin_after_its_subscriber_went() -> None:
    manager = EventManager()
    fd = EventFd(1)
    copy = os.dup(fd.fileno())
    id = manager.add_subscriber(Recorder(Events(fd)))
    fd.close()
    manager.remove_subscriber(id)
    assert manager.run_with_timeout(0) == 0
    os.close(copy)


@alone
def test_number_given_again_goes_to_its_new_owner() -> None:
    manager = EventManager()
    first = EventFd(1)
    old = Recorder(Events(first))
    manager.add_subscriber(old)
    number = first.fileno()
    first.close()
    second = EventFd(1)
    assert second.fileno() == number, "the kernel gives the lowest free number"
    new = Recorder(Events(second))
    manager.add_subscriber(new)
    assert manager.run() == 1
    assert (len(old.seen), len(new.seen)) == (0, 1)


def test_event_of_a_batch_does_not_reach_a_stranger_with_the_same_number() -> None:
    manager = EventManager()
    fds = [EventFd(1), EventFd(1)]
    strangers: list[tuple[Recorder, EventFd]] = []

    def swap(events: Events, ops: EventOps) -> None:
        """Close the other descriptor and give its number to somebody else."""
        other = fds[1] if events.fd == fds[0].fileno() else fds[0]
        ops.remove(other)
        other.close()
        fresh = EventFd()
        strangers.append((Recorder(Events(fresh)), fresh))
        manager.add_subscriber(strangers[0][0])

    recorder = Recorder(*(Events(fd) for fd in fds), on_event=swap)
    manager.add_subscriber(recorder)
    assert manager.run() == 1
    assert strangers[0][0].seen == []


def test_exception_leaves_the_rest_of_the_batch_for_the_next_run() -> None:
    manager = EventManager()
    fds = [EventFd(1) for _ in range(3)]

    def fail(events: Events, ops: EventOps) -> None:
        raise LookupError(events.fd)

    edge = EventSet.IN | EventSet.EDGE_TRIGGERED
    recorder = Recorder(*(Events(fd, edge) for fd in fds), on_event=fail)
    manager.add_subscriber(recorder)
    with pytest.raises(LookupError):
        manager.run()
    recorder.on_event = None
    assert manager.run() == 2, "even edges that were not handled"
    assert sorted(seen[0] for seen in recorder.seen) == sorted(fd.fileno() for fd in fds)


@pytest.mark.parametrize("subscriber", [object(), type("NoProcess", (), {"init": lambda self, ops: None})(), None, 5])
def test_what_is_no_subscriber_is_refused(subscriber: object) -> None:
    with pytest.raises(TypeError, match="a subscriber needs"):
        EventManager().add_subscriber(subscriber)  # type: ignore[arg-type]


def test_bad_sources_have_distinct_errors() -> None:
    manager = EventManager()
    with open(__file__) as file, pytest.raises(EventError, match="regular file"):
        manager.add_subscriber(Recorder(Events(file)))
    with pytest.raises(EventError, match="is not open"):
        manager.add_subscriber(Recorder(Events(99999)))
    fd = EventFd()
    with pytest.raises(EventError, match="already registered"):
        manager.add_subscriber(Recorder(Events(fd), Events(fd)))
    with pytest.raises(EventError, match="not registered"):
        manager.add_subscriber(Remover(fd))


class Remover:
    def __init__(self, fd: EventFd) -> None:
        self.fd = fd

    def init(self, ops: EventOps) -> None:
        ops.remove(self.fd)

    def process(self, events: Events, ops: EventOps) -> None: ...


@pytest.mark.parametrize("source", [-1, "x", None, 1.5, object()])
def test_events_need_a_descriptor(source: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Events(source)  # type: ignore[arg-type]


@given(st.integers(), st.integers())
def test_events_take_numbers_of_their_width_or_say_so(event_set: int, data: int) -> None:
    known = sum(EventSet)
    try:
        events = Events(0, event_set, data)
    except (OverflowError, ValueError):
        assert not (0 <= event_set < 2**32 and event_set & ~known == 0 and 0 <= data < 2**32)
    else:
        assert (events.fd, events.data, int(events.event_set)) == (0, data, event_set)


def test_subscribers_change_from_another_thread_while_run_waits() -> None:
    manager = EventManager()
    recorder = Recorder(Events(EventFd(1)))
    adder = threading.Thread(target=lambda: manager.add_subscriber(recorder))
    adder.start()
    assert manager.run() == 1
    adder.join()
    assert len(recorder.seen) == 1


def test_second_run_fails_at_once() -> None:
    manager = EventManager()

    def run_again(events: Events, ops: EventOps) -> None:
        with pytest.raises(StateError, match="already running"):
            manager.run()

    manager.add_subscriber(Recorder(Events(EventFd(1)), on_event=run_again))
    assert manager.run() == 1


def test_another_manager_can_be_run_in_a_callback_and_hosts_this_one() -> None:
    inner, outer = EventManager(), EventManager()
    recorder = Recorder(Events(EventFd(1)))
    inner.add_subscriber(recorder)
    outer.add_subscriber(Recorder(Events(inner), on_event=lambda *_: inner.run()))
    assert outer.run() == 1
    assert len(recorder.seen) == 1


def test_source_is_kept_alive_while_registered() -> None:
    manager = EventManager()
    fd = EventFd(1)
    alive = weakref.ref(fd)
    id = manager.add_subscriber(Recorder())
    manager.remove_subscriber(id)

    class Keeps:
        def init(self, ops: EventOps) -> None:
            ops.add(Events(source.pop()))

        def process(self, events: Events, ops: EventOps) -> None: ...

    source = [fd]
    del fd
    id = manager.add_subscriber(Keeps())
    assert alive() is not None
    assert manager.run() == 1
    manager.remove_subscriber(id)
    assert is_collected(alive)


def test_manager_in_a_cycle_with_its_subscriber_is_collected() -> None:
    class Cyclic(Recorder):
        manager: EventManager

    manager = EventManager()
    subscriber = Cyclic(Events(EventFd()))
    subscriber.manager = manager
    manager.add_subscriber(subscriber)
    alive = weakref.ref(manager)
    del manager, subscriber
    assert is_collected(alive)


def test_event_set_has_every_flag_of_the_crate() -> None:
    names = {
        "IN", "OUT", "ERROR", "READ_HANG_UP", "EDGE_TRIGGERED", "HANG_UP", "PRIORITY", "WAKE_UP", "ONE_SHOT",
        "EXCLUSIVE",
    }  # fmt: skip
    assert set(EventSet.__members__) == names
    for flag in EventSet:
        assert Events(0, flag).event_set is flag


def test_forked_child_gets_an_error_from_each_call_and_the_parent_is_unharmed() -> None:
    manager = EventManager()
    fd = EventFd(1)
    id = manager.add_subscriber(Recorder(Events(fd)))
    ops, endpoint = manager.event_ops(id), manager.remote_endpoint()
    calls: list[Callable[[], object]] = [
        manager.run, manager.run_forever, lambda: manager.run_with_timeout(0), manager.stop, manager.fileno,
        lambda: manager.add_subscriber(Recorder()), lambda: manager.remove_subscriber(id),
        lambda: manager.event_ops(id), lambda: ops.add(Events(EventFd())), lambda: ops.modify(Events(fd)),
        lambda: ops.remove(fd), endpoint.kick, lambda: endpoint.fire(print), lambda: endpoint.call_blocking(print),
        lambda: manager.on(fd)(print), lambda: manager.call_later(0, print),
    ]  # fmt: skip
    child = os.fork()
    if child == 0:
        wrong = len(calls)
        try:
            for call in calls:
                try:
                    call()
                except StateError as error:
                    wrong -= "forked" in str(error)
        finally:
            os._exit(wrong)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert manager.run() == 1
    assert manager.remove_subscriber(id) is not None

"""`EventFd`: the counter, its modes, and its life.

Covers src/py/gil_cell.rs.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading

import pytest
from pyvmm import EventFd


def test_read_takes_the_sum_of_writes() -> None:
    with EventFd(2) as fd:
        fd.write()
        fd.write(40)
        assert fd.read() == 43
        with pytest.raises(BlockingIOError):
            fd.read()


def test_semaphore_gives_one_at_a_time() -> None:
    with EventFd(2, semaphore=True) as fd:
        assert (fd.read(), fd.read()) == (1, 1)
        with pytest.raises(BlockingIOError):
            fd.read()


def test_full_counter_would_block() -> None:
    with EventFd(2**64 - 2) as fd:
        with pytest.raises(BlockingIOError):
            fd.write(1)
        assert fd.read() == 2**64 - 2


@pytest.mark.parametrize(
    ("value", "error"), [(-1, OverflowError), (2**64, OverflowError), (2**64 - 1, OSError), ("1", TypeError)]
)
def test_bad_value_is_refused(value: object, error: type[Exception]) -> None:
    with EventFd() as fd:
        with pytest.raises(error):
            fd.write(value)  # type: ignore[arg-type]
        with pytest.raises(BlockingIOError):
            fd.read()


def test_blocking_read_waits_for_a_write() -> None:
    with EventFd(nonblocking=False) as fd:
        values: list[int] = []
        reader = threading.Thread(target=lambda: values.append(fd.read()))
        reader.start()
        fd.write(5)
        reader.join(60)
        assert values == [5]


def test_close_during_a_blocking_read_leaves_it_its_descriptor() -> None:
    fd = EventFd(nonblocking=False)
    copy = os.dup(fd.fileno())
    values: list[int] = []
    entered = threading.Event()

    def read_or_refuse() -> None:
        entered.set()
        with contextlib.suppress(ValueError):
            values.append(fd.read())

    reader = threading.Thread(target=read_or_refuse)
    reader.start()
    entered.wait()
    fd.close()
    os.eventfd_write(copy, 7)
    reader.join(60)
    os.close(copy)
    # Closed before the read began, the read is refused; else it gets the value.
    assert values in ([7], [])


def test_closed_one_says_so() -> None:
    fd, epoll = EventFd(1), select.epoll()
    epoll.register(fd)
    fd.close()
    fd.close()
    assert fd.closed
    assert repr(fd) == "EventFd(closed)"
    for call in (fd.read, fd.write, fd.fileno):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert epoll.poll(0) == [], "the kernel has closed it"
    epoll.close()


def test_it_is_a_plain_descriptor_not_inherited() -> None:
    with EventFd(1) as fd:
        assert select.select([fd], [], [], 0)[0] == [fd]
        assert not os.get_inheritable(fd.fileno())


@pytest.mark.parametrize("kind", ["EventFd", "TimerFd", "full EventFd"])
def test_descriptor_made_blocking_later_holds_up_only_its_caller(kind: str) -> None:
    """Any holder of a duplicate can do that. If the wait held the GIL, no thread could end it."""
    code = f"""
import os, threading
from pyvmm import EventFd, TimerFd
if {kind!r} == "TimerFd":
    source = TimerFd()
    go_on, wait = (lambda: source.set(0)), source.read
elif {kind!r} == "EventFd":
    source = EventFd()
    go_on, wait = source.write, source.read
else:
    source = EventFd(2**64 - 2)
    go_on, wait = (lambda: os.read(source.fileno(), 8)), source.write
os.set_blocking(source.fileno(), True)
waiting = threading.Thread(target=wait)
waiting.start()
while "S" not in open(f"/proc/self/task/{{waiting.native_id}}/stat").read().split(") ")[1][:1]:
    pass
go_on()
waiting.join()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_drained_source_made_blocking_later_does_not_hold_up_its_loop() -> None:
    """What was fetched may have been read by somebody else since."""
    code = """
import os, select
from pyvmm import EventFd, EventManager, Events, TimerFd
manager, bell, timer = EventManager(), EventFd(1), TimerFd()
timer.set(0)
class Thief:
    def __init__(self, source): self.source = source
    def init(self, ops): ops.add(Events(self.source))
    def process(self, events, ops): os.read(bell.fileno(), 8), os.read(timer.fileno(), 8)
class Robbed(Thief):
    def init(self, ops): ops.add(Events(self.source, drain=True))
    def process(self, events, ops): raise AssertionError("it was read already")
assert select.select([timer], [], [], 60)[0]
manager.add_subscriber(Thief(EventFd(1)))
for source in bell, timer:
    manager.add_subscriber(Robbed(source))
    os.set_blocking(source.fileno(), True)
assert manager.run_with_timeout(0) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("wait", ["EventFd(nonblocking=False).read()", "EventFd(2**64 - 2, nonblocking=False).write()"])
def test_signal_handler_ends_a_call_that_waits(wait: str) -> None:
    # A signal that comes before the wait is not noticed, so they repeat.
    code = f"""
import signal
from pyvmm import EventFd
def handler(*_):
    raise LookupError
signal.signal(signal.SIGALRM, handler)
try:
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    {wait}
except LookupError:
    signal.setitimer(signal.ITIMER_REAL, 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

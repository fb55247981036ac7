"""`EventFd`: the counter, its modes, and its life."""

from __future__ import annotations

import contextlib
import os
import select
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
    fd = EventFd()
    number = fd.fileno()
    fd.close()
    fd.close()
    assert fd.closed
    assert repr(fd) == "EventFd(closed)"
    for call in (fd.read, fd.write, fd.fileno):
        with pytest.raises(ValueError, match="closed"):
            call()
    with pytest.raises(OSError):
        os.fstat(number)


def test_it_is_a_plain_descriptor_not_inherited() -> None:
    with EventFd(1) as fd:
        assert select.select([fd], [], [], 0)[0] == [fd]
        assert not os.get_inheritable(fd.fileno())

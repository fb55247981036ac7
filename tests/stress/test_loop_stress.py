"""The loop under load from many threads: every write is seen exactly once, and nothing is left behind.

Two seconds in CI; PYVMM_STRESS_S sets another time, thirty under `make stress`.
"""

from __future__ import annotations

import os
import threading
import time

from held import held
from pyvmm import EventFd, EventManager, EventOps, Events

SECONDS = float(os.environ.get("PYVMM_STRESS_S", "2"))
WRITERS, CHANGERS = 8, 4


class Sum:
    """Adds up what is written to its eventfd."""

    def __init__(self) -> None:
        self.fd = EventFd()
        self.total = 0

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd))

    def process(self, events: Events, ops: EventOps) -> None:
        self.total += self.fd.read()


def add_and_remove(manager: EventManager, end: float, failures: list[BaseException]) -> None:
    try:
        while time.monotonic() < end:
            mine = Sum()
            mine.fd.write(1)
            id = manager.add_subscriber(mine)
            assert manager.remove_subscriber(id) is mine
    except BaseException as error:
        failures.append(error)


def test_every_write_is_seen_once_while_subscribers_come_and_go() -> None:
    manager = EventManager()
    sums = [Sum() for _ in range(WRITERS)]
    for each in sums:
        manager.add_subscriber(each)
    written = [0] * WRITERS
    end = time.monotonic() + SECONDS
    failures: list[BaseException] = []

    def write(n: int) -> None:
        # At least once, however late the thread starts.
        while True:
            sums[n].fd.write(1)
            written[n] += 1
            if time.monotonic() >= end:
                return

    before = held()
    loop = threading.Thread(target=manager.run_forever)
    workers = [threading.Thread(target=write, args=(n,)) for n in range(WRITERS)]
    workers += [threading.Thread(target=add_and_remove, args=(manager, end, failures)) for _ in range(CHANGERS)]
    for thread in (loop, *workers):
        thread.start()
    for thread in workers:
        thread.join(SECONDS + 100)
        assert not thread.is_alive(), "a worker hangs"
    manager.stop()
    loop.join(60)
    assert not loop.is_alive(), "the loop hangs"
    assert not failures, failures
    manager.run_with_timeout(0)
    assert [each.total for each in sums] == written
    assert min(written) > 0
    after = held()
    assert (after.descriptors, after.threads) == (before.descriptors, before.threads)
    assert after.resident_kib <= before.resident_kib + 4096

"""Which calls of a job are taken back by a reset, and which close its fork: every public call is known."""

from __future__ import annotations

import contextlib
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest
from guests import SPIN, exit_with, flat, out
from pool_jobs import CLOSES, TAKEN_BACK, kept_snapshot
from pyvmm import (
    ExitReason,
    Stop,
    Vmm,
    VmmError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0


def test_every_call_is_known_to_be_taken_back_or_to_close_the_fork() -> None:
    """A new one closes it unless it says that a reset takes back all that it does: its author has to choose."""
    with Vmm(flat(SPIN, irqchip=True)) as vmm:
        parts = (vmm, vmm.memory, vmm.vcpus[0], vmm.serial, vmm.irq(1))
        public = {f"{type(part).__name__}.{name}" for part in parts for name in dir(part) if not name.startswith("_")}
    assert TAKEN_BACK.keys() | CLOSES.keys() == public
    assert TAKEN_BACK.keys() & CLOSES.keys() == set()


@pytest.mark.parametrize("name", [*TAKEN_BACK, *CLOSES])
def test_fork_is_reset_if_that_undoes_everything_and_replaced_otherwise(name: str) -> None:
    with Vmm(flat(exit_with(1), irqchip=True)) as vmm:
        snapshot = vmm.snapshot()
    kept_snapshot[:] = [snapshot]
    fork = snapshot.fork()
    fork._accept_changes()
    handle = fork._lend()
    with contextlib.suppress(VmmError, ValueError):
        (TAKEN_BACK | CLOSES)[name](handle)
    assert fork._is_clean() is (name in TAKEN_BACK)
    assert fork._renew(snapshot) is False, "somebody holds it"
    del handle
    assert fork._renew(snapshot) is (name in TAKEN_BACK and name != "Vmm.stop")
    fork.close()


class NoState:
    """A device without a state."""

    def write(self, offset: int, size: int, value: int) -> None:
        pass

    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        pass


class Late(NoState):
    """A device whose callback, left by a job, ends while the fork is reset for the next one."""

    def __init__(self, end: Callable[[], Stop]) -> None:
        self.end = end
        self.entered, self.go, self.gone = threading.Event(), threading.Event(), threading.Event()

    def write(self, offset: int, size: int, value: int) -> Stop | None:  # type: ignore[override]
        if self.gone.is_set():
            return None
        self.entered.set()
        assert self.go.wait(DEADLINE_S)
        self.gone.set()
        return self.end()

    def quiesce(self) -> None:
        self.go.set()
        assert self.gone.wait(DEADLINE_S)
        # Not needed for what is asserted: the callback has more often ended when the reset looks.
        time.sleep(0.02)

    def resume(self) -> None:
        pass


def raises() -> Stop:
    raise LookupError("of the last job")


def add(fork: Vmm, late: Late) -> None:
    fork.add_pio_device(0x500, 1, late)


# A fork that is closed instead reports the exception.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("end", [raises, lambda: Stop("of the last job")])
def test_nothing_that_a_left_callback_comes_to_reaches_the_next_job(end: Callable[[], Stop]) -> None:
    with Vmm(flat(out(0x500, 1) + SPIN)) as vmm:
        vmm.add_pio_device(0x500, 1, NoState())
        snapshot = vmm.snapshot()
    for _ in range(5):
        late = Late(end)
        with snapshot.fork(setup=partial(add, late=late)) as fork:
            fork._accept_changes()
            job = fork._lend()
            while not late.entered.is_set():
                assert job.run(0.01).reason is ExitReason.TIMEOUT
            del job
            if not fork._renew(snapshot):
                continue  # the pool closes it
            job = fork._lend()
            assert job.run(0.01).reason is ExitReason.TIMEOUT
            job.stop()
            assert job.run(DEADLINE_S).value is None

"""Which calls of a job are taken back by a reset, and which close its fork: every public call is known."""

from __future__ import annotations

import contextlib

import pytest
from guests import SPIN, exit_with, flat
from pool_jobs import CLOSES, TAKEN_BACK, kept_snapshot
from pyvmm import (
    Vmm,
    VmmError,
)

pytestmark = pytest.mark.kvm


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
    fork._settle()
    handle = fork._lend()
    with contextlib.suppress(VmmError, ValueError):
        (TAKEN_BACK | CLOSES)[name](handle)
    assert fork._is_clean() is (name in TAKEN_BACK)
    assert fork._renew(snapshot) is False, "somebody holds it"
    del handle
    assert fork._renew(snapshot) is (name in TAKEN_BACK and name != "Vmm.stop")
    fork.close()

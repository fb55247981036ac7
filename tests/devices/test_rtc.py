"""The real-time clock: a time that the guest sets."""

from __future__ import annotations

import pytest
from guests import flat
from pyvmm import Vmm

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0

READ_YEAR = b"\xb0\x09\xe6\x70\xe4\x71\xe6\xf4"  # mov al, 9; out 0x70, al; in al, 0x71; out 0xf4, al
SET_YEAR = b"\xb0\x09\xe6\x70\xb0\x55\xe6\x71"  # mov al, 9; out 0x70, al; mov al, 0x55; out 0x71, al


def test_a_time_that_the_guest_sets_is_kept_by_snapshots() -> None:
    with Vmm(flat(READ_YEAR + SET_YEAR + READ_YEAR + READ_YEAR)) as vmm:
        years = vmm.run(DEADLINE_S).code
        before = vmm.snapshot()
        assert years != 0x55, "the host's time, in a year that is not this test's"
        for _ in range(2):
            vmm.reset(before)
            assert vmm.run(DEADLINE_S).code == 0x55
        after = vmm.snapshot()
        with after.fork() as fork:
            assert fork.run(DEADLINE_S).code == 0x55
        with before.fork() as fork:
            assert fork.run(DEADLINE_S).code == 0x55

"""Machines on a network inside the process, and copies of both at one instant.

Covers src/vmm/together.rs and src/py/network_snapshot.rs.
"""

from __future__ import annotations

import pytest
from guests import SPIN, flat
from pyvmm import Network, StateError, Vmm

pytestmark = pytest.mark.kvm


def test_only_machines_of_the_network_are_captured_with_it() -> None:
    net = Network()
    with Vmm(flat(SPIN)) as vmm:
        with pytest.raises(StateError, match="not connected to this network"):
            net.snapshot([vmm])
        with pytest.raises(ValueError, match="each once"):
            net.snapshot([vmm, vmm])
        with pytest.raises(ValueError, match="one or more machines"):
            net.snapshot([])

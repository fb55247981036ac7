"""A pytest suite with machines: `pytest test_guest.py`. The guest starts once, each test has a copy of its own."""

from collections.abc import Callable

import pytest
from pyvmm import FlatBoot, Snapshot, Vmm, VmmConfig

# mov al, 1; out 0xf4, al (ready); mov al, [0x2000]; add al, al; out 0xf4, al
GUEST = bytes.fromhex("b001 e6f4 a00020 00c0 e6f4")


@pytest.fixture(scope="session")
def ready() -> Snapshot:
    with Vmm(VmmConfig(boot=FlatBoot(GUEST))) as vmm:
        vmm.run(timeout=10)
        return vmm.snapshot()


@pytest.mark.needs_kvm
@pytest.mark.parametrize("number", [0, 1, 100])
def test_guest_doubles(pyvmm_vmm: Callable[[Snapshot], Vmm], ready: Snapshot, number: int) -> None:
    vmm = pyvmm_vmm(ready)  # closed after the test; its console and exit are in the report of a failure
    vmm.memory.write(0x2000, bytes([number]))
    assert vmm.run(timeout=10).code == 2 * number

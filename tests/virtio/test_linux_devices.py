"""Linux drives the devices that need nothing on the host.

Covers tests/virtio_linux.py, python/pyvmm/linux/agent.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pyvmm import Rng, Vmm
from virtio_linux import booted, config, forked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm import Snapshot

pytestmark = [pytest.mark.linux, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ready() -> Iterator[Snapshot]:
    """One boot for all tests of this file."""
    with Vmm(config(rng=Rng(seed=7))) as vmm:
        booted(vmm)
        yield vmm.snapshot()


def test_random_numbers_come_from_the_seed_in_every_fork(ready: Snapshot) -> None:
    drawn = []
    for _ in range(2):
        with forked(ready) as guest:
            drawn.append(guest("dump /dev/hwrng 16"))
            (device,) = guest.vmm.virtio
            assert (device.name, device.failure) == ("rng", None)
            assert device.chains > 0
    assert drawn[0] == drawn[1]
    assert len(drawn[0].strip()) == 32

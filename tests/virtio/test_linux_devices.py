"""Linux drives the devices that need nothing on the host.

Covers tests/virtio_linux.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import LINUX_DEADLINE_S
from virtio_linux import Ready, forked

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtio_linux import Guest

pytestmark = [pytest.mark.linux, pytest.mark.timeout(900)]
MIB = 1 << 20


def resident() -> int:
    """How much memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def free_kib(guest: Guest) -> int:
    """What the guest says about its free memory."""
    (line,) = (line for line in guest("cat /proc/meminfo").splitlines() if line.startswith("MemFree:"))
    return int(line.split()[1])


def until(guest: Guest, true: Callable[[], bool]) -> None:
    """Let the guest work until something is true."""
    deadline = time.monotonic() + LINUX_DEADLINE_S
    while not true():
        assert time.monotonic() < deadline
        guest("sync")


def test_random_numbers_come_from_the_seed_in_every_fork(linux_ready: Ready) -> None:
    drawn = []
    for _ in range(2):
        with forked(linux_ready.snapshot) as guest:
            drawn.append(guest("dump /dev/hwrng 16"))
            (device,) = (device for device in guest.vmm.virtio if device.name == "rng")
            assert device.failure is None
            assert device.chains > 0
    assert drawn[0] == drawn[1]
    assert len(drawn[0].strip()) == 32


def test_the_balloon_takes_memory_from_the_guest_and_gives_it_back(linux_ready: Ready) -> None:
    with forked(linux_ready.snapshot) as guest:
        balloon = guest.vmm.balloon
        before = free_kib(guest)
        balloon.target_mib = 8
        until(guest, lambda: balloon.actual_mib == 8)
        assert free_kib(guest) < before - 6 * 1024
        balloon.target_mib = 0
        until(guest, lambda: balloon.actual_mib == 0)
        assert free_kib(guest) > before - 2 * 1024


def test_memory_that_a_program_of_the_guest_has_freed_leaves_the_process(linux_ready: Ready) -> None:
    with forked(linux_ready.snapshot) as guest:
        # Without this, Linux reports free memory only while there is more than 128 MiB of it.
        guest("mount sysfs sys /mnt")
        guest("put /mnt/module/page_reporting/parameters/page_reporting_order 2")
        guest.type("hold 16")
        guest.expect("holding")
        held = resident()
        guest.type("")
        guest.end()
        until(guest, lambda: resident() < held - 8 * MIB)

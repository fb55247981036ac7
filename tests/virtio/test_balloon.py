"""The memory balloon, driven by a guest. Covers src/py/balloon.rs."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from pyvmm import Balloon, BalloonDevice, ClosedError, ConfigError, Vmm
from virtio_driver import BUFFERS, Driver, machine, readable, writable

kvm = pytest.mark.kvm

REPORTING = 1 << 5
MIB = 1 << 20


def shared_kib() -> int:
    """The KiB of shared memory that are resident in this process, which a guest's pages are."""
    found = re.search(r"^RssShmem:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


@kvm
def test_pages_of_the_balloon_leave_the_process() -> None:
    with Vmm(machine(balloon=Balloon())) as vmm:
        driver = Driver(vmm)
        assert driver.start(queues=2) == 15
        vmm.memory.write(4 * MIB, b"x" * 8 * MIB)
        full = shared_kib()
        vmm.memory.write(BUFFERS, struct.pack("<2048I", *range(1024, 3072)))
        assert driver.exchange(0, readable(BUFFERS, 4 * 2048)) == 0
        assert shared_kib() <= full - 7 * 1024  # the driver touches a few pages itself
        assert vmm.memory.read(4 * MIB, 1) == b"\0"
        assert vmm.memory.read(12 * MIB - 1, 2) == b"\0\0"


@kvm
def test_free_pages_that_are_reported_leave_a_fork_too() -> None:
    with Vmm(machine(balloon=Balloon())) as vmm:
        driver = Driver(vmm)
        driver.start(REPORTING, queues=3)
        vmm.memory.write(4 * MIB, b"old")
        snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            fork.memory.write(4 * MIB, b"new")
            mine = driver.fork(fork)
            mine.exchange(2, writable(4 * MIB, 4096))
            # A fork's page is again what the snapshot has.
            assert fork.memory.read(4 * MIB, 3) == b"old"
            fork.reset(snapshot)
            assert fork.memory.read(4 * MIB, 3) == b"old"
        driver.exchange(2, writable(4 * MIB, 4096))
        assert vmm.snapshot().fork().memory.read(4 * MIB, 3) in {b"old", bytes(3)}


@kvm
def test_the_target_is_in_the_configuration_and_interrupts() -> None:
    with Vmm(machine(balloon=Balloon(target_mib=2))) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        balloon = vmm.balloon
        assert isinstance(balloon, BalloonDevice)
        assert vmm.balloon is balloon
        assert (driver.read(0x100), balloon.target_mib, balloon.actual_mib) == (512, 2, 0)
        balloon.target_mib = 3
        assert (driver.read(0x100), driver.read(0x60)) == (768, 2)
        driver.write(0x104, 512)
        assert balloon.actual_mib == 2
        assert repr(balloon) == "BalloonDevice(target_mib=3, actual_mib=2)"
        with vmm.snapshot().fork() as fork:
            assert (fork.balloon.target_mib, fork.balloon.actual_mib) == (3, 2)
        with pytest.raises(OverflowError):
            balloon.target_mib = -1
    with pytest.raises(ClosedError):
        _ = balloon.actual_mib


@kvm
def test_statistics_arrive_by_name() -> None:
    with Vmm(machine(balloon=Balloon(statistics_s=0.01))) as vmm:
        driver = Driver(vmm)
        driver.start(1 << 1, queues=3)
        assert vmm.balloon.statistics == {}
        statistics = struct.pack("<HQHQHQ", 4, 5 * MIB, 5, 16 * MIB, 999, 1)
        vmm.memory.write(BUFFERS, statistics)
        driver.exchange(2, readable(BUFFERS, len(statistics)))
        assert vmm.balloon.statistics == {"free_memory": 5 * MIB, "total_memory": 16 * MIB}


@kvm
@pytest.mark.parametrize(("on", "bits"), [(True, 0b100100), (False, 0)])
def test_features_can_be_left_out(on: bool, bits: int) -> None:
    with Vmm(machine(balloon=Balloon(deflate_on_oom=on, reporting=on))) as vmm:
        assert vmm.virtio[0].offered & 0xFFFF == bits


@kvm
def test_a_machine_without_one_says_how_to_add_it() -> None:
    with Vmm() as vmm, pytest.raises(ConfigError, match="VmmConfig"):
        _ = vmm.balloon


@pytest.mark.parametrize(
    ("balloon", "key"),
    [
        (Balloon(target_mib=-1), "balloon.target_mib"),
        (Balloon(statistics_s=0), "balloon.statistics_s"),
        (Balloon(statistics_s=float("nan")), "balloon.statistics_s"),
        (Balloon(reporting="yes"), "balloon.reporting"),  # type: ignore[arg-type]
    ],
)
def test_bad_values_are_named(balloon: Balloon, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        Vmm(machine(balloon=balloon))

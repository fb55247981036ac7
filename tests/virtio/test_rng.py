"""The entropy device, and what all virtio devices have in common, driven by a guest.

Covers src/virtio/doorbells.rs, src/virtio/place.rs, src/virtio/create.rs, src/vmm/virtio.rs,
src/config/virtio.rs, src/devices/doorbell.rs, src/py/virtio.rs, src/py/config_virtio.rs,
python/pyvmm/virtio_parts.py, python/pyvmm/cli_devices.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pyvmm import Balloon, ClosedError, ConfigError, Rng, Snapshot, Vmm
from virtio_driver import BUFFERS, POLL_REGISTER, Driver, machine, writable

kvm = pytest.mark.kvm


def drawn(driver: Driver, count: int = 16) -> bytes:
    assert driver.exchange(0, writable(BUFFERS, count)) == count
    return bytes(driver.vmm.memory.read(BUFFERS, count))


@kvm
def test_a_guest_finds_the_device_and_draws_random_bytes() -> None:
    with Vmm(machine(rng=Rng(), irqchip=False)) as vmm:
        driver = Driver(vmm)
        assert [driver.read(at) for at in (0, 4, 8)] == [0x74726976, 2, 4]
        assert driver.start() == 15
        assert drawn(driver) != drawn(driver)
        (device,) = vmm.virtio
        assert (device.name, device.device_type, device.irq, device.failure) == ("rng", 4, None, None)
        assert (device.status, device.features, device.chains) == (15, 1 << 32, 2)
        assert device.notifications >= 2
        assert device.interrupts == 2
        assert device.offered & 1 << 32
        assert vmm.virtio[0] is device
        assert "rng" in repr(device)
    with pytest.raises(ClosedError):
        _ = device.status
    assert repr(device) == "VirtioDevice(unreachable)"


@kvm
def test_a_seed_gives_the_same_bytes_also_in_forks_and_after_a_reset(tmp_path: Path) -> None:
    config = machine(rng=Rng(seed=1))
    with Vmm(config) as vmm, Vmm(config) as other:
        drivers = [Driver(vmm), Driver(other)]
        assert [driver.start() for driver in drivers] == [15, 15]
        first, second = [drawn(driver) for driver in drivers]
        assert first == second
        snapshot = vmm.snapshot()
        before = drivers[0].fork(vmm)
        following = drawn(drivers[0])
        with snapshot.fork() as fork:
            assert drawn(drivers[1].fork(fork)) == following
        vmm.reset(snapshot)
        assert drawn(before) == following
        snapshot.save(tmp_path / "it")
        with Snapshot.load(tmp_path / "it").fork() as fork:
            assert fork.virtio[0].status == 15
            assert drawn(drivers[1].fork(fork)) == following


@kvm
def test_after_many_notifications_the_kernel_takes_them() -> None:
    with Vmm(machine(rng=Rng())) as vmm:
        driver = Driver(vmm)
        driver.start()
        with vmm.stats:
            for _ in range(20):
                drawn(driver)
            before = sum(count.exits for count in vmm.stats.exits if count.kind == "mmio")
            for _ in range(20):
                drawn(driver)
            assert sum(count.exits for count in vmm.stats.exits if count.kind == "mmio") == before
        assert vmm.virtio[0].chains == 40


@kvm
def test_a_reset_while_live_starts_anew() -> None:
    with Vmm(machine(rng=Rng())) as vmm:
        driver = Driver(vmm)
        for _ in range(3):
            assert driver.start() == 15
            drawn(driver)
            driver.write(0x70, 0)
            assert (driver.read(0x70), vmm.virtio[0].features) == (0, None)


@kvm
def test_a_broken_chain_needs_a_reset_and_the_reason_is_told() -> None:
    with Vmm(machine(rng=Rng())) as vmm:
        driver = Driver(vmm)
        driver.start()
        driver.add(0, [writable(1 << 40, 8)])
        driver.write(0x50, 0)
        driver.script((POLL_REGISTER, driver.base + 0x70, 15))
        (device,) = vmm.virtio
        assert device.status == 0x4F
        assert device.failure is not None
        assert "0x10000000000" in device.failure
        assert driver.start() == 15
        drawn(driver)


@kvm
def test_a_trace_shows_the_queue(tmp_path: Path) -> None:
    with Vmm(machine(rng=Rng())) as vmm:
        driver = Driver(vmm)
        driver.start()
        with vmm.trace(tmp_path / "trace.json"):
            drawn(driver)
    assert "rng queue 0" in (tmp_path / "trace.json").read_text()


@kvm
def test_a_device_that_is_given_to_a_fork_takes_its_place() -> None:
    with Vmm(machine(rng=Rng(seed=1))) as vmm:
        driver = Driver(vmm)
        driver.start()
        snapshot = vmm.snapshot()
        with snapshot.fork(virtio={"rng": Rng(seed=1)}) as fork:
            assert len(drawn(driver.fork(fork))) == 16
        with pytest.raises(ConfigError, match="virtio"):
            snapshot.fork(virtio={"rng": object()})  # type: ignore[dict-item]


def forks_of(snapshot: Snapshot, devices: dict[str, Any]) -> list[Vmm]:
    return snapshot.fork_many(2, lambda _: {"virtio": devices})


@kvm
def test_a_device_that_a_snapshot_does_not_have_is_refused_by_its_name() -> None:
    with Vmm(machine(rng=Rng(), balloon=Balloon())) as vmm, Vmm(machine()) as bare:
        snapshot, without = vmm.snapshot(), bare.snapshot()
    for name in ["disk0", "rng0", "Rng", "net7", ""]:
        with pytest.raises(ConfigError, match="no such device; it has rng, balloon") as refused:
            snapshot.fork(virtio={name: Rng()})
        assert refused.value.at == f'virtio["{name}"]'
        with pytest.raises(ConfigError, match="no such device"):
            forks_of(snapshot, {"rng": Rng(), name: Rng()})
    with pytest.raises(ConfigError, match="the snapshot has no virtio devices"):
        without.fork(virtio={"rng": Rng()})
    with pytest.raises(ConfigError, match=r"virtio: expected names of devices, such as .disk0., not 7"):
        snapshot.fork(virtio={7: Rng()})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="of type 4, the snapshot's is of 5") as refused:
        snapshot.fork(virtio={"balloon": Rng()})
    assert refused.value.at == 'virtio["balloon"]'


def test_a_bad_seed_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rng.seed"):
        Vmm(machine(rng=Rng(seed=-1)))

"""What a job of a pool does with virtio devices, and what the next job sees of it; and devices of closed machines.

Covers src/virtio/counts.rs.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import pytest
from pyvmm import (
    Balloon,
    ClosedError,
    Disk,
    ForkExecutor,
    Net,
    PythonNet,
    Rng,
    Snapshot,
    VirtioConsole,
    Vmm,
    VmmConfig,
    VmmError,
    Vsock,
)
from virtio_driver import BUFFERS, POLL_REGISTER, Driver, machine, readable, writable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.kvm
SIZE = 64 << 10
TIMEOUT_S = 60


def everything(**changes: Any) -> VmmConfig:
    devices: dict[str, Any] = {
        "disks": [Disk(bytes(SIZE))], "nets": [Net(PythonNet())], "rng": Rng(), "balloon": Balloon(),
        "console": VirtioConsole(), "vsock": Vsock(),
    }  # fmt: skip
    return machine(**devices | changes)


def parts(vmm: Vmm) -> list[Any]:
    return [vmm.virtio[0], vmm.disks[0], vmm.nets[0], vmm.balloon, vmm.virtio_console, vmm.vsock]


# What a job may do so that its fork is reset for the next, besides reading properties.
TAKEN_BACK: dict[str, Callable[[Vmm], object]] = {
    "NetDevice.link": lambda vmm: setattr(vmm.nets[0], "link", False),
    "VsockHost.connect_async": lambda vmm: vmm.vsock.connect_async(1).close(),  # which has not begun
}
CLOSES: dict[str, Callable[[Vmm], object]] = {
    "DiskDevice.resize": lambda vmm: vmm.disks[0].resize(2 * SIZE),
    "NetDevice.connect": lambda vmm: vmm.nets[0].connect(PythonNet()),
    "NetDevice.capture": lambda vmm: vmm.nets[0].capture(None),
    "BalloonDevice.target_mib": lambda vmm: setattr(vmm.balloon, "target_mib", 1),
    "ConsoleDevice.connect": lambda vmm: vmm.virtio_console.connect().close(),
    "ConsoleDevice.resize": lambda vmm: vmm.virtio_console.resize(80, 25),
    "VsockHost.connect": lambda vmm: vmm.vsock.connect(1, TIMEOUT_S),  # raises: there is no driver
    "VsockHost.listen": lambda vmm: vmm.vsock.listen(7).close(),
}


def properties(part: Any) -> set[str]:
    is_data = inspect.isdatadescriptor
    return {name for name, member in inspect.getmembers(type(part)) if is_data(member) and not name.startswith("_")}


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    with Vmm(everything()) as vmm:
        return vmm.snapshot()


def test_each_call_is_known_to_be_taken_back_or_to_close_the_fork() -> None:
    with Vmm(everything()) as vmm:
        for part in parts(vmm):
            name = type(part).__name__
            public = {f"{name}.{member}" for member in dir(part) if not member.startswith("_")}
            known = {call for call in TAKEN_BACK | CLOSES if call.startswith(f"{name}.")}
            assert public - known == {f"{name}.{member}" for member in properties(part)} - known


def is_reused(snapshot: Snapshot, job: Callable[[Vmm], object]) -> bool:
    with snapshot.fork() as fork:
        fork._accept_changes()
        handle = fork._lend()
        with contextlib.suppress(VmmError, OSError):
            job(handle)
        is_clean = fork._is_clean()
        del handle
        assert fork._renew(snapshot) is is_clean
        return is_clean


@pytest.mark.parametrize("name", [*TAKEN_BACK, *CLOSES])
def test_a_job_that_changes_a_device_for_good_has_its_fork_closed(snapshot: Snapshot, name: str) -> None:
    assert is_reused(snapshot, (TAKEN_BACK | CLOSES)[name]) is (name in TAKEN_BACK)


def test_a_job_that_only_reads_leaves_its_fork(snapshot: Snapshot) -> None:
    def look(vmm: Vmm) -> list[object]:
        return [getattr(part, name) for part in parts(vmm) for name in properties(part)]

    assert is_reused(snapshot, look)


def test_a_job_that_takes_the_network_behind_a_device_has_its_fork_closed() -> None:
    with Vmm(everything(nets=[Net("user")])) as vmm:
        snapshot = vmm.snapshot()
    assert not is_reused(snapshot, lambda vmm: vmm.nets[0].network)


def test_a_link_that_a_job_has_cut_is_up_for_the_next() -> None:
    def cut(fork: Vmm) -> bool:
        was_up = fork.nets[0].link
        fork.nets[0].link = False
        return was_up and not fork.nets[0].link

    with Vmm(everything(nets=[Net("user")])) as vmm:
        snapshot = vmm.snapshot()
    with ForkExecutor(snapshot, 1) as pool:
        assert [pool.submit(cut).result(TIMEOUT_S) for _ in range(3)] == [True] * 3


def test_the_counts_and_failures_of_a_job_are_not_those_of_the_next() -> None:
    with Vmm(machine(disks=[Disk(bytes(SIZE))])) as vmm:
        driver = Driver(vmm)
        assert driver.start() == 15
        snapshot = vmm.snapshot()

        def job(fork: Vmm) -> list[object]:
            own, (device,), (disk,) = driver.fork(fork), fork.virtio, fork.disks
            found: list[object] = [
                device.chains,
                device.taken,
                device.interrupts,
                device.failure,
                disk.reads,
                disk.errors,
            ]
            # A read behind the end, and a chain outside memory.
            fork.memory.write(BUFFERS, (0).to_bytes(8, "little") + (1 << 40).to_bytes(8, "little"))
            assert own.exchange(0, readable(BUFFERS, 16), writable(BUFFERS + 16, 513))
            assert (device.chains, disk.errors, disk.failure is None) == (1, 1, False)
            own.add(0, [writable(1 << 40, 8)])
            own.script((1, own.base + 0x50, 0), (POLL_REGISTER, own.base + 0x70, 15))
            assert "0x10000000000" in str(device.failure)
            return found

        with ForkExecutor(snapshot, 1) as pool:
            # The first fork is also one that was not reset.
            assert [pool.submit(job).result(TIMEOUT_S) for _ in range(3)] == [[0, 0, 0, None, 0, 0]] * 3
        with snapshot.fork() as fork:
            fork._accept_changes()
            job(handle := fork._lend())
            del handle
            assert fork._renew(snapshot)
            job(fork)


CALLS: dict[str, Callable[[list[Any]], object]] = {
    "disk.resize": lambda o: o[1].resize(SIZE),
    "net.link": lambda o: setattr(o[2], "link", False),
    "net.connect": lambda o: o[2].connect(PythonNet()),
    "net.capture": lambda o: o[2].capture(None),
    "balloon.target_mib": lambda o: setattr(o[3], "target_mib", 1),
    "console.connect": lambda o: o[4].connect(),
    "console.resize": lambda o: o[4].resize(80, 25),
    "vsock.connect": lambda o: o[5].connect(1, TIMEOUT_S),
    "vsock.connect_async": lambda o: o[5].connect_async(1).send(None),
    "vsock.listen": lambda o: o[5].listen(7),
}


def refuses(call: Callable[[], object]) -> None:
    with pytest.raises(ClosedError, match=r"\Athe machine is closed\Z") as refused:
        call()
    assert refused.value.at == "machine"


def is_closed(objects: list[Any]) -> None:
    for part in objects:
        for name in properties(part):
            refuses(lambda part=part, name=name: getattr(part, name))  # type: ignore[misc]
    for call in CALLS.values():
        refuses(lambda call=call: call(objects))  # type: ignore[misc]


def test_devices_of_a_closed_machine_say_so() -> None:
    with Vmm(everything()) as vmm:
        objects = parts(vmm)
    is_closed(objects)


def test_devices_that_a_job_has_kept_of_a_closed_fork_say_so(snapshot: Snapshot) -> None:
    with ForkExecutor(snapshot, 1) as pool:
        objects = pool.submit(parts).result(TIMEOUT_S)
    is_closed(objects)


def test_counts_stay_after_the_machine_is_closed(tmp_path: Path) -> None:
    with Vmm(machine(rng=Rng(), disks=[Disk(bytes(SIZE))])) as vmm:
        stats, driver = vmm.stats, Driver(vmm, 1)
        driver.start()
        driver.exchange(0, writable(BUFFERS, 16))
        assert [count.chains for count in stats.virtio] == [0, 0], "they were not enabled"
        with stats:
            for size in (16, 32):
                driver.exchange(0, writable(BUFFERS, size))
        driver.exchange(0, writable(BUFFERS, 64))
        device = vmm.virtio[1]
        assert (device.taken, device.chains, device.interrupts) == (4, 4, 4)
        assert (device.bytes_from_guest, device.bytes_to_guest) == (0, 16 + 32 + 64 + 16)
    disk, rng = stats.virtio
    assert rng[:1] + rng[2:] == ("rng", 2, 2, 2, 0, 48)
    assert rng.notifications >= 2
    assert disk == ("disk0", 0, 0, 0, 0, 0, 0)
    stats.reset()
    assert [sum(count[1:]) for count in stats.virtio] == [0, 0]

"""Virtio devices in Python. Covers src/py/virtio_custom.rs, src/py/virtio_chain.rs, python/pyvmm/virtio_device.py."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from pyvmm import (
    ConfigError,
    DescriptorChain,
    SnapshotError,
    StateError,
    VirtioProgram,
    Virtqueue,
    Vmm,
)
from virtio_driver import BUFFERS, POLL_REGISTER, Driver, machine, readable, writable
from virtio_programs import Keeper, keep

if TYPE_CHECKING:
    from collections.abc import Callable

kvm = pytest.mark.kvm


class Upper(Keeper):
    """Answers with what it reads, in upper case."""

    features = 5
    config = b"config"

    def write_config(self, offset: int, data: bytes) -> None:
        self.calls.append((offset, data))
        self.transport.set_config_quietly(data * 3)

    def answer(self, chain: DescriptorChain) -> None:
        chain.write(chain.read().upper())

    def save(self) -> bytes:
        return b"saved"

    def restore(self, state: bytes) -> None:
        self.calls.append(state)


def upper(driver: Driver, text: bytes, queue: int = 0) -> bytes:
    driver.vmm.memory.write(BUFFERS, text)
    length = driver.exchange(queue, readable(BUFFERS, len(text)), writable(BUFFERS + 0x1000, 100))
    return bytes(driver.vmm.memory.read(BUFFERS + 0x1000, length))


@kvm
def test_a_guest_uses_a_device_in_python() -> None:
    device = Upper()
    assert isinstance(device, VirtioProgram)
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        assert (driver.read(8), vmm.virtio[0].name, vmm.virtio[0].offered & 0xFFFF) == (42, "virtio0", 5)
        assert driver.start(5, queues=2) == 15
        assert upper(driver, b"hello") == b"HELLO"
        assert device.calls == ["reset", 1 << 32 | 5]
        assert (device.transport.name, device.transport.features) == ("virtio0", 1 << 32 | 5)
        assert repr(device.transport.queue(0)) == "Virtqueue(virtio0, 0)"
        with pytest.raises(IndexError):
            device.transport.queue(2)


@kvm
def test_the_configuration_space_changes_and_answers() -> None:
    device = Upper()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        assert driver.read(0x100) == int.from_bytes(b"conf", "little")
        device.transport.config = b"other"
        assert (driver.read(0x100), driver.read(0x60)) == (int.from_bytes(b"othe", "little"), 2)
        driver.write(0x104, 0x64636261)
        assert device.calls[-1] == (4, b"abcd")
        assert (driver.read(0x108), device.transport.config) == (0x64636261, b"abcdabcdabcd")
        with pytest.raises(ConfigError):
            device.transport.config = bytes(4096)


@kvm
def test_a_kept_chain_is_completed_by_another_thread() -> None:
    device = Upper()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        keep(driver, device, readable(BUFFERS, 4), writable(BUFFERS + 0x1000, 8))

        def complete() -> None:
            with device.kept[0] as chain:
                assert (chain.readable, chain.writable) == (4, 8)
                assert chain.read(3) + chain.read() + chain.read() == bytes(4)
                assert chain.write(b"more than eight") == 8

        thread = threading.Thread(target=complete)
        thread.start()
        thread.join(60)
        assert driver.take(1) == 8
        assert vmm.memory.read(BUFFERS + 0x1000, 8) == b"more tha"
        device.kept[0].complete()
        with pytest.raises(StateError, match="completed"):
            device.kept[0].write(b"")


@kvm
def test_a_chain_is_void_after_a_reset() -> None:
    device = Upper()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        keep(driver, device, readable(BUFFERS, 4))
        driver.start(queues=2)
        with pytest.raises(StateError, match="reset"):
            device.kept[0].read()
        device.kept[0].complete()
        assert upper(driver, b"again") == b"AGAIN"
        assert vmm.memory.read(driver.rings[1].used + 2, 2) == b"\0\0"


@kvm
def test_a_chain_completed_while_the_machine_is_paused_arrives_later() -> None:
    device = Upper()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        keep(driver, device, writable(BUFFERS, 4))
        vmm.start()
        vmm.pause(60)
        device.kept[0].write(b"late")
        device.kept[0].complete()
        assert vmm.memory.read(driver.rings[1].used + 2, 2) == b"\0\0"
        vmm.resume()
        vmm.stop()
        vmm.wait(60)
        driver.script((3, driver.rings[1].used + 2, 0))
        assert (driver.take(1), vmm.memory.read(BUFFERS, 4)) == (4, b"late")


@kvm
def test_a_fork_has_its_own_device_and_takes_kept_chains_again() -> None:
    device = Upper()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        keep(driver, device, readable(BUFFERS, 4))
        snapshot = vmm.snapshot()
        with pytest.raises(SnapshotError, match="fork"):
            snapshot.fork()
        other = Upper()
        with snapshot.fork(virtio={"virtio0": other}) as fork:
            mine = driver.fork(fork)
            assert upper(mine, b"forked") == b"FORKED"
            assert other.calls == ["reset", b"saved", 1 << 32]
            assert len(other.kept) == 1
        vmm.reset(snapshot)
        driver.rings[1].taken = 0
        assert upper(driver, b"back") == b"BACK"
        assert len(device.kept) == 2


class Bad(Upper):
    """Does something wrong in `process`."""

    def __init__(self, act: Callable[[Bad, Virtqueue], object]) -> None:
        super().__init__()
        self.act = act

    def process(self, queue: Virtqueue) -> None:
        self.act(self, queue)


def fails(_device: Bad, queue: Virtqueue) -> None:
    raise ValueError(f"in queue {queue.index}")


@kvm
def test_an_exception_ends_the_run() -> None:
    with Vmm(machine(virtio=[Bad(fails)])) as vmm:
        driver = Driver(vmm)
        with pytest.raises(ValueError, match="in queue 0"):
            driver.start(queues=2)


@kvm
def test_an_exception_of_write_config_ends_the_run() -> None:
    class Refuses(Upper):
        def write_config(self, offset: int, data: bytes) -> None:
            raise ValueError(f"{offset} {data!r}")

    with Vmm(machine(virtio=[Refuses()])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)

        def write() -> None:
            driver.write(0x100, 1)
            upper(driver, b"x")

        with pytest.raises(ValueError, match="0 b"):
            write()


@kvm
def test_a_device_may_close_snapshot_and_fail_in_process() -> None:
    taken = []

    def act(device: Bad, queue: Virtqueue) -> None:
        for chain in queue:
            taken.append(holder[0].snapshot())
            chain.complete()
        device.transport.fail("on purpose")

    with Vmm(machine(virtio=[Bad(act)])) as vmm:
        holder = [vmm]
        driver = Driver(vmm)
        driver.start(queues=2)
        driver.script((POLL_REGISTER, driver.base + 0x70, 15))
        assert vmm.virtio[0].failure == "on purpose"

    def close(_device: Bad, _queue: Virtqueue) -> None:
        holder[0].close()

    with Vmm(machine(virtio=[Bad(close)])) as vmm:
        holder = [vmm]
        with pytest.raises(Exception, match="closed"):
            Driver(vmm).start(queues=2)


@kvm
def test_chains_of_a_closed_machine_are_harmless() -> None:
    device = Upper()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        keep(driver, device, readable(BUFFERS, 4))
    with pytest.raises(StateError):
        device.kept[0].read()
    device.kept[0].complete()
    assert device.transport.queue(0).pop() is None


@kvm
def test_a_cycle_through_a_device_is_collected() -> None:
    device = Upper()
    vmm = Vmm(machine(virtio=[device]))
    device.calls.append(vmm)
    gone = weakref.ref(device)
    vmm.close()
    del device, vmm
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device_type": 0}, "device_type"),
        ({"device_type": "x"}, "device_type"),
        ({"queues": ()}, "queues"),
        ({"queues": (3,)}, "power of two"),
        ({"features": 1 << 28}, "features"),
        ({"config": 5}, "config"),
        ({"process": None}, "process"),
    ],
)
def test_what_cannot_be_a_device_is_refused(changes: dict[str, Any], text: str) -> None:
    device = type("Device", (Upper,), changes)()
    with pytest.raises(ConfigError, match=text):
        Vmm(machine(virtio=[device]))

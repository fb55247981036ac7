"""Hostile and clumsy virtio devices in Python, and drivers that reset at the worst time.

Covers src/py/virtio_custom.rs, src/py/virtio_chain.rs, src/virtio/custom.rs.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from pyvmm import SnapshotError, StateError, Vmm
from virtio_driver import BUFFERS, Driver, machine, readable, writable
from virtio_programs import Keeper, keep

if TYPE_CHECKING:
    from pyvmm import VirtioTransport, Virtqueue

kvm = pytest.mark.kvm


@kvm
@pytest.mark.parametrize("is_started_again", [False, True])
def test_a_void_chain_writes_nothing_to_guest_memory(is_started_again: bool) -> None:
    device = Keeper()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        chain = keep(driver, device)
        chain.write(b"stale")
        driver.write(0x70, 0)
        if is_started_again:
            driver.start(queues=2)
        chain.complete()
        if not is_started_again:
            driver.start(queues=2)
        driver.exchange(0, writable(BUFFERS + 64, 8))
        assert vmm.memory.read(BUFFERS, 8) == bytes(8)


@kvm
def test_a_chain_of_before_a_reset_to_a_snapshot_writes_nothing() -> None:
    device = Keeper()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        snapshot = vmm.snapshot()
        chain = keep(driver, device)
        chain.write(b"stale")
        vmm.reset(snapshot)
        chain.complete()
        driver.rings[1].added = 0
        driver.exchange(0, writable(BUFFERS + 64, 8))
        assert vmm.memory.read(BUFFERS, 8) == bytes(8)


@kvm
def test_the_device_learns_of_a_reset_without_another_notification() -> None:
    device = Keeper()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        device.calls.clear()
        driver.write(0x70, 0)
        for _ in range(1000):
            driver.read(0)
            if device.calls:
                break
        assert device.calls == ["reset"]


@kvm
def test_an_exception_of_write_config_does_not_wait_for_a_notification() -> None:
    class Refuses(Keeper):
        def write_config(self, offset: int, data: bytes) -> None:
            raise ValueError(f"no {offset} {data!r}")

    with Vmm(machine(virtio=[Refuses()])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)

        def write() -> None:
            driver.write(0x100, 1)
            for _ in range(1000):
                driver.read(0)

        with pytest.raises(ValueError, match="no 0"):
            write()


@kvm
def test_chains_that_an_exception_left_are_served_by_the_next_run() -> None:
    class Once(Keeper):
        failed = False

        def process(self, queue: Virtqueue) -> object:
            if queue.index == 0 and not self.failed and self.transport.features:
                self.failed = True
                raise ValueError("once")
            return super().process(queue)

    device = Once()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        with pytest.raises(ValueError, match="once"):
            driver.start(queues=2)
        device.failed = True
        driver.start(queues=2)
        driver.exchange(0, writable(BUFFERS, 8))
        device.failed = False
        driver.add(0, [writable(BUFFERS, 8)])
        with pytest.raises(ValueError, match="once"):
            driver.script((1, driver.base + 0x50, 0), (3, driver.rings[0].used + 2, driver.rings[0].taken))
        vmm.run_until(b"!", timeout=20)
        assert driver.take(0) == 2


@kvm
@pytest.mark.parametrize("kind", [2, 4, 5, 3, 18])
def test_a_fork_never_gets_another_device_instead_of_the_programs(kind: int) -> None:
    device = Keeper()
    device.device_type = kind
    with Vmm(machine(virtio=[device])) as vmm:
        Driver(vmm).start(queues=2)
        snapshot = vmm.snapshot()
        with pytest.raises(SnapshotError, match=r"virtio0"):
            snapshot.fork()


@kvm
@pytest.mark.parametrize("nonsense", [5, "text", None, 1.5, object()])
def test_nonsense_is_not_written(nonsense: Any) -> None:
    device = Keeper()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        chain = keep(driver, device)
        with pytest.raises(TypeError):
            chain.write(nonsense)
        assert chain.write(memoryview(b"xaxbxc")[1::2]) == 3
        assert chain.write(bytearray(b"def")) == 3
        chain.complete()
        assert vmm.memory.read(BUFFERS, 8) == b"abcdef\0\0"


@kvm
def test_a_coroutine_is_refused() -> None:
    class Async(Keeper):
        async def process(self, queue: Virtqueue) -> object:
            raise AssertionError(queue)

    with Vmm(machine(virtio=[Async()])) as vmm, pytest.raises(StateError, match="coroutine"):
        Driver(vmm).start(queues=2)


@kvm
@pytest.mark.parametrize("name", ["activate", "reset"])
def test_a_coroutine_of_another_method_is_refused(name: str) -> None:
    async def method(_self: object, *_arguments: object) -> None:
        pass

    device: Any = type("Async", (Keeper,), {name: method})()
    with Vmm(machine(virtio=[device])) as vmm, pytest.raises(TypeError):
        Driver(vmm).start(queues=2)


@kvm
def test_a_chain_in_a_forked_child_is_refused() -> None:
    device = Keeper()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        chain = keep(driver, device)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                chain.complete()
            except StateError:
                try:
                    device.transport.queue(0).pop()
                except StateError:
                    status = 0
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        chain.write(b"parent")
        chain.complete()
        assert vmm.memory.read(BUFFERS, 6) == b"parent"


@kvm
@pytest.mark.parametrize("closes", [False, True])
def test_a_cycle_through_a_device_and_its_machine_is_collected(closes: bool) -> None:
    device = Keeper()
    vmm = Vmm(machine(virtio=[device]))
    device.calls.append(vmm)
    driver = Driver(vmm)
    driver.start(queues=2)
    keep(driver, device)
    gone = weakref.ref(device)
    if closes:
        vmm.close()
    del device, vmm, driver
    for _ in range(3):
        gc.collect()
    assert gone() is None


@kvm
def test_a_machine_that_cannot_be_made_leaves_nothing() -> None:
    class Fails(Keeper):
        def attach(self, transport: VirtioTransport) -> None:
            super().attach(transport)
            raise ValueError("attach")

    first, second = Keeper(), Fails()
    with pytest.raises(ValueError, match="attach"):
        Vmm(machine(virtio=[first, second]))
    gone: list[weakref.ref[Any]] = [weakref.ref(first), weakref.ref(second)]
    del first, second
    for _ in range(3):
        gc.collect()
    assert [one() for one in gone] == [None, None]


@kvm
def test_a_device_is_reset_before_it_is_restored() -> None:
    class Store(Keeper):
        def __init__(self) -> None:
            super().__init__()
            self.values = b"at first"

        def reset(self) -> None:
            super().reset()
            self.values = b""

        def save(self) -> bytes:
            return self.values

        def restore(self, state: bytes) -> None:
            self.values = state

        def process(self, queue: Virtqueue) -> object:
            self.calls.append(self.values)
            return super().process(queue)

    device, other = Store(), Store()
    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        device.values = b"saved"
        snapshot = vmm.snapshot()
        with snapshot.fork(virtio={"virtio0": other}) as fork:
            driver.fork(fork).exchange(0, writable(BUFFERS, 8))
            assert other.values == b"saved"
            assert other.calls[:2] == ["reset", 1 << 32]
        device.values = b"later"
        device.calls.clear()
        before = driver.fork(vmm)
        vmm.reset(snapshot)
        before.exchange(0, writable(BUFFERS, 8))
        assert device.values == b"saved"
        assert device.calls[:2] == ["reset", 1 << 32]
        assert set(device.calls[2:]) == {b"saved"}


@kvm
@pytest.mark.parametrize(("name", "text"), [("save", "ValueError"), ("restore", "ValueError"), (None, "restore")])
def test_a_state_that_fails_is_a_typed_error(name: str | None, text: str) -> None:
    class Stateful(Keeper):
        def save(self) -> object:
            if name == "save":
                raise ValueError("no")
            return b"state"

    def restore(_self: object, _state: bytes) -> None:
        if name == "restore":
            raise ValueError("no")

    device = Stateful()
    if name is not None:
        Stateful.restore = restore  # type: ignore[attr-defined]
    with Vmm(machine(virtio=[device])) as vmm:
        if name != "restore":
            with pytest.raises(StateError, match=text):
                vmm.snapshot()
            return
        snapshot = vmm.snapshot()
        with pytest.raises(StateError, match=text):
            snapshot.fork(virtio={"virtio0": Stateful()})
        with pytest.raises(StateError, match=text):
            vmm.reset(snapshot)


@kvm
def test_completions_race_with_pauses() -> None:
    class Threaded(Keeper):
        def process(self, queue: Virtqueue) -> object:
            for chain in queue:
                chain.write(b"x")
                self.kept.append(chain)
                ready.release()
            return None

    device, ready, ends = Threaded(), threading.Semaphore(0), threading.Event()

    def complete() -> None:
        while ready.acquire() and not ends.is_set():
            device.kept.pop(0).complete()

    def disturb(vmm: Vmm) -> None:
        while not ends.is_set():
            # Without a run there is nothing to pause.
            with suppress(StateError):
                vmm.pause(20)
                vmm.resume()

    with Vmm(machine(virtio=[device])) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        threads = [threading.Thread(target=complete), threading.Thread(target=disturb, args=(vmm,))]
        for thread in threads:
            thread.start()
        try:
            for _ in range(100):
                driver.exchange(0, readable(BUFFERS, 8), writable(BUFFERS, 8))
        finally:
            ends.set()
            ready.release()
            for thread in threads:
                thread.join(60)

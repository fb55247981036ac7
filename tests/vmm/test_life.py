"""The life of a machine: closed, paused, resumed and held from several threads and from its own callbacks at once.

Covers src/py/in_loop.rs, src/py/vmm_loop.rs, src/vmm/runner.rs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from guests import SPIN, exit_with, flat
from pyvmm import CpuConfig, KvmVm, StateError, Stop, Vmm, VmmError, VmRunState

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0

OUT_FOR_EVER = b"\xba\x00\x05\xb0\x78\xee\xeb\xfd"  # mov dx, 0x500; mov al, 'x'; back: out dx, al; jmp back
# 64 bits, ring 3: vCPU 0 ends by the exit port, the others spin.
FIRST_ENDS = b"\x85\xff\x75\x04" + exit_with(3) + SPIN


def within(call: Callable[[], Any]) -> Any:
    """What a call that might hang returns or raises."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert result, "it hangs"
    return result[0]


class Device:
    """Calls a function at the first write, and says when it is there."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.writes = 0
        self.entered, self.go, self.returned = threading.Event(), threading.Event(), threading.Event()
        self.result: Any = None

    def write(self, _offset: int, _size: int, _value: int) -> None:
        self.writes += 1
        if self.writes == 1:
            self.entered.set()
            assert self.go.wait(DEADLINE_S)
            try:
                self.result = self.call()
            except VmmError as error:
                self.result = error
            self.returned.set()

    def save(self) -> bytes:
        return b""

    def restore(self, _state: bytes) -> None:
        pass


def machine(call: Callable[[Vmm], Any]) -> tuple[Vmm, Device]:
    vmm = Vmm(flat(OUT_FOR_EVER))
    device = Device(lambda: call(vmm))
    vmm.add_pio_device(0x500, 1, device)
    return vmm, device


CALLS: dict[str, Callable[[Vmm], Any]] = {
    "run": lambda vmm: vmm.run(0),
    "wait": lambda vmm: vmm.wait(0),
    "start": lambda vmm: vmm.start(),
    "close": lambda vmm: vmm.close(),
    "pause": lambda vmm: vmm.pause(),
    "resume": lambda vmm: vmm.resume(),
    "snapshot": lambda vmm: vmm.snapshot(),
    "nmi": lambda vmm: vmm.nmi(0),
    "registers": lambda vmm: vmm.vcpus[0].regs.rip,
}


@pytest.mark.parametrize("name", CALLS)
def test_close_of_a_started_machine_beside_a_callback_returns(name: str) -> None:
    vmm, device = machine(CALLS[name])
    vmm.start()
    assert device.entered.wait(DEADLINE_S)
    closer = threading.Thread(target=vmm.close, daemon=True)
    closer.start()
    while vmm.state is not VmRunState.CLOSED:
        pass
    device.go.set()
    closer.join(DEADLINE_S)
    assert not closer.is_alive()
    # The callback has returned before `close` did, and none comes after it.
    assert device.returned.is_set()
    assert device.writes == 1
    if name != "close":
        assert isinstance(device.result, StateError)


def test_two_that_close_at_once_both_wait_for_a_callback_in_progress() -> None:
    vmm, device = machine(lambda _vmm: None)
    vmm.start()
    assert device.entered.wait(DEADLINE_S)
    # Whether the callback had returned when each came back.
    found: list[bool] = []

    def close() -> None:
        vmm.close()
        found.append(device.returned.is_set())

    closers = [threading.Thread(target=close, daemon=True) for _ in range(2)]
    for closer in closers:
        closer.start()
    while vmm.state is not VmRunState.CLOSED:
        pass
    # Nothing hangs on this time: one that did not wait would come back within it.
    closers[0].join(0.2)
    assert not found
    device.go.set()
    for closer in closers:
        closer.join(DEADLINE_S)
    assert found == [True, True]


@pytest.mark.parametrize("name", ["snapshot", "pause", "wait"])
def test_close_means_closed_whoever_else_is_inside(name: str) -> None:
    vmm, device = machine(lambda _vmm: None)
    vmm.start()
    assert device.entered.wait(DEADLINE_S)
    other = threading.Thread(target=within, args=(lambda: CALLS[name](vmm),), daemon=True)
    other.start()
    closers = [threading.Thread(target=vmm.close, daemon=True) for _ in range(2)]
    for closer in closers:
        closer.start()
    while vmm.state is not VmRunState.CLOSED:
        pass
    assert all(closer.is_alive() for closer in closers), "a callback still runs"
    device.go.set()
    for thread in [*closers, other]:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in [*closers, other])
    assert device.writes == 1


@pytest.mark.parametrize("timeout", [2.0, None])
def test_close_in_a_callback_while_the_run_is_ending(timeout: float | None) -> None:
    vmm, device = machine(lambda vmm: vmm.close())
    runner = threading.Thread(target=within, args=(lambda: vmm.run(timeout),), daemon=True)
    runner.start()
    assert device.entered.wait(DEADLINE_S)
    vmm.stop()
    device.go.set()
    runner.join(DEADLINE_S)
    assert not runner.is_alive()
    assert vmm.state is VmRunState.CLOSED


def test_close_in_a_callback_of_a_machine_that_nobody_waits_for_stops_its_guest() -> None:
    vmm, device = machine(lambda vmm: vmm.close())
    vmm.start()
    device.go.set()
    assert device.returned.wait(DEADLINE_S)
    while vmm.state is VmRunState.RUNNING:
        pass
    within(vmm.close)
    assert device.writes == 1


def test_the_last_reference_may_go_in_a_callback() -> None:
    held: list[Vmm] = []

    def let_go() -> int:
        held.clear()
        return gc.collect()

    device = Device(let_go)
    vmm = Vmm(flat(OUT_FOR_EVER))
    vmm.add_pio_device(0x500, 1, device)
    held.append(vmm)
    vmm.start()
    del vmm
    device.go.set()
    assert device.returned.wait(DEADLINE_S)
    while "vcpu_0" in thread_names():
        pass
    assert device.writes == 1


def thread_names() -> set[str]:
    names = set()
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as file:
                names.add(file.read().strip())
        except OSError:
            pass  # it has ended
    return names


def test_two_callbacks_that_shut_their_machine_down_do_not_wait_for_each_other() -> None:
    """Each would join the other's thread."""
    both = threading.Barrier(2)

    class Both:
        def write(self, _offset: int, _size: int, _value: int) -> Stop:
            both.wait(DEADLINE_S)
            vmm.close()
            return Stop(1)

    code = b"\x66\xba\x00\x05\xee" + SPIN
    with Vmm(flat(code, "user64", address=0x10000, size_mib=2, cpu=CpuConfig(vcpus=2))) as vmm:
        vmm.add_pio_device(0x500, 1, Both())
        vmm.start()
        within(lambda: vmm.wait(DEADLINE_S))
        assert vmm.state is VmRunState.CLOSED


@pytest.mark.parametrize("kind", ["Vmm", "KvmVm"])
def test_resume_after_the_end_says_so_while_another_vcpu_spins(kind: str) -> None:
    config = flat(FIRST_ENDS, "user64", address=0x10000, size_mib=2, cpu=CpuConfig(vcpus=2))
    vm: Vmm | KvmVm
    if kind == "Vmm":
        vm = Vmm(config)
        vm.start()
    else:
        vm = KvmVm(config)
        vm.run()
    with vm:
        while vm.state is not VmRunState.EXITING:
            pass
        error = within(vm.resume)
        assert isinstance(error, StateError)
        assert error.hint is not None
        assert "reset()" in error.hint


def test_a_wait_after_the_end_says_so() -> None:
    with Vmm(flat(exit_with(3))) as vmm:
        assert vmm.run(DEADLINE_S).code == 3
        for call in (vmm.wait, vmm.run, vmm.resume):
            with pytest.raises(StateError, match="guest has ended") as info:
                call()
            assert "reset()" in str(info.value.hint)


@pytest.mark.parametrize("kind", ["Vmm", "KvmVm"])
def test_pause_beside_resume_returns(kind: str) -> None:
    vm: Vmm | KvmVm
    if kind == "Vmm":
        vm = Vmm(flat(SPIN))
        vm.start()
    else:
        vm = KvmVm(flat(SPIN))
        vm.run()

    def often(call: Callable[[], Any]) -> bool:
        for _ in range(2000):
            call()
        return True

    with vm:
        resumer = threading.Thread(target=within, args=(lambda: often(vm.resume),), daemon=True)
        resumer.start()
        assert within(lambda: often(vm.pause)) is True
        resumer.join(DEADLINE_S)
        assert not resumer.is_alive()


@pytest.mark.parametrize("name", ["nmi", "snapshot"])
def test_a_pause_is_not_undone_by_who_holds_the_machine_for_a_moment(name: str) -> None:
    over = threading.Event()
    with Vmm(flat(SPIN + b"\xcf")) as vmm:
        vmm.memory.write(8, (0x1002).to_bytes(4, "little"))  # vector 2: an iret
        vmm.start()

        def hold() -> None:
            while not over.is_set():
                CALLS[name](vmm)

        holder = threading.Thread(target=hold, daemon=True)
        holder.start()
        try:
            for _ in range(300):
                vmm.pause()
                for _ in range(20):
                    assert vmm.state is VmRunState.PAUSED
                    assert vmm.vcpus[0].regs.rip > 0
                vmm.resume()
        finally:
            over.set()
        holder.join(DEADLINE_S)
        assert not holder.is_alive()


def test_a_hold_does_not_end_a_wait_for_the_machine() -> None:
    """`KvmVm.wait` returns when the machine no longer runs; a snapshot or an NMI of a running one is no such end."""
    with Vmm(flat(SPIN)) as vmm:
        vmm.start()
        for _ in range(20):
            vmm.snapshot()
            assert vmm.state is VmRunState.RUNNING


def test_a_device_that_has_stopped_the_run_is_not_called_again_by_a_hold() -> None:
    class Stops:
        writes = 0

        def write(self, _offset: int, _size: int, _value: int) -> Stop:
            self.writes += 1
            return Stop(self.writes)

        def save(self) -> bytes:
            return b""

        def restore(self, _state: bytes) -> None:
            pass

    device = Stops()
    with Vmm(flat(OUT_FOR_EVER)) as vmm:
        vmm.add_pio_device(0x500, 1, device)
        vmm.start()
        while device.writes == 0:
            pass
        for _ in range(20):
            vmm.snapshot()
        exit = vmm.wait(DEADLINE_S)
        assert exit is not None
        assert (exit.value, device.writes) == (1, 1)


def descriptors() -> list[str]:
    """What each descriptor of this process refers to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(found)


@pytest.mark.parametrize("how", ["made", "run", "forked", "watched"])
def test_close_releases_every_descriptor_though_the_machine_is_held(how: str) -> None:
    with Vmm(flat(exit_with(0))) as first:
        snapshot = first.snapshot()
    gc.collect()
    before = descriptors()
    vmm = snapshot.fork() if how == "forked" else Vmm(flat(exit_with(0)))
    if how == "watched":
        vmm.event_manager.call_later(3600, int)
        vmm.event_manager.fileno()
        vmm.stats.enable()
    if how != "made":
        vmm.run(DEADLINE_S)
    assert descriptors() != before
    vmm.close()
    assert descriptors() == before
    assert vmm.state is VmRunState.CLOSED
    with pytest.raises(StateError, match="closed"):
        _ = vmm.event_manager
    vmm.stop()  # of a machine that is closed, there is nothing to stop


def test_whoever_holds_an_event_manager_has_it_after_its_machine_is_closed() -> None:
    called: list[int] = []
    with Vmm(flat(exit_with(0))) as vmm:
        manager = vmm.event_manager
    manager.call_later(0, lambda: called.append(1))
    manager.run_with_timeout(60_000)
    assert called == [1]


PARTS: dict[str, Callable[[Vmm], Any]] = {
    "memory": lambda vmm: vmm.memory,
    "vcpu": lambda vmm: vmm.vcpus[0],
    "registers": lambda vmm: vmm.vcpus[0].regs,
    "serial": lambda vmm: vmm.serial,
    "stats": lambda vmm: vmm.stats,
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_keeps_its_machine_and_lets_it_go(part: Callable[[Vmm], Any]) -> None:
    vmm = Vmm(flat(exit_with(0)))
    machine = weakref.ref(vmm)
    held = part(vmm)
    del vmm
    gc.collect()
    kept = machine()
    assert kept is not None
    assert kept.state is VmRunState.CREATED
    del kept, held
    gc.collect()
    assert machine() is None


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_machine_whose_callbacks_hold_its_parts_is_collected(part: Callable[[Vmm], Any]) -> None:
    class Device:
        def read(self, offset: int, size: int) -> int:
            return 0

    vmm = Vmm(flat(exit_with(0)))
    device: Any = Device()
    device.part = part(vmm)
    vmm.add_pio_device(0x500, 1, device)
    vmm.on_exit("hlt", functools.partial(lambda part, vcpu, exit: None, part(vmm)))
    machine = weakref.ref(vmm)
    del vmm, device
    gc.collect()
    assert machine() is None

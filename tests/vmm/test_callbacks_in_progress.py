"""Calls beside a callback that does not return: time limits end them, and the machine is as before.

Covers src/limit.rs, src/vcpu/rest.rs, src/vmm/run.rs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from guests import flat
from pyvmm import ExitReason, KvmVm, StateError, Stop, Vmm, VmmError, VmRunState, WaitTimeoutError

if TYPE_CHECKING:
    from typing import Any

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
OUT_FOR_EVER = b"\xba\x00\x05\xb0\x78\xee\xeb\xfd"  # mov dx, 0x500; mov al, 'x'; back: out dx, al; jmp back


class Slow:
    """A device that returns when the test lets it."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.calls = 0
        self.error: Exception | None = None
        self.result: Stop | None = None

    def write(self, offset: int, size: int, value: int) -> Stop | None:
        self.entered.set()
        assert self.go.wait(DEADLINE_S)
        self.calls += 1
        if self.error:
            raise self.error
        return self.result

    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        pass


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.go.set()


@pytest.fixture
def vmm(slow: Slow) -> Iterator[Vmm]:
    with Vmm(flat(OUT_FOR_EVER)) as vmm:
        vmm.add_pio_device(0x500, 1, slow)
        yield vmm
        slow.go.set()


def run_into_callback(vmm: Vmm, slow: Slow) -> None:
    """Run until its time is over and the device has been called, which may be later."""
    while not slow.entered.is_set():
        assert vmm.run(0.01).reason is ExitReason.TIMEOUT


def test_a_run_ends_in_time_beside_a_callback_that_does_not_return(vmm: Vmm, slow: Slow) -> None:
    run_into_callback(vmm, slow)
    assert vmm.run(0.01).reason is ExitReason.TIMEOUT
    assert not slow.calls
    assert vmm.state is VmRunState.PAUSED
    assert vmm.vcpus[0].regs.rdx == 0x500
    slow.go.set()
    while slow.calls < 2:  # the guest continues
        assert vmm.run(0.01).reason is ExitReason.TIMEOUT


def test_what_such_a_callback_raises_comes_out_of_the_next_run(vmm: Vmm, slow: Slow) -> None:
    run_into_callback(vmm, slow)
    slow.error = ValueError("late")
    slow.go.set()
    with pytest.raises(ValueError, match="late"):
        vmm.run(DEADLINE_S)


def test_registers_can_be_read_while_paused_whatever_its_callback_does(vmm: Vmm, slow: Slow) -> None:
    """Also in the moment in which the callback has returned, and its vCPU is not at rest yet."""
    with ThreadPoolExecutor() as others:
        ran = others.submit(vmm.run, DEADLINE_S)
        try:
            for turn in range(3000):
                assert slow.entered.wait(DEADLINE_S)
                vmm.pause(DEADLINE_S)
                slow.entered.clear()
                slow.go.set()
                while slow.calls == turn or vmm.vcpus[0].regs.rip != 0x1006:
                    assert vmm.vcpus[0].regs.rdx == 0x500
                slow.go.clear()
                vmm.resume()
        finally:
            slow.go.set()
            vmm.stop()
        assert ran.result(DEADLINE_S).reason is ExitReason.STOPPED


def test_a_run_that_was_stopped_waits_for_the_callback(vmm: Vmm, slow: Slow) -> None:
    with ThreadPoolExecutor() as others:
        ran = others.submit(vmm.run, DEADLINE_S)
        assert slow.entered.wait(DEADLINE_S)
        vmm.stop()
        while vmm.state is VmRunState.RUNNING:
            time.sleep(0.001)
        assert not ran.done()
        slow.go.set()
        assert ran.result().reason is ExitReason.STOPPED
    assert slow.calls == 1


def test_a_callback_may_stop_its_run_and_do_more(vmm: Vmm, slow: Slow) -> None:
    done: list[int] = []

    class Stopper:
        def write(self, offset: int, size: int, value: int) -> None:
            vmm.stop()
            time.sleep(0.05)
            done.append(value)

    vmm.remove_pio_device(0x500)
    vmm.add_pio_device(0x500, 1, Stopper())
    assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
    assert done == [0x78]


def test_a_stop_of_a_callback_is_not_lost_when_the_time_passes_meanwhile(vmm: Vmm, slow: Slow) -> None:
    # Whenever the device returns, also within what a run waits for it after its time has passed:
    # one run ends with the value.
    for number, delay in enumerate([0.0, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08]):
        slow.go.clear()
        slow.result = Stop(number)
        timer = threading.Timer(delay, slow.go.set)
        timer.start()
        exits = [vmm.run(0.01)]
        while exits[-1].reason is ExitReason.TIMEOUT:
            exits.append(vmm.run(0.01))
        timer.join()
        assert (exits[-1].reason, exits[-1].value) == (ExitReason.STOPPED, number)


def test_a_stop_for_a_guest_that_went_ends_no_run_of_the_next(vmm: Vmm, slow: Slow) -> None:
    before = vmm.snapshot()
    slow.result = Stop("of the former guest")
    run_into_callback(vmm, slow)
    slow.go.set()
    vmm.reset(before, DEADLINE_S)
    slow.result = None
    assert vmm.run(0.01).reason is ExitReason.TIMEOUT
    vmm.stop()
    exit = vmm.run(DEADLINE_S)
    assert (exit.reason, exit.value) == (ExitReason.STOPPED, None)


@pytest.mark.parametrize("run", ["run", "run_here"])
def test_a_reset_beside_the_end_of_the_guest_is_refused_or_brings_it_back(run: str) -> None:
    # out 0x80, al; hlt
    with Vmm(flat(b"\xe6\x80\xf4")) as vmm, ThreadPoolExecutor() as others:
        before = vmm.snapshot()
        for _ in range(50):
            ran = others.submit(getattr(vmm, run), DEADLINE_S)
            while not ran.done():
                try:
                    vmm.reset(before, DEADLINE_S)
                except StateError:
                    continue
            try:
                reason = ran.result().reason
            except StateError:  # the reset came first: one of them at a time
                continue
            assert reason is ExitReason.HALT
            vmm.reset(before)
            assert vmm.state is not VmRunState.EXITING


def test_what_a_callback_raises_that_has_dropped_its_machine_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = threading.Event()
    seen: list[Any] = []

    def hook(unraisable: Any) -> None:
        seen.append(str(unraisable.exc_value))
        reported.set()

    monkeypatch.setattr("sys.unraisablehook", hook)
    slow, machines = Slow(), [Vmm(flat(OUT_FOR_EVER))]

    class Dropping:
        def write(self, offset: int, size: int, value: int) -> None:
            slow.write(offset, size, value)
            machines.clear()
            raise LookupError("nobody is left")

    machines[0].add_pio_device(0x500, 1, Dropping())
    run_into_callback(machines[0], slow)
    slow.go.set()
    assert reported.wait(DEADLINE_S)
    assert seen == ["nobody is left"]


@pytest.mark.parametrize("call", ["snapshot", "reset"])
def test_a_time_limit_ends_a_wait_for_a_callback(vmm: Vmm, slow: Slow, call: str) -> None:
    before = vmm.snapshot()
    calls: dict[str, Callable[[float], Any]] = {
        "snapshot": vmm.snapshot,
        "reset": lambda limit: vmm.reset(before, limit),
    }
    vmm.start()
    assert slow.entered.wait(DEADLINE_S)
    with pytest.raises(WaitTimeoutError, match="vcpu_0: a callback of the machine did not return") as raised:
        calls[call](0.01)
    assert isinstance(raised.value, TimeoutError)
    assert isinstance(raised.value, VmmError)
    assert vmm.state is VmRunState.RUNNING
    slow.go.set()
    calls[call](DEADLINE_S)
    assert vmm.wait(0.01) is None
    assert slow.calls > 0


def test_a_pause_does_not_wait_for_a_callback(vmm: Vmm, slow: Slow) -> None:
    vmm.start()
    assert slow.entered.wait(DEADLINE_S)
    vmm.pause(DEADLINE_S)
    assert vmm.state is VmRunState.PAUSED
    assert not slow.calls
    vmm.resume()
    slow.go.set()
    assert vmm.wait(0.01) is None


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), "1"])
def test_a_time_limit_that_cannot_be_is_refused(vmm: Vmm, timeout: Any) -> None:
    before = vmm.snapshot()
    calls: list[Callable[[], Any]] = [
        lambda: vmm.pause(timeout),
        lambda: vmm.snapshot(timeout),
        lambda: vmm.reset(before, timeout),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError)):
            call()
    assert vmm.state is VmRunState.CREATED


def test_a_callback_cannot_snapshot_its_own_machine(vmm: Vmm, slow: Slow) -> None:
    raised: list[StateError] = []

    class Device:
        def write(self, offset: int, size: int, value: int) -> None:
            with pytest.raises(StateError, match="let the callback return first") as error:
                vmm.snapshot(DEADLINE_S)
            raised.append(error.value)
            vmm.stop()

    vmm.remove_pio_device(0x500)
    vmm.add_pio_device(0x500, 1, Device())
    assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
    assert raised


def test_a_kvm_vms_pause_takes_a_time_limit() -> None:
    with KvmVm(flat(b"\xeb\xfe")) as vm:
        vm.run()
        vm.pause(DEADLINE_S)
        assert vm.state is VmRunState.PAUSED
        vm.shutdown()

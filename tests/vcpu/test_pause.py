"""Pausing and resuming a machine: pauses, and every call in every state, from any thread.

Covers src/vcpu/handle.rs, src/vcpu/host_access.rs, src/vm/vcpus.rs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import guests
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyvmm import CpuConfig, FlatBoot, KvmVm, StateError, Vmm, VmmConfig, WaitTimeoutError
from threads import all_at_once

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
# Counts in RBX without end: inc rbx; jmp -5
COUNT = bytes.fromhex("48ffc3 ebfb")
COUNT_AT = 0x1000


def counting(vcpus: int = 1) -> Vmm:
    return Vmm(VmmConfig(boot=FlatBoot(COUNT, address=COUNT_AT, mode="user64"), cpu=CpuConfig(vcpus=vcpus)))


def test_a_machine_runs_on_after_a_pause_and_a_snapshot_that_timed_out() -> None:
    # The vCPU may be on its way out when the wait ends. It must not stay out.
    with Vmm(guests.flat(guests.COUNT_IN_MEMORY)) as vmm:
        vmm.start()
        for number in range(400):
            limit = number % 50 * 1e-6
            try:
                if number % 2:
                    vmm.pause(limit)
                    vmm.resume()
                else:
                    vmm.snapshot(limit)
            except WaitTimeoutError:
                assert vmm.state == "running"
            count = vmm.memory.read_u16(0x2000)
            give_up = time.monotonic() + DEADLINE_S
            while vmm.memory.read_u16(0x2000) == count:
                assert time.monotonic() < give_up, f"the guest stands still after call {number}"


def test_a_paused_guest_stops_and_continues() -> None:
    with counting() as vmm:
        (vcpu,) = vmm.vcpus
        vmm.start()
        vmm.pause()
        assert vmm.state == "paused"
        first = vcpu.regs.rbx
        assert vcpu.regs.rbx == first
        vmm.pause()  # again: nothing
        vmm.resume()
        assert vmm.state == "running"
        vmm.resume()
        while True:
            vmm.pause()
            if vcpu.regs.rbx > first:
                break
            vmm.resume()
        vmm.stop()
        assert str(vmm.wait(60)) == "stopped"


def test_registers_of_a_running_guest_are_out_of_reach() -> None:
    with counting() as vmm:
        (vcpu,) = vmm.vcpus
        vmm.start()
        with pytest.raises(StateError, match="pause"):
            _ = vcpu.regs.rip
        with pytest.raises(StateError, match="pause"):
            vcpu.regs.rip = 0
        vmm.stop()
        vmm.wait(60)
        assert COUNT_AT <= vcpu.regs.rip < COUNT_AT + len(COUNT)


def test_changed_registers_are_the_guests() -> None:
    """Out 0xf4, al: the exit code is what was put into RAX."""
    with Vmm(VmmConfig(boot=FlatBoot(bytes.fromhex("e6f4")))) as vmm:
        (vcpu,) = vmm.vcpus
        start = vcpu.regs.rip
        vcpu.regs.rax = 42
        assert vmm.run(60).code == 42
        assert vcpu.regs.rip == start + 2, "after the instruction"


def test_several_vcpus_pause_and_resume_together() -> None:
    with counting(vcpus=2) as vmm:
        vmm.start()
        for _ in range(20):
            vmm.pause()
            assert [vcpu.id for vcpu in vmm.vcpus] == [0, 1]
            assert all(vcpu.regs.rip for vcpu in vmm.vcpus)
            vmm.resume()
        vmm.stop()
        vmm.wait(60)


def test_pause_and_resume_from_a_callback_and_another_thread() -> None:
    with counting() as vmm:
        seen: list[int] = []

        def look() -> None:
            vmm.pause()
            seen.append(vmm.vcpus[0].regs.rip)
            vmm.resume()
            thread = threading.Thread(target=vmm.pause)
            thread.start()
            thread.join(60)
            assert vmm.state == "paused"
            vmm.stop()

        vmm.event_manager.call_later(0.0, look)
        assert str(vmm.run(60)) == "stopped"
        assert seen


def test_pauses_at_random_moments_from_several_threads_lose_nothing() -> None:
    with counting() as vmm:
        vmm.start()

        def work() -> None:
            for _ in range(50):
                vmm.pause()
                vmm.resume()

        all_at_once(*[work] * 4)
        vmm.stop()
        assert str(vmm.wait(60)) == "stopped"


def test_start_and_wait_are_run_in_two_steps() -> None:
    with counting() as vmm:
        with pytest.raises(StateError, match="start"):
            vmm.wait()
        vmm.start()
        with pytest.raises(StateError, match="wait"):
            vmm.run()
        with pytest.raises(StateError, match="wait"):
            vmm.start()
        assert vmm.wait(0.01) is None
        assert vmm.state == "running"
        vmm.stop()
        assert str(vmm.wait(60)) == "stopped"
        with pytest.raises(StateError, match="start"):
            vmm.wait()
        assert str(vmm.run(0.01)) == "timeout"


def test_calls_in_the_wrong_state_say_which() -> None:
    vmm = Vmm(VmmConfig(boot=FlatBoot(guests.HALT)))
    calls: list[Callable[[], object]] = [vmm.pause, vmm.resume]
    for call in calls:
        with pytest.raises(StateError, match="not been started"):
            call()
    assert str(vmm.run(60)) == "halt (vCPU 0)"
    for call in calls:
        with pytest.raises(StateError, match="ended"):
            call()
    (vcpu,) = vmm.vcpus
    assert vcpu.regs.rip, "its state can still be read"
    vmm.close()
    looks = [lambda: vmm.vcpus, lambda: vcpu.regs.rip, lambda: vcpu.msrs[0x10], lambda: vcpu.cpuid]
    for call in [*calls, vmm.start, vmm.wait, *looks]:
        with pytest.raises(StateError, match="closed"):
            call()


def test_a_stopped_machine_cannot_be_resumed_but_run() -> None:
    with counting() as vmm:
        assert str(vmm.run(0.01)) == "timeout"
        with pytest.raises(StateError, match="no run"):
            vmm.resume()
        vmm.pause()
        assert str(vmm.run(0.01)) == "timeout"


def created() -> KvmVm:
    return KvmVm(VmmConfig(boot=FlatBoot(COUNT, address=COUNT_AT, mode="user64")))


def running() -> KvmVm:
    vm = created()
    vm.run()
    return vm


def paused() -> KvmVm:
    vm = running()
    vm.pause()
    return vm


def shut_down() -> KvmVm:
    vm = running()
    vm.shutdown()
    return vm


def exiting() -> KvmVm:
    vm = KvmVm(VmmConfig(boot=FlatBoot(guests.HALT)))
    vm.run()
    vm.wait(60)
    return vm


def closed() -> KvmVm:
    vm = created()
    vm.close()
    return vm


# What each call makes of each state; a text is the reason why it is refused.
TABLE: dict[tuple[Callable[[], KvmVm], str], dict[str, str]] = {
    (created, "created"): {
        "run": "running", "pause": "!not been started", "resume": "!not been started", "shutdown": "created",
        "close": "closed",
    },
    (running, "running"): {
        "run": "!running already", "pause": "paused", "resume": "running", "shutdown": "paused", "close": "closed",
    },
    (paused, "paused"): {
        "run": "!paused", "pause": "paused", "resume": "running", "shutdown": "paused", "close": "closed",
    },
    (shut_down, "paused"): {
        "run": "running", "pause": "paused", "resume": "!no run", "shutdown": "paused", "close": "closed",
    },
    (exiting, "exiting"): {
        "run": "!has ended", "pause": "!has ended", "resume": "!has ended", "shutdown": "exiting", "close": "closed",
    },
    (closed, "closed"): {
        "run": "!closed", "pause": "!closed", "resume": "!closed", "shutdown": "!closed", "close": "closed",
    },
}  # fmt: skip
STEPS = [
    pytest.param(make, state, call, outcome, id=f"{make.__name__}-{call}")
    for (make, state), calls in TABLE.items()
    for call, outcome in calls.items()
]


@pytest.mark.parametrize(("make", "state", "call", "outcome"), STEPS)
def test_every_call_in_every_state(make: Callable[[], KvmVm], state: str, call: str, outcome: str) -> None:
    vm = make()
    assert vm.state == state
    if outcome.startswith("!"):
        with pytest.raises(StateError, match=outcome[1:]):
            getattr(vm, call)()
        assert vm.state == state
    else:
        getattr(vm, call)()
        assert vm.state == outcome
    vm.close()


@pytest.mark.parametrize(("make", "state", "call", "outcome"), STEPS)
def test_every_call_in_every_state_from_four_threads_at_once(
    make: Callable[[], KvmVm], state: str, call: str, outcome: str
) -> None:
    """Together they come to what one of them comes to."""
    del state
    vm = make()
    together = threading.Barrier(4)
    unexpected: list[BaseException] = []

    def work() -> None:
        together.wait(60)
        try:
            getattr(vm, call)()
        except StateError:
            pass
        except BaseException as error:
            unexpected.append(error)

    before = vm.state
    all_at_once(*[work] * 4)
    assert not unexpected
    assert vm.state == (before if outcome.startswith("!") else outcome)
    vm.close()


@settings(max_examples=25)
@given(st.lists(st.lists(st.sampled_from(["run", "pause", "resume", "shutdown"]), max_size=8), min_size=2, max_size=4))
def test_any_calls_from_several_threads_leave_a_machine_that_works(plans: list[list[str]]) -> None:
    vm = created()

    def work(plan: list[str]) -> None:
        for call in plan:
            with contextlib.suppress(StateError):
                getattr(vm, call)()

    all_at_once(*(partial(work, plan) for plan in plans))
    vm.shutdown()
    assert vm.state in ("created", "paused")
    vm.run()
    vm.pause()
    first = vm.vcpus[0].regs.rbx
    while vm.vcpus[0].regs.rbx == first:
        vm.resume()
        vm.pause()
    vm.close()
    assert vm.state == "closed"

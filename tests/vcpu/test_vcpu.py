"""Stopping a machine, looking into its vCPUs, and letting it go on.

Covers src/vcpu/registers.rs, src/vcpu/msr.rs, src/vcpu/handle.rs, src/vcpu/host_access.rs, src/vm/vcpus.rs,
python/pyvmm/registers.py.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import guests
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyvmm import CpuConfig, FlatBoot, KvmError, KvmVm, StateError, Vcpu, Vmm, VmmConfig
from pyvmm.registers import MpState, Msr

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm

# Counts in RBX for ever: inc rbx; jmp -5
COUNT = bytes.fromhex("48ffc3 ebfb")
COUNT_AT = 0x1000


def counting(vcpus: int = 1) -> Vmm:
    return Vmm(VmmConfig(boot=FlatBoot(COUNT, address=COUNT_AT, mode="user64"), cpu=CpuConfig(vcpus=vcpus)))


def test_a_paused_guest_stands_still_and_goes_on() -> None:
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

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
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
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
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

    threads = [threading.Thread(target=work, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
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


@pytest.fixture(scope="module")
def vcpu() -> Any:
    with Vmm(VmmConfig(boot=FlatBoot(guests.HALT, mode="long64"), irqchip=True)) as vmm:
        yield vmm.vcpus[0]


GENERAL = [
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rsp",
    "rbp",
    "rip",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
]


@given(name=st.sampled_from(GENERAL), value=st.integers(0, 2**64 - 1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_general_registers_keep_what_they_are_given(vcpu: Vcpu, name: str, value: int) -> None:
    setattr(vcpu.regs, name, value)
    assert getattr(vcpu.regs, name) == value


@given(value=st.one_of(st.integers(max_value=-1), st.integers(2**64), st.floats(), st.text(), st.none()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_no_number_of_its_width_is_refused(vcpu: Vcpu, value: Any) -> None:
    before = vcpu.regs.rax
    with pytest.raises((OverflowError, TypeError)):
        vcpu.regs.rax = value
    with pytest.raises((OverflowError, TypeError)):
        vcpu.sregs.cs.dpl = value
    with pytest.raises((OverflowError, TypeError, KeyError)):
        _ = vcpu.msrs[value]
    with pytest.raises((OverflowError, TypeError)):
        vcpu.translate(value)
    with pytest.raises((OverflowError, TypeError)):
        vcpu.mp_state = value
    assert vcpu.regs.rax == before


def test_system_registers_and_their_parts(vcpu: Vcpu) -> None:
    sregs = vcpu.sregs
    assert sregs.cr0 & 1
    selector = sregs.ds.selector
    sregs.fs.base = 0x1234_5678_9ABC
    assert sregs.fs.base == 0x1234_5678_9ABC
    sregs.es = sregs.fs
    assert sregs.es.base == 0x1234_5678_9ABC
    assert sregs.ds.selector == selector
    with pytest.raises(OverflowError, match="16 bits"):
        sregs.ds.selector = 0x10000
    with pytest.raises(TypeError, match="Segment"):
        sregs.gs = sregs.gdt
    with pytest.raises(AttributeError, match="no register"):
        sregs.cr9 = 1


def test_vector_registers(vcpu: Vcpu) -> None:
    fpu = vcpu.fpu
    fpu.xmm[15] = 2**128 - 2
    fpu.ymm[3] = 3 << 200 | 7
    fpu.st[1] = 0x3FFF_8000_0000_0000_0000
    fpu.mxcsr = 0x1F80
    assert (fpu.xmm[15], fpu.xmm[-1]) == (2**128 - 2, 2**128 - 2)
    assert fpu.ymm[3] == 3 << 200 | 7
    assert fpu.xmm[3] == 7
    assert fpu.st[1] == 0x3FFF_8000_0000_0000_0000
    assert len(fpu.st) == 8
    with pytest.raises(IndexError):
        _ = fpu.xmm[16]
    with pytest.raises(OverflowError, match="128 bits"):
        fpu.xmm[0] = 1 << 128
    for wrong in (1.5, "x", None):
        with pytest.raises(TypeError, match="integer"):
            fpu.xmm[0] = wrong  # type: ignore[assignment]
        with pytest.raises(TypeError, match="integer"):
            _ = fpu.xmm[wrong]  # type: ignore[index]


def test_model_specific_registers_by_name_and_number(vcpu: Vcpu) -> None:
    vcpu.msrs["IA32_LSTAR"] = 0xFFFF_8000_0000_1000
    assert vcpu.msrs[0xC0000082] == vcpu.msrs[Msr.IA32_LSTAR] == 0xFFFF_8000_0000_1000
    with pytest.raises(KeyError, match="IA32_EFER"):
        _ = vcpu.msrs["EFFER"]
    with pytest.raises(KvmError, match="does not know"):
        _ = vcpu.msrs[0x1234_5678]
    with pytest.raises(KvmError, match="refuses"):
        vcpu.msrs["IA32_LSTAR"] = 0x8000_0000_0000_0000  # not canonical
    assert "IA32_EFER=" in repr(vcpu.msrs)


def test_the_other_classes(vcpu: Vcpu) -> None:
    assert vcpu.mp_state == MpState.RUNNABLE
    vcpu.mp_state = MpState.HALTED
    assert vcpu.mp_state is MpState.HALTED
    vcpu.mp_state = MpState.RUNNABLE
    vcpu.debugregs.db0 = 0x1000
    assert vcpu.debugregs.db0 == 0x1000
    assert vcpu.events.nmi_masked == 0
    vcpu.events.nmi_masked = 1
    assert vcpu.events.nmi_masked == 1
    assert vcpu.xcrs.xcr0 & 1
    assert vcpu.lapic.version & 0xFF >= 0x10
    leaf = next(entry for entry in vcpu.cpuid if entry.function == 0)
    assert leaf.eax > 0
    assert "eax=0x" in repr(leaf)


def test_a_refused_value_changes_nothing(vcpu: Vcpu) -> None:
    before = vcpu.sregs.cr4
    with pytest.raises(KvmError, match="KVM_SET_SREGS"):
        vcpu.sregs.cr4 = 2**64 - 1
    assert vcpu.sregs.cr4 == before


def test_views_are_readable(vcpu: Vcpu) -> None:
    vcpu.regs.rflags = 0x202
    assert "rflags=0x202 [IF]" in repr(vcpu.regs)
    assert "cs=Segment(base=" in repr(vcpu.sregs)
    html = vcpu.regs._repr_html_()
    assert "<th>IA32_EFER</th><td><code>0x" in vcpu.msrs._repr_html_()
    assert html.startswith("<table>")
    assert "<th>r15</th>" in html
    assert "xmm" in repr(vcpu.fpu)
    assert repr(vcpu) == "Vcpu(0)"


def test_guest_virtual_addresses_are_translated(vcpu: Vcpu) -> None:
    assert vcpu.translate(0x1234) == 0x1234, "a flat guest's pages map to themselves"
    assert vcpu.translate(0x7FFF_FFFF_F000) is None

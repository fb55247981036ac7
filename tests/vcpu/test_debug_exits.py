"""Single steps and breakpoints, which come out as debug exits.

Covers src/vcpu/guest_debug.rs.
"""

from __future__ import annotations

import pytest
from guests import exit_with, flat
from pyvmm import (
    ConfigError,
    CpuConfig,
    Exit,
    ExitAction,
    ExitKind,
    ExitReason,
    KvmVm,
    StateError,
    Vcpu,
    VcpuExit,
    Vmm,
    VmRunState,
)

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
CONTINUE, RETRY = ExitAction.CONTINUE, ExitAction.RETRY


def test_single_steps_come_out_as_debug_exits() -> None:
    rips: list[int] = []

    def hook(vcpu: Vcpu, exit: VcpuExit) -> ExitAction:
        assert isinstance(exit, VcpuExit.Debug)
        rips.append(vcpu.regs.rip)
        if len(rips) == 3:
            vcpu.debug()
        return CONTINUE

    with Vmm(flat(b"\x90" * 5 + exit_with(1), "long64")) as vmm:
        vmm.vcpus[0].debug(single_step=True)
        vmm.on_exit(ExitKind.DEBUG, hook)
        assert vmm.run(DEADLINE_S).code == 1
    assert rips == [0x1001, 0x1002, 0x1003]


def test_breakpoints_come_out_as_debug_exits() -> None:
    stops: list[tuple[int, int]] = []

    def hook(vcpu: Vcpu, exit: VcpuExit) -> ExitAction:
        assert isinstance(exit, VcpuExit.Debug)
        stops.append((exit.pc, vcpu.regs.rip))
        vcpu.debug()
        return CONTINUE

    with Vmm(flat(b"\x90" * 5 + exit_with(1), "long64")) as vmm:
        vmm.vcpus[0].debug(breakpoints=[0x1003])
        vmm.on_exit("debug", hook)
        assert vmm.run(DEADLINE_S).code == 1
        with pytest.raises(ConfigError, match="four"):
            vmm.vcpus[0].debug(breakpoints=range(5))
    assert stops == [(0x1003, 0x1003)]


def stop_by(vmm: Vmm, how: str) -> Exit:
    if how == "start and wait":
        vmm.start()
        exit = vmm.wait(DEADLINE_S)
        assert exit is not None
        return exit
    return vmm.run_here(DEADLINE_S) if how == "run_here" else vmm.run(DEADLINE_S)


@pytest.mark.parametrize("how", ["run", "run_here", "start and wait"])
def test_without_a_hook_a_debug_exit_ends_the_run_and_the_next_run_continues(how: str) -> None:
    with Vmm(flat(b"\x90" * 5 + exit_with(1), "long64")) as vmm:
        (vcpu,) = vmm.vcpus
        vcpu.debug(single_step=True)
        for rip in range(0x1001, 0x1004):
            assert stop_by(vmm, how) == Exit(ExitReason.DEBUG, vcpu=0)
            assert (vcpu.regs.rip, vmm.state) == (rip, VmRunState.PAUSED)
        vcpu.debug()
        assert stop_by(vmm, how).code == 1


def test_a_breakpoint_of_one_vcpu_stops_the_others_too() -> None:
    spin_or_go = b"\x85\xff\x74\xfe"  # test edi, edi; jz to itself: vCPU 0 spins
    config = flat(spin_or_go + b"\x90" + exit_with(1), "long64", cpu=CpuConfig(vcpus=2))
    with Vmm(config) as vmm:
        vmm.vcpus[1].debug(breakpoints=[0x1004])
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.DEBUG, vcpu=1)
        spinning, stopped = (vcpu.regs.rip for vcpu in vmm.vcpus)
        assert stopped == 0x1004
        assert spinning in (0x1000, 0x1002)  # it may not have begun
        vmm.vcpus[1].debug()
        assert vmm.run(DEADLINE_S)[:3] == (ExitReason.CODE, 1, 1)


def test_a_machine_that_a_breakpoint_has_stopped_can_be_reset_and_forked() -> None:
    with Vmm(flat(b"\x90" * 5 + exit_with(1), "long64")) as vmm:
        start = vmm.snapshot()
        vmm.vcpus[0].debug(breakpoints=[0x1003])
        assert vmm.run(DEADLINE_S).reason is ExitReason.DEBUG
        with vmm.snapshot().fork() as fork:
            assert fork.vcpus[0].regs.rip == 0x1003
            assert fork.run(DEADLINE_S).code == 1
        vmm.reset(start)
        assert vmm.run(DEADLINE_S).reason is ExitReason.DEBUG
        vmm.vcpus[0].debug()
        assert vmm.run(DEADLINE_S).code == 1


def test_a_kvm_vm_that_a_breakpoint_has_stopped_continues_after_a_shutdown() -> None:
    with KvmVm(flat(b"\x90" * 5 + exit_with(1), "long64")) as vm:
        vm.vcpus[0].debug(breakpoints=[0x1003])
        vm.run()
        assert vm.wait(DEADLINE_S) == vm.exit == Exit(ExitReason.DEBUG, vcpu=0)
        with pytest.raises(StateError, match="the run is ending"):
            vm.pause()
        with pytest.raises(StateError, match=r"shutdown\(\)"):
            vm.run()
        vm.shutdown()
        assert (vm.exit, vm.state) == (None, VmRunState.PAUSED)
        vm.vcpus[0].debug()
        vm.run()
        end = vm.wait(DEADLINE_S)
        assert end is not None
        assert end.code == 1

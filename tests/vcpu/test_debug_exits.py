"""Single steps and breakpoints, which come out as debug exits.

Covers src/vcpu/guest_debug.rs.
"""

from __future__ import annotations

import pytest
from guests import exit_with, flat
from pyvmm import (
    ConfigError,
    ExitAction,
    ExitKind,
    ExitReason,
    Vcpu,
    VcpuExit,
    Vmm,
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


def test_without_a_hook_a_debug_exit_ends_the_run_by_its_number() -> None:
    with Vmm(flat(b"\x90" * 5 + exit_with(1), "long64")) as vmm:
        vmm.vcpus[0].debug(single_step=True)
        assert vmm.run(DEADLINE_S)[:2] == (ExitReason.UNKNOWN_EXIT, 4)

"""Hooks of model-specific registers: filters, answers, and registers that are KVM's again."""

from __future__ import annotations

import struct

import pytest
from guests import exit_with, flat
from pyvmm import (
    ConfigError,
    ExitAction,
    ExitReason,
    Vcpu,
    VcpuExit,
    Vmm,
)

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
CONTINUE, RETRY = ExitAction.CONTINUE, ExitAction.RETRY
RDMSR, WRMSR = b"\x0f\x32", b"\x0f\x30"


# 64 bits, ring 0: mov ecx, number; then rdmsr or wrmsr
def msr(instruction: bytes, number: int) -> bytes:
    """Access a model-specific register."""
    return b"\xb9" + struct.pack("<I", number) + instruction


def test_model_specific_registers_come_out_by_number() -> None:
    seen: list[str] = []

    def hook(_vcpu: Vcpu, exit: VcpuExit) -> object:
        seen.append(repr(exit))
        match exit:
            case VcpuExit.Rdmsr(index=0x10):
                return 0x1122334455667788
            case VcpuExit.Wrmsr():
                return CONTINUE
        return None

    # mov eax, 5; mov edx, 6; wrmsr 0x7777 (which KVM does not know); rdmsr 0x10 (which it does);
    # leave
    code = (
        b"\xb8\x05\0\0\0\xba\x06\0\0\0"
        + msr(WRMSR, 0x7777_0000)
        + msr(RDMSR, 0x10)
        + b"\x89\xc3\x89\xd1"
        + exit_with(1)
    )
    with Vmm(flat(code, "long64")) as vmm:
        vmm.on_exit("msr", hook, msrs=[0x10])
        assert vmm.run(DEADLINE_S).code == 1
        regs = vmm.vcpus[0].regs
        assert (regs.rbx, regs.rcx) == (0x55667788, 0x11223344)
    assert seen == [
        "VcpuExit.Wrmsr(index=0x77770000, value=25769803781, reason='unknown')",
        "VcpuExit.Rdmsr(index=0x10, reason='filter')",
    ]


def test_a_register_that_no_hook_answers_faults_as_before() -> None:
    with Vmm(flat(msr(RDMSR, 0x7777_0000) + exit_with(1), "long64")) as vmm:
        vmm.on_exit("msr", lambda _vcpu, _exit: None)
        assert vmm.run(DEADLINE_S).reason is ExitReason.SHUTDOWN, "a fault without an IDT"


def test_filters_of_several_hooks_add_up_and_have_a_bound() -> None:
    seen: list[int] = []
    code = msr(RDMSR, 0x10) + msr(RDMSR, 0xC000_0102) + exit_with(1)
    with Vmm(flat(code, "long64")) as vmm:
        vmm.on_exit("msr", lambda _vcpu, exit: seen.append(exit.index), msrs=[0x10])
        vmm.on_exit("msr", lambda _vcpu, _exit: 0, msrs=[0xC000_0102])
        assert vmm.run(DEADLINE_S).code == 1
        with pytest.raises(ConfigError, match="ranges"):
            vmm.on_exit("msr", print, msrs=[number << 16 for number in range(17)])
        with pytest.raises(ValueError, match="msrs needs"):
            vmm.on_exit("io", print, msrs=[1])
        vmm.on_exit("msr", print, msrs=[0x11])  # what was refused is forgotten
    assert seen == [0x10, 0xC000_0102]


def test_registers_are_kvms_again_when_their_hooks_are_gone() -> None:
    def hook(_vcpu: Vcpu, _exit: VcpuExit) -> object:
        raise AssertionError("a hook that was removed")

    with Vmm(flat(msr(RDMSR, 0x10) + exit_with(1), "long64")) as vmm:
        for _ in range(2):
            vmm.on_exit("msr", hook, msrs=[0x10])
        for _ in range(2):
            vmm.off_exit("msr", hook)
        assert vmm.run(DEADLINE_S).code == 1

"""CPU features: hidden, exposed, and offered to no guest that was not promised them."""

from __future__ import annotations

from typing import Any

import pytest
from guests import (
    HALT,
    flat,
)
from pyvmm import (
    CpuConfig,
    ExitReason,
    Kvm,
    KvmError,
    StateError,
    Vmm,
)

pytestmark = pytest.mark.kvm


def test_hidden_feature_is_not_seen_by_the_guest() -> None:
    code = (
        b"\xb8\x01\x00\x00\x00"  # mov eax, 1
        b"\x0f\xa2"  #             cpuid
        b"\xc1\xe9\x0d\x83\xe1\x01"  # shr ecx, 13; and ecx, 1: cx16
        b"\x88\xc8\xe6\xf4"  #     mov al, cl; out 0xf4, al
    )
    seen = []
    for cpu in [CpuConfig(), CpuConfig(hide=("cx16",))]:
        with Vmm(flat(code, "long64", cpu=cpu)) as vmm:
            seen.append(vmm.run(60).code)
    assert seen == [1, 0]


def has_feature(vmm: Vmm, function: int, register: str, bit: int) -> bool:
    return any(getattr(leaf, register) >> bit & 1 for leaf in vmm.vcpus[0].cpuid if leaf.function == function)


@pytest.mark.parametrize("template", ["auto", "host", "software-kvm"])
def test_hardware_virtualization_is_offered_to_no_guest_that_was_not_promised_it(template: Any) -> None:
    with Vmm(flat(HALT, cpu=CpuConfig(template=template))) as vmm:
        assert not has_feature(vmm, 1, "ecx", 5), "vmx"
        assert not has_feature(vmm, 0x8000_0001, "ecx", 2), "svm"


def test_a_guest_that_is_a_hypervisor_has_no_snapshot() -> None:
    """Its own guests' state would be lost."""
    with Vmm(flat(HALT, "long64", cpu=CpuConfig(expose=("svm",)))) as vmm:
        (vcpu,) = vmm.vcpus
        vmm.snapshot()
        try:
            vcpu.sregs.efer |= 1 << 12  # SVME
        except KvmError:
            pytest.skip("this KVM has no nesting of SVM")
        with pytest.raises(StateError, match="hardware virtualization switched on"):
            vmm.snapshot()
        vcpu.sregs.efer &= ~(1 << 12)
        with vmm.snapshot().fork() as fork:
            assert fork.run(60).reason is ExitReason.HALT


def test_hypercalls_that_a_kvm_in_software_does_not_answer_are_hidden() -> None:
    unanswered = 1 << 7 | 1 << 11 | 1 << 13  # PV_UNHALT, PV_SEND_IPI, PV_SCHED_YIELD
    with Vmm(flat(HALT, cpu=CpuConfig(vcpus=2, template="software-kvm"))) as vmm:
        for vcpu in vmm.vcpus:
            (features,) = (leaf.eax for leaf in vcpu.cpuid if leaf.function == 0x4000_0001)
            assert not features & unanswered
    with Vmm(flat(HALT, cpu=CpuConfig(template="host"))) as vmm:
        (features,) = (leaf.eax for leaf in vmm.vcpus[0].cpuid if leaf.function == 0x4000_0001)
        (supported,) = (leaf.eax for leaf in Kvm().supported_cpuid if leaf.function == 0x4000_0001)
        assert features & unanswered == supported & unanswered


def test_exposed_feature_is_seen_by_the_guest() -> None:
    """The bit of vmx, which no template offers: mov eax, 1; cpuid; shr ecx, 5; and ecx, 1; exit."""
    code = bytes.fromhex("b801000000 0fa2 c1e905 83e101 88c8 e6f4")
    with Vmm(flat(code, "long64", cpu=CpuConfig(template="software-kvm", expose=("popcnt",)))) as vmm:
        popcnt = [entry.ecx >> 23 & 1 for entry in vmm.vcpus[0].cpuid if entry.function == 1]
        assert popcnt == [1]
    with Vmm(flat(code, "long64", cpu=CpuConfig(hide=("vmx",)))) as vmm:
        assert vmm.run(60).code == 0
    with Vmm(flat(code, "long64", cpu=CpuConfig(expose=("vmx",)))) as vmm:
        assert vmm.run(60).code == 1

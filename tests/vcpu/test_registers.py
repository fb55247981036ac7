"""The registers of a stopped vCPU, by name.

Covers src/vcpu/vcpu.rs, src/vcpu/registers.rs, src/vcpu/msr.rs, src/py/vcpu.rs,
src/py/processor.rs, python/pyvmm/registers.py, python/pyvmm/views.py.
"""

from __future__ import annotations

import re
from typing import Any

import guests
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyvmm import FlatBoot, KvmError, Vcpu, Vmm, VmmConfig
from pyvmm.registers import MpState, Msr

pytestmark = pytest.mark.kvm
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


@pytest.fixture(scope="module")
def vcpu() -> Any:
    with Vmm(VmmConfig(boot=FlatBoot(guests.HALT, mode="long64"), irqchip=True)) as vmm:
        yield vmm.vcpus[0]


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
    assert re.search(r"IA32_EFER</th><td[^>]*>0x", vcpu.msrs._repr_html_())
    assert html.startswith("<table>")
    assert ">r15</th>" in html
    assert "xmm" in repr(vcpu.fpu)
    assert repr(vcpu) == "Vcpu(0)"


def test_guest_virtual_addresses_are_translated(vcpu: Vcpu) -> None:
    assert vcpu.translate(0x1234) == 0x1234, "a flat guest's pages map to themselves"
    assert vcpu.translate(0x7FFF_FFFF_F000) is None

"""What KVM_RUN takes from the run page on entry, as the guest finds it there. Covers src/vcpu/run_page.rs.

Without an in-kernel LAPIC CR8 is such a register: what KVM_SET_SREGS gets does not reach the guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from guests import exit_with, flat
from pyvmm import CpuConfig, KvmError, Snapshot, Vmm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
CHIPS = pytest.mark.parametrize("irqchip", [False, True], ids=["no LAPIC", "LAPIC"])

EXIT_WITH_CR8 = b"\x44\x0f\x20\xc0\xe6\xf4"  # mov rax, cr8; out 0xf4, al


def set_cr8(value: int) -> bytes:
    return b"\xb8" + bytes([value, 0, 0, 0]) + b"\x44\x0f\x22\xc0"  # mov eax, value; mov cr8, rax


def found(vmm: Vmm) -> int | None:
    """The CR8 that the guest finds."""
    return vmm.run(DEADLINE_S).code


@CHIPS
@pytest.mark.parametrize("fixups", [False, True])
def test_a_guest_has_the_cr8_of_its_snapshot(irqchip: bool, fixups: bool, tmp_path: Path) -> None:
    code = EXIT_WITH_CR8 + set_cr8(5) + exit_with(99) + EXIT_WITH_CR8
    with Vmm(flat(code, "long64", irqchip=irqchip, cpu=CpuConfig(fixups=fixups))) as vmm:
        before = vmm.snapshot()
        assert found(vmm) == 0
        vmm.reset(vmm.snapshot())  # it continues after the exit
        assert vmm.run(DEADLINE_S).code == 99
        after = vmm.snapshot()
        vmm.reset(before)
        assert (vmm.vcpus[0].sregs.cr8, found(vmm)) == (0, 0), "reset: nothing of the guest that went"
        vmm.reset(after)
        assert (vmm.vcpus[0].sregs.cr8, found(vmm)) == (5, 5), "reset"
    after.save(tmp_path / "file")
    for snapshot in (after, Snapshot.load(tmp_path / "file")):
        with snapshot.fork() as fork:
            assert (fork.vcpus[0].sregs.cr8, found(fork)) == (5, 5), "fork"
            fork.reset(snapshot)
            assert found(fork) == 5
            fork.reset(before)
            assert found(fork) == 0


@CHIPS
def test_a_guest_has_the_cr8_that_the_host_wrote(irqchip: bool) -> None:
    with Vmm(flat(EXIT_WITH_CR8, "long64", irqchip=irqchip)) as vmm:
        snapshot = vmm.snapshot()
        for value in (15, 0, 1):
            vmm.vcpus[0].sregs.cr8 = value
            assert vmm.vcpus[0].sregs.cr8 == value
            assert found(vmm) == value
            assert vmm.vcpus[0].sregs.cr8 == value
            vmm.reset(snapshot)
        assert found(vmm) == 0


@CHIPS
def test_a_write_of_another_special_register_leaves_cr8_to_the_guest(irqchip: bool) -> None:
    code = set_cr8(5) + exit_with(99) + EXIT_WITH_CR8
    with Vmm(flat(code, "long64", irqchip=irqchip)) as vmm:
        vmm.run(DEADLINE_S)
        vmm.reset(vmm.snapshot())
        vmm.vcpus[0].sregs.cr2 = 0x1234
        vmm.vcpus[0].sregs.fs.base = 0x1000
        assert found(vmm) == 5


@CHIPS
def test_a_cr8_that_no_processor_has_is_refused(irqchip: bool) -> None:
    with Vmm(flat(EXIT_WITH_CR8, "long64", irqchip=irqchip)) as vmm:
        vmm.vcpus[0].sregs.cr8 = 3
        for value in (16, 2**63):
            with pytest.raises(KvmError, match=r"CR8 is 0x.* and the processor has 15 at most"):
                vmm.vcpus[0].sregs.cr8 = value
        assert (vmm.vcpus[0].sregs.cr8, found(vmm)) == (3, 3), "nothing is changed"

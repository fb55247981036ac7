"""The empty PCI bus, the HPET and the registers of the screen, as a guest sees them.

Covers src/devices/pci.rs, src/devices/hpet.rs, src/devices/vga.rs.
"""

from __future__ import annotations

import pytest
from guests import HALT, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from port_script import answers, machine, read, run, run_other, write
from pyvmm import ExitReason, PlatformConfig, Vmm

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
EVERYTHING = PlatformConfig(pvpanic=True, reset_ports=True, screen=True, debug_port=True, pci=True, hpet=True)

# 32 bits: the check for configuration mechanism #1, and a read of the vendor of device 0. The exit
# code is both.
PROBE_PCI = (
    b"\x66\xba\xf8\x0c"  #         mov dx, 0xcf8
    b"\xb8\x00\x00\x00\x80\xef"  # mov eax, 0x80000000; out dx, eax
    b"\xed\x89\xc3"  #             in eax, dx; mov ebx, eax
    b"\x66\xba\xfc\x0c\xed"  #     mov dx, 0xcfc; in eax, dx
    b"\xc1\xeb\x1f\x25\xff\xff\x00\x00"  # shr ebx, 31; and eax, 0xffff
    b"\xc1\xe3\x10\x09\xd8\xe7\xf4"  # shl ebx, 16; or eax, ebx; out 0xf4, eax
)


@pytest.mark.parametrize(("pci", "found"), [(True, 0x1FFFF), (None, 0x1FFFF)])
def test_pci_is_probed_and_has_no_device(pci: bool | None, found: int) -> None:
    # Without the ports everything reads as one bits, so the mechanism seems to be there, too.
    config = flat(PROBE_PCI, "protected32", platform=PlatformConfig(pci=pci))
    with Vmm(config) as vmm:
        assert vmm.run(DEADLINE_S).code == found
        assert bool(vmm.unanswered) == (pci is None)


def test_the_reset_port_is_among_the_ports_of_pci() -> None:
    parts = PlatformConfig(pci=True, reset_ports=True)
    assert answers(write(0xCF9, 2), read(0xCF9), platform=parts) == [2]
    with machine([write(0xCF9, 6)], platform=parts) as vmm:
        assert vmm.run(DEADLINE_S).reason is ExitReason.RESET
        assert [(r.start, r.length) for r in vmm.resources if r.name == "pci"] == [(0xCF8, 8)]


# 32 bits: enable the HPET, and wait until its counter has moved. The exit code is its period in
# nanoseconds.
READ_HPET = (
    b"\xbb\x00\x00\xd0\xfe"  #         mov ebx, 0xfed00000
    b"\xc7\x43\x10\x01\x00\x00\x00"  # mov dword [ebx + 0x10], 1
    b"\x8b\x8b\xf0\x00\x00\x00"  #     mov ecx, [ebx + 0xf0]
    b"\x3b\x8b\xf0\x00\x00\x00\x74\xf8"  # same: cmp ecx, [ebx + 0xf0]; je same
    b"\x8b\x43\x04\x31\xd2\xb9\x40\x42\x0f\x00\xf7\xf1"  # mov eax, [ebx + 4]; xor edx, edx; mov ecx, 1000000; div ecx
    b"\xe7\xf4"  #                     out 0xf4, eax
)


def test_the_hpet_counts() -> None:
    with Vmm(flat(READ_HPET, "protected32", platform=PlatformConfig(hpet=True))) as vmm:
        assert ("mmio", 0xFED0_0000, 0x400) in [(r.kind, r.start, r.length) for r in vmm.resources]
        assert vmm.run(DEADLINE_S).code == 10
    with Vmm(flat(HALT)) as vmm:
        assert not [r for r in vmm.resources if r.name == "hpet"]


def test_a_guest_that_waits_for_the_retrace_continues() -> None:
    code = (
        b"\xba\xda\x03"  #             mov dx, 0x3da
        b"\xec\xa8\x08\x74\xfb"  #     in al, dx; test al, 8; jz back
        b"\xec\xa8\x08\x75\xfb"  #     in al, dx; test al, 8; jnz back
        b"\xec\xa8\x01\x74\xfb"  #     in al, dx; test al, 1; jz back
        b"\xb0\x01\xe6\xf4"  #         mov al, 1; out 0xf4, al
    )
    with Vmm(flat(code, platform=PlatformConfig(screen=True))) as vmm:
        assert vmm.run(DEADLINE_S).code == 1


PORTS = [*range(0x3C0, 0x3E0), 0x402, *range(0xCF8, 0xD00), 0x505]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(PORTS), st.none() | st.integers(0, 255)).filter(
            lambda step: step[0] not in (0xCF9, 0x505) or step[1] is None  # which end the run
        ),
        max_size=80,
    )
)
def test_no_accesses_upset_the_devices_and_a_fork_has_their_state(steps: list[tuple[int, int | None]]) -> None:
    look = [read(port) for port in PORTS if port != 0x3DA]
    with machine(steps, platform=EVERYTHING) as vmm:
        run(vmm, steps)
        with vmm.snapshot().fork() as fork:
            assert run_other(fork, look) == run_other(vmm, look)
            assert fork.screen.cursor == vmm.screen.cursor

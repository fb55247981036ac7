"""What CPUID says of a machine's processors, by every leaf that the host's KVM has.

Covers src/cpu/config.rs, src/py/cpuid.rs.
"""

from __future__ import annotations

from typing import Literal

import pytest
from guests import HALT, flat
from pyvmm import CpuConfig, Vmm

pytestmark = pytest.mark.kvm
NO_CACHE = 0


@pytest.mark.parametrize("template", ["auto", "host"])
@pytest.mark.parametrize("vcpus", [1, 2, 3, 4, 7])
def test_every_leaf_tells_of_the_machine_s_vcpus(vcpus: int, template: Literal["auto", "host"]) -> None:
    bits = (vcpus - 1).bit_length()
    with Vmm(flat(HALT, cpu=CpuConfig(vcpus=vcpus, template=template))) as vmm:
        for vcpu in vmm.vcpus:
            leaves = {(leaf.function, leaf.index): leaf for leaf in vcpu.cpuid}
            assert (leaves[1, 0].ebx >> 24, leaves[1, 0].ebx >> 16 & 0xFF) == (vcpu.id, vcpus)
            for function in (0xB, 0x1F):
                if (function, 0) not in leaves:
                    continue
                levels = [leaves[function, index] for index in range(2)]
                assert [(level.eax, level.ebx, level.ecx >> 8) for level in levels] == [(0, 1, 1), (bits, vcpus, 2)]
                assert [level.edx for level in levels] == [vcpu.id] * 2
            for (function, _), leaf in leaves.items():
                if function not in (4, 0x8000_001D) or leaf.eax & 0x1F == NO_CACHE:
                    continue
                is_shared = leaf.eax >> 5 & 7 >= 3
                assert leaf.eax >> 14 & 0xFFF == ((1 << bits) - 1 if is_shared else 0)
                if function == 4:
                    assert leaf.eax >> 26 == (1 << bits) - 1
            if (0x8000_001E, 0) in leaves:
                assert (leaves[0x8000_001E, 0].eax, leaves[0x8000_001E, 0].ebx >> 8 & 0xFF) == (vcpu.id, 0)
            if leaves.get((0x8000_0008, 0)) and leaves[0x8000_0008, 0].ecx & 0xFF:
                assert leaves[0x8000_0008, 0].ecx & 0xF0FF == bits << 12 | vcpus - 1

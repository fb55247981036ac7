"""Several vCPUs: started by INIT and SIPI of the guest's own, stopped in every state, and more than an xAPIC has."""

from __future__ import annotations

import os
import resource
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest
from alone import alone
from guests import HALT, SPIN, Mode, elf, exit_with, flat
from pyvmm import ConfigError, CpuConfig, ExitReason, KernelBoot, KvmError, MemoryConfig, Snapshot, Vmm, VmmConfig

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm
DEADLINE_S = 120
COUNT, NUMBERS, STARTED = 0x3000, 0x4000, 0x8000
# The interrupt command register: INIT to all others; SIPI to all others, at 0x8000.
INIT, SIPI = 0xC4500, 0xC4600 | STARTED >> 12

# Where a SIPI starts a processor, in real mode: it marks its initial APIC id and counts itself.
PROCESSOR = (
    b"\x66\xb8\x01\x00\x00\x00"  # mov eax, 1
    b"\x0f\xa2"  #                 cpuid
    b"\x66\xc1\xeb\x18"  #         shr ebx, 24
    b"\xfe\x87\x00\x40"  #         inc byte [bx + 0x4000]
    b"\xf0\xff\x06\x00\x30"  #     lock inc word [0x3000]
    b"\xfa\xf4\xeb\xfc"  #         stop: cli; hlt; jmp stop
)
PARK = b"\xfa\xf4\xeb\xfc"  # the same


def starter(mode: Mode, commands: list[int], others: int) -> bytes:
    """Have vCPU 0 give its local APIC these commands, wait until so many have started, and exit; the others halt."""
    if mode == "real16":
        # Only the registers of x2APIC mode are within real mode's reach.
        code = (
            b"\x66\xb9\x1b\x00\x00\x00\x0f\x32"  # mov ecx, IA32_APIC_BASE; rdmsr
            b"\x66\x0d\x00\x0c\x00\x00\x0f\x30"  # or eax, 0xc00; wrmsr
            b"\x66\xb9\x30\x08\x00\x00\x66\x31\xd2"  # mov ecx, the ICR; xor edx, edx
        ) + b"".join(b"\x66\xb8" + struct.pack("<I", command) + b"\x0f\x30" for command in commands)  # mov eax; wrmsr
        code += b"\x81\x3e\x00\x30" + struct.pack("<H", others)  # wait: cmp word [0x3000], others
        code += b"\xf3\x90\x75\xf6"  # pause; jne wait
    else:
        code = b"\xbb\x00\x03\xe0\xfe"  # mov ebx, the ICR
        code += b"".join(b"\xc7\x03" + struct.pack("<I", command) for command in commands)  # mov dword [rbx], command
        code += b"\xbe\x00\x30\x00\x00"  # mov esi, 0x3000
        code += b"\x81\x3e" + struct.pack("<I", others)  # wait: cmp dword [rsi], others
        code += b"\xf3\x90\x75\xf6"  # pause; jne wait
    code += exit_with(7)
    return b"\x85\xff\x75" + bytes([len(code)]) + code + PARK  # test edi, edi; jnz park


def machine(code: bytes, mode: Mode, vcpus: int, **rest: Any) -> VmmConfig:
    cpu = CpuConfig(vcpus=vcpus, **rest)
    return flat(code, mode, address=0x40000 if mode != "real16" else 0x1000, cpu=cpu, irqchip=True)


def started(vmm: Vmm) -> tuple[int, list[int]]:
    """How many processors have counted themselves, and how often each has left its mark."""
    count = int.from_bytes(vmm.memory.read(COUNT, 2), "little")
    return count, list(vmm.memory.read(NUMBERS, len(vmm.vcpus)))


@pytest.mark.parametrize("mode", ["real16", "protected32", "long64"])
@pytest.mark.parametrize("vcpus", [2, 3, 32])
def test_guest_starts_its_other_processors(mode: Mode, vcpus: int) -> None:
    """INIT twice, and a SIPI more, which a running processor ignores."""
    with Vmm(machine(starter(mode, [INIT, INIT, SIPI, SIPI], vcpus - 1), mode, vcpus)) as vmm:
        vmm.memory.write(STARTED, PROCESSOR)
        assert vmm.run(DEADLINE_S).code == 7
        assert started(vmm) == (vcpus - 1, [0] + [1] * (vcpus - 1))


def test_kernel_starts_the_processors_that_wait_for_it(tmp_path: Path) -> None:
    """Only vCPU 0 enters a kernel. The others have not run before their SIPI."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(elf(0x100000, starter("long64", [INIT, SIPI, SIPI], 31)))
    config = VmmConfig(boot=KernelBoot(kernel), memory=MemoryConfig(size_mib=4), cpu=CpuConfig(vcpus=32))
    with Vmm(config) as vmm:
        vmm.memory.write(STARTED, PROCESSOR)
        assert [vcpu.mp_state.name for vcpu in vmm.vcpus[1:]] == ["UNINITIALIZED"] * 31
        with vmm.snapshot().fork() as fork:
            for each in (vmm, fork):
                assert each.run(DEADLINE_S).code == 7
                assert started(each) == (31, [0] + [1] * 31)


def test_init_starts_a_running_processor_again() -> None:
    """Each of the two has started twice: the guest waits for both before its second INIT."""
    first = starter("long64", [INIT, SIPI], 2)
    again = starter("long64", [INIT, SIPI, SIPI], 4)
    code = first.replace(exit_with(7) + PARK, again[4:])  # without the test for vCPU 0
    code = b"\x85\xff\x75" + bytes([len(code) - 4 - len(PARK)]) + code[4:]
    with Vmm(machine(code, "long64", 3)) as vmm:
        vmm.memory.write(STARTED, PROCESSOR)
        assert vmm.run(DEADLINE_S).code == 7
        assert started(vmm) == (4, [0, 2, 2])


WAITING = starter("long64", [INIT], 31)  # and no SIPI comes, so vCPU 0 waits


def test_processors_that_were_never_started_are_in_snapshots(tmp_path: Path) -> None:
    """Forked, reset, saved and loaded: each waits for its SIPI, and starts then."""
    with Vmm(machine(WAITING, "long64", 32)) as vmm:
        vmm.memory.write(STARTED, PROCESSOR)
        assert vmm.run(0.2).reason is ExitReason.TIMEOUT
        snapshot = vmm.snapshot()
        assert [vcpu.mp_state.name for vcpu in vmm.vcpus[1:]] == ["INIT_RECEIVED"] * 31
        snapshot.save(tmp_path / "waiting")
        loaded = Snapshot.load(tmp_path / "waiting")
        with snapshot.fork() as fork, loaded.fork() as again:
            for each in (vmm, fork, again):
                start_them(each)
                each.reset(snapshot)
                assert started(each) == (0, [0] * 32)
                start_them(each)


def start_them(vmm: Vmm) -> None:
    """Have vCPU 0 send a SIPI to all others."""
    vmm.memory.write(0x50000, starter("long64", [SIPI], 31)[4:])
    vmm.vcpus[0].regs.rip = 0x50000
    assert vmm.run(DEADLINE_S).code == 7
    assert started(vmm) == (31, [0] + [1] * 31)


def test_32_vcpus_that_spin_are_stopped_paused_and_closed() -> None:
    with Vmm(machine(SPIN, "long64", 32)) as vmm:
        assert vmm.run(0.2).reason is ExitReason.TIMEOUT
        timer = threading.Timer(0.1, vmm.stop)
        timer.start()
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
        timer.join()
        snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            assert fork.run(0.1).reason is ExitReason.TIMEOUT
        vmm.reset(snapshot)
        vmm.start()
        vmm.pause()
        vmm.resume()


def test_nmi_reaches_one_vcpu_beyond_8_bits() -> None:
    """With x2APIC ids of 32 bits, 255 is one of them and 256 is not 0."""
    # In real mode vector 2 is at 8: the handler exits with the vCPU's number, which DI has.
    handler = b"\x89\xf8\xe7\xf4"  # mov ax, di; out 0xf4, ax
    waiting = b"\xfb\xf4\xeb\xfc"  # back: sti; hlt; jmp back
    with Vmm(machine(waiting, "real16", 258)) as vmm:
        vmm.memory.write(8, struct.pack("<HH", 0x2000, 0))
        vmm.memory.write(0x2000, handler)
        before = vmm.snapshot()
        for number in (0, 1, 254, 255, 256, 257):
            vmm.nmi(number)
            exit = vmm.run(DEADLINE_S)
            assert (exit.code, exit.vcpu) == (number, number)
            vmm.reset(before)


def test_more_vcpus_than_an_xapic_has_are_in_x2apic_mode_also_in_a_fork() -> None:
    with Vmm(machine(PARK, "long64", 257)) as vmm:
        with vmm.snapshot().fork() as fork:
            for each in (vmm, fork):
                assert {vcpu.sregs.apic_base & 0xC00 for vcpu in each.vcpus} == {0xC00}
                assert [vcpu.lapic.id for vcpu in each.vcpus] == list(range(257))
        last = {(leaf.function, leaf.index): leaf for leaf in vmm.vcpus[-1].cpuid}
        assert [last[0xB, level].edx for level in (0, 1)] == [256, 256]
    with Vmm(machine(PARK, "long64", 255)) as vmm:
        assert {vcpu.sregs.apic_base & 0xC00 for vcpu in vmm.vcpus} == {0x800}
    hidden = CpuConfig(vcpus=256, hide=("x2apic",))
    with pytest.raises(ConfigError, match=r"cpu.hide: more than 255 vCPUs with an interrupt controller need x2apic"):
        Vmm(flat(HALT, cpu=hidden, irqchip=True))


def test_vcpus_are_divided_into_sockets_cores_and_threads() -> None:
    with Vmm(machine(HALT, "real16", 8, sockets=2, threads=2)) as vmm:
        for vcpu in vmm.vcpus:
            leaves = {(leaf.function, leaf.index): leaf for leaf in vcpu.cpuid}
            assert (leaves[1, 0].ebx >> 24, leaves[1, 0].ebx >> 16 & 0xFF) == (vcpu.id, 4)
            if (0xB, 0) in leaves:
                levels = [leaves[0xB, level] for level in (0, 1)]
                assert [(level.eax, level.ebx, level.edx) for level in levels] == [(1, 2, vcpu.id), (2, 4, vcpu.id)]
            if (0x8000_001E, 0) in leaves:
                place = leaves[0x8000_001E, 0]
                assert (place.ebx, place.ecx) == (1 << 8 | vcpu.id >> 1 & 1, vcpu.id >> 2)
    for wrong, message in [
        (CpuConfig(vcpus=3, threads=2), "cpu.threads: 3 vCPUs cannot be divided into 1 sockets with 2 threads a core"),
        (CpuConfig(vcpus=6, threads=3), "cpu.threads: 3 is not a power of two"),
        (CpuConfig(vcpus=6, sockets=2), "cpu.sockets: 3 vCPUs in each of several sockets are not a power of two"),
    ]:
        with pytest.raises(ConfigError) as caught:
            Vmm(flat(HALT, cpu=wrong))
        assert str(caught.value) == message


@alone
def test_vcpu_without_a_descriptor_is_refused_and_nothing_stays() -> None:
    with Vmm(flat(HALT)):
        pass
    before = len(os.listdir("/proc/self/fd"))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
    with pytest.raises(KvmError, match="ulimit -n"):
        Vmm(flat(HALT, cpu=CpuConfig(vcpus=100)))
    assert len(os.listdir("/proc/self/fd")) == before

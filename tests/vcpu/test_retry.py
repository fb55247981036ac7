"""`ExitAction.RETRY`: the guest executes the instruction again, and nothing of the first time is left."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from guests import exit_with, flat
from pyvmm import ExitAction, ExitReason, GuestMemoryError, Stop, Vcpu, VcpuExit, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
MMIO = 0xD000_0000
TO_EBX = b"\xbb" + struct.pack("<I", MMIO)  #  mov ebx, MMIO
OUT_EAX = b"\xe7\xf4"  #                       out 0xf4, eax
LOAD = b"\x8b\x03" + OUT_EAX  #                mov eax, [rbx]; out 0xf4, eax

# 64 bits, ring 0. What is at MMIO is 7 by the time it is read again; what the guest exits with
# then.
FORMS = {
    "add [m], 5": (b"\x83\x03\x05" + LOAD, 12),
    "or [m], 16": (b"\x83\x0b\x10" + LOAD, 23),
    "and [m], 6": (b"\x83\x23\x06" + LOAD, 6),
    "sub [m], 3": (b"\x83\x2b\x03" + LOAD, 4),
    "xor [m], 1": (b"\x83\x33\x01" + LOAD, 6),
    "adc [m], 5 with carry": (b"\xf9\x83\x13\x05" + LOAD, 13),
    "sbb [m], 3 with carry": (b"\xf9\x83\x1b\x03" + LOAD, 3),
    "inc [m]": (b"\xff\x03" + LOAD, 8),
    "dec [m]": (b"\xff\x0b" + LOAD, 6),
    "neg [m]": (b"\xf7\x1b" + LOAD, 2**32 - 7),
    "not [m]": (b"\xf7\x13" + LOAD, 2**32 - 8),
    "shl [m], 2": (b"\xc1\x23\x02" + LOAD, 28),
    "rol [m], 4": (b"\xc1\x03\x04" + LOAD, 112),
    "shld [m], eax, 4": (b"\x31\xc0\x0f\xa4\x03\x04" + LOAD, 112),
    "bts [m], 3": (b"\x0f\xba\x2b\x03" + LOAD, 15),
    "btr [m], 0": (b"\x0f\xba\x33\x00" + LOAD, 6),
    "btc [m], 1": (b"\x0f\xba\x3b\x01" + LOAD, 5),
    "add [m], al": (b"\xb0\x05\x00\x03" + LOAD, 12),
    "lock add [m], 5": (b"\xf0\x83\x03\x05" + LOAD, 12),
    "lock xadd": (b"\xb9\x05\x00\x00\x00\xf0\x0f\xc1\x0b" + LOAD, 12),
    "xchg": (b"\xb9\x05\x00\x00\x00\x87\x0b\x89\xc8" + OUT_EAX, None),
    "cmpxchg that matches": (b"\xb8\x07\x00\x00\x00\xb9\x09\x00\x00\x00\xf0\x0f\xb1\x0b" + LOAD, 9),
    "cmpxchg that does not": (b"\xb8\x06\x00\x00\x00\xb9\x09\x00\x00\x00\xf0\x0f\xb1\x0b" + LOAD, 7),
    "mov": (LOAD, 7),
    "add eax, [m]": (b"\xb8\x05\x00\x00\x00\x03\x03" + OUT_EAX, 12),
    "push [m]": (b"\xbc\x00\x50\x00\x00\xff\x33\x58" + OUT_EAX, 7),
    "pop": (b"\x89\xdc\x58" + OUT_EAX, 7),
    "rep movsb": (
        b"\x89\xde\xbf\x00\x30\x00\x00\xb9\x04\x00\x00\x00\xf3\xa4\x8b\x04\x25\x00\x30\x00\x00" + OUT_EAX,
        7,
    ),
    "lodsd": (b"\x89\xde\xad" + OUT_EAX, 7),
    "cmp": (b"\x83\x3b\x07\x0f\x94\xc0\x0f\xb6\xc0" + OUT_EAX, 1),  # sete al; movzx eax, al
}


def lazily(vmm: Vmm) -> Callable[[Vcpu, VcpuExit], object]:
    """Adds the memory when it is asked for."""

    def hook(_vcpu: Vcpu, exit: VcpuExit) -> object:
        vmm.memory.add(MMIO, 4096)
        vmm.memory.write_u32(MMIO, 7)
        return ExitAction.RETRY if isinstance(exit, VcpuExit.MmioRead) else None

    return hook


@pytest.mark.parametrize("form", FORMS)
def test_read_finds_the_memory_that_its_hook_has_added(form: str) -> None:
    code, want = FORMS[form]
    with Vmm(flat(TO_EBX + code, "long64", size_mib=4)) as vmm:
        vmm.on_exit("mmio", lazily(vmm))
        exit = vmm.run(DEADLINE_S)
        if want is None:
            assert (exit.code, vmm.memory.read_u32(MMIO)) == (7, 5)
        else:
            assert exit.code == want, exit


def test_read_across_two_pages_finds_the_memory_of_both() -> None:
    code = b"\xbb" + struct.pack("<I", MMIO + 4094) + b"\x83\x03\x05" + LOAD
    asked: list[int] = []
    with Vmm(flat(code, "long64", size_mib=4)) as vmm:

        def hook(_vcpu: Vcpu, exit: VcpuExit) -> object:
            assert isinstance(exit, VcpuExit.MmioRead)
            asked.append(exit.address)
            vmm.memory.add(MMIO, 8192)
            vmm.memory.write_u32(MMIO + 4094, 0x0001_0007)
            return ExitAction.RETRY

        vmm.on_exit("mmio", hook)
        assert vmm.run(DEADLINE_S).code == 0x0001_000C
        assert asked == [MMIO + 4094]


def test_read_of_memory_that_cannot_be_written_writes_to_the_device_there() -> None:
    """As it does wherever a guest writes where it only may read."""
    with Vmm(flat(TO_EBX + FORMS["add [m], 5"][0], "long64", size_mib=4)) as vmm:
        written: list[bytes] = []

        def hook(_vcpu: Vcpu, exit: VcpuExit) -> object:
            if isinstance(exit, VcpuExit.MmioRead):
                vmm.memory.add(MMIO, 4096, read_only=True)
                vmm.memory.write_u32(MMIO, 7)
                return ExitAction.RETRY
            assert isinstance(exit, VcpuExit.MmioWrite)
            written.append(bytes(exit.data))
            return None

        vmm.on_exit("mmio", hook)
        assert vmm.run(DEADLINE_S).code == 7
        assert written == [struct.pack("<I", 12)]


class Seven:
    def __init__(self) -> None:
        self.writes: list[int] = []

    def read(self, offset: int, size: int) -> int:
        return 7

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append(value)


@pytest.mark.parametrize("form", FORMS)
def test_read_finds_the_device_that_its_hook_has_added(form: str) -> None:
    """What the first time would have written to it is not written."""
    code, _ = FORMS[form]
    with Vmm(flat(TO_EBX + code, "long64", size_mib=4)) as vmm, Vmm(flat(TO_EBX + code, "long64", size_mib=4)) as other:
        late, early = Seven(), Seven()

        def hook(_vcpu: Vcpu, exit: VcpuExit) -> object:
            if late.writes or not isinstance(exit, VcpuExit.MmioRead) or hook_calls:
                return None
            hook_calls.append(1)
            vmm.add_mmio_device(MMIO, 4096, late)
            return ExitAction.RETRY

        hook_calls: list[int] = []
        vmm.on_exit("mmio", hook)
        other.add_mmio_device(MMIO, 4096, early)
        want = other.run(DEADLINE_S)
        assert vmm.run(DEADLINE_S).code == want.code
        assert late.writes == early.writes


@pytest.mark.parametrize("form", FORMS)
def test_registers_that_the_hook_has_changed_are_those_of_the_second_time(form: str) -> None:
    """The guest continues at the new RIP; the memory that was added at the old address is unchanged."""
    code, _ = FORMS[form]
    with Vmm(flat(TO_EBX + code, "long64", size_mib=4)) as vmm:
        vmm.memory.write(0x6000, exit_with(99))

        def hook(vcpu: Vcpu, exit: VcpuExit) -> object:
            assert isinstance(exit, VcpuExit.MmioRead)
            vmm.memory.add(MMIO, 4096)
            vmm.memory.write_u32(MMIO, 7)
            vmm.memory.write(0x3000, b"here")
            vcpu.regs.rip = 0x6000
            vcpu.regs.r12 = 0x1212
            return ExitAction.RETRY

        vmm.on_exit("mmio", hook)
        assert vmm.run(DEADLINE_S).code == 99
        assert vmm.memory.read_u32(MMIO) == 7
        assert vmm.memory.read(0x3000, 4) == b"here"
        assert vmm.vcpus[0].regs.r12 == 0x1212


# mov ebx, MMIO; then an instruction that loads a register other than the general ones: lgdt, lidt,
# movups xmm0
@pytest.mark.parametrize("instruction", [b"\x0f\x01\x13", b"\x0f\x01\x1b", b"\x0f\x10\x03"])
def test_other_registers_are_those_from_before(instruction: bytes) -> None:
    with Vmm(flat(TO_EBX + instruction + exit_with(1), "long64", size_mib=4)) as vmm:
        vmm.memory.write(0x6000, exit_with(99))
        vmm.vcpus[0].fpu.xmm[0] = 0x1234
        before: list[object] = []

        def state(vcpu: Vcpu) -> object:
            return vcpu.sregs.gdt.base, vcpu.sregs.gdt.limit, vcpu.sregs.idt.base, vcpu.fpu.xmm[0]

        def hook(vcpu: Vcpu, _exit: VcpuExit) -> object:
            before.append(state(vcpu))
            vcpu.regs.rip = 0x6000
            return ExitAction.RETRY

        vmm.on_exit("mmio", hook)
        exit = vmm.run(DEADLINE_S)
        if exit.reason is ExitReason.INTERNAL_ERROR:
            pytest.skip("KVM does not execute it on such an address")
        assert exit.code == 99
        assert [state(vmm.vcpus[0])] == before


# mov dx, 0x500; mov edi, 0x3000; mov ecx, 4; cld; rep insb, or insd; out 0xf4, al
@pytest.mark.parametrize("opcode", [b"\xf3\x6c", b"\xf3\x6d", b"\x6c"])
def test_string_from_a_port_leaves_no_byte_of_the_first_time(opcode: bytes) -> None:
    code = b"\x66\xba\x00\x05\xbf\xf8\x3f\x00\x00\xb9\x04\x00\x00\x00\xfc" + opcode + exit_with(1)
    with Vmm(flat(code, "long64", size_mib=4)) as vmm:
        vmm.memory.write(0x3FF0, b"x" * 32)
        vmm.memory.write(0x6000, exit_with(99))

        def hook(vcpu: Vcpu, exit: VcpuExit) -> object:
            assert isinstance(exit, VcpuExit.IoIn)
            vcpu.regs.rip = 0x6000
            return ExitAction.RETRY

        vmm.on_exit("io", lambda vcpu, exit: hook(vcpu, exit) if isinstance(exit, VcpuExit.IoIn) else None)
        assert vmm.run(DEADLINE_S).code == 99
        assert vmm.memory.read(0x3FF0, 32) == b"x" * 32
        assert vmm.vcpus[0].regs.rdi == 0x3FF8


def test_string_from_a_port_is_read_by_the_device_that_came() -> None:
    code = b"\x66\xba\x00\x05\xbf\x00\x30\x00\x00\xb9\x04\x00\x00\x00\xf3\x6c" + exit_with(1)
    with Vmm(flat(code, "long64", size_mib=4)) as vmm:
        asked: list[VcpuExit] = []

        def hook(_vcpu: Vcpu, exit: VcpuExit) -> object:
            if not isinstance(exit, VcpuExit.IoIn) or asked:
                return None
            asked.append(exit)
            vmm.add_pio_device(0x500, 1, Seven())
            return ExitAction.RETRY

        vmm.on_exit("io", hook)
        assert vmm.run(DEADLINE_S).code == 1
        assert vmm.memory.read(0x3000, 4) == b"\7" * 4


def test_register_read_again_faults_in_no_guest() -> None:
    """RDMSR of a register that KVM does not know, at first."""
    code = b"\xb9\x00\x02\x00\x4a\x0f\x32" + OUT_EAX  # mov ecx, 0x4a000200; rdmsr
    answers: list[object] = [ExitAction.RETRY, ExitAction.RETRY, 0x55]
    with Vmm(flat(code, "long64", size_mib=4)) as vmm:
        vmm.on_exit("msr", lambda _vcpu, _exit: answers.pop(0))
        assert vmm.run(DEADLINE_S).code == 0x55


@pytest.mark.parametrize("code", [TO_EBX + LOAD, b"\x66\xba\x00\x05\xec"], ids=["mmio", "io"])
def test_endless_retry_can_be_stopped_paused_and_taken_a_snapshot_of(code: bytes) -> None:
    with Vmm(flat(code + exit_with(3), "long64", size_mib=4)) as vmm:
        start = vmm.vcpus[0].regs.rip
        for kind in ("mmio", "io"):
            vmm.on_exit(kind, lambda _vcpu, exit: ExitAction.RETRY if hasattr(exit, "length") or size(exit) else None)
        assert vmm.run(0.05).reason is ExitReason.TIMEOUT
        vmm.start()
        vmm.pause()
        assert start <= vmm.vcpus[0].regs.rip < start + len(code)
        snapshot = vmm.snapshot()
        vmm.resume()
        vmm.stop()
        assert vmm.wait(DEADLINE_S) is not None
        with snapshot.fork() as fork:
            assert fork.run(DEADLINE_S).reason is ExitReason.CODE


def size(exit: VcpuExit) -> bool:
    return isinstance(exit, VcpuExit.IoIn)


def test_memory_that_goes_again_is_asked_for_again() -> None:
    """Added and removed in the same hook: the second time asks once more."""
    with Vmm(flat(TO_EBX + LOAD, "long64", size_mib=4)) as vmm:
        asked: list[int] = []

        def hook(_vcpu: Vcpu, exit: VcpuExit) -> object:
            asked.append(1)
            if len(asked) == 3:
                return Stop("enough")
            slot = vmm.memory.add(MMIO, 4096)
            vmm.memory.remove(slot)
            return ExitAction.RETRY

        vmm.on_exit("mmio", hook)
        assert vmm.run(DEADLINE_S).value == "enough"
        with pytest.raises(GuestMemoryError):
            vmm.memory.read(MMIO, 1)

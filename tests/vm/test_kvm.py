"""KVM itself as a library: /dev/kvm, a bare machine, a vCPU driven by hand.

Covers src/py/vcpu_exit.rs, src/vcpu/run_once.rs, src/vm/build.rs.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from pyvmm import Cap, Kvm, KvmError, KvmVm, StateError, Vcpu, VcpuExit
from pyvmm.registers import CpuidEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm
CODE = 0x1000
SPIN = bytes.fromhex("ebfe")
HLT = bytes.fromhex("f4")


def bare(code: bytes) -> tuple[KvmVm, Vcpu]:
    """A machine with a page of real-mode code, its vCPU at the first byte."""
    vm = KvmVm()
    vm.memory.add(CODE, 0x1000)
    vm.memory.write(CODE, code)
    vcpu = vm.create_vcpu()
    vcpu.sregs.cs.update(base=0, selector=0)
    vcpu.regs.update(rip=CODE, rflags=2)
    return vm, vcpu


@pytest.fixture
def spinning() -> Iterator[Vcpu]:
    vm, vcpu = bare(SPIN)
    with vm:
        yield vcpu


def test_dev_kvm_says_what_it_can() -> None:
    kvm = Kvm()
    assert kvm.api_version == 12
    assert kvm.check_extension(Cap.USER_MEMORY) == kvm.check_extension(3) == 1
    assert kvm.check_extension(2**32 - 1) == 0
    assert kvm.max_vcpus >= 1
    assert 0x10 in kvm.msr_list, "the time stamp counter"
    assert {entry.function for entry in kvm.supported_cpuid} >= {0, 1}
    assert kvm.fileno() > 2
    assert repr(kvm) == "Kvm(api_version=12)"


@pytest.mark.parametrize("capability", [-1, 2**32, 1.5, "IRQCHIP", None])
def test_what_is_no_capability_is_refused(capability: object) -> None:
    with pytest.raises((TypeError, OverflowError)):
        Kvm().check_extension(capability)  # type: ignore[arg-type]


def test_bare_machine_has_nothing() -> None:
    with KvmVm() as vm:
        assert (vm.vcpus, vm.memory.slots, vm.memory.size, vm.entry) == ((), (), 0, 0)
        assert vm.unanswered == []
        with pytest.raises(StateError, match="no devices"):
            _ = vm.serial


def test_each_exit_comes_as_its_class_and_reads_are_answered() -> None:
    """In al, 0x10; out 0x11, al; mov [0x5000], al; mov al, [0x6000]; out 0x12, al; hlt."""
    vm, vcpu = bare(bytes.fromhex("e410 e611 a20050 a00060 e612 f4"))
    with vm:
        exit = vcpu.run_once()
        assert isinstance(exit, VcpuExit.IoIn)
        assert (exit.port, exit.size, exit.count) == (0x10, 1, 1)
        assert repr(exit) == "VcpuExit.IoIn(port=0x10, size=1, count=1)"
        assert vcpu.regs.rip == CODE, "before the instruction, until it is answered"
        vcpu.answer(0x41)
        match vcpu.run_once():
            case VcpuExit.IoOut(port, size, data):
                assert (port, size, data) == (0x11, 1, b"A")
            case other:
                pytest.fail(repr(other))
        match vcpu.run_once():
            case VcpuExit.MmioWrite(address, data):
                assert (address, data) == (0x5000, b"A")
            case other:
                pytest.fail(repr(other))
        match vcpu.run_once():
            case VcpuExit.MmioRead(address, length):
                assert (address, length) == (0x6000, 1)
            case other:
                pytest.fail(repr(other))
        vcpu.answer(b"Z")
        out = vcpu.run_once()
        assert isinstance(out, VcpuExit.IoOut)
        assert out.data == b"Z"
        assert isinstance(vcpu.run_once(), VcpuExit.Hlt)


def test_read_without_an_answer_reads_ones() -> None:
    """In eax, dx; hlt."""
    vm, vcpu = bare(bytes.fromhex("66ed f4"))
    with vm:
        assert isinstance(vcpu.run_once(), VcpuExit.IoIn)
        assert isinstance(vcpu.run_once(), VcpuExit.Hlt)
        assert vcpu.regs.rax == 0xFFFFFFFF


def test_string_reads_are_answered_together() -> None:
    """Mov di, 0x1800; mov cx, 3; rep insw; hlt."""
    vm, vcpu = bare(bytes.fromhex("bf0018 b90300 f36d f4"))
    with vm:
        got = b""
        while isinstance(exit := vcpu.run_once(), VcpuExit.IoIn):
            size = exit.size * exit.count
            data = b"abcdef"[len(got) :][:size]
            vcpu.answer(data)
            got += data
        assert isinstance(exit, VcpuExit.Hlt)
        assert vm.memory.read(0x1800, 6) == got == b"abcdef"


def test_registers_after_an_answer_are_those_after_the_instruction() -> None:
    vm, vcpu = bare(bytes.fromhex("e410 f4"))
    with vm:
        vcpu.run_once()
        vcpu.answer(7)
        assert (vcpu.regs.rip, vcpu.regs.rax & 0xFF) == (CODE + 2, 7)
        with pytest.raises(StateError, match="has been answered"):
            vcpu.answer(8)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", ValueError),
        (b"ab", ValueError),
        (256, OverflowError),
        (-1, OverflowError),
        (1.0, TypeError),
        (None, TypeError),
    ],
)
def test_wrong_answer_is_refused_and_changes_nothing(answer: object, error: type[Exception]) -> None:
    vm, vcpu = bare(bytes.fromhex("e410 f4"))
    with vm:
        vcpu.run_once()
        with pytest.raises(error):
            vcpu.answer(answer)  # type: ignore[arg-type]
        vcpu.answer(5)
        vcpu.run_once()
        assert vcpu.regs.rax & 0xFF == 5


def test_answer_to_nothing_is_refused(spinning: Vcpu) -> None:
    with pytest.raises(StateError, match="not a read"):
        spinning.answer(1)


def test_kick_brings_it_back_now_or_the_next_time(spinning: Vcpu) -> None:
    spinning.kick()
    spinning.kick()
    assert isinstance(spinning.run_once(), VcpuExit.Interrupted)
    thread = threading.Timer(0.05, spinning.kick)
    thread.start()
    assert isinstance(spinning.run_once(), VcpuExit.Interrupted)
    thread.join()


def test_one_thread_at_a_time_and_no_look_meanwhile(spinning: Vcpu) -> None:
    exits: list[VcpuExit] = []
    thread = threading.Thread(target=lambda: exits.append(spinning.run_once()))
    thread.start()
    while True:  # until the guest runs
        try:
            _ = spinning.regs.rip
        except StateError as error:
            assert "pause" in str(error)
            break
    with pytest.raises(StateError):
        spinning.run_once()
    spinning.kick()
    thread.join()
    assert isinstance(exits[0], VcpuExit.Interrupted)


def test_close_brings_it_back() -> None:
    vm, vcpu = bare(SPIN)
    thread = threading.Timer(0.05, vm.close)
    thread.start()
    assert isinstance(vcpu.run_once(), VcpuExit.Interrupted)
    thread.join()
    with pytest.raises(StateError, match="closed"):
        vcpu.run_once()


def test_cpuid_is_set_before_the_first_run_and_never_after() -> None:
    vm, vcpu = bare(HLT)
    with vm:
        vcpu.cpuid = supported = Kvm().supported_cpuid
        # Some KVMs drop leaves of zeros.
        wanted = {(entry.function, entry.index) for entry in supported if entry.eax | entry.ebx | entry.ecx | entry.edx}
        found = [(entry.function, entry.index) for entry in vcpu.cpuid]
        assert wanted <= set(found) <= {(entry.function, entry.index) for entry in supported}
        assert len(set(found)) == len(found), "each leaf once"
        vcpu.run_once()
        with pytest.raises(StateError, match="has run"):
            vcpu.cpuid = ()
        assert vcpu.cpuid


def test_cpuid_can_be_read_changed_and_extended() -> None:
    vm, vcpu = bare(HLT)
    with vm:
        vcpu.cpuid = Kvm().supported_cpuid
        one_more = CpuidEntry(0x4000_0010, 0, 0, 1, 2, 3, 4)
        vcpu.cpuid = before = (*vcpu.cpuid, one_more)
        by_leaf = {(entry.function, entry.index): entry for entry in vcpu.cpuid}
        assert len(vcpu.cpuid) == len(before)
        assert by_leaf[0x4000_0010, 0] == one_more
        assert by_leaf[0, 0].eax >= 1, "the highest leaf"


def test_xcr0_that_kvm_refuses_is_refused_with_what_it_offers() -> None:
    with KvmVm() as vm:
        vcpu = vm.create_vcpu()
        vcpu.cpuid = supported = Kvm().supported_cpuid
        offered = [entry.edx << 32 | entry.eax for entry in supported if (entry.function, entry.index) == (0xD, 0)]
        mask = offered[0] if offered else 0
        before = vcpu.xcrs.xcr0
        with pytest.raises(KvmError, match=f"KVM offers {mask:#x}"):
            vcpu.xcrs.xcr0 = 1 << 61 | 1
        assert vcpu.xcrs.xcr0 == before
        if mask:
            vcpu.xcrs.xcr0 = mask
            assert vcpu.xcrs.xcr0 == mask


@pytest.mark.parametrize(
    "cpuid", [[1], None, [CpuidEntry(2**32, 0, 0, 0, 0, 0, 0)], [CpuidEntry(-1, 0, 0, 0, 0, 0, 0)]]
)
def test_what_is_no_cpuid_is_refused(cpuid: object) -> None:
    vm, vcpu = bare(HLT)
    with vm, pytest.raises((TypeError, AttributeError, OverflowError)):
        vcpu.cpuid = cpuid  # type: ignore[assignment]


def test_vcpus_have_numbers_of_their_own() -> None:
    with KvmVm() as vm:
        first = vm.create_vcpu()
        assert vm.create_vcpu(7).id == 7
        with pytest.raises(KvmError):
            vm.create_vcpu(7)
        for wrong in (-1, 2**64, 1.5, "1"):
            with pytest.raises((TypeError, OverflowError)):
                vm.create_vcpu(wrong)  # type: ignore[arg-type]
        assert [vcpu.id for vcpu in vm.vcpus] == [first.id, 7]


def test_threads_can_drive_a_bare_machine_too() -> None:
    vm, vcpu = bare(HLT)
    with vm:
        vm.run()
        exit = vm.wait(60)
        assert exit is not None
        assert str(exit) == "halt (vCPU 0)"
        assert vcpu.regs.rip == CODE + 1
        with pytest.raises(StateError, match="has run"):
            vm.create_vcpu(1)


def test_four_levels_of_page_tables_are_walked() -> None:
    with KvmVm() as vm:
        memory = vm.memory
        memory.add(0, 0x400000)
        for at, entry in {
            0x1000: 0x2007,
            0x2000: 0x3007,
            0x3000: 0x4007,
            0x4028: 0x9007,
            0x4030: 0xB007,
            0x3008: 0x200087,
        }.items():
            memory.write_u64(at, entry)
        vcpu = vm.create_vcpu()
        vcpu.cpuid = Kvm().supported_cpuid
        vcpu.sregs.update(cr3=0x1000, cr4=0x20, efer=0x500, cr0=0x80000011)
        assert vcpu.translate(0x5123) == 0x9123
        assert vcpu.translate(0x201234) == 0x201234
        assert vcpu.translate(0x8000000000) is None
        memory.write(0x5FFE, b"over", vcpu=vcpu)
        assert (memory.read(0x9FFE, 2), memory.read(0xB000, 2)) == (b"ov", b"er")
        assert memory.read(0x5FFE, 4, vcpu=vcpu) == b"over"

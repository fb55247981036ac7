"""Exit hooks: every kind of exit, what a hook may answer, and what it may not.

Covers src/vcpu/current.rs, src/vcpu/timing.rs, src/py/vmm/hooks.rs.
"""

from __future__ import annotations

import gc
import struct
import threading
import weakref
from typing import Any

import pytest
from guests import FWAIT_FOREVER, HALT, SPIN, TRIPLE_FAULT, exit_with, flat, out, read_in
from held import is_collected
from pyvmm import (
    Exit,
    ExitAction,
    ExitKind,
    ExitReason,
    StateError,
    Stop,
    Vcpu,
    VcpuExit,
    Vmm,
    VmRunState,
    kvm_info,
)

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
CONTINUE, RETRY = ExitAction.CONTINUE, ExitAction.RETRY


def test_a_hook_sees_ports_before_the_device_and_answers_for_it() -> None:
    seen: list[VcpuExit] = []

    def hook(vcpu: Vcpu, exit: VcpuExit) -> int | ExitAction | None:
        seen.append(exit)
        match exit:
            case VcpuExit.IoIn(port=0x3FD):
                return 0x42
            case VcpuExit.IoOut(port=0x3F8):
                return CONTINUE
        return None

    with Vmm(flat(read_in(0x3FD) + b"\xba\xf8\x03\xee" + out(0x3F8, 7) + exit_with(1))) as vmm:
        assert vmm.on_exit(ExitKind.IO, hook) is hook
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.CODE, 1, 0)
        assert vmm.serial.take_output() == b""
    shown = [repr(exit) for exit in seen]
    assert shown == [
        "VcpuExit.IoIn(port=0x3fd, size=1, count=1)",
        "VcpuExit.IoOut(port=0x3f8, size=1, data=b'B')",
        "VcpuExit.IoOut(port=0x3f8, size=1, data=b'\\x07')",
        "VcpuExit.IoOut(port=0xf4, size=1, data=b'\\x01')",
    ]


def test_one_hook_sees_the_exits_of_every_kind() -> None:
    # 32 bits: mov eax, [0xd0000000]; out 0x80, al; hlt
    code = b"\xa1\x00\x00\x00\xd0\xe6\x80\xf4"
    seen: list[dict[str, object]] = []
    with Vmm(flat(code, "protected32")) as vmm:

        @vmm.on_exit("any")
        def see(_vcpu: Vcpu, exit: VcpuExit) -> int | None:
            seen.append(exit.as_dict())
            return 0x55 if isinstance(exit, VcpuExit.MmioRead) else None

        assert vmm.run(DEADLINE_S).reason is ExitReason.HALT
        assert seen == [
            {"type": "MmioRead", "address": 0xD000_0000, "length": 4},
            {"type": "IoOut", "port": 0x80, "size": 1, "data": b"\x55"},
            {"type": "Hlt"},
        ]
        vmm.off_exit("any", see)
        with pytest.raises(ValueError, match="not a hook"):
            vmm.off_exit("any", see)
        with pytest.raises(ValueError, match="not a hook"):
            vmm.off_exit("io", see)


def test_a_hook_sees_addresses_without_memory() -> None:
    # 64 bits: mov rbx, 0xd0000000; mov rax, [rbx]; mov [rbx], ax
    code = b"\x48\xbb" + struct.pack("<Q", 0xD000_0000) + b"\x48\x8b\x03\x66\x89\x03" + exit_with(1)
    seen: list[VcpuExit] = []

    def hook(_vcpu: Vcpu, exit: VcpuExit) -> bytes | None:
        seen.append(exit)
        return b"abcdefgh" if isinstance(exit, VcpuExit.MmioRead) else None

    with Vmm(flat(code, "long64")) as vmm:
        vmm.on_exit("mmio", hook)
        assert vmm.run(DEADLINE_S).code == 1
        assert [row.address for row in vmm.unanswered] == [0xD000_0000]
    assert [repr(exit) for exit in seen] == [
        "VcpuExit.MmioRead(address=0xd0000000, length=8)",
        "VcpuExit.MmioWrite(address=0xd0000000, data=b'ab')",
    ]


def test_hlt_continues_or_ends_the_run() -> None:
    answers: list[object] = [CONTINUE, Stop({"reason": "tired"}), None]
    with Vmm(flat(HALT * 3 + exit_with(1))) as vmm:
        vmm.on_exit("hlt", lambda _vcpu, _exit: answers.pop(0))
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.STOPPED, vcpu=0, value={"reason": "tired"})
        assert vmm.state is VmRunState.PAUSED
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.HALT, vcpu=0)


def test_hlt_is_executed_again() -> None:
    rips: list[int] = []

    def hook(vcpu: Vcpu, _exit: VcpuExit) -> ExitAction:
        rips.append(vcpu.regs.rip)
        return RETRY if len(rips) < 3 else CONTINUE

    with Vmm(flat(HALT + exit_with(1))) as vmm:
        vmm.on_exit("hlt", hook)
        assert vmm.run(DEADLINE_S).code == 1
    assert rips == [0x1001] * 3


def test_a_read_is_executed_again_and_a_write_is_not() -> None:
    answers: list[object] = [RETRY, RETRY, 0x33]
    with Vmm(flat(read_in(0x80) + b"\xe6\xf4")) as vmm:  # out 0xf4, al

        def hook(_vcpu: Vcpu, exit: VcpuExit) -> object:
            return answers.pop(0) if isinstance(exit, VcpuExit.IoIn) else None

        vmm.on_exit("io", hook)
        assert vmm.run(DEADLINE_S).code == 0x33
    with Vmm(flat(out(0x80, 1) + exit_with(1))) as vmm:
        vmm.on_exit("io", lambda _vcpu, _exit: RETRY)
        with pytest.raises(ValueError, match="already been executed"):
            vmm.run(DEADLINE_S)


def test_a_triple_fault_is_survived_by_setting_registers() -> None:
    def hook(vcpu: Vcpu, exit: VcpuExit) -> ExitAction:
        assert isinstance(exit, VcpuExit.Shutdown)
        vcpu.regs.rip = 0x2000
        return CONTINUE

    with Vmm(flat(TRIPLE_FAULT, "long64")) as vmm:
        vmm.memory.write(0x2000, exit_with(6))
        start = vmm.vcpus[0].sregs.cr3
        vmm.on_exit("shutdown", hook)
        exit = vmm.run(DEADLINE_S)
        assert start
    # Hardware KVM resets the processor on a triple fault; an emulating one leaves it as it was.
    assert exit.code == 6 or exit.is_fault or exit.reason is ExitReason.HALT


@pytest.mark.skipif(not kvm_info()["software_kvm"], reason="this KVM executes FWAIT")
def test_an_emulation_failure_carries_its_bytes_and_is_survived() -> None:
    seen: list[VcpuExit] = []

    def hook(vcpu: Vcpu, exit: VcpuExit) -> ExitAction:
        seen.append(exit)
        vcpu.regs.rip += 1
        vcpu.memory = None  # type: ignore[attr-defined]
        return CONTINUE

    def good(vcpu: Vcpu, exit: VcpuExit) -> ExitAction:
        seen.append(exit)
        vcpu.regs.update(rip=vcpu.regs.rip + 1)
        return CONTINUE

    with Vmm(flat(FWAIT_FOREVER[:1] + exit_with(8), "long64")) as vmm:
        vmm.on_exit("internal-error", hook)
        with pytest.raises(AttributeError):
            vmm.run(DEADLINE_S)
    with Vmm(flat(FWAIT_FOREVER[:1] + exit_with(8), "long64")) as vmm:
        vmm.on_exit("internal-error", good)
        assert vmm.run(DEADLINE_S).code == 8
    exit = seen[-1]
    assert isinstance(exit, VcpuExit.InternalError)
    assert exit.suberror == 1
    assert exit.instruction[:1] == b"\x9b"


def test_hooks_of_a_kind_are_asked_in_order_until_one_answers() -> None:
    asked: list[str] = []

    def first(_vcpu: Vcpu, _exit: VcpuExit) -> None:
        asked.append("first")

    def second(_vcpu: Vcpu, exit: VcpuExit) -> int | None:
        asked.append("second")
        return 9 if isinstance(exit, VcpuExit.IoIn) else None

    def third(_vcpu: Vcpu, _exit: VcpuExit) -> None:
        asked.append("third")

    with Vmm(flat(read_in(0x80) + b"\xe6\xf4")) as vmm:
        for hook in (first, second, third):
            vmm.on_exit("io", hook)
        assert vmm.run(DEADLINE_S).code == 9
    assert asked == ["first", "second", "first", "second", "third"]


def test_hooks_are_removed_also_bound_methods() -> None:
    class Hooks:
        def __init__(self) -> None:
            self.seen = 0

        def on_io(self, _vcpu: Vcpu, _exit: VcpuExit) -> None:
            self.seen += 1

    hooks = Hooks()
    with Vmm(flat(out(0x80, 1) + out(0x80, 2) + exit_with(1))) as vmm:
        vmm.on_exit("io", hooks.on_io)

        @vmm.on_exit("io")
        def last(_vcpu: Vcpu, _exit: VcpuExit) -> None:
            vmm.off_exit("io", hooks.on_io)
            vmm.off_exit("io", last)

        assert vmm.run(DEADLINE_S).code == 1
        with pytest.raises(ValueError, match="not a hook"):
            vmm.off_exit("io", last)
    assert hooks.seen == 1


def test_a_hook_added_while_the_guest_runs_takes_effect() -> None:
    seen = threading.Event()
    with Vmm(flat(b"\xe6\x80\xeb\xfc")) as vmm:  # out 0x80, al; jmp -4
        vmm.start()
        vmm.on_exit("io", lambda _vcpu, _exit: seen.set())
        while not seen.is_set():
            assert vmm.wait(0.001) is None
        vmm.stop()
        vmm.wait(DEADLINE_S)


def test_an_exception_in_a_hook_ends_the_run_and_says_where() -> None:
    def hook(_vcpu: Vcpu, _exit: VcpuExit) -> None:
        raise LookupError("here")

    with Vmm(flat(out(0x80, 1) + exit_with(1))) as vmm:
        vmm.on_exit("io", hook)
        with pytest.raises(LookupError, match="here") as raised:
            vmm.run(DEADLINE_S)
        assert raised.value.__notes__[0].startswith("in a hook of an exit of kind io, vCPU 0, guest RIP 0x100")
        vmm.off_exit("io", hook)
        assert vmm.run(DEADLINE_S).code == 1


@pytest.mark.parametrize("answer", [7, b"", "x", object(), True], ids=repr)
def test_what_a_hook_cannot_answer_is_an_error_of_the_run(answer: Any) -> None:
    with Vmm(flat(HALT + exit_with(1))) as vmm:
        vmm.on_exit("hlt", lambda _vcpu, _exit: answer)
        with pytest.raises(TypeError, match="reads nothing"):
            vmm.run(DEADLINE_S)


@pytest.mark.parametrize(
    ("answer", "error"), [(256, OverflowError), (-1, OverflowError), (b"ab", ValueError), ("x", TypeError)]
)
def test_a_read_that_a_hook_answers_wrongly_is_an_error_of_the_run(answer: Any, error: type[Exception]) -> None:
    with Vmm(flat(read_in(0x80) + exit_with(1))) as vmm:
        vmm.on_exit("io", lambda _vcpu, _exit: answer)
        with pytest.raises(error):
            vmm.run(DEADLINE_S)


def test_a_hook_answers_through_the_vcpu() -> None:
    def hook(vcpu: Vcpu, exit: VcpuExit) -> ExitAction | None:
        if isinstance(exit, VcpuExit.IoIn):
            vcpu.answer(0x21)
            return CONTINUE
        return None

    with Vmm(flat(read_in(0x80) + b"\xe6\xf4")) as vmm:
        vmm.on_exit("io", hook)
        assert vmm.run(DEADLINE_S).code == 0x21


@pytest.mark.parametrize("kind", ["nonsense", "", "IO"])
def test_kinds_that_there_are_not_are_refused(kind: str) -> None:
    with Vmm(flat(HALT)) as vmm:
        with pytest.raises(ValueError, match="is not one of io, mmio"):
            vmm.on_exit(kind, print)
        with pytest.raises(ValueError, match="is not one of io, mmio"):
            vmm.off_exit(kind, print)


@pytest.mark.parametrize(("kind", "function"), [(7, print), (None, print), ("io", 7), ("io", "x")])
def test_arguments_of_the_wrong_type_are_refused(kind: Any, function: Any) -> None:
    with Vmm(flat(HALT)) as vmm, pytest.raises(TypeError):
        vmm.on_exit(kind, function)


def test_a_closed_machine_takes_no_hooks() -> None:
    vmm = Vmm(flat(HALT))
    vmm.close()
    with pytest.raises(StateError, match="closed"):
        vmm.on_exit("io", print)


def test_a_hook_that_stops_every_exit_does_not_hang_the_close() -> None:
    with Vmm(flat(b"\xe6\x80\xeb\xfc")) as vmm:
        vmm.on_exit("io", lambda _vcpu, _exit: Stop(1))
        for _ in range(50):
            assert vmm.run(DEADLINE_S).value == 1


def test_endless_retries_are_ended_by_the_host() -> None:
    with Vmm(flat(read_in(0x80) + SPIN)) as vmm:
        vmm.on_exit("io", lambda _vcpu, _exit: RETRY)
        assert vmm.run(0.05).reason is ExitReason.TIMEOUT


def test_machines_in_cycles_with_their_hooks_are_collected() -> None:
    def cycle() -> weakref.ref[Vmm]:
        vmm = Vmm(flat(out(0x80, 1) + exit_with(5)))
        vmm.on_exit("io", lambda _vcpu, _exit: vmm.state and None)
        assert vmm.run(DEADLINE_S).code == 5
        return weakref.ref(vmm)

    reference = cycle()
    assert is_collected(reference)


def test_an_exit_is_answered_again_and_again_without_the_guest() -> None:
    seen: list[VcpuExit] = []
    rips: set[int] = set()

    def hook(vcpu: Vcpu, exit: VcpuExit) -> int | Stop:
        rips.add(vcpu.regs.rip)
        seen.append(exit)
        return Stop("ready") if len(seen) == 1 else 7

    with Vmm(flat(read_in(0x500) + read_in(0x501) + exit_with(3))) as vmm:
        vmm.on_exit("io", hook)
        assert vmm.run(DEADLINE_S).value == "ready"
        assert vmm._time_answers(50) > 0
        assert [exit.port for exit in seen if isinstance(exit, VcpuExit.IoIn)] == [0x500] + 50 * [0x501]
        assert len(rips) == 2
        with pytest.raises(StateError):
            vmm.off_exit("io", hook)
            vmm.on_exit("io", lambda vcpu, exit: Stop("no"))
            vmm._time_answers(2)


def test_an_exit_that_a_hook_keeps_stays_as_it_was() -> None:
    kept: list[VcpuExit] = []
    with Vmm(flat(out(0x500, 1) + out(0x500, 2) + out(0x500, 2) + read_in(0x500) + exit_with(0))) as vmm:

        @vmm.on_exit("io")
        def _(_vcpu: Vcpu, exit: VcpuExit) -> None:
            kept.append(exit)

        assert vmm.run(DEADLINE_S).code == 0
    writes = [exit for exit in kept if isinstance(exit, VcpuExit.IoOut) and exit.port == 0x500]
    assert [bytes(exit.data) for exit in writes] == [b"\x01", b"\x02", b"\x02"]
    assert any(isinstance(exit, VcpuExit.IoIn) and exit.port == 0x500 for exit in kept)


def test_a_machine_ends_with_its_last_reference_after_a_run_with_hooks() -> None:
    vmm = Vmm(flat(out(0x500, 1) + exit_with(0)))
    vcpus: list[weakref.ref[Vcpu]] = []
    vmm.on_exit("io", lambda vcpu, _exit: vcpus.append(weakref.ref(vcpu)))
    gc.disable()
    try:
        assert vmm.run(DEADLINE_S).code == 0
        assert vcpus[0]() is None
        ended = weakref.ref(vmm)
        del vmm
        assert ended() is None
    finally:
        gc.enable()


def test_a_view_of_registers_outlives_its_vcpu_object() -> None:
    with Vmm(flat(exit_with(0))) as vmm:
        regs = vmm.vcpus[0].regs
        gc.collect()
        regs.rax = 5
        assert vmm.vcpus[0].regs.rax == 5
    with pytest.raises(StateError):
        _ = regs.rax

"""Hooks for answers: what they say is what the guest gets, and what they may do.

Covers src/vcpu/answer.rs, src/vcpu/report.rs, src/py/answers.rs. test_answer_values.py compares
them with what guests have.
"""

from __future__ import annotations

import pickle
import weakref
from typing import Any

import pytest
from guests import COUNT_IN_MEMORY, HALT, TRIPLE_FAULT, exit_with, flat, out, read_in
from held import is_collected
from pyvmm import (
    Answer,
    AnsweredBy,
    Exit,
    ExitAction,
    ExitReason,
    StateError,
    Stop,
    Vcpu,
    VcpuExit,
    Vmm,
)

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
DEVICE, HOOK, MEMORY, RETRY, NOTHING = AnsweredBy


class Device:
    """Reads its values one by one, and keeps what is written to it."""

    def __init__(self, *values: object) -> None:
        self.values = list(values)
        self.written: list[int] = []

    def read(self, offset: int, size: int) -> object:
        return self.values.pop(0)

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append(value)


def seen_by(vmm: Vmm, kind: str = "any") -> list[tuple[VcpuExit, Answer]]:
    seen: list[tuple[VcpuExit, Answer]] = []
    vmm.on_answer(kind, lambda _vcpu, exit, answer: seen.append((exit, answer)))
    return seen


def test_a_hook_learns_who_answered_and_what() -> None:
    code = read_in(0x500) + out(0x500, 3) + read_in(0x501) + read_in(0x80) + out(0x3F8, 65) + exit_with(4)
    with Vmm(flat(code)) as vmm:
        vmm.add_pio_device(0x500, 1, Device(0x5A))
        vmm.on_exit("io", lambda _vcpu, exit: 7 if exit == VcpuExit.IoIn(0x501, 1, 1) else None)
        seen = seen_by(vmm, "io")
        assert vmm.run(DEADLINE_S).code == 4
        names = {resource.name for resource in vmm.resources}
    assert seen == [
        (VcpuExit.IoIn(0x500, 1, 1), Answer(DEVICE, b"\x5a", "Device")),
        (VcpuExit.IoOut(0x500, 1, b"\x03"), Answer(DEVICE, b"\x03", "Device")),
        (VcpuExit.IoIn(0x501, 1, 1), Answer(HOOK, b"\x07")),
        (VcpuExit.IoIn(0x80, 1, 1), Answer(NOTHING, b"\xff")),
        (VcpuExit.IoOut(0x3F8, 1, b"A"), Answer(DEVICE, b"A", "COM1")),
        (VcpuExit.IoOut(0xF4, 1, b"\x04"), Answer(DEVICE, b"\x04", "exit port", ends_run=True)),
    ]
    assert seen[0][1].value == 0x5A
    assert {answer.device for _, answer in seen if answer.device} <= names


def test_the_built_in_devices_have_the_names_of_their_resources() -> None:
    code = b"".join(read_in(port) for port in (0x60, 0x70, 0xF4, 0x3F8)) + HALT
    with Vmm(flat(code)) as vmm:
        seen = seen_by(vmm, "io")
        vmm.run(DEADLINE_S)
        owners = {resource.start: resource.name for resource in vmm.resources if resource.kind == "pio"}
    assert [answer.device for _, answer in seen] == [owners[port] for port in (0x60, 0x70, 0xF4, 0x3F8)]


@pytest.mark.parametrize("has_many", [False, True])
def test_every_element_of_a_string_instruction_is_reported(has_many: bool) -> None:
    # 16 bits: mov dx, 0x500; mov di, 0x3000; mov cx, 3; rep insw
    #          mov si, 0x3000; mov cx, 6; rep outsb
    code = b"\xba\x00\x05\xbf\x00\x30\xb9\x03\x00\xf3\x6d\xbe\x00\x30\xb9\x06\x00\xf3\x6e" + exit_with(0)

    class Many(Device):
        def read_many(self, offset: int, size: int, count: int) -> bytes:
            return b"abcdef"[: size * count]

        def write_many(self, offset: int, size: int, data: bytes) -> None:
            self.written.extend(data)

    device = Many() if has_many else Device(*(int.from_bytes(pair, "little") for pair in (b"ab", b"cd", b"ef")))
    with Vmm(flat(code)) as vmm:
        vmm.add_pio_device(0x500, 4, device)
        seen = seen_by(vmm)
        assert vmm.run(DEADLINE_S).code == 0
        assert vmm.memory.read(0x3000, 6) == b"abcdef"
    assert bytes(device.written) == b"abcdef"
    reads = [answer.data or b"" for exit, answer in seen if isinstance(exit, VcpuExit.IoIn)]
    writes = [answer.data or b"" for exit, answer in seen if isinstance(exit, VcpuExit.IoOut) and exit.port == 0x500]
    assert b"".join(reads) == b"".join(writes) == b"abcdef"
    assert not has_many or len(writes) == 1


def test_a_read_that_is_executed_again_has_its_answer_later() -> None:
    # 32 bits: mov eax, [0xd0000000]; out 0x80, eax
    code = b"\xa1\x00\x00\x00\xd0\xe7\x80" + exit_with(0)

    def add_memory(_vcpu: Vcpu, _exit: VcpuExit) -> ExitAction:
        tries.append(1)
        if len(tries) == 3:
            vmm.memory.add(0xD000_0000, 4096)
            vmm.memory.write(0xD000_0000, b"here")
        return ExitAction.RETRY

    tries: list[int] = []
    with Vmm(flat(code, "protected32")) as vmm:
        vmm.on_exit("mmio", add_memory)
        seen = seen_by(vmm)
        assert vmm.run(DEADLINE_S).code == 0
    read = VcpuExit.MmioRead(0xD000_0000, 4)
    assert seen[:4] == [
        (read, Answer(RETRY)),
        (read, Answer(RETRY)),
        (read, Answer(MEMORY, b"here")),
        (VcpuExit.IoOut(0x80, 4, b"here"), Answer(NOTHING, b"here")),
    ]


def test_model_specific_registers_have_their_value_or_fault() -> None:
    # 64 bits: mov ecx, 0x4b564d77; rdmsr; wrmsr; rdmsr
    code = b"\xb9\x77\x4d\x56\x4b\x0f\x32\x0f\x30\x0f\x32" + exit_with(0)
    answers: list[object] = [0x1_0000_0002, ExitAction.CONTINUE, None]
    with Vmm(flat(code, "long64")) as vmm:
        seen = seen_by(vmm)
        assert not vmm.run(0).is_fault
        vmm.on_exit("msr", lambda _vcpu, _exit: answers.pop(0))
        assert vmm.run(DEADLINE_S).is_fault
    value = (0x1_0000_0002).to_bytes(8, "little")
    reported = [(type(exit), answer) for exit, answer in seen]
    assert reported[:3] == [
        (VcpuExit.Rdmsr, Answer(HOOK, value)),
        (VcpuExit.Wrmsr, Answer(HOOK, value)),
        (VcpuExit.Rdmsr, Answer(NOTHING)),
    ]
    assert reported[3] == (VcpuExit.Shutdown, Answer(NOTHING, ends_run=True))


def test_registers_that_kvm_does_not_know_exit_for_answers_too() -> None:
    code = b"\xb9\x77\x4d\x56\x4b\x0f\x32"  # 64 bits: mov ecx, 0x4b564d77; rdmsr
    with Vmm(flat(code, "long64")) as vmm:
        seen = seen_by(vmm, "msr")
        assert vmm.run(DEADLINE_S).is_fault
    assert [answer for _, answer in seen] == [Answer(NOTHING)]


@pytest.mark.parametrize(("code", "mode"), [(HALT, "real16"), (TRIPLE_FAULT, "long64")])
def test_the_end_of_a_guest_is_reported_and_no_stop_replaces_it(code: bytes, mode: Any) -> None:
    seen: list[Answer] = []

    def hook(_vcpu: Vcpu, _exit: VcpuExit, answer: Answer) -> Stop:
        seen.append(answer)
        return Stop("not this")

    with Vmm(flat(code, mode)) as vmm:
        before = vmm.snapshot()
        for _ in range(2):
            vmm.on_answer("any", hook)
            exit = vmm.run(DEADLINE_S)
            assert exit.reason in (ExitReason.HALT, ExitReason.SHUTDOWN)
            assert exit.value is None
            vmm.off_answer("any", hook)
            vmm.reset(before)  # the hook's value is no later run's
            assert vmm.run(DEADLINE_S).value is None
            vmm.reset(before)
    assert seen == [Answer(NOTHING, ends_run=True)] * 2


def test_a_hook_ends_the_run_at_an_answer_and_the_guest_keeps_it() -> None:
    def first(_vcpu: Vcpu, _exit: VcpuExit, answer: Answer) -> Stop | None:
        return Stop(answer.value) if answer.value == 0x21 else None

    def second(_vcpu: Vcpu, _exit: VcpuExit, answer: Answer) -> Stop | None:
        called.append(answer)
        return Stop("too late") if answer.value == 0x21 else None

    called: list[Answer] = []
    with Vmm(flat(read_in(0x500) + read_in(0x500) + b"\xe6\xf4")) as vmm:  # out 0xf4, al
        vmm.add_pio_device(0x500, 1, Device(0x20, 0x21))
        vmm.on_answer("io", first)
        vmm.on_answer("io", second)
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.STOPPED, vcpu=0, value=0x21)
        assert vmm.vcpus[0].regs.rax & 0xFF == 0x21
        assert vmm.run(DEADLINE_S).code == 0x21
    assert len(called) == 3


def test_a_device_that_ends_the_run_is_reported_and_its_value_stays() -> None:
    with Vmm(flat(read_in(0x500) + b"\xe6\xf4")) as vmm:
        vmm.add_pio_device(0x500, 1, Device(Stop("the device's")))
        vmm.on_answer("io", lambda _vcpu, _exit, answer: Stop("the hook's") if answer.device == "Device" else None)
        seen = seen_by(vmm, "io")
        assert vmm.run(DEADLINE_S).value == "the device's"
        assert vmm.run(DEADLINE_S).code == 0xFF
    assert seen[0][1] == Answer(DEVICE, b"\xff", "Device", ends_run=True)


def test_a_device_and_a_hook_that_raise_are_reported() -> None:
    def fail(_vcpu: Vcpu, exit: VcpuExit) -> None:
        if exit == VcpuExit.IoIn(0x501, 1, 1):
            raise LookupError("hook")

    with Vmm(flat(read_in(0x500) + read_in(0x501) + exit_with(0))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        vmm.on_exit("io", fail)
        seen = seen_by(vmm, "io")
        with pytest.raises(IndexError):
            vmm.run(DEADLINE_S)
        with pytest.raises(LookupError, match="hook"):
            vmm.run(DEADLINE_S)
        assert vmm.run(DEADLINE_S).code == 0
    assert [answer for _, answer in seen[:2]] == [
        Answer(DEVICE, b"\xff", "Device", ends_run=True),
        Answer(HOOK, b"\xff", ends_run=True),
    ]


def test_an_exception_of_a_hook_ends_the_run_and_says_where() -> None:
    def hook(_vcpu: Vcpu, _exit: VcpuExit, _answer: Answer) -> None:
        raise LookupError("here")

    with Vmm(flat(read_in(0x500) + b"\xe6\xf4")) as vmm:
        vmm.add_pio_device(0x500, 1, Device(9))
        vmm.on_answer("io", hook)
        with pytest.raises(LookupError, match="here") as raised:
            vmm.run(DEADLINE_S)
        assert raised.value.__notes__[0].startswith("in a hook of an answer of kind io, vCPU 0, guest RIP 0x100")
        vmm.off_answer("io", hook)
        assert vmm.run(DEADLINE_S).code == 9


async def coroutine(_vcpu: Vcpu, _exit: VcpuExit, _answer: Answer) -> None:
    pass


@pytest.mark.parametrize("answer", [7, b"", "x", True, ExitAction.CONTINUE], ids=repr)
def test_what_a_hook_for_answers_cannot_return_is_an_error_of_the_run(answer: Any) -> None:
    with Vmm(flat(read_in(0x80) + exit_with(1))) as vmm:
        vmm.on_answer("io", lambda _vcpu, _exit, _answer: answer)
        with pytest.raises(TypeError, match="None or a Stop, not"):
            vmm.run(DEADLINE_S)
        with pytest.raises(TypeError, match="None or a Stop, not"):
            vmm.run(DEADLINE_S)


def test_a_coroutine_is_refused_and_closed() -> None:
    with Vmm(flat(read_in(0x80) + exit_with(1))) as vmm:
        vmm.on_answer("io", coroutine)
        with pytest.raises(TypeError, match="coroutine"):
            vmm.run(DEADLINE_S)


def test_a_hook_changes_registers_and_answers_nothing() -> None:
    def hook(vcpu: Vcpu, exit: VcpuExit, _answer: Answer) -> None:
        if isinstance(exit, VcpuExit.IoIn):
            with pytest.raises(StateError, match="answered"):
                vcpu.answer(1)
            assert vcpu.regs.rip == 0x1003
            vcpu.regs.rax = 0x44

    with Vmm(flat(read_in(0x500) + b"\xe6\xf4")) as vmm:
        vmm.add_pio_device(0x500, 1, Device(9))
        vmm.on_answer("io", hook)
        assert vmm.run(DEADLINE_S).code == 0x44


def test_hooks_for_answers_come_and_go() -> None:
    class Hooks:
        seen = 0

        def on_io(self, _vcpu: Vcpu, _exit: VcpuExit, _answer: Answer) -> None:
            self.seen += 1

    hooks = Hooks()
    with Vmm(flat(out(0x80, 1) + out(0x80, 2) + exit_with(1))) as vmm:
        assert vmm.on_answer("any", hooks.on_io) == hooks.on_io

        @vmm.on_answer("io")
        def last(_vcpu: Vcpu, _exit: VcpuExit, _answer: Answer) -> None:
            vmm.off_answer("any", hooks.on_io)
            vmm.off_answer("io", last)

        with pytest.raises(ValueError, match="not a hook"):
            vmm.off_exit("io", last)  # type: ignore[arg-type]
        assert vmm.run(DEADLINE_S).code == 1
        with pytest.raises(ValueError, match="not a hook"):
            vmm.off_answer("io", last)
        with pytest.raises(ValueError, match="is not one of io, mmio"):
            vmm.on_answer("IO", print)
        with pytest.raises(TypeError, match="a hook is a function, not int"):
            vmm.on_answer("io", 7)  # type: ignore[call-overload]
    assert hooks.seen == 1
    with pytest.raises(StateError, match="closed"):
        vmm.on_answer("io", print)


@pytest.mark.parametrize("kind", ["exit", "answer"])
def test_a_hook_added_while_the_guest_is_inside_sees_its_next_exit(kind: str) -> None:
    seen: list[VcpuExit] = []
    # 16 bits: back: inc word [0x2000]; cmp byte [0x2002], 0; je back; hlt
    code = COUNT_IN_MEMORY[:4] + b"\x80\x3e\x02\x20\x00\x74\xf5" + HALT
    with Vmm(flat(code)) as vmm:
        vmm.start()
        while vmm.memory.read_u16(0x2000) == 0:
            assert vmm.wait(0.001) is None
        if kind == "exit":
            vmm.on_exit("hlt", lambda _vcpu, exit: seen.append(exit))
        else:
            vmm.on_answer("hlt", lambda _vcpu, exit, _answer: seen.append(exit))
        vmm.memory.write_u8(0x2002, 1)
        exit = vmm.wait(DEADLINE_S)
    assert exit is not None
    assert exit.reason is ExitReason.HALT
    assert seen == [VcpuExit.Hlt()]


@pytest.mark.parametrize("run", ["run", "run_here", "start"])
def test_every_way_to_run_reports_the_same_and_forks_have_no_hooks(run: str) -> None:
    with Vmm(flat(read_in(0x500) + b"\xe6\xf4")) as vmm:
        values = [5, 6]
        vmm.on_exit("io", lambda _vcpu, exit: values.pop(0) if isinstance(exit, VcpuExit.IoIn) else None)
        before = vmm.snapshot()
        seen = seen_by(vmm)
        with before.fork() as fork:
            assert fork.run(DEADLINE_S).code == 0xFF
        assert seen == []
        for value in (5, 6):
            if run == "start":
                vmm.start()
                exit = vmm.wait(DEADLINE_S)
            else:
                exit = getattr(vmm, run)(DEADLINE_S)
            assert exit is not None
            assert exit.code == value
            vmm.reset(before)
    read = VcpuExit.IoIn(0x500, 1, 1)
    assert [answer.value for exit, answer in seen if exit == read] == [5, 6]


def test_machines_in_cycles_with_their_hooks_for_answers_are_collected() -> None:
    def cycle() -> weakref.ref[Vmm]:
        vmm = Vmm(flat(out(0x80, 1) + exit_with(5)))
        vmm.on_answer("io", lambda _vcpu, _exit, _answer: vmm.state and None)
        assert vmm.run(DEADLINE_S).code == 5
        return weakref.ref(vmm)

    reference = cycle()
    assert is_collected(reference)


def test_an_answer_is_a_value() -> None:
    answer = Answer(DEVICE, b"\x01\x02", "uart")
    assert pickle.loads(pickle.dumps(answer)) == answer
    assert (answer.value, Answer(RETRY).value) == (0x201, None)
    assert str(AnsweredBy.DEVICE) == "device"

"""A run that goes wrong never hangs or loses the reason: guests that fail, callbacks that raise, forks, exits."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import weakref
from typing import TYPE_CHECKING

import pytest
import pyvmm
from conftest import TESTS
from guests import (
    COUNT_IN_MEMORY,
    FWAIT_FOREVER,
    PRINT_FOR_EVER,
    SPIN,
    TRIPLE_FAULT,
    exit_with,
    flat,
    keeps_fault_state,
)
from held import is_collected
from pyvmm import (
    EventFd,
    EventOps,
    Events,
    ExitReason,
    SerialConfig,
    StateError,
    StreamError,
    Vmm,
    VmmConfig,
    VmRunState,
)
from subscribers import DEADLINE_S, Callback, within_deadline

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = pytest.mark.kvm


def test_triple_fault_is_a_shutdown_with_its_registers() -> None:
    with Vmm(flat(TRIPLE_FAULT, "long64")) as vmm:
        exit = vmm.run(DEADLINE_S)
    assert (exit.reason, exit.vcpu) == (ExitReason.SHUTDOWN, 0)
    assert exit.is_fault
    assert exit.fault is not None
    if keeps_fault_state(exit.fault):
        assert "rip 0x000000000000100a" in exit.fault
        assert "rax 0xffff800000000000" in exit.fault
    else:
        assert "instruction at" not in exit.fault


def test_what_kvm_cannot_emulate_ends_with_the_instruction_bytes() -> None:
    if not pyvmm.kvm_info()["software_kvm"]:
        pytest.skip("a hardware KVM executes every instruction")
    with Vmm(flat(FWAIT_FOREVER, "long64")) as vmm:
        exit = vmm.run(DEADLINE_S)
    assert exit.reason is ExitReason.INTERNAL_ERROR
    assert exit.fault is not None
    assert "instruction at 0x1000: wait\ninstruction bytes: 9b" in exit.fault
    assert "rip 0x0000000000001000" in exit.fault


def test_second_vcpu_that_fails_ends_the_run_for_all() -> None:
    code = (
        b"\x85\xff"  # test edi, edi
        b"\x75\x02"  # jnz fail
        b"\xeb\xfe"  # jmp $
    ) + TRIPLE_FAULT
    with Vmm(flat(code, "long64", address=0x10000, cpu=pyvmm.CpuConfig(vcpus=2))) as vmm:
        exit = vmm.run(DEADLINE_S)
    assert (exit.reason, exit.vcpu) == (ExitReason.SHUTDOWN, 1)


def test_exception_in_init_comes_out_of_add_subscriber_and_leaves_nothing() -> None:
    class Fails:
        def init(self, ops: EventOps) -> None:
            ops.add(Events(fd))
            raise LookupError("on purpose")

        def process(self, events: Events, ops: EventOps) -> None:
            raise AssertionError("never called")

    fd = EventFd(1)
    with Vmm(flat(exit_with(3))) as vmm:
        with pytest.raises(LookupError, match="on purpose"):
            vmm.add_subscriber(Fails())
        assert vmm.run(DEADLINE_S).code == 3


def test_exception_in_process_comes_out_of_run_with_its_traceback() -> None:
    def fail() -> None:
        raise LookupError("on purpose")

    with Vmm(flat(SPIN)) as vmm:
        vmm.add_subscriber(Callback(fail))
        with pytest.raises(LookupError, match="on purpose") as raised:
            vmm.run(DEADLINE_S)
        assert [entry.name for entry in raised.traceback][-2:] == ["process", "fail"]
        assert vmm.state is VmRunState.PAUSED
        assert vmm.memory.read(0x1000, 2) == SPIN
        assert vmm.run(0.01).reason is ExitReason.TIMEOUT, "it can go on"


def test_base_exception_comes_out_too() -> None:
    def leave() -> None:
        raise SystemExit(4)

    with Vmm(flat(SPIN)) as vmm:
        vmm.add_subscriber(Callback(leave))
        with pytest.raises(SystemExit):
            vmm.run(DEADLINE_S)


def test_second_run_at_the_same_time_fails_at_once() -> None:
    errors: list[BaseException] = []

    def run_again() -> None:
        for again in (vmm.run, vmm.event_manager.run):
            with pytest.raises(StateError, match="already running") as raised:
                again()
            errors.append(raised.value)

    with Vmm(flat(SPIN)) as vmm:

        def try_both() -> None:
            run_again()
            within_deadline(run_again)
            vmm.stop()

        vmm.add_subscriber(Callback(try_both))
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
    assert len(errors) == 4


def test_interpreter_ends_with_machines_alive() -> None:
    program = textwrap.dedent(
        """
        import threading
        from guests import flat, SPIN
        from pyvmm import *

        class Handler:
            def kick(self): pass

        running = Vmm(flat(SPIN))
        threading.Thread(target=running.run, daemon=True).start()
        bare = KvmVm(flat(SPIN), Handler())
        bare.run()
        never_run = Vmm(flat(SPIN))
        cycle = [never_run]
        cycle.append(cycle)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_forked_child_gets_an_error_and_harms_nothing() -> None:
    with Vmm(flat(COUNT_IN_MEMORY)) as vmm:
        vmm.run(0.01)
        (vcpu,) = vmm.vcpus
        handler = vmm.exit_handler
        calls: list[Callable[[], object]] = [
            vmm.run, vmm.start, vmm.pause, vmm.resume, vmm.stop, vmm.event_manager.run, lambda: vmm.vcpus, vcpu.kick,
            lambda: vcpu.regs.rip, lambda: vcpu.translate(0), lambda: vmm.memory.read(0, 1), handler.kick,
            lambda: vmm.memory.add(1 << 32, 4096), lambda: vmm.memory.view(0, 1), handler.handler.kick, handler.rearm,
            lambda: vmm.serial.send(b"x"), vmm.serial.take_output, lambda: pyvmm.EventManager().add_subscriber(handler),
        ]  # fmt: skip
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for call in calls:
                    try:
                        call()
                    except StateError as error:
                        status = 0 if "forked" in str(error) else 2
                    else:
                        status = 3
                    if status:
                        break
                vmm.close()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert vmm.run(0.01).reason is ExitReason.TIMEOUT


def test_reader_that_went_away_ends_the_run(make: Callable[[VmmConfig], Vmm]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    vmm = make(flat(PRINT_FOR_EVER, serial=SerialConfig(output=writer)))
    os.close(writer)
    with pytest.raises(StreamError, match=r"serial\.output"):
        vmm.run(DEADLINE_S)


def test_callable_that_fails_ends_the_run(make: Callable[[VmmConfig], Vmm]) -> None:
    def refuse(piece: bytes) -> None:
        raise ValueError("no")

    vmm = make(flat(PRINT_FOR_EVER, serial=SerialConfig(output=refuse)))
    with pytest.raises(ValueError, match="no"):
        vmm.run(DEADLINE_S)


def test_uncollected_output_is_left_for_the_host(make: Callable[[VmmConfig], Vmm]) -> None:
    """More than a pipe can hold: the guest ends, the run does not hang, and no byte is lost."""
    code = (
        b"\x66\xb9\xa0\x86\x01\x00"  # mov ecx, 100000
        b"\xba\xf8\x03\xb0\x78"  #     mov dx, 0x3f8; mov al, 'x'
        b"\xee"  #                      out dx, al
        b"\x66\x49\x75\xfb"  #         dec ecx; jnz back
    ) + exit_with(0)
    reader, writer = os.pipe()
    vmm = make(flat(code, serial=SerialConfig(output=writer)))
    assert vmm.run(DEADLINE_S).reason is ExitReason.CODE
    left = vmm.serial.take_output()
    vmm.close()
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert len(pipe.read()) + len(left) == 100_000
    assert left


def test_machine_in_a_cycle_with_its_subscriber_is_collected() -> None:
    class Owner(Callback):
        vmm: Vmm

    owner = Owner(lambda: None)
    owner.vmm = Vmm(flat(exit_with(1)))
    owner.vmm.add_subscriber(owner)
    owner.vmm.run(DEADLINE_S)
    alive = weakref.ref(owner.vmm)
    del owner
    assert is_collected(alive)

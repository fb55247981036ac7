"""It never hangs, spins, aborts or loses the reason: each way a run can go wrong, with a deadline."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from typing import TYPE_CHECKING

import pytest
import pyvmm
from conftest import TESTS
from guests import (
    COUNT_IN_MEMORY,
    FWAIT_FOREVER,
    HALT,
    PRINT_FOR_EVER,
    SPIN,
    TRIPLE_FAULT,
    exit_with,
    flat,
    keeps_fault_state,
)
from pyvmm import (
    EventFd,
    EventOps,
    Events,
    EventSet,
    ExitReason,
    SerialConfig,
    StateError,
    StreamError,
    Vmm,
    VmmConfig,
    VmRunState,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm
DEADLINE_S = 60


class Callback:
    """A subscriber that is called at once, and calls a function."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.fd = EventFd(1)
        self.call = call

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd, EventSet.IN))

    def process(self, events: Events, ops: EventOps) -> None:
        self.fd.read()
        self.call()


def after(event: threading.Event, call: Callable[[], None]) -> Callable[[], None]:
    """Call once an event is set."""

    def wait() -> None:
        event.wait()
        call()

    return wait


def within_deadline(call: Callable[[], object]) -> None:
    """Run in a thread that has to end."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive(), "it hangs"


# A vCPU that fails.


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


# Exceptions.


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


# Ctrl-C.


@pytest.mark.parametrize("what", ["spins", "halts", "waits"])
def test_ctrl_c_ends_the_run(what: str) -> None:
    """The machine of another process, so that the signal is the real one."""
    program = textwrap.dedent(
        """
        import sys, time
        from guests import flat, SPIN, HALT
        from pyvmm import *

        class Told:
            def __init__(self): self.fd = EventFd(1)
            def init(self, ops): ops.add(Events(self.fd))
            def process(self, events, ops):
                self.fd.read()
                print("running", flush=True)

        what = sys.argv[1]
        try:
            if what == "waits":
                manager = EventManager()
                manager.add_subscriber(Told())
                manager.run()
                manager.run()
            # With an interrupt controller HLT stays in the kernel.
            with Vmm(flat(HALT + SPIN if what == "halts" else SPIN, irqchip=what == "halts")) as vmm:
                vmm.add_subscriber(Told())
                vmm.run()
        except KeyboardInterrupt:
            print("interrupted", time.monotonic())
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", program, what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=DEADLINE_S)
    assert out.startswith("interrupted")
    assert process.returncode == 0


def test_signal_handler_of_the_program_runs_while_the_guest_spins() -> None:
    with Vmm(flat(SPIN)) as vmm:
        before = signal.signal(signal.SIGUSR1, lambda *_: vmm.stop())
        try:
            vmm.add_subscriber(Callback(lambda: os.kill(os.getpid(), signal.SIGUSR1)))
            assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
        finally:
            signal.signal(signal.SIGUSR1, before)


# stop() and kicks.


def test_stop_from_another_thread() -> None:
    with Vmm(flat(SPIN)) as vmm:
        started = threading.Event()
        vmm.add_subscriber(Callback(started.set))
        stopper = threading.Thread(target=after(started, vmm.stop))
        stopper.start()
        exit = vmm.run(DEADLINE_S)
        stopper.join()
    assert exit == pyvmm.Exit(ExitReason.STOPPED)


def test_stop_from_a_callback_and_twice() -> None:
    with Vmm(flat(COUNT_IN_MEMORY)) as vmm:

        def stop_twice() -> None:
            vmm.stop()
            vmm.stop()

        vmm.add_subscriber(Callback(stop_twice))
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
        assert vmm.run(0.01).reason is ExitReason.TIMEOUT, "both belonged to the first run"


def test_stop_and_kick_before_run_end_it_before_the_guest_starts() -> None:
    for before in (Vmm.stop, lambda vmm: vmm.exit_handler.kick()):
        with Vmm(flat(COUNT_IN_MEMORY)) as vmm:
            before(vmm)
            assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
            assert vmm.memory.read(0x2000, 2) == b"\0\0"
            assert vmm.run(0.01).reason is ExitReason.TIMEOUT


def test_stop_after_the_end_does_nothing() -> None:
    with Vmm(flat(exit_with(1))) as vmm:
        vmm.run(DEADLINE_S)
        vmm.stop()
        assert vmm.state is VmRunState.EXITING
    vmm.stop()


def test_kicks_at_random_moments_are_never_lost() -> None:
    with Vmm(flat(SPIN)) as vmm:
        for n in range(200):
            kicker = threading.Thread(target=vmm.exit_handler.clone().kick)
            kicker.start()
            assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED, n
            kicker.join()


# close(), and two at once.


def test_close_while_running_ends_the_run() -> None:
    vmm = Vmm(flat(SPIN))
    started = threading.Event()
    vmm.add_subscriber(Callback(started.set))
    closer = threading.Thread(target=after(started, vmm.close))
    closer.start()
    assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
    closer.join(DEADLINE_S)
    assert vmm.state is VmRunState.CLOSED


def test_close_from_a_callback_takes_effect_at_the_end_of_the_run() -> None:
    vmm = Vmm(flat(SPIN))
    vmm.add_subscriber(Callback(vmm.close))
    assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
    assert vmm.state is VmRunState.CLOSED


def test_second_run_at_the_same_time_fails_at_once() -> None:
    errors: list[BaseException] = []

    def run_again() -> None:
        for again in (vmm.run, vmm.event_manager.run):
            with pytest.raises(StateError, match="one run at a time") as raised:
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


# Streams.


def test_guest_that_prints_for_ever_can_be_stopped(make: Callable[[VmmConfig], Vmm]) -> None:
    reader, writer = os.pipe()
    try:
        vmm = make(flat(PRINT_FOR_EVER, serial=SerialConfig(output=writer)))
        assert vmm.run(0.5).reason is ExitReason.TIMEOUT, "nobody reads the pipe, and the run still ends"
        vmm.close()
    finally:
        os.close(reader)
        os.close(writer)


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


def test_halt_with_nobody_to_wake_it_can_be_stopped() -> None:
    with Vmm(flat(HALT + SPIN, irqchip=True)) as vmm:
        start = time.monotonic()
        assert vmm.run(0.05).reason is ExitReason.TIMEOUT
        assert time.monotonic() - start < DEADLINE_S


def test_output_that_nobody_takes_is_left_for_the_host(make: Callable[[VmmConfig], Vmm]) -> None:
    """More than a pipe holds: the guest ends, the run does not wait for ever, and no byte is lost."""
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
    gc.collect()
    assert alive() is None

"""A run can be stopped at any moment: by stop, kick, close, Ctrl-C, from any thread and callback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING

import pytest
import pyvmm
from conftest import TESTS
from guests import (
    COUNT_IN_MEMORY,
    HALT,
    PRINT_FOR_EVER,
    SPIN,
    exit_with,
    flat,
)
from pyvmm import (
    ExitReason,
    SerialConfig,
    Vmm,
    VmmConfig,
    VmRunState,
)
from subscribers import DEADLINE_S, Callback, after

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = pytest.mark.kvm


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


def test_guest_that_prints_endlessly_can_be_stopped(make: Callable[[VmmConfig], Vmm]) -> None:
    reader, writer = os.pipe()
    try:
        vmm = make(flat(PRINT_FOR_EVER, serial=SerialConfig(output=writer)))
        assert vmm.run(0.5).reason is ExitReason.TIMEOUT, "nobody reads the pipe, and the run still ends"
        vmm.close()
    finally:
        os.close(reader)
        os.close(writer)


def test_halt_that_nothing_wakes_can_be_stopped() -> None:
    with Vmm(flat(b"\xfb" + HALT + SPIN, irqchip=True)) as vmm:  # sti; hlt
        start = time.monotonic()
        assert vmm.run(0.05).reason is ExitReason.TIMEOUT
        assert time.monotonic() - start < DEADLINE_S

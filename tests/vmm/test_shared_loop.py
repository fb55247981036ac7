"""Machines that share a loop, and end each alone.

Covers src/event/turn_lock.rs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import pyvmm
from conftest import TESTS
from guests import (
    SPIN,
    exit_with,
    flat,
    print_text,
)
from pyvmm import EventFd, EventOps, Events, EventSet, ExitReason, Vmm
from threads import all_at_once

pytestmark = pytest.mark.kvm


def test_many_machines_share_one_loop_and_end_each_alone() -> None:
    manager = pyvmm.EventManager()
    machines = [Vmm(flat(exit_with(n)), event_manager=manager) for n in range(20)]
    spinning = Vmm(flat(SPIN), event_manager=manager)
    assert all(vmm.event_manager is manager for vmm in machines)
    codes: dict[int, int | None] = {}

    def run(n: int) -> None:
        codes[n] = machines[n].run(60).code

    threads = [threading.Thread(target=run, args=(n,)) for n in range(20)]
    spinner = threading.Thread(target=spinning.run)
    for thread in (spinner, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    assert codes == {n: n for n in range(20)}
    assert spinner.is_alive(), "the end of others is not its end"
    spinning.stop()
    spinner.join(60)
    for vmm in (spinning, *machines):
        vmm.close()
    assert manager.run_with_timeout(0) == 0


def test_machine_leaves_a_shared_loop_when_it_is_closed_or_dropped() -> None:
    manager = pyvmm.EventManager()
    out: list[bytes] = []
    config = flat(print_text(b"hi") + exit_with(1), serial=pyvmm.SerialConfig(output=out.append))
    with Vmm(config, event_manager=manager) as vmm:
        vmm.run(60)
    assert b"".join(out) == b"hi"
    assert repr(manager) == "EventManager(subscribers=0)"
    dropped = Vmm(flat(exit_with(1)), event_manager=manager)
    handler = dropped.exit_handler
    del dropped
    handler.kick()
    assert manager.run_with_timeout(0) == 0


def test_loop_that_waits_already_can_be_shared() -> None:
    """The machine's run may take the kick that the other run waits for."""
    manager = pyvmm.EventManager()
    forever = threading.Thread(target=manager.run_forever)
    forever.start()
    manager.remote_endpoint().call_blocking(lambda _: None)
    with Vmm(flat(SPIN), event_manager=manager) as spinning:
        run = threading.Thread(target=spinning.run)
        run.start()
        with Vmm(flat(exit_with(7)), event_manager=manager) as vmm:
            assert vmm.run(60).code == 7
        manager.stop()
        forever.join(60)
        assert not forever.is_alive()
        spinning.stop()
        run.join(60)
        assert not run.is_alive()


def test_kick_that_another_loop_takes_ends_the_run_too() -> None:
    with Vmm(flat(SPIN)) as vmm:
        other = pyvmm.EventManager()
        other.add_subscriber(vmm.exit_handler)
        thief = threading.Thread(target=other.run_forever)
        thief.start()
        for _ in range(20):
            kicker = threading.Thread(target=vmm.exit_handler.kick)
            kicker.start()
            assert vmm.run(60).reason is ExitReason.STOPPED
            kicker.join()
        other.stop()
        thief.join(60)
        assert not thief.is_alive()


def test_kick_that_a_subscriber_of_the_program_processes_ends_the_run_too() -> None:
    """It drains the exit event, so that the machine's own loop does not see it."""
    with Vmm(flat(SPIN)) as vmm:
        handler = vmm.exit_handler

        class Processes:
            def __init__(self) -> None:
                self.fd = EventFd(1)

            def init(self, ops: EventOps) -> None:
                ops.add(Events(self.fd))

            def process(self, events: Events, ops: EventOps) -> None:
                self.fd.read()
                handler.process(Events(handler.handler.exit_event, EventSet.IN), ops)

        other = pyvmm.EventManager()
        subscriber = Processes()
        other.add_subscriber(subscriber)
        run = threading.Thread(target=vmm.run)
        run.start()
        while vmm.state is not pyvmm.VmRunState.RUNNING:
            time.sleep(0)
        assert other.run() == 1
        run.join(60)
        assert not run.is_alive()


def test_runs_end_while_other_threads_perform_the_iterations() -> None:
    """Each run may check its end just before another thread dispatches it, and wait afterwards."""
    end = time.monotonic() + float(os.environ.get("PYVMM_STRESS_S", "1"))
    manager = pyvmm.EventManager()
    spinning = Vmm(flat(SPIN), event_manager=manager)

    def run(code: int) -> None:
        with Vmm(flat(exit_with(code)), event_manager=manager) as vmm:
            snapshot = vmm.snapshot()
            while time.monotonic() < end:
                assert vmm.run(60).code == code
                vmm.reset(snapshot)

    def run_all() -> None:
        all_at_once(*(lambda code=code: run(code) for code in range(4)), deadline=100)
        spinning.stop()

    all_at_once(spinning.run, run_all, deadline=110)
    spinning.close()


CTRL_C = """
import os, signal, sys, threading
sys.path[:0] = [{tests!r}]
from guests import SPIN, flat
from pyvmm import *

manager = EventManager()
leader, own = (Vmm(flat(SPIN), event_manager=manager) for _ in range(2))

def is_waiting(thread, state):
    with open(f"/proc/self/task/{{thread}}/syscall") as file:
        return file.read().split()[0] == state

# It waits for the loop's events (ppoll), and the main thread for its iteration (futex).
running = threading.Thread(target=leader.run)
running.start()
while not is_waiting(running.native_id, "271"):
    pass

def interrupt():
    while own.state is not VmRunState.RUNNING or not is_waiting(os.getpid(), "202"):
        pass
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    {run}
except KeyboardInterrupt:
    print("interrupted")
leader.stop()
running.join(60)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end", ["close", "stop and join"])
def test_a_callback_of_a_shared_loop_ends_the_run_of_another_thread_and_waits_for_it(end: str) -> None:
    manager = pyvmm.EventManager()
    other = Vmm(flat(SPIN), event_manager=manager)
    thread = threading.Thread(target=other.run, daemon=True)

    class Ends:
        def __init__(self) -> None:
            self.fd, self.calls = EventFd(), 0

        def init(self, ops: EventOps) -> None:
            ops.add(Events(self.fd))

        def process(self, events: Events, ops: EventOps) -> None:
            self.fd.read()
            self.calls += 1
            if end == "close":
                other.close()
            else:
                other.stop()
            thread.join()

    with Vmm(flat(SPIN), event_manager=manager) as vmm:
        ends = Ends()
        manager.add_subscriber(ends)
        leader = threading.Thread(target=vmm.run, daemon=True)
        leader.start()
        thread.start()
        while other.state is not pyvmm.VmRunState.RUNNING:
            time.sleep(0.001)
        ends.fd.write()
        thread.join()
        vmm.stop()
        leader.join()
    assert ends.calls == 1
    other.close()


@pytest.mark.parametrize("run", ["own.run()", "own.start(); own.wait()", "own.start(); manager.run_forever()"])
def test_ctrl_c_ends_a_run_while_another_thread_performs_the_iterations(run: str) -> None:
    program = CTRL_C.format(tests=str(TESTS), run=run)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")

"""Machines that share a loop, and end each alone."""

from __future__ import annotations

import threading

import pytest
import pyvmm
from guests import (
    SPIN,
    exit_with,
    flat,
    print_text,
)
from pyvmm import (
    ExitReason,
    Vmm,
)

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

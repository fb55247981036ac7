"""Closing a machine: beside callbacks, from them, from several threads, and with everything released.

Covers src/py/vmm/close.rs.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading

import pytest
from alone import alone
from entangled import CALLS, DEADLINE_S, OUT_FOR_EVER, Device, machine, within
from guests import exit_with, flat
from pyvmm import StateError, Vmm, VmRunState
from threads import thread_names

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize("name", CALLS)
def test_close_of_a_started_machine_beside_a_callback_returns(name: str) -> None:
    vmm, device = machine(CALLS[name])
    vmm.start()
    assert device.entered.wait(DEADLINE_S)
    closer = threading.Thread(target=vmm.close, daemon=True)
    closer.start()
    while vmm.state is not VmRunState.CLOSED:
        pass
    device.go.set()
    closer.join(DEADLINE_S)
    assert not closer.is_alive()
    # The callback has returned before `close` did, and none comes after it.
    assert device.returned.is_set()
    assert device.writes == 1
    if name != "close":
        assert isinstance(device.result, StateError)


def test_two_that_close_at_once_both_wait_for_a_callback_in_progress() -> None:
    vmm, device = machine(lambda _vmm: None)
    vmm.start()
    assert device.entered.wait(DEADLINE_S)
    # Whether the callback had returned when each came back.
    found: list[bool] = []

    def close() -> None:
        vmm.close()
        found.append(device.returned.is_set())

    closers = [threading.Thread(target=close, daemon=True) for _ in range(2)]
    for closer in closers:
        closer.start()
    while vmm.state is not VmRunState.CLOSED:
        pass
    # Nothing hangs on this time: one that did not wait would come back within it.
    closers[0].join(0.2)
    assert not found
    device.go.set()
    for closer in closers:
        closer.join(DEADLINE_S)
    assert found == [True, True]


@pytest.mark.parametrize("name", ["snapshot", "pause", "wait"])
def test_close_means_closed_whoever_else_is_inside(name: str) -> None:
    vmm, device = machine(lambda _vmm: None)
    vmm.start()
    assert device.entered.wait(DEADLINE_S)
    other = threading.Thread(target=within, args=(lambda: CALLS[name](vmm),), daemon=True)
    other.start()
    closers = [threading.Thread(target=vmm.close, daemon=True) for _ in range(2)]
    for closer in closers:
        closer.start()
    while vmm.state is not VmRunState.CLOSED:
        pass
    assert all(closer.is_alive() for closer in closers), "a callback still runs"
    device.go.set()
    for thread in [*closers, other]:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in [*closers, other])
    assert device.writes == 1


@pytest.mark.parametrize("timeout", [2.0, None])
def test_close_in_a_callback_while_the_run_is_ending(timeout: float | None) -> None:
    vmm, device = machine(lambda vmm: vmm.close())
    runner = threading.Thread(target=within, args=(lambda: vmm.run(timeout),), daemon=True)
    runner.start()
    assert device.entered.wait(DEADLINE_S)
    vmm.stop()
    device.go.set()
    runner.join(DEADLINE_S)
    assert not runner.is_alive()
    assert vmm.state is VmRunState.CLOSED


def test_close_in_a_callback_without_a_waiting_thread_stops_the_guest() -> None:
    vmm, device = machine(lambda vmm: vmm.close())
    vmm.start()
    device.go.set()
    assert device.returned.wait(DEADLINE_S)
    while vmm.state is VmRunState.RUNNING:
        pass
    within(vmm.close)
    assert device.writes == 1


def test_the_last_reference_may_go_in_a_callback() -> None:
    held: list[Vmm] = []

    def let_go() -> int:
        held.clear()
        return gc.collect()

    device = Device(let_go)
    vmm = Vmm(flat(OUT_FOR_EVER))
    vmm.add_pio_device(0x500, 1, device)
    held.append(vmm)
    vmm.start()
    del vmm
    device.go.set()
    assert device.returned.wait(DEADLINE_S)
    while "vcpu_0" in thread_names():
        pass
    assert device.writes == 1


def descriptors() -> list[str]:
    """What each descriptor of this process refers to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(found)


@pytest.mark.parametrize("how", ["made", "run", "forked", "watched"])
@alone
def test_close_releases_every_descriptor_though_the_machine_is_held(how: str) -> None:
    with Vmm(flat(exit_with(0))) as first:
        snapshot = first.snapshot()
    gc.collect()
    before = descriptors()
    vmm = snapshot.fork() if how == "forked" else Vmm(flat(exit_with(0)))
    if how == "watched":
        vmm.event_manager.call_later(3600, int)
        vmm.event_manager.fileno()
        vmm.stats.enable()
    if how != "made":
        vmm.run(DEADLINE_S)
    assert descriptors() != before
    vmm.close()
    assert descriptors() == before
    assert vmm.state is VmRunState.CLOSED
    with pytest.raises(StateError, match="closed"):
        _ = vmm.event_manager
    vmm.stop()  # of a machine that is closed, there is nothing to stop

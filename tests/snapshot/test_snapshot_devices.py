"""The devices of a snapshot: Python objects that save and restore, and snapshots taken from their callbacks."""

from __future__ import annotations

import contextlib
import threading

import pytest
from guests import SPIN, flat
from oracle import counted, finish, oracle
from python_devices import READS_TAPE, Tape
from pyvmm import (
    SerialConfig,
    Snapshot,
    StateError,
    Vmm,
)

pytestmark = pytest.mark.kvm
DEADLINE_S = 60


def test_snapshot_from_a_callback_of_the_running_machine() -> None:
    snapshots: list[Snapshot] = []

    def look(piece: bytes) -> None:
        if not snapshots:
            snapshots.append(vmm.snapshot())

    with oracle(5, serial=SerialConfig(output=look)) as vmm:
        assert vmm.run(DEADLINE_S).code == 9
    with snapshots[0].fork() as fork:
        assert counted(5).endswith(finish(fork))


def test_python_devices_are_saved_and_restored() -> None:
    with Vmm(flat(READS_TAPE)) as vmm:
        tape = Tape(b"abcd")
        vmm.add_pio_device(0x80, 1, tape)
        tape.at = 2
        snapshot = vmm.snapshot()
        vmm.vcpus[0].regs.rip += 16  # two letters have been printed elsewhere
        later = vmm.snapshot()
        assert (vmm.run(DEADLINE_S).code, vmm.serial.take_output()) == (1, b"cd")
        vmm.reset(later)
        assert (tape.at, vmm.run(DEADLINE_S).code, vmm.serial.take_output()) == (2, 1, b"cd")
        with pytest.raises(StateError, match=r"pio 0x80: .*setup"):
            snapshot.fork()
        with later.fork(setup=lambda fork: fork.add_pio_device(0x80, 1, Tape(b"abCD"))) as fork:
            assert (fork.run(DEADLINE_S).code, fork.serial.take_output()) == (1, b"CD")


def test_python_device_that_cannot_be_saved_is_named() -> None:
    class Stateless:
        def read(self, offset: int, size: int) -> int:
            return 0

    class Failing(Tape):
        def save(self) -> bytes:
            raise ZeroDivisionError

    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x80, 1, Stateless())
        with pytest.raises(StateError, match=r"pio 0x80: the .*Stateless there has no save\(\)"):
            vmm.snapshot()
        vmm.remove_pio_device(0x80)
        vmm.add_pio_device(0x80, 1, Failing(b""))
        with pytest.raises(ZeroDivisionError):
            vmm.snapshot()
        vmm.remove_pio_device(0x80)
        vmm.snapshot()


def test_snapshot_from_a_devices_own_callback_is_refused_and_from_another_thread_waits() -> None:
    class Asks(Tape):
        def read(self, offset: int, size: int) -> int:
            if not entered.is_set():
                with pytest.raises(StateError, match="not answered yet"):
                    vmm.snapshot()
                entered.set()
                assert go.wait(DEADLINE_S)
            return super().read(offset, size)

    entered, go = threading.Event(), threading.Event()
    snapshots: list[Snapshot] = []
    with Vmm(flat(READS_TAPE)) as vmm:
        vmm.add_pio_device(0x80, 1, Asks(b"abcd"))
        vmm.start()
        assert entered.wait(DEADLINE_S)
        other = threading.Thread(target=lambda: snapshots.append(vmm.snapshot()))
        other.start()
        # While the machine is stopped for the snapshot, its vCPU is accessible.
        is_held = False
        while not is_held:
            with contextlib.suppress(StateError):
                is_held = vmm.vcpus[0].regs.rip > 0
        go.set()
        other.join()
        exit = vmm.wait(DEADLINE_S)
        assert exit is not None
        assert (exit.code, vmm.serial.take_output()) == (1, b"abcd")
    with snapshots[0].fork(setup=lambda fork: fork.add_pio_device(0x80, 1, Tape(b"abcd"))) as fork:
        assert (fork.run(DEADLINE_S).code, fork.serial.take_output()) == (1, b"abcd")

"""Devices stand still while their machine is paused, snapshotted or reset.

Covers src/devices/quiesce.rs, src/vm/quiesce.rs.
"""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from guests import flat
from pyvmm import ExitReason, SerialConfig, Snapshot, StateError, Vmm, VmRunState
from threads import all_at_once

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
SPIN = b"\xeb\xfe"
# Reads the serial port's line status until there is input, reads it, and ends the run with it.
ECHO = bytes.fromhex("bafd03eca80174fbbaf803ece6f4")


class Clock:
    """A device with a half of its own."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None

    def read(self, offset: int, size: int) -> int:
        return 0

    def quiesce(self) -> None:
        self.calls.append("quiesce")
        if self.error:
            raise self.error

    def resume(self) -> None:
        self.calls.append("resume")

    def save(self) -> bytes:
        self.calls.append("save")
        return b""

    def restore(self, state: bytes) -> None:
        self.calls.append("restore")


def test_a_device_stands_still_for_a_snapshot_and_a_reset() -> None:
    clock = Clock()
    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x500, 1, clock)
        before = vmm.snapshot()
        assert clock.calls == ["quiesce", "save", "resume"]
        clock.calls.clear()
        vmm.reset(before)
        assert clock.calls == ["quiesce", "restore", "resume"]


def test_a_device_stands_still_for_as_long_as_the_machine_is_paused() -> None:
    clock = Clock()
    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x500, 1, clock)
        vmm.start()
        vmm.pause()
        assert clock.calls == ["quiesce"]
        vmm.snapshot()
        assert clock.calls == ["quiesce", "quiesce", "save", "resume"]
        vmm.resume()
        assert clock.calls[4:] == ["resume"]
        vmm.pause()
        vmm.stop()
        exit = vmm.wait(DEADLINE_S)
        assert exit is not None
        assert exit.reason is ExitReason.STOPPED
        assert clock.calls[5:] == ["quiesce", "resume"], "the end of the run ends the pause"
        vmm.start()
        vmm.pause()
    assert clock.calls[7:] == ["quiesce", "resume"], "as a close does"


class Half:
    """Counts its calls, and checks that it is quiesced whenever its state is saved or restored."""

    def __init__(self) -> None:
        self.lock, self.still = threading.Lock(), 0

    def read(self, offset: int, size: int) -> int:
        return 0

    def quiesce(self) -> None:
        with self.lock:
            self.still += 1

    def resume(self) -> None:
        with self.lock:
            self.still -= 1
            assert self.still >= 0

    def save(self) -> bytes:
        assert self.still > 0
        return b""

    def restore(self, state: bytes) -> None:
        assert self.still > 0


def test_pauses_and_resumes_from_many_threads_leave_the_device_going() -> None:
    half = Half()
    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x500, 1, half)
        vmm.start()

        def work() -> None:
            for _ in range(30):
                vmm.pause()
                vmm.snapshot()
                vmm.resume()

        all_at_once(*[work] * 3)
        assert vmm.state is VmRunState.RUNNING
        assert half.still == 0


@pytest.mark.parametrize("call", ["pause", "snapshot", "reset"])
def test_what_quiesce_raises_comes_out_and_the_machine_goes_on(call: str) -> None:
    clock = Clock()
    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x500, 1, clock)
        before = vmm.snapshot()
        vmm.start()
        clock.error = LookupError("no")
        with pytest.raises(LookupError, match="no"):
            getattr(vmm, call)(*([before] if call == "reset" else []))
        assert vmm.state is VmRunState.RUNNING
        clock.error = None
        vmm.pause()
        assert vmm.wait(0.01) is None


CALLS: dict[str, Callable[[Vmm, Snapshot], object]] = {
    "pause": lambda vmm, _before: vmm.pause(),
    "snapshot": lambda vmm, _before: vmm.snapshot(),
    "reset": lambda vmm, before: vmm.reset(before),
    "nmi": lambda vmm, _before: vmm.nmi(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("method", "outer", "is_running"),
    [
        ("quiesce", "pause", True),
        ("quiesce", "snapshot", False),
        ("save", "snapshot", True),
        ("restore", "reset", True),
        ("restore", "reset", False),
        ("resume", "snapshot", True),
    ],
)
def test_a_device_cannot_make_its_own_machine_stand_still_again(
    method: str, outer: str, call: str, is_running: bool
) -> None:
    clock, refused = Clock(), list[StateError]()

    def again(*_: bytes) -> bytes:
        clock.calls.append("again")
        if clock.calls.count("again") == 1:
            with pytest.raises(StateError, match=f"{call}: a device of this machine is being quiesced") as error:
                CALLS[call](vmm, before)
            refused.append(error.value)
        return b""

    with Vmm(flat(SPIN)) as vmm:
        setattr(clock, method, again)
        clock.calls.append("again")
        vmm.add_pio_device(0x500, 1, clock)
        before = vmm.snapshot()
        if is_running:
            vmm.start()
        clock.calls.clear()
        CALLS[outer](vmm, before)
        assert len(refused) == 1, clock.calls
        assert refused[0].hint == "call it after the device's method has returned"
        if is_running:
            vmm.pause()
            vmm.resume()


def test_a_device_may_make_another_machine_stand_still() -> None:
    clock, others = Clock(), list[Snapshot]()

    def save() -> bytes:
        others.append(other.snapshot())
        return b""

    with Vmm(flat(SPIN)) as vmm, Vmm(flat(SPIN)) as other:
        vmm.add_pio_device(0x500, 1, clock)
        clock.save = save  # type: ignore[method-assign]
        vmm.remove_pio_device(0x500)
        vmm.add_pio_device(0x500, 1, clock)
        other.start()
        vmm.snapshot()
        assert len(others) == 1


def test_a_pause_between_two_runs_holds_no_device_in_the_next() -> None:
    clock = Clock()
    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x500, 1, clock)
        vmm.run(0.01)
        vmm.pause()
        vmm.start()
        assert clock.calls == ["quiesce", "resume"]


class SlowClock(Clock):
    """Its first quiesce() returns when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()

    def quiesce(self) -> None:
        self.calls.append("quiesce")
        if self.calls.count("quiesce") > 1:
            return
        self.entered.set()
        assert self.go.wait(DEADLINE_S)
        if self.error:
            raise self.error


def pause_meanwhile(vmm: Vmm, clock: SlowClock, act: Callable[[], object]) -> None:
    """Pause, and `act` before the pause has quiesced the device."""

    def pause() -> None:
        try:
            vmm.pause()
        except LookupError as error:
            assert error is clock.error

    with ThreadPoolExecutor() as others:
        paused = others.submit(pause)
        assert clock.entered.wait(DEADLINE_S)
        try:
            act()
        finally:
            clock.go.set()
        paused.result()


@pytest.mark.parametrize("error", [None, LookupError("no")])
def test_a_pause_that_was_resumed_meanwhile_undoes_no_later_one(error: Exception | None) -> None:
    clock = SlowClock()
    clock.error = error
    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x500, 1, clock)
        vmm.start()

        def resume_and_pause() -> None:
            vmm.resume()
            vmm.pause()

        pause_meanwhile(vmm, clock, resume_and_pause)
        assert vmm.state is VmRunState.PAUSED
        quiesced = clock.calls.count("quiesce") - (error is not None)
        assert quiesced - clock.calls.count("resume") == 1
        vmm.resume()
        assert quiesced == clock.calls.count("resume")


@pytest.mark.parametrize("error", [None, LookupError("no")])
def test_a_pause_whose_run_ended_meanwhile_leaves_nothing_behind(error: Exception | None) -> None:
    clock = SlowClock()
    clock.error = error
    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x500, 1, clock)
        vmm.start()

        def end() -> None:
            vmm.stop()
            assert vmm.wait(DEADLINE_S) is not None

        pause_meanwhile(vmm, clock, end)
        assert vmm.state is VmRunState.PAUSED
        vmm.start()
        assert vmm.wait(0.01) is None
        assert clock.calls == ["quiesce"] + ["resume"] * (error is None)


def test_what_resume_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bad(Clock):
        def resume(self) -> None:
            raise LookupError("no")

    seen: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: seen.append(unraisable.exc_value))
    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x500, 1, Bad())
        vmm.snapshot()
    assert [str(error) for error in seen] == ["no"]


@pytest.mark.parametrize("missing", ["quiesce", "resume"])
def test_a_device_has_both_or_neither(missing: str) -> None:
    clock = Clock()
    setattr(clock, missing, None)
    with Vmm(flat(SPIN)) as vmm:
        with pytest.raises(TypeError, match=r"Clock has one of quiesce\(\) and resume\(\): both go together"):
            vmm.add_pio_device(0x500, 1, clock)
        vmm.add_pio_device(0x500, 1, Clock())


def test_a_coroutine_is_no_quiesce() -> None:
    class Bad(Clock):
        async def quiesce(self) -> None:  # type: ignore[override]
            pass

    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x500, 1, Bad())
        with pytest.raises(TypeError, match="quiesce"):
            vmm.snapshot()
    gc.collect()


def test_input_that_comes_while_the_machine_is_paused_is_read_afterwards() -> None:
    with Vmm(flat(ECHO)) as vmm:
        vmm.start()
        vmm.pause()
        vmm.serial.send(b"A")
        assert vmm.serial.input_waiting == 1
        fork = vmm.snapshot().fork(serial=SerialConfig())
        vmm.resume()
        for machine in (vmm.wait(DEADLINE_S), fork.run(DEADLINE_S)):
            assert machine is not None
            assert (machine.reason, machine.code) == (ExitReason.CODE, ord("A"))
        fork.close()

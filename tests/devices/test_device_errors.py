"""Exceptions and stops of Python devices: where they come out, and that none is lost.

Covers src/py/pending_outcome.rs.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
from guests import HALT, exit_with, flat, out, read_in
from pyvmm import CpuConfig, EventManager, Exit, ExitReason, StateError, Stop, Vcpu, Vmm, VmRunState

pytestmark = pytest.mark.kvm
DEADLINE_S = 60


def test_an_exception_comes_out_of_run_with_the_guests_address_and_the_guest_continues() -> None:
    class Device:
        def write(self, _offset: int, _size: int, value: int) -> None:
            raise LookupError(value)

    with Vmm(flat(out(0x502, 9) + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 4, Device())
        with pytest.raises(LookupError) as raised:
            vmm.run(DEADLINE_S)
        (note,) = raised.value.__notes__
        assert "in write() at port 0x502, offset 0x2 of the device, vCPU 0, guest RIP 0x100" in note
        assert raised.traceback[-1].name == "write"
        assert vmm.state is VmRunState.PAUSED
        assert vmm.run(DEADLINE_S).code == 3


def test_even_a_keyboard_interrupt_of_a_device_comes_out() -> None:
    class Device:
        def read(self, _offset: int, _size: int) -> int:
            raise KeyboardInterrupt

    with Vmm(flat(read_in(0x500) + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        with pytest.raises(KeyboardInterrupt):
            vmm.run(DEADLINE_S)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (None, TypeError, "int or bytes"),
        ("x", TypeError, "int or bytes"),
        (1.0, TypeError, "int or bytes"),
        (256, OverflowError, "8 bits"),
        (-1, OverflowError, "8 bits"),
        (1 << 64, OverflowError, "8 bits"),
        (b"", ValueError, "1 bytes, not 0"),
        (b"ab", ValueError, "1 bytes, not 2"),
    ],
    ids=repr,
)
def test_a_read_that_answers_nonsense_is_an_error_of_the_run(value: Any, error: type[Exception], text: str) -> None:
    class Device:
        def read(self, _offset: int, _size: int) -> Any:
            return value

    with Vmm(flat(read_in(0x500) + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        with pytest.raises(error, match=text):
            vmm.run(DEADLINE_S)
        assert vmm.run(DEADLINE_S).code == 3


def test_a_device_that_takes_other_arguments_is_an_error_of_the_run() -> None:
    class Device:
        def read(self) -> int:
            return 0

    with Vmm(flat(read_in(0x500) + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="argument"):
            vmm.run(DEADLINE_S)


@pytest.mark.parametrize("half", ["read", "write"])
def test_a_device_ends_the_run_with_a_value(half: str) -> None:
    class Device:
        def read(self, _offset: int, _size: int) -> Stop:
            return Stop(("read", self))

        def write(self, _offset: int, _size: int, value: int) -> Stop:
            return Stop(("write", self))

    device = Device()
    access = read_in(0x500) if half == "read" else out(0x500, 1)
    with Vmm(flat(access + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 1, device)
        exit = vmm.run(DEADLINE_S)
        assert exit == Exit(ExitReason.STOPPED, vcpu=0, value=(half, device))
        assert vmm.run(DEADLINE_S).code == 3


def test_of_two_exceptions_one_comes_out_and_notes_the_other() -> None:
    barrier = threading.Barrier(2)

    class Device:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            barrier.wait(DEADLINE_S)
            raise RuntimeError("from a device")

    code = b"\x66\xba\x00\x05\xee\xeb\xfd"
    with Vmm(flat(code, "user64", cpu=CpuConfig(vcpus=2), size_mib=2)) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        with pytest.raises(RuntimeError, match="from a device") as raised:
            vmm.run(DEADLINE_S)
        notes = "\n".join(raised.value.__notes__)
        assert "another callback raised RuntimeError" in notes


def test_of_an_exception_and_a_stop_the_stop_does_not_come_out_of_a_later_run() -> None:
    both = threading.Barrier(2)

    class Ends:
        def write(self, offset: int, _size: int, _value: int) -> Stop:
            both.wait(DEADLINE_S)
            if offset == 0:
                raise ValueError("mine")
            return Stop("stale")

    # 64 bits: mov edx, 0x500; add edx, edi; out dx, al; spin
    code = bytes.fromhex("ba00050000 01fa ee ebfe")
    with Vmm(flat(code, "long64", cpu=CpuConfig(vcpus=2))) as vmm:
        vmm.add_pio_device(0x500, 2, Ends())
        with pytest.raises(ValueError, match="mine"):
            vmm.run(DEADLINE_S)
        vmm.stop()
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.STOPPED)


def is_at_rest(vcpu: Vcpu) -> bool:
    """Whether its registers can be read."""
    try:
        return vcpu.regs.rip > 0
    except StateError:
        return False


def test_a_run_that_is_refused_leaves_the_exception_to_the_one_in_progress() -> None:
    class Raises:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            raise ValueError("mine")

    with Vmm(flat(out(0x500, 1) + HALT), event_manager=EventManager()) as vmm:
        vmm.add_pio_device(0x500, 1, Raises())
        (vcpu,) = vmm.vcpus
        vmm.start()
        while not is_at_rest(vcpu):
            pass
        with pytest.raises(StateError, match="started"):
            vmm.run()
        with pytest.raises(ValueError, match="mine"):
            vmm.wait(DEADLINE_S)


def test_an_uncollected_exception_of_a_device_is_reported_at_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    called = threading.Event()

    class Raises:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            called.set()
            raise ValueError("mine")

    with Vmm(flat(out(0x500, 1) + HALT)) as vmm:
        vmm.add_pio_device(0x500, 1, Raises())
        vmm.start()
        assert called.wait(DEADLINE_S)
    assert [repr(error) for error in told] == ["ValueError('mine')"]


def test_a_started_machine_raises_what_a_device_raised_when_it_is_waited_for() -> None:
    class Device:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            raise LookupError

    with Vmm(flat(out(0x500, 1) + exit_with(5))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        vmm.start()
        with pytest.raises(LookupError):
            vmm.wait(DEADLINE_S)
        assert vmm.run(DEADLINE_S).code == 5

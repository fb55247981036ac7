"""`run_until`: a machine that stops where its console shows a text, and continues; also in forks and pools."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING

import pytest
from guests import OUT_FOR_EVER, PRINT_FOR_EVER, SPIN, echo_until, exit_with, flat, print_text
from pyvmm import (
    ClosedError,
    Exit,
    ExitReason,
    Expected,
    ExpectTimeoutError,
    ForkExecutor,
    GuestEndedError,
    StateError,
    Vmm,
    VmmConfig,
    VmRunState,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[[VmmConfig], Vmm]

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120)]
DEADLINE_S = 60
COUNT = print_text(b"one two three") + exit_with(9)


def test_machine_stops_at_the_byte_and_continues(make: Make) -> None:
    vmm = make(flat(COUNT))
    assert vmm.run_until("one", DEADLINE_S) == Expected(0, "one", "")
    assert (vmm.state, vmm.console.text) == (VmRunState.PAUSED, "one")
    assert vmm.run_until([b"three", b"two"], DEADLINE_S) == Expected(1, b"two", b" ")
    assert vmm.console.text == "one two"
    assert vmm.run(DEADLINE_S) == Exit(ExitReason.CODE, 9, 0)


def test_text_that_began_before_the_call_counts(make: Make) -> None:
    vmm = make(flat(COUNT))
    vmm.serial.stop_at(b"one tw")
    assert vmm.run(DEADLINE_S).value == b"one tw"
    assert vmm.run_until(b"two", DEADLINE_S).before == b"one "
    assert vmm.console.text == "one two"


def test_text_that_is_there_runs_nothing(make: Make) -> None:
    vmm = make(flat(COUNT))
    vmm.serial.stop_at(b"two")
    vmm.run(DEADLINE_S)
    assert vmm.run_until("ne", DEADLINE_S).before == "o"
    assert vmm.console.text == "one two"


def test_stop_at_of_the_program_stays(make: Make) -> None:
    vmm = make(flat(COUNT))
    vmm.serial.stop_at(b"three")
    vmm.run_until("one", DEADLINE_S)
    with pytest.raises(GuestEndedError) as caught:
        vmm.run_until("four", DEADLINE_S)
    assert caught.value.exit == Exit(ExitReason.STOPPED, value=b"three")
    assert vmm.run(DEADLINE_S).code == 9


def test_regular_expression_stops_soon_after(make: Make) -> None:
    vmm = make(flat(PRINT_FOR_EVER))
    found = vmm.run_until(re.compile("x{10}"), DEADLINE_S)
    assert (found.matched, vmm.state) == ("x" * 10, VmRunState.PAUSED)
    assert vmm.run_until(re.compile("x{10}"), DEADLINE_S).before == ""


def test_guest_that_ends_at_the_match_is_reported_by_the_next_run(make: Make) -> None:
    for pattern in ("three", re.compile("three")):
        vmm = make(flat(COUNT))
        assert vmm.run_until(pattern, DEADLINE_S).matched == "three"
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.CODE, 9, 0)
        with pytest.raises(StateError, match="ended"):
            vmm.run(DEADLINE_S)


def test_time_out_stops_the_machine_which_can_continue(make: Make) -> None:
    vmm = make(flat(print_text(b"> ") + echo_until(ord("!"))))
    with pytest.raises(ExpectTimeoutError, match="run_until"):
        vmm.run_until("never", 0.05)
    assert vmm.state is VmRunState.PAUSED
    vmm.serial.send(b"never!")
    assert vmm.run_until("never", DEADLINE_S).before == "> "
    assert vmm.run(DEADLINE_S).code == 0


def test_end_of_the_guest_says_how(make: Make) -> None:
    vmm = make(flat(COUNT))
    with pytest.raises(GuestEndedError, match="code 9"):
        vmm.run_until("four", DEADLINE_S)


def test_machine_that_expect_or_start_has_started_is_stopped(make: Make) -> None:
    for start in (lambda vmm: vmm.serial.expect("> ", DEADLINE_S), Vmm.start):
        vmm = make(flat(print_text(b"> ") + echo_until(ord("!"))))
        start(vmm)
        vmm.serial.send(b"go")
        assert vmm.run_until("go", DEADLINE_S).matched == "go"
        assert vmm.state is VmRunState.PAUSED
        vmm.serial.send(b"!")
        assert vmm.run(DEADLINE_S).code == 0


def test_machine_of_another_thread_is_left_alone(make: Make) -> None:
    vmm = make(flat(SPIN))
    thread = threading.Thread(target=vmm.run, daemon=True)
    thread.start()
    while vmm.state is not VmRunState.RUNNING:
        threading.Event().wait(0.001)
    with pytest.raises(StateError, match="one run at a time"):
        vmm.run_until("never", 0.1)
    assert vmm.state is VmRunState.RUNNING
    vmm.stop()
    thread.join(DEADLINE_S)


def test_exception_of_a_callback_comes_out(make: Make) -> None:
    vmm = make(flat(OUT_FOR_EVER))

    class Raises:
        def write(self, offset: int, size: int, value: int) -> None:
            raise ZeroDivisionError("written")

    vmm.add_pio_device(0x500, 1, Raises())
    with pytest.raises(ZeroDivisionError, match="written"):
        vmm.run_until("never", DEADLINE_S)
    assert vmm.state is VmRunState.PAUSED


def test_fork_continues_with_the_console_of_the_original(make: Make) -> None:
    vmm = make(flat(COUNT))
    vmm.serial.stop_at(b"tw")
    vmm.run(DEADLINE_S)
    vmm.serial.expect("one", 0)
    snapshot = vmm.snapshot()
    for _ in range(2):
        with snapshot.fork() as fork:
            assert (fork.console.matched, fork.console.pending) == ("one", " tw")
            assert fork.run_until("two", DEADLINE_S).before == " "
            assert fork.serial.expect("three", DEADLINE_S).before == " "
    assert vmm.run_until("three", DEADLINE_S).before == " two "
    vmm.reset(snapshot)
    assert (vmm.console.matched, vmm.console.pending) == ("one", " tw")
    assert vmm.run_until("three", DEADLINE_S).before == " two "


def test_reset_of_a_machine_that_is_waited_for_begins_again(make: Make) -> None:
    vmm = make(flat(print_text(b"> ") + echo_until(ord("!"))))
    vmm.run_until("> ", DEADLINE_S)
    snapshot = vmm.snapshot()
    found: list[Expected[str]] = []
    waiter = threading.Thread(target=lambda: found.append(vmm.serial.expect("abc", DEADLINE_S)), daemon=True)
    waiter.start()
    vmm.serial.send(b"ab")
    while "ab" not in vmm.console:
        threading.Event().wait(0.001)
    vmm.reset(snapshot)
    vmm.serial.send(b"cabc")
    waiter.join(DEADLINE_S)
    assert found == [Expected(0, "abc", "c")]


def test_job_of_a_pool_leaves_no_trace(make: Make) -> None:
    vmm = make(flat(print_text(b"> ") + echo_until(ord("!"))))
    vmm.run_until("> ", DEADLINE_S)

    def job(fork: Vmm, text: str) -> tuple[str, str]:
        fork.serial.send(text.encode())
        seen = fork.console.text
        return seen, fork.run_until(text, DEADLINE_S).matched

    with ForkExecutor(vmm.snapshot(), workers=1) as pool:
        for text in ("abc", "c", "xyz"):
            assert pool.submit(job, text).result(DEADLINE_S) == ("> ", text)


def test_closed_machine_is_refused(make: Make) -> None:
    vmm = make(flat(SPIN))
    vmm.close()
    with pytest.raises(ClosedError):
        vmm.run_until("x")

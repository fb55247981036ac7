"""`expect`, `sendline` and the console's text, on machines that are run in every way.

Covers src/vmm/watch.rs, src/py/console.rs and src/py/vmm/console.rs.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from children import end_in
from guests import HALT, OUT_FOR_EVER, SPIN, echo_until, exit_with, flat, print_text
from pyvmm import (
    ClosedError,
    Exit,
    ExitReason,
    Expected,
    ExpectTimeoutError,
    GuestEndedError,
    KvmVm,
    StateError,
    Stop,
    Vmm,
    VmmConfig,
    VmRunState,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[[VmmConfig], Vmm]

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120)]
DEADLINE_S = 60
ECHO = echo_until(ord("!"))


def prompt(text: bytes) -> bytes:
    """Print a text, and then echo what is typed up to and with "!"."""
    return print_text(text) + ECHO


def test_expect_starts_the_machine_and_leaves_it_running(make: Make) -> None:
    vmm = make(flat(prompt(b"hello, login: ")))
    assert vmm.serial.expect("login: ", DEADLINE_S) == Expected(0, "login: ", "hello, ")
    assert vmm.state is VmRunState.RUNNING
    vmm.serial.sendline("root")
    assert vmm.serial.expect(b"root\n", DEADLINE_S).before == b""
    vmm.serial.sendline(b"bye!", end=b"")
    assert vmm.wait(DEADLINE_S) == Exit(ExitReason.CODE, 0, 0)
    assert vmm.serial.take_output() == b"hello, login: root\nbye!"


def test_run_continues_a_machine_that_expect_has_started(make: Make) -> None:
    for run in ("run", "run_here", "wait"):
        vmm = make(flat(prompt(b"> ")))
        vmm.serial.expect("> ", DEADLINE_S)
        vmm.serial.send(b"!")
        assert getattr(vmm, run)(DEADLINE_S) == Exit(ExitReason.CODE, 0, 0), run


def test_run_gets_the_exit_of_a_guest_that_ended_in_the_background(make: Make) -> None:
    for run in ("run", "run_here", "wait"):
        vmm = make(flat(print_text(b"ready") + exit_with(7)))
        vmm.serial.expect("ready", DEADLINE_S)
        while vmm.state is not VmRunState.EXITING:
            threading.Event().wait(0.001)
        assert getattr(vmm, run)(DEADLINE_S) == Exit(ExitReason.CODE, 7, 0), run


def test_start_makes_a_machine_that_expect_has_started_ones_own(make: Make) -> None:
    vmm = make(flat(prompt(b"> ")))
    vmm.serial.expect("> ", DEADLINE_S)
    vmm.start()
    with pytest.raises(StateError, match="has been started"):
        vmm.run(0)
    vmm.serial.send(b"!")
    assert vmm.wait(DEADLINE_S) == Exit(ExitReason.CODE, 0, 0)


@pytest.mark.parametrize("run", ["run", "run_here", "wait", "expect first"])
def test_expect_waits_beside_the_thread_that_runs_the_machine(make: Make, run: str) -> None:
    vmm = make(flat(prompt(b"> ")))
    exits: list[object] = []
    if run == "wait":
        vmm.start()
    name = run if run != "expect first" else "run"
    thread = threading.Thread(target=lambda: exits.append(getattr(vmm, name)(DEADLINE_S)), daemon=True)
    if run == "expect first":
        # The first expect drives the machine, and leaves that to `run`.
        waiter = threading.Thread(target=lambda: exits.append(vmm.serial.expect("typed", DEADLINE_S)), daemon=True)
        waiter.start()
        while vmm.state is not VmRunState.RUNNING:
            threading.Event().wait(0.001)
    thread.start()
    vmm.serial.expect("> ", DEADLINE_S)
    vmm.serial.sendline("typed")
    if run == "expect first":
        waiter.join(DEADLINE_S)
        assert exits == [Expected(0, "typed", "> ")]
        exits.clear()
    else:
        assert vmm.serial.expect(re.compile(b"typ(e)d"), DEADLINE_S).match is not None
    vmm.serial.send(b"!")
    thread.join(DEADLINE_S)
    assert exits == [Exit(ExitReason.CODE, 0, 0)]


def test_several_waiters_all_see_the_output(make: Make) -> None:
    vmm = make(flat(prompt(b"> ")))
    vmm.serial.expect("> ", DEADLINE_S)
    found: dict[str, Expected[str]] = {}

    def wait(name: str) -> None:
        found[name] = vmm.serial.expect(name[0], DEADLINE_S)

    names = ["a1", "a2", "b1", "c1"]
    threads = [threading.Thread(target=wait, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    ready = threading.Event()
    while vmm.serial._watches() < len(names):
        ready.wait(0.001)
    vmm.serial.send(b"xcba")
    for thread in threads:
        thread.join(DEADLINE_S)
    assert {name: one.before for name, one in found.items()} == {"a1": "xcb", "a2": "xcb", "b1": "xc", "c1": "x"}
    assert vmm.console.matched == "> xcba"


def test_matched_output_is_not_matched_again(make: Make) -> None:
    vmm = make(flat(print_text(b"one two one ") + SPIN))
    assert vmm.serial.expect("one", DEADLINE_S).before == ""
    assert vmm.serial.expect("one", DEADLINE_S).before == " two "
    with pytest.raises(ExpectTimeoutError) as caught:
        vmm.serial.expect("one", 0.01)
    assert caught.value.pending == " "
    assert (vmm.console.matched, vmm.console.pending) == ("one two one", " ")


def test_patterns_of_every_kind(make: Make) -> None:
    vmm = make(flat(print_text("a1 b2 \xe9\xff c3\n".encode("latin-1") + "é!".encode()) + SPIN))
    first = vmm.serial.expect([re.compile(rb"z"), "b", re.compile(r"a(\d)")], DEADLINE_S)
    assert (first.index, first.matched, first.before) == (2, "a1", "")
    assert first.match is not None
    assert first.match[1] == "1"
    second = vmm.serial.expect((b"b2", "b2"), DEADLINE_S)
    assert (second.index, second.matched, second.before) == (0, b"b2", b" ")
    third = vmm.serial.expect(re.compile(r"c\d$", re.MULTILINE), DEADLINE_S)
    assert third.before == " \ufffd\ufffd "
    assert vmm.serial.expect(re.compile("(é)!"), DEADLINE_S).before == "\n"
    assert vmm.console.pending == ""


def test_patterns_that_cannot_match_are_refused(make: Make) -> None:
    vmm = make(flat(SPIN))
    refused: list[tuple[Any, type[Exception]]] = [
        ("", ValueError), (b"", ValueError), ([], ValueError), (1, TypeError), (None, TypeError), ([["a"]], TypeError),
    ]  # fmt: skip
    for pattern, error in refused:
        with pytest.raises(error, match="pattern"):
            vmm.serial.expect(pattern, 0)
        with pytest.raises(error, match="pattern"):
            vmm.run_until(pattern, 0)
    for timeout in (-1, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            vmm.serial.expect("a", timeout)
    with pytest.raises(TypeError):
        vmm.serial.sendline(1)  # type: ignore[arg-type]
    assert vmm.state is VmRunState.CREATED


def test_time_out_shows_the_last_lines(make: Make) -> None:
    text = b"".join(b"line %d\r\n" % number for number in range(20)) + b"\x1b[1mlogin\x00"
    vmm = make(flat(print_text(text) + SPIN))
    vmm.serial.expect(b"\x00", DEADLINE_S)
    with pytest.raises(TimeoutError) as caught:
        vmm.serial.expect(["Password:", re.compile("[$]")], 0.01)
    assert str(caught.value).startswith(
        "expect: the console did not show 'Password:' or '[$]' within 0.01 s; its last lines are:\n  line 11\n"
    )
    assert str(caught.value).endswith("\n  line 19\n  \\x1b[1mlogin\\x00")
    assert "its last lines" in str(pickle.loads(pickle.dumps(caught.value)))
    assert vmm.state is VmRunState.RUNNING


def test_the_end_of_the_guest_says_how(make: Make) -> None:
    vmm = make(flat(print_text(b"bye") + exit_with(3)))
    with pytest.raises(GuestEndedError, match=r"ended with code 3 \(vCPU 0\).*\n  bye$") as caught:
        vmm.serial.expect("hello", DEADLINE_S)
    assert (caught.value.exit, caught.value.pending) == (Exit(ExitReason.CODE, 3, 0), "bye")
    assert isinstance(copy.copy(caught.value), EOFError)
    with pytest.raises(GuestEndedError, match="code 3"):
        vmm.serial.expect("hello", DEADLINE_S)
    assert vmm.serial.expect("bye", DEADLINE_S).before == "", "what it printed last is still there"


def test_last_output_of_a_guest_counts(make: Make) -> None:
    for _ in range(20):
        vmm = make(flat(print_text(b"the last words") + HALT))
        assert vmm.serial.expect("words", DEADLINE_S).before == "the last "


def test_run_that_another_thread_ends_ends_the_wait(make: Make) -> None:
    vmm = make(flat(SPIN))
    thread = threading.Thread(target=vmm.run, args=(0.2,), daemon=True)
    thread.start()
    while vmm.state is not VmRunState.RUNNING:
        threading.Event().wait(0.001)
    with pytest.raises(GuestEndedError) as caught:
        vmm.serial.expect("never", DEADLINE_S)
    assert caught.value.exit in (Exit(ExitReason.TIMEOUT), None)
    thread.join()
    with pytest.raises(GuestEndedError, match="it has shown nothing") as caught:
        threading.Timer(0.05, vmm.stop).start()
        vmm.serial.expect("never", DEADLINE_S)
    assert caught.value.exit == Exit(ExitReason.STOPPED)


def test_exception_of_a_callback_comes_out(make: Make) -> None:
    vmm = make(flat(OUT_FOR_EVER))

    class Raises:
        def write(self, offset: int, size: int, value: int) -> None:
            raise ZeroDivisionError("written")

    vmm.add_pio_device(0x500, 1, Raises())
    with pytest.raises(ZeroDivisionError, match="written"):
        vmm.serial.expect("never", DEADLINE_S)
    vmm.remove_pio_device(0x500)
    with pytest.raises(ExpectTimeoutError):
        vmm.serial.expect("never", 0.01)


def test_stop_of_a_device_is_in_the_error(make: Make) -> None:
    vmm = make(flat(OUT_FOR_EVER))

    class Stops:
        def write(self, offset: int, size: int, value: int) -> Stop:
            return Stop("enough")

    vmm.add_pio_device(0x500, 1, Stops())
    with pytest.raises(GuestEndedError) as caught:
        vmm.serial.expect("never", DEADLINE_S)
    assert caught.value.exit is not None
    assert caught.value.exit.value == "enough"


def test_callback_cannot_wait_for_its_own_machine(make: Make) -> None:
    raised: list[Exception] = []
    vmm = make(flat(print_text(b"x") + OUT_FOR_EVER))

    class Waits:
        def write(self, offset: int, size: int, value: int) -> Stop:
            assert vmm.serial.expect("x", 0).before == ""
            with pytest.raises(StateError, match="callback") as caught:
                vmm.serial.expect("never", 1)
            raised.append(caught.value)
            return Stop()

    vmm.add_pio_device(0x500, 1, Waits())
    vmm.run(DEADLINE_S)
    vmm.event_manager.call_later(0, lambda: vmm.serial.expect("never", 1))
    with pytest.raises(StateError, match="callback"):
        vmm.run(DEADLINE_S)
    assert len(raised) >= 1


def test_close_in_another_thread_ends_the_wait(make: Make) -> None:
    for beside in (False, True):
        vmm = make(flat(SPIN))
        if beside:
            threading.Thread(target=vmm.run, daemon=True).start()
            while vmm.state is not VmRunState.RUNNING:
                threading.Event().wait(0.001)
        closer = threading.Timer(0.05, vmm.close)
        closer.start()
        with pytest.raises((ClosedError, GuestEndedError)):  # the run ends before the machine is closed
            vmm.serial.expect("never", DEADLINE_S)
        closer.join()
        for call in (vmm.serial.expect, vmm.run_until):
            with pytest.raises(ClosedError):
                call("never")


def test_bare_machine_is_refused() -> None:
    with KvmVm(flat(SPIN)) as vm, pytest.raises(StateError, match="Vmm"):
        vm.serial.expect("x")


def test_forked_child_is_refused(make: Make) -> None:
    vmm = make(flat(prompt(b"> ")))
    vmm.serial.expect("> ", DEADLINE_S)
    calls = (vmm.serial.expect, vmm.run_until, vmm.serial.sendline)
    child = os.fork()
    if child == 0:
        refused = 0
        try:
            end_in(DEADLINE_S)
            for call in calls:
                with contextlib.suppress(StateError):
                    call("x")
                    break
                refused += 1
        finally:
            os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    vmm.serial.sendline("still here")
    vmm.serial.expect("here", DEADLINE_S)


@pytest.mark.parametrize("beside", [False, True])
def test_ctrl_c_ends_the_wait_at_once(beside: bool) -> None:
    program = f"""
import os, signal, threading, time
from children import end_in
from guests import SPIN, flat
from pyvmm import Vmm, VmRunState
with Vmm(flat(SPIN)) as vmm:
    if {beside}:
        threading.Thread(target=vmm.run, daemon=True).start()
        while vmm.state is not VmRunState.RUNNING:
            time.sleep(0.001)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        vmm.serial.expect("never")
    except KeyboardInterrupt:
        print("interrupted", time.monotonic() - began < 30)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        env={**os.environ, "PYTHONPATH": os.path.dirname(sys.modules["guests"].__file__ or "")},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "interrupted True\n"), done.stderr

"""Runs a machine for the command line: the console on the terminal, signals, and the exit status."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
from contextlib import ExitStack
from enum import IntEnum
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from pyvmm import screen_display, terminal
from pyvmm._pyvmm import Vmm
from pyvmm.exceptions import ExpectTimeoutError, GuestEndedError, StreamError
from pyvmm.exits import Exit, ExitReason
from pyvmm.signals import EndingSignals

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.live import Live

    from pyvmm.config import SerialConfig, VmmConfig

STDIN, STDOUT, STDERR = 0, 1, 2
MAX_GUEST_CODE = 99
SLOW_S = 1.0
LIVE_HZ = 2.0


class Status(IntEnum):
    """The exit statuses of `pyvmm run` other than the guest's own codes."""

    HIGH_CODE = 119
    GUEST_FAULT = 120
    RESET = 121
    PANIC = 122
    NOT_SHOWN = 123
    TIMEOUT = 124
    ERROR = 125
    HUNG_UP = 129
    INTERRUPTED = 130
    TERMINATED = 143


STATUSES = {
    f"0-{MAX_GUEST_CODE}": "the guest's own exit code; also 0 for a halt or a power-off",
    str(Status.HIGH_CODE): f"the guest's own exit code is above {MAX_GUEST_CODE}; stderr and --json have it",
    str(Status.GUEST_FAULT): "the guest failed: a triple fault, an exception, an instruction that KVM cannot execute",
    str(Status.RESET): "the guest reset the machine, as Linux does for reboot, and after a panic with panic=-1",
    str(Status.PANIC): "the guest reported a panic, by the pvpanic port",
    str(Status.NOT_SHOWN): "the console did not show the text of --expect",
    str(Status.TIMEOUT): "the time of --timeout passed",
    str(Status.ERROR): "pyvmm could not run the machine",
    str(Status.HUNG_UP): "ended by SIGHUP",
    str(Status.INTERRUPTED): "ended by Ctrl-A x or Ctrl-C",
    str(Status.TERMINATED): "ended by SIGTERM",
}
"""Every exit status of `pyvmm run` and `restore`, and what it means."""


# Terminals whose cursor cannot be moved.
NO_CURSOR = ("dumb", "unknown")


class Ask(NamedTuple):
    """What the command line asks of a run, other than the machine."""

    timeout: float | None = None
    as_json: bool = False
    expect: str | None = None
    screen: bool = False
    """Show the VGA text screen instead of the serial port, and look for `expect` there."""


class Instrumentation(NamedTuple):
    """How a run is observed: by counters, shown at the end or live, and by a trace file."""

    stats: bool = False
    live: bool = False
    trace: str | None = None

    @property
    def is_live(self) -> bool:
        """Whether the counters can be updated on a terminal."""
        return self.live and os.isatty(STDERR) and os.environ.get("TERM", "").lower() not in NO_CURSOR


def run_machine(config: VmmConfig, ask: Ask, watch: Instrumentation) -> int:
    """Run to the end and return the exit status."""

    def build(serial: SerialConfig) -> Vmm:
        return _build(config.replace(serial=serial))

    return run_with(config.serial, build, ask, watch)


def run_with(serial: SerialConfig, build: Callable[[SerialConfig], Vmm], ask: Ask, watch: Instrumentation) -> int:
    """Run the machine that `build` creates, with its console on the terminal. Return the exit status."""
    try:
        return _run(serial, build, ask, watch)
    except _TraceError as failed:
        raise failed.failure from None
    except StreamError as error:
        if error.errno == errno.EPIPE:  # the reader has closed the pipe
            print_error(ask.as_json, str(error))
            return Status.ERROR
        raise


class _TraceError(Exception):
    """The run was reported, but its trace could not be written."""

    def __init__(self, failure: StreamError) -> None:
        self.failure = failure


class Ended(NamedTuple):
    """How a run ended."""

    exit: Exit
    failure: StreamError | None = None
    """The error of the trace file, which does not end the run."""
    is_shown: bool | None = None
    """Whether the console showed the text of --expect."""


def _run(serial: SerialConfig, build: Callable[[SerialConfig], Vmm], ask: Ask, watch: Instrumentation) -> int:
    as_json = ask.as_json
    typing = os.isatty(STDIN) and serial.input is None
    with ExitStack() as stack:
        keys, pipe = _pipe(stack) if typing else (STDIN, -1)
        output = STDERR if as_json else STDOUT
        console = _console(serial, keys, None if ask.screen else output)
        vmm = stack.enter_context(build(console))
        if watch.stats and not as_json and not watch.is_live:
            stack.callback(_print_stats, vmm)  # after the terminal is restored, however the run ends
        ending = stack.enter_context(EndingSignals(vmm.stop))
        keyboard = terminal.Keyboard(STDIN, pipe, vmm.stop) if typing else None
        if keyboard:
            print(f"pyvmm: {terminal.HELP}", file=sys.stderr, flush=True)
            vmm.add_subscriber(keyboard)
            stack.enter_context(terminal.raw(STDIN))
        if ask.screen:
            stack.enter_context(screen_display.shown(vmm, output))
        start = time.monotonic()
        ended = _watched(vmm, watch, ask)
        seconds = time.monotonic() - start
        more: dict[str, Any] = {"unanswered": [count._asdict() for count in vmm.unanswered]}
        if ended.is_shown is not None:
            more["expect"] = {"text": ask.expect, "shown": ended.is_shown}
        if ask.screen:
            more["screen"] = vmm.screen.lines
        last_lines = vmm.console.tail() if ended.is_shown is False and not ask.screen else ""
    if watch.stats and as_json:
        more["stats"] = {
            key: [row._asdict() for row in getattr(vmm.stats, key)] for key in ("vcpus", "exits", "virtio")
        }
    status = _status(ended, ending.status, bool(keyboard and keyboard.keys.quit))
    _report(ended.exit, status, as_json, seconds, more)
    if ended.is_shown is False:
        end = "the screen did not show {}" if ask.screen else f"the console did not show {{}}; {_quoted(last_lines)}"
        print(f"pyvmm: {end.format(repr(ask.expect))}", file=sys.stderr)
    if ended.failure:
        raise _TraceError(ended.failure)
    return status


def _quoted(lines: str) -> str:
    return "its last lines are:\n" + "\n".join(f"  {line}" for line in lines.split("\n")) if lines else "it is empty"


def _status(ended: Ended, signal_status: int | None, is_quit: bool) -> int:
    if signal_status is not None:
        return signal_status
    if is_quit:
        return Status.INTERRUPTED
    if ended.is_shown is not None:
        return 0 if ended.is_shown else Status.NOT_SHOWN
    return exit_status(ended.exit)


def _watched(vmm: Vmm, watch: Instrumentation, ask: Ask) -> Ended:
    """Run with counters and trace."""
    ended: Ended | None = None
    try:
        with ExitStack() as stack:
            if watch.trace is not None:
                stack.enter_context(vmm.trace(watch.trace))
            if watch.stats:
                stack.enter_context(vmm.stats)
            if watch.is_live:
                stack.enter_context(_live(vmm))
            ended = Ended(vmm.run(ask.timeout)) if ask.expect is None else _expected(vmm, ask.expect, ask)
    except StreamError as failure:
        if ended is None:
            raise
        return ended._replace(failure=failure)
    return ended


def _expected(vmm: Vmm, text: str, ask: Ask) -> Ended:
    """Run until the console or the screen shows the text."""
    try:
        if ask.screen:
            vmm.screen.run_until(text, ask.timeout)
        else:
            vmm.run_until(os.fsencode(text), ask.timeout)
    except GuestEndedError as error:
        if error.exit is None:
            raise
        return Ended(error.exit, is_shown=False)
    except ExpectTimeoutError:
        return Ended(Exit(ExitReason.TIMEOUT), is_shown=False)
    return Ended(Exit(ExitReason.STOPPED), is_shown=True)


class _Lines(io.TextIOBase):
    """Stderr, which may be a terminal in raw mode."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text.replace("\n", "\r\n"))

    def flush(self) -> None:
        sys.stderr.flush()

    def fileno(self) -> int:
        return STDERR

    def isatty(self) -> bool:
        return os.isatty(STDERR)


def _live(vmm: Vmm) -> Live:
    """The counters on the terminal, updated by their own thread. The last state stays visible."""
    from rich.console import Console
    from rich.live import Live

    from pyvmm.stats import tables

    return Live(
        console=Console(file=cast("IO[str]", _Lines())),
        refresh_per_second=LIVE_HZ,
        redirect_stdout=False,
        redirect_stderr=False,
        get_renderable=lambda: tables(vmm.stats),
    )


def _print_stats(vmm: Vmm) -> None:
    from rich.console import Console

    from pyvmm.stats import tables

    Console(stderr=True).print(tables(vmm.stats))


ENDS = {
    ExitReason.HALT: 0,
    ExitReason.SHUTDOWN: 0,
    ExitReason.POWEROFF: 0,
    ExitReason.ALL_HALTED: 0,
    ExitReason.PANIC: Status.PANIC,
    ExitReason.RESET: Status.RESET,
    ExitReason.TIMEOUT: Status.TIMEOUT,
    ExitReason.STOPPED: Status.INTERRUPTED,
}


def exit_status(exit: Exit) -> int:
    """The exit status for the end of a guest."""
    if exit.is_fault:  # also a triple fault, whose reason is a shutdown
        return Status.GUEST_FAULT
    if exit.reason is ExitReason.CODE:
        code = exit.code or 0
        return code if code <= MAX_GUEST_CODE else Status.HIGH_CODE
    return ENDS.get(exit.reason, Status.GUEST_FAULT)


def _pipe(stack: ExitStack) -> tuple[int, int]:
    """Create a pipe that is closed with the stack."""
    reader, writer = os.pipe()
    for end in (reader, writer):
        stack.callback(os.close, end)
    os.set_blocking(writer, False)
    return reader, writer


def _console(serial: SerialConfig, input: int, output: int | None) -> SerialConfig:
    """Connect the serial port to these descriptors where the configuration names no stream."""
    values: dict[str, Any] = {}
    if serial.output is None:
        values["output"] = output
    if serial.input is None:
        values["input"] = input if _is_open(input) else "/dev/null"
    return serial.replace(**values)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _build(config: VmmConfig) -> Vmm:
    """Create the machine. If this takes long, show a message on the terminal."""
    if not os.isatty(STDERR):
        return Vmm(config)
    import threading

    from rich.console import Console

    console = Console(stderr=True)
    built = threading.Event()

    def tell() -> None:
        if not built.wait(SLOW_S):
            with console.status("loading the kernel"):
                built.wait()

    teller = threading.Thread(target=tell, name="progress", daemon=True)
    teller.start()
    try:
        return Vmm(config)
    finally:
        built.set()
        teller.join()


def _report(exit: Exit, status: int, as_json: bool, seconds: float, more: dict[str, Any]) -> None:
    if as_json:
        _print_json(exit, status, seconds, more)
    if status == Status.HIGH_CODE:
        print(f"pyvmm: the guest's exit code is {exit.code}; status {status}", file=sys.stderr)
    elif not as_json and (exit.is_fault or status == Status.TIMEOUT):
        print(f"pyvmm: {exit}", file=sys.stderr)


def print_error(as_json: bool, error: str, status: int = Status.ERROR) -> None:
    """With --json, print that the machine could not be run, or how it was interrupted before it ran."""
    if as_json:
        exit = Exit(ExitReason.STOPPED) if status == Status.INTERRUPTED else None
        more = {"error": error} if exit is None else {}
        _print_json(exit, status, time.monotonic() - STARTED, {"unanswered": [], **more})


_OF_AN_EXCEPTION = ("vector", "error_code", "cr2", "rip", "symbol")
STARTED = time.monotonic()


class _Printed:
    """Whether the JSON of this process is printed. There is one for each call."""

    is_done = False


def _print_json(exit: Exit | None, status: int, seconds: float, more: dict[str, Any]) -> None:
    """Print how a run ended, once. Without an exit, the machine could not be run."""
    if _Printed.is_done:
        return
    _Printed.is_done = True
    left_out = {"value"} if exit and exit.vector is not None else {"value", *_OF_AN_EXCEPTION}
    keys = [key for key in Exit._fields if key not in left_out]
    values = {key: getattr(exit, key, None) for key in keys}
    values["reason"] = exit.reason if exit else "error"
    print(json.dumps({**values, "status": status, "seconds": round(seconds, 6), **more}), flush=True)

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

import msgspec

from pyvmm import terminal
from pyvmm._pyvmm import Vmm
from pyvmm.exceptions import StreamError, VmmError
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

    GUEST_FAULT = 120
    TIMEOUT = 124
    ERROR = 125
    INTERRUPTED = 130


# Terminals whose cursor cannot be moved.
NO_CURSOR = ("dumb", "unknown")


class Instrumentation(NamedTuple):
    """How a run is observed: by counters, shown at the end or live, and by a trace file."""

    stats: bool = False
    live: bool = False
    trace: str | None = None

    @property
    def is_live(self) -> bool:
        """Whether the counters can be updated on a terminal."""
        return self.live and os.isatty(STDERR) and os.environ.get("TERM", "").lower() not in NO_CURSOR


def run_machine(config: VmmConfig, timeout: float | None, as_json: bool, watch: Instrumentation) -> int:
    """Run to the end and return the exit status."""

    def build(serial: SerialConfig) -> Vmm:
        return _build(msgspec.structs.replace(config, serial=serial))

    return run_with(config.serial, build, timeout, as_json, watch)


def run_with(
    serial: SerialConfig,
    build: Callable[[SerialConfig], Vmm],
    timeout: float | None,
    as_json: bool,
    watch: Instrumentation,
) -> int:
    """Run the machine that `build` creates, with its console on the terminal. Return the exit status."""
    start = time.monotonic()
    try:
        return _run(serial, build, timeout, as_json, watch)
    except KeyboardInterrupt:
        if as_json:
            _print_json(Exit(ExitReason.STOPPED), time.monotonic() - start, {"unanswered": []})
        return Status.INTERRUPTED
    except _TraceError as failed:
        raise failed.failure from None
    except VmmError as error:
        if as_json:
            _print_json(None, time.monotonic() - start, {"unanswered": [], "error": str(error)})
        if isinstance(error, StreamError) and error.errno == errno.EPIPE:  # the reader has closed the pipe
            return Status.ERROR
        raise


class _TraceError(Exception):
    """The run was reported, but its trace could not be written."""

    def __init__(self, failure: StreamError) -> None:
        self.failure = failure


def _run(
    serial: SerialConfig,
    build: Callable[[SerialConfig], Vmm],
    timeout: float | None,
    as_json: bool,
    watch: Instrumentation,
) -> int:
    typing = os.isatty(STDIN) and serial.input is None
    with ExitStack() as stack:
        keys, pipe = _pipe(stack) if typing else (STDIN, -1)
        console = _console(serial, keys, STDERR if as_json else STDOUT)
        vmm = stack.enter_context(build(console))
        if watch.stats and not as_json and not watch.is_live:
            stack.callback(_print_stats, vmm)  # after the terminal is restored, however the run ends
        ending = stack.enter_context(EndingSignals(vmm.stop))
        keyboard = terminal.Keyboard(STDIN, pipe, vmm.stop) if typing else None
        if keyboard:
            print(f"pyvmm: {terminal.HELP}", file=sys.stderr, flush=True)
            vmm.add_subscriber(keyboard)
            stack.enter_context(terminal.raw(STDIN))
        start = time.monotonic()
        exit, failure = _watched(vmm, watch, timeout)
        seconds = time.monotonic() - start
        more: dict[str, Any] = {"unanswered": [count._asdict() for count in vmm.unanswered]}
    if watch.stats and as_json:
        more["stats"] = {
            "vcpus": [time._asdict() for time in vmm.stats.vcpus],
            "exits": [count._asdict() for count in vmm.stats.exits],
        }
    _report(exit, as_json, seconds, more)
    if failure:
        raise _TraceError(failure)
    if ending.status is not None:
        return ending.status
    return Status.INTERRUPTED if keyboard and keyboard.keys.quit else exit_status(exit)


def _watched(vmm: Vmm, watch: Instrumentation, timeout: float | None) -> tuple[Exit, StreamError | None]:
    """Run with counters and trace. Also return the error of the trace file, which does not end the run."""
    exit: Exit | None = None
    try:
        with ExitStack() as stack:
            if watch.trace is not None:
                stack.enter_context(vmm.trace(watch.trace))
            if watch.stats:
                stack.enter_context(vmm.stats)
            if watch.is_live:
                stack.enter_context(_live(vmm))
            exit = vmm.run(timeout)
    except StreamError as failure:
        if exit is None:
            raise
        return exit, failure
    return exit, None


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


def exit_status(exit: Exit) -> int:
    """The exit status for the end of a guest."""
    if exit.reason is ExitReason.TIMEOUT:
        return Status.TIMEOUT
    if exit.reason is ExitReason.STOPPED:
        return Status.INTERRUPTED
    if exit.is_fault:
        return Status.GUEST_FAULT
    return min(exit.code or 0, MAX_GUEST_CODE)


def _pipe(stack: ExitStack) -> tuple[int, int]:
    """Create a pipe that is closed with the stack."""
    reader, writer = os.pipe()
    for end in (reader, writer):
        stack.callback(os.close, end)
    os.set_blocking(writer, False)
    return reader, writer


def _console(serial: SerialConfig, input: int, output: int) -> SerialConfig:
    """Connect the serial port to these descriptors where the configuration names no stream."""
    values: dict[str, Any] = {}
    if serial.output is None:
        values["output"] = output
    if serial.input is None:
        values["input"] = input if _is_open(input) else "/dev/null"
    return msgspec.structs.replace(serial, **values)


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


def _report(exit: Exit, as_json: bool, seconds: float, more: dict[str, Any]) -> None:
    if as_json:
        _print_json(exit, seconds, more)
    elif exit.is_fault or exit.reason is ExitReason.TIMEOUT:
        print(f"pyvmm: {exit}", file=sys.stderr)
    elif exit.code is not None and exit.code > MAX_GUEST_CODE:
        print(f"pyvmm: the guest's exit code is {exit.code}; status {MAX_GUEST_CODE}", file=sys.stderr)


_OF_AN_EXCEPTION = ("vector", "error_code", "cr2", "rip", "symbol")


def _print_json(exit: Exit | None, seconds: float, more: dict[str, Any]) -> None:
    """Print how a run ended. Without an exit, the machine could not be run."""
    left_out = {"value"} if exit and exit.vector is not None else {"value", *_OF_AN_EXCEPTION}
    keys = [key for key in Exit._fields if key not in left_out]
    values = {key: getattr(exit, key, None) for key in keys}
    values["reason"] = exit.reason if exit else "error"
    print(json.dumps({**values, "seconds": round(seconds, 6), **more}), flush=True)

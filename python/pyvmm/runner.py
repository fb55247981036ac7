"""A machine on the command line: the console at the terminal, signals, and the exit status."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import msgspec

from pyvmm import terminal
from pyvmm._pyvmm import Vmm
from pyvmm.exceptions import StreamError
from pyvmm.exits import Exit, ExitReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.config import SerialConfig, VmmConfig

STDIN, STDOUT, STDERR = 0, 1, 2
MOST_GUEST_CODE = 99
SLOW_S = 1.0


class Status(IntEnum):
    """What `pyvmm run` exits with beside the guest's own codes."""

    GUEST_FAULT = 120
    TIMEOUT = 124
    ERROR = 125
    INTERRUPTED = 130
    TERMINATED = 143


def run_machine(config: VmmConfig, timeout: float | None, as_json: bool) -> int:
    """Run to the end and return the exit status."""

    def build(serial: SerialConfig) -> Vmm:
        return _build(msgspec.structs.replace(config, serial=serial))

    return run_with(config.serial, build, timeout, as_json)


def run_with(serial: SerialConfig, build: Callable[[SerialConfig], Vmm], timeout: float | None, as_json: bool) -> int:
    """Run the machine that `build` makes with its console at the terminal; the exit status."""
    typing = os.isatty(STDIN) and serial.input is None
    with ExitStack() as stack:
        keys, pipe = _pipe(stack) if typing else (STDIN, -1)
        console = _console(serial, keys, STDERR if as_json else STDOUT)
        vmm = stack.enter_context(build(console))
        keyboard = terminal.Keyboard(STDIN, pipe, vmm.stop) if typing else None
        if keyboard:
            print(f"pyvmm: {terminal.HELP}", file=sys.stderr, flush=True)
            vmm.add_subscriber(keyboard)
            stack.enter_context(terminal.raw(STDIN))
        terminated = _stop_on_sigterm(vmm, stack)
        start = time.monotonic()
        try:
            exit = vmm.run(timeout)
        except KeyboardInterrupt:
            return Status.INTERRUPTED
        except StreamError as error:
            if error.errno == errno.EPIPE:  # the reader has seen enough
                return Status.ERROR
            raise
        seconds = time.monotonic() - start
        unanswered = [count._asdict() for count in vmm.unanswered]
    _report(exit, as_json, seconds, unanswered)
    if terminated:
        return Status.TERMINATED
    return Status.INTERRUPTED if keyboard and keyboard.keys.quit else exit_status(exit)


def exit_status(exit: Exit) -> int:
    """The exit status that tells how the guest ended."""
    if exit.reason is ExitReason.TIMEOUT:
        return Status.TIMEOUT
    if exit.reason is ExitReason.STOPPED:
        return Status.INTERRUPTED
    if exit.is_fault:
        return Status.GUEST_FAULT
    return min(exit.code or 0, MOST_GUEST_CODE)


def _pipe(stack: ExitStack) -> tuple[int, int]:
    """The two ends of a pipe, closed with the stack."""
    reader, writer = os.pipe()
    for end in (reader, writer):
        stack.callback(os.close, end)
    os.set_blocking(writer, False)
    return reader, writer


def _console(serial: SerialConfig, input: int, output: int) -> SerialConfig:
    """The port's two ends at this process's, where the configuration names no others."""
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
    """The machine; if that takes long, a terminal is told."""
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


def _stop_on_sigterm(vmm: Vmm, stack: ExitStack) -> list[int]:
    """Stop the machine at SIGTERM; the list is not empty then."""
    terminated: list[int] = []

    def stop(number: int, _frame: object) -> None:
        terminated.append(number)
        vmm.stop()

    before = signal.signal(signal.SIGTERM, stop)
    stack.callback(signal.signal, signal.SIGTERM, before)
    return terminated


def _report(exit: Exit, as_json: bool, seconds: float, unanswered: list[dict[str, Any]]) -> None:
    if as_json:
        values = {key: value for key, value in exit._asdict().items() if key != "value"}
        print(json.dumps({**values, "seconds": round(seconds, 6), "unanswered": unanswered}))
    elif exit.is_fault or exit.reason is ExitReason.TIMEOUT:
        print(f"pyvmm: {exit}", file=sys.stderr)
    elif exit.code is not None and exit.code > MOST_GUEST_CODE:
        print(f"pyvmm: the guest's exit code is {exit.code}; status {MOST_GUEST_CODE}", file=sys.stderr)

"""The console of a machine as text: its history, `expect`, `sendline` and `run_until`.

The native module keeps the newest output and does the waiting. `patterns` has the patterns and the
search.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NoReturn

from pyvmm.exceptions import ClosedError, ExpectTimeoutError, GuestEndedError, StateError
from pyvmm.exits import ExitReason, VmRunState
from pyvmm.patterns import LINE_WIDTH, Expected, Found, Patterns, Search, decode, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import TypeAlias

    from pyvmm._pyvmm import Serial, Vmm
    from pyvmm.exits import Exit

    Awaiter: TypeAlias = Callable[[Any, str], None]

# How much of the console an error shows.
TAIL_LINES = 10


class Console:
    """The text that the guest has printed to its first serial port: `Vmm.console`.

    At most the newest 256 KiB are kept, whether or not the output is configured or taken. The text
    is decoded as UTF-8; each byte that is not UTF-8 is shown as U+FFFD. It can be read at any time,
    from any thread, also after the machine is closed.
    """

    def __init__(self, serial: Serial) -> None:
        self._serial = serial

    @property
    def data(self) -> bytes:
        """The bytes that are kept."""
        return self._serial._kept()[1]

    @property
    def text(self) -> str:
        """The text that is kept: `matched` and `pending`."""
        return decode(self.data)

    @property
    def matched(self) -> str:
        """The text up to the end of the last match of `expect` or `run_until`."""
        start, data, matched = self._serial._kept()
        return decode(data[: matched - start])

    @property
    def pending(self) -> str:
        """The text after the last match, which the next `expect` begins with."""
        start, data, matched = self._serial._kept()
        return decode(data[matched - start :])

    @property
    def dropped(self) -> int:
        """The number of older bytes that are no longer kept. After a fork or a reset it counts on."""
        return self._serial._kept()[0]

    def skip(self) -> str:
        """Count all text so far as matched. Return what was pending."""
        watch = self._serial._watch()
        position, data = watch.look()
        watch.match_up_to(position + len(data))
        return decode(data)

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines, with control characters escaped and long lines shortened."""
        return tail(self.data, lines)

    def __contains__(self, text: str) -> bool:
        """Whether the text is on the console."""
        return text in self.text

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Console: {len(self.data)} bytes, the last line {self.tail(1)!r}>"

    def _repr_html_(self) -> str:
        """Return a table, for notebooks."""
        from pyvmm import notebook

        return notebook.console(self)


def tail(data: bytes, lines: int) -> str:
    """The last lines of the console, fit for an error message."""
    found = decode(data[-lines * LINE_WIDTH * 4 :]).replace("\r\n", "\n").rstrip().split("\n")[-lines:]
    return "\n".join(printable(line) for line in found)


class Expectation:
    """One wait for patterns on a machine's console. `name` is the call, for errors."""

    WHAT = "the console"
    # How long a wait may last before it looks again; None if an event ends it.
    POLL_S: float | None = None

    def __init__(self, vmm: object, serial: Serial, pattern: object, timeout: float | None, name: str) -> None:
        # Imported here, because the native module needs this one while a machine is used.
        from pyvmm._pyvmm import Vmm

        self.patterns = Patterns(pattern)
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout: {timeout} is not a number of seconds of at least 0")
        if getattr(vmm, "state", None) is VmRunState.CLOSED:
            raise ClosedError("the machine is closed", at="machine")
        if not isinstance(vmm, Vmm):
            raise StateError(f"{name}: only the console of a Vmm can be waited for", at=name, hint="use a Vmm")
        self.vmm = vmm
        self._serial = serial
        self._timeout = timeout
        self._name = name
        self._begin = 0
        self.watch = serial._watch()

    def beside(self, awaiter: Awaiter | None = None) -> Expected[Any] | None:
        """Wait for a match, beside the thread that runs the machine. Return None after it was cancelled."""
        return self._wait(False, awaiter)

    def alone(self, awaiter: Awaiter | None = None) -> Expected[Any] | None:
        """Run the machine up to a match, and stop it. Return None after it was cancelled."""
        self._stop_at_text()
        try:
            # Fails if another thread runs the machine, which is not stopped then.
            self.vmm._await_output(self.watch, 0.0, (False, True), awaiter)
            try:
                return self._wait(True, awaiter)
            finally:
                self._stop(awaiter)
        finally:
            self._serial._run_until([])

    def _stop_at_text(self) -> None:
        """If all patterns are texts, have the guest stop right behind one."""
        patterns = self.patterns
        if len(patterns.literals) == len(patterns.all):
            self._serial._run_until(list(patterns.literals.values()))

    def _stop(self, awaiter: Awaiter | None) -> None:
        if self.vmm.state is VmRunState.CLOSED or not self.vmm._is_running():
            return
        self.vmm.stop()
        over: tuple[Exit | None] | None = None
        while over is None:
            _, over = self.vmm._await_output(self.watch, None, (False, True), awaiter)
            self.watch.look()
        self._keep(over[0])

    def _keep(self, exit: Exit | None) -> None:
        """Keep the exit of a guest that has ended, which this call does not return."""
        if exit is not None and exit.reason is not ExitReason.STOPPED:
            self.vmm._keep_exit(exit)

    def _wait(self, is_alone: bool, awaiter: Awaiter | None) -> Expected[Any] | None:
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        search = Search(self.patterns)
        may_start = True
        over: tuple[Exit | None] | None = None
        is_running = False
        while True:
            if found := self._find(search):
                if over is not None and is_running:  # this call has run the machine to its end
                    self._keep(over[0])
                return found
            if self.watch.is_cancelled():
                return None
            if over is not None:
                self._raise_ended(over[0])
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                self._raise_late()
            if self.POLL_S is not None:
                left = self.POLL_S if left is None else min(left, self.POLL_S)
            is_running, over = self.vmm._await_output(self.watch, left, (may_start, is_alone), awaiter)
            may_start = may_start and not is_running

    def _find(self, search: Search) -> Expected[Any] | None:
        """A match in the new output."""
        found = search.feed(self._look(search))
        return self._take(found) if found else None

    def _look(self, search: Search) -> bytes:
        """The new output. The search begins again after a reset, and where output is no longer kept."""
        position, data = self.watch.look()
        if position != search.end:
            search.restart(position)
            self._begin = position
        return data

    def _take(self, found: Found) -> Expected[Any]:
        kept, data, _ = self._serial._kept()
        begin, start, end = (max(0, position - kept) for position in (self._begin, found.start, found.end))
        self.watch.match_up_to(found.end)
        return self.patterns.result(found, data[start:end], data[begin:start])

    def _raise_late(self) -> NoReturn:
        text = f"{self._name}: {self.WHAT} did not show {self.patterns} within {self._timeout} s"
        if self.vmm.state is VmRunState.PAUSED:
            text += "; the machine is paused"
        raise ExpectTimeoutError(self._with_tail(text), at=self._name, pending=self._pending())

    def _raise_ended(self, exit: Exit | None) -> NoReturn:
        if self.vmm.state is VmRunState.CLOSED:
            raise ClosedError("the machine is closed", at="machine")
        how = "with an exception" if exit is None else f"with {exit}".replace("\n", "; ")
        text = f"{self._name}: the run ended {how}, before {self.WHAT} showed {self.patterns}"
        raise GuestEndedError(self._with_tail(text), at=self._name, exit=exit, pending=self._pending())

    def _pending(self) -> str:
        kept, data, _ = self._serial._kept()
        return decode(data[max(0, self._begin - kept) :])

    def _with_tail(self, text: str) -> str:
        data = self._serial._kept()[1]
        if not data:
            return f"{text}; it has shown nothing"
        lines = tail(data, TAIL_LINES).replace("\n", "\n  ")
        return f"{text}; its last lines are:\n  {lines}"


def expect(vmm: object, serial: Serial, pattern: object, timeout: float | None) -> Expected[Any] | None:
    """Implement `Serial.expect`."""
    return Expectation(vmm, serial, pattern, timeout, "expect").beside()


def run_until(vmm: Vmm, serial: Serial, pattern: object, timeout: float | None) -> Expected[Any] | None:
    """Implement `Vmm.run_until`."""
    return Expectation(vmm, serial, pattern, timeout, "run_until").alone()


def expect_async(
    vmm: object, serial: Serial, pattern: object, timeout: float | None
) -> Coroutine[Any, Any, Expected[Any] | None]:
    """Implement `Serial.expect_async`."""
    _ = serial.input_waiting  # fails in a forked child, also if the coroutine is never awaited
    return _expect_async(vmm, serial, pattern, timeout)


async def _expect_async(vmm: object, serial: Serial, pattern: object, timeout: float | None) -> Expected[Any] | None:
    expectation = Expectation(vmm, serial, pattern, timeout, "expect_async")
    return await hosted(expectation, expectation.beside)


async def run_until_async(vmm: Vmm, serial: Serial, pattern: object, timeout: float | None) -> Any:
    """Implement `Vmm.run_until_async`."""
    expectation = Expectation(vmm, serial, pattern, timeout, "run_until_async")
    return await hosted(expectation, expectation.alone)


async def hosted(expectation: Expectation, wait: Callable[[Awaiter], Expected[Any] | None]) -> Expected[Any] | None:
    """Make a wait in a thread of its own, for a running asyncio loop."""
    from pyvmm import aio

    tasks = aio.Tasks(expectation.vmm.event_manager, expectation.watch.cancel)
    waiting = aio.ThreadCall(lambda: wait(tasks.take), "pyvmm expect_async")
    found: Expected[Any] | None = await aio.supervise(waiting, tasks, expectation.watch.cancel)
    return found


def line(text: object, end: object) -> bytes:
    """The input for `Serial.sendline`."""
    return b"".join(_input(part) for part in ("" if text is None else text, end))


def _input(text: object) -> bytes:
    if isinstance(text, str):
        return text.encode()
    if isinstance(text, (bytes, bytearray)):
        return bytes(text)
    raise TypeError(f"expected str or bytes, not {type(text).__qualname__}")

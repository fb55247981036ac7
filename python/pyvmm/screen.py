"""The guest's VGA text screen: `Vmm.screen`. Its characters are in guest memory; waits look at them repeatedly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyvmm.console import Expectation, hosted
from pyvmm.patterns import Search

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from pyvmm._pyvmm import Vmm
    from pyvmm.patterns import Expected

COLUMNS, ROWS = 80, 25
ADDRESS = 0xB8000
# The memory behind the screen; what is shown wraps around at its end.
SIZE = 0x8000
# The screen changes without an event, so a wait looks at it this often.
POLL_S = 0.05

# Code page 437 has pictures where Python's codec has control characters, and NUL is shown as blank.
_PICTURES = " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼"
_CHARACTERS = (_PICTURES + bytes(range(0x20, 0x100)).decode("cp437")).replace("\x7f", "⌂").replace("\xa0", " ")

# The sixteen colours, in the order of the attributes.
COLORS = (
    "#000000", "#0000aa", "#00aa00", "#00aaaa", "#aa0000", "#aa00aa", "#aa5500", "#aaaaaa",
    "#555555", "#5555ff", "#55ff55", "#55ffff", "#ff5555", "#ff55ff", "#ffff55", "#ffffff",
)  # fmt: skip
# The same colours of a terminal, whose red and blue are the other way around.
_TERMINAL = (0, 4, 2, 6, 1, 5, 3, 7)


class Screen:
    """What the guest shows on its VGA text screen of 80 by 25 characters: `Vmm.screen`.

    The characters are those in guest memory from 0xb8000 on, whether or not the machine has the
    registers of `PlatformConfig(screen=True)`, by which a guest moves the cursor and scrolls. Each
    attribute of this object looks at the memory anew. A guest that draws meanwhile may be seen in
    the middle of it.
    """

    def __init__(self, vmm: Vmm) -> None:
        self._vmm = vmm

    def _cells(self) -> bytes:
        """The characters and attributes that are shown, two bytes each."""
        start = 2 * self._view()[0] % SIZE
        memory = self._vmm.memory.read(ADDRESS, SIZE)
        return (memory + memory)[start : start + 2 * COLUMNS * ROWS]

    def _view(self) -> tuple[int, int | None]:
        """The first character, and the cursor's."""
        return self._vmm._screen() or (0, None)

    @property
    def lines(self) -> list[str]:
        """The 25 lines, without the blanks at their ends. Characters are those of code page 437."""
        return _lines(self._cells())

    @property
    def text(self) -> str:
        """The lines as one text, without empty lines at the end."""
        return "\n".join(self.lines).rstrip("\n")

    @property
    def attributes(self) -> list[bytes]:
        """The attributes of the 25 lines, 80 bytes each.

        Bits 0 to 3 are the colour of the character, bits 4 to 6 that of the background, and bit 7
        blinks.
        """
        return [row[1::2] for row in _rows(self._cells())]

    @property
    def cursor(self) -> tuple[int, int] | None:
        """The line and the column of the cursor, from 0; None if it is off or outside the screen."""
        start, cursor = self._view()
        at = -1 if cursor is None else cursor - start
        return divmod(at, COLUMNS) if 0 <= at < COLUMNS * ROWS else None

    def expect(self, pattern: Any, timeout: float | None = None) -> Expected[Any]:
        """Wait until the screen shows a pattern, and return the match.

        The patterns, and which thread runs the machine, are as for `Serial.expect`. The call looks
        at the screen about twenty times a second, so it may miss a text that is there for a shorter
        time. What is there at the call counts, also if an earlier call has matched it.

        Raises:
            ExpectTimeoutError: nothing matched in this time; the guest keeps running. It shows the
                screen.
            GuestEndedError: the run ended before a match; it says how.
            StateError: a callback of the machine made the call.
            ClosedError: the machine is closed.
        """
        found = ScreenExpectation(self, pattern, timeout, "screen.expect").beside()
        assert found is not None
        return found

    def expect_async(self, pattern: Any, timeout: float | None = None) -> Coroutine[Any, Any, Expected[Any]]:
        """`expect` in a running asyncio loop, which stays responsive. Cancelling it does not stop the guest."""
        return self._expect_async(pattern, timeout)

    async def _expect_async(self, pattern: Any, timeout: float | None) -> Any:
        expectation = ScreenExpectation(self, pattern, timeout, "screen.expect_async")
        return await hosted(expectation, expectation.beside)

    def run_until(self, pattern: Any, timeout: float | None = None) -> Expected[Any]:
        """Run the guest until its screen shows a pattern, and stop it soon after: `expect` as `Vmm.run_until`."""
        found = ScreenExpectation(self, pattern, timeout, "screen.run_until").alone()
        assert found is not None
        return found

    def __contains__(self, text: str) -> bool:
        """Whether the text is on the screen, within a line."""
        return text in "\n".join(self.lines)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        lines = [line for line in self.lines if line]
        return f"<Screen: {len(lines)} lines with text, cursor {self.cursor}>"

    def _repr_html_(self) -> str:
        """Return the screen in its colours, for notebooks."""
        from html import escape

        def span(attribute: int, text: str) -> str:
            style = f"color:{COLORS[attribute & 15]};background:{COLORS[attribute >> 4 & 7]}"
            return f'<span style="{style}">{escape(text)}</span>'

        rows = ("".join(span(*run) for run in _runs(row)) for row in _rows(self._cells()))
        style = f"background:{COLORS[0]};line-height:1.2;display:inline-block;padding:0.3em"
        return f'<pre style="{style}">' + "\n".join(rows) + "</pre>"

    def ansi(self) -> list[str]:
        """The 25 lines with escape sequences for their colours, for a terminal."""
        return ["".join(_colored(*run) for run in _runs(row)) + "\x1b[0m" for row in _rows(self._cells())]


def _rows(cells: bytes) -> list[bytes]:
    return [cells[at : at + 2 * COLUMNS] for at in range(0, len(cells), 2 * COLUMNS)]


def _lines(cells: bytes) -> list[str]:
    return ["".join(_CHARACTERS[byte] for byte in row[::2]).rstrip() for row in _rows(cells)]


def _runs(row: bytes) -> Iterator[tuple[int, str]]:
    """The pieces of a line whose attributes are the same: the attribute, and the text."""
    start = 0
    attributes = row[1::2]
    for at in range(1, COLUMNS + 1):
        if at == COLUMNS or attributes[at] != attributes[start]:
            yield attributes[start], "".join(_CHARACTERS[byte] for byte in row[2 * start : 2 * at : 2])
            start = at


def _colored(attribute: int, text: str) -> str:
    foreground = (90 if attribute & 8 else 30) + _TERMINAL[attribute & 7]
    return f"\x1b[0;{foreground};{40 + _TERMINAL[attribute >> 4 & 7]}m{text}"


class ScreenExpectation(Expectation):
    """One wait for patterns on a machine's screen."""

    WHAT = "the screen"
    POLL_S = POLL_S

    def __init__(self, screen: Screen, pattern: object, timeout: float | None, name: str) -> None:
        super().__init__(screen._vmm, screen._vmm.serial, pattern, timeout, name)
        self._screen = screen

    def _find(self, search: Search) -> Expected[Any] | None:
        """A match on the screen as it is now."""
        self.watch.look()  # output on the console is no reason to look again
        search.restart(0)
        data = "\n".join(self._screen.lines).encode()
        if (found := search.feed(data)) is None:
            return None
        return self.patterns.result(found, data[found.start : found.end], data[: found.start])

    def _stop_at_text(self) -> None:
        """No text on the console ends the run."""

    def _pending(self) -> str:
        return self._screen.text

    def _with_tail(self, text: str) -> str:
        shown = self._screen.text
        return f"{text}; it shows:\n  " + shown.replace("\n", "\n  ") if shown else f"{text}; it is empty"

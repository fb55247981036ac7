"""Patterns on the console: what `expect` looks for, the search in the output, and the result."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, AnyStr, Generic, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

# The longest match of a regular expression that is found for certain. Each piece of output is
# searched together with this much before it, so that the time for any output is linear in its
# length.
WINDOW = PIECE = 4096
# What a regular expression may look back at, before the window.
BEHIND = 256
# The longest line that an error shows.
LINE_WIDTH = 200

NOT_UTF8 = re.compile("[\udc80-\udcff]")


def decode(data: bytes) -> str:
    """The bytes as UTF-8. Each byte that is not is one U+FFFD."""
    return shown(data.decode(errors="surrogateescape"))


def shown(text: str) -> str:
    """A text decoded with `surrogateescape`, with U+FFFD for what is not UTF-8. The length stays the same."""
    return NOT_UTF8.sub("\ufffd", text)


def printable(line: str) -> str:
    """One line, with control characters escaped, and only its end if it is long."""
    text = "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in line.rstrip("\r"))
    return text if len(text) <= LINE_WIDTH else f"... {text[-LINE_WIDTH:]}"


@dataclass(frozen=True, slots=True)
class Expected(Generic[AnyStr]):
    """What `expect` has found.

    Attributes:
        index: the number of the pattern in the list, or 0.
        matched: the text that matched, of the pattern's type.
        before: the text between the last match and this one, as far as it is kept.
        match: for a regular expression, its `re.Match`, for the groups. The positions in it count
            from an arbitrary place in the output.
    """

    index: int
    matched: AnyStr
    before: AnyStr
    match: re.Match[AnyStr] | None = None


class Found(NamedTuple):
    """Where a pattern has matched, as positions in the output."""

    number: int
    start: int
    end: int
    match: re.Match[Any] | None


class Patterns:
    """The patterns of one call: literal texts as bytes, and regular expressions."""

    def __init__(self, given: object) -> None:
        self.all = list(given) if isinstance(given, (list, tuple)) else [given]
        if not self.all:
            raise ValueError("pattern: the list is empty")
        self.literals: dict[int, bytes] = {}
        self.of_bytes: dict[int, re.Pattern[bytes]] = {}
        self.of_text: dict[int, re.Pattern[str]] = {}
        for index, pattern in enumerate(self.all):
            if isinstance(pattern, (str, bytes, bytearray)):
                if not pattern:
                    raise ValueError("pattern: an empty text matches everywhere")
                self.literals[index] = pattern.encode() if isinstance(pattern, str) else bytes(pattern)
            elif not isinstance(pattern, re.Pattern):
                kinds = "bytes, str, a compiled regular expression, or a list of them"
                raise TypeError(f"pattern: expected {kinds}, not {type(pattern).__qualname__}")
            elif isinstance(pattern.pattern, str):
                self.of_text[index] = pattern
            else:
                self.of_bytes[index] = pattern

    def __str__(self) -> str:
        names = [repr(p.pattern if isinstance(p, re.Pattern) else p) for p in self.all]
        return " or ".join(printable(name) for name in names)

    def result(self, found: Found, output: bytes, before: bytes) -> Expected[Any]:
        """What the caller gets for a match, in the type of the pattern."""
        pattern = self.all[found.number]
        kind = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
        matched = found.match.group() if found.match else output if isinstance(kind, bytes) else pattern
        return Expected(found.number, matched, decode(before) if isinstance(kind, str) else before, found.match)


class Search:
    """Looks for patterns in a stream of output, in time linear in its length."""

    def __init__(self, patterns: Patterns) -> None:
        self._patterns = patterns
        self._overlap = max(map(len, patterns.literals.values()), default=1) - 1
        self.restart(0)

    def restart(self, position: int) -> None:
        """Forget what was seen. The next output begins at this position."""
        self.end = position
        self._tail = b""
        self._bytes = Window(position)
        self._text = TextWindow(position)

    def feed(self, data: bytes) -> Found | None:
        """Search the next output. After a match, the rest of it is left out."""
        for at in range(0, len(data), PIECE):
            if found := self._feed(data[at : at + PIECE]):
                return found
        return None

    def _feed(self, piece: bytes) -> Found | None:
        found = [*self._literals(piece)]
        if self._patterns.of_bytes:
            self._bytes.add(piece)
            found += self._bytes.search(self._patterns.of_bytes)
        if self._patterns.of_text:
            self._text.add(piece)
            found += self._text.search(self._patterns.of_text)
        self.end += len(piece)
        return min(found, key=lambda one: (one.start, one.number), default=None)

    def _literals(self, piece: bytes) -> Iterator[Found]:
        if not self._patterns.literals:
            return
        window, start = self._tail + piece, self.end - len(self._tail)
        for index, text in self._patterns.literals.items():
            at = window.find(text)
            if at >= 0:
                yield Found(index, start + at, start + at + len(text), None)
        self._tail = window[max(0, len(window) - self._overlap) :]


class Window:
    """The newest output, for regular expressions of bytes."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._data = b""
        self._from = 0

    def add(self, piece: bytes) -> None:
        """Append output, and drop what is older than the window."""
        self._data += piece
        drop = len(self._data) - len(piece) - WINDOW - BEHIND
        if drop > 0:
            self._data = self._data[drop:]
            self._start += drop
            # Not from 0, where `^` would match.
            self._from = BEHIND

    def search(self, patterns: dict[int, re.Pattern[bytes]]) -> Iterator[Found]:
        """The first match of each pattern."""
        for index, pattern in patterns.items():
            if match := pattern.search(self._data, self._from):
                yield Found(index, self._start + match.start(), self._start + match.end(), match)


class TextWindow:
    """The newest output, for regular expressions of str. A character is one byte where it is not UTF-8."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._raw = ""
        self._from = 0

    def add(self, piece: bytes) -> None:
        """Append output, and drop what is older than the window."""
        more = self._decoder.decode(piece)
        self._raw += more
        drop = len(self._raw) - len(more) - WINDOW - BEHIND
        if drop > 0:
            self._start += self._length(drop)
            self._raw = self._raw[drop:]
            self._from = BEHIND

    def _length(self, characters: int) -> int:
        return len(self._raw[:characters].encode(errors="surrogateescape"))

    def search(self, patterns: dict[int, re.Pattern[str]]) -> Iterator[Found]:
        """The first match of each pattern."""
        text = shown(self._raw)
        for index, pattern in patterns.items():
            if match := pattern.search(text, self._from):
                start, end = (self._start + self._length(at) for at in match.span())
                yield Found(index, start, end, match)

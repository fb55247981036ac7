"""The search of `pyvmm.patterns` in output of any size and in any pieces. Covers python/pyvmm/patterns.py."""

from __future__ import annotations

import itertools
import re
import time

from hypothesis import given
from hypothesis import strategies as st
from pyvmm.console import tail
from pyvmm.patterns import PIECE, WINDOW, Found, Patterns, Search, decode

TEXTS = st.lists(st.sampled_from([b"a", b"ab", b"\xc3\xa9", b"\xc3", b"\xa9", b"\n", b"\xff"]), max_size=12).map(
    b"".join
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def feed(search: Search, parts: list[bytes]) -> Found | None:
    return next((found for part in parts if (found := search.feed(part))), None)


@given(TEXTS, st.lists(st.integers(0, 30), max_size=8), st.binary(min_size=1, max_size=3))
def test_literal_is_found_where_it_is_whatever_the_pieces(data: bytes, cuts: list[int], text: bytes) -> None:
    for literal in (text, b"ab", b"\xc3\xa9"):
        search = Search(Patterns(literal))
        search.restart(1000)
        found = feed(search, pieces(data, cuts))
        at = data.find(literal)
        assert (found and (found.start - 1000, found.end - found.start)) == ((at, len(literal)) if at >= 0 else None)


@given(TEXTS, st.lists(st.integers(0, 30), max_size=8))
def test_regular_expressions_find_the_same_in_pieces(data: bytes, cuts: list[int]) -> None:
    for pattern in (
        re.compile(rb"b\n"),
        re.compile(rb"^a", re.MULTILINE),
        re.compile(rb"(?<=a)\xff"),
        re.compile(rb"\A\n"),
    ):
        search = Search(Patterns(pattern))
        found = feed(search, pieces(data, cuts))
        whole = pattern.search(data)
        assert (found and (found.start, found.end)) == (whole and whole.span())


@given(TEXTS, st.lists(st.integers(0, 30), max_size=8))
def test_positions_in_text_are_those_of_the_bytes(data: bytes, cuts: list[int]) -> None:
    for pattern in (re.compile("éa"), re.compile("\n"), re.compile("ab?\n")):
        found = feed(Search(Patterns(pattern)), pieces(data, cuts))
        whole = pattern.search(decode(data))
        assert (found is None) == (whole is None)
        if found and whole:
            assert decode(data[found.start : found.end]) == whole.group()
            assert decode(data[: found.start]) == decode(data)[: whole.start()]


@given(st.binary(max_size=40))
def test_text_has_a_character_for_each_byte_that_is_not_utf8(data: bytes) -> None:
    text = decode(data)
    assert len(text) == len(data.decode(errors="surrogateescape"))
    text.encode()  # no surrogates
    if "\ufffd" not in text:
        assert text.encode() == data


@given(st.binary(max_size=60), st.integers(1, 4))
def test_tail_is_printable_lines(data: bytes, lines: int) -> None:
    found = tail(data, lines)
    assert len(found.split("\n")) <= lines
    assert all(char.isprintable() or char in "\n\t" for char in found)


def test_match_longer_than_a_piece_is_found_up_to_the_window() -> None:
    for size in (10, PIECE, WINDOW - 2):
        for before in (0, 1, PIECE - 1, 3 * PIECE + 7):
            data = b"." * before + b"<" + b"x" * (size - 2) + b">" + b"." * 10
            for pattern in (re.compile(b"<x*>"), re.compile("<x*>")):
                found = Search(Patterns(pattern)).feed(data)
                assert found is not None
                assert (found.start, found.end) == (before, before + size)


def test_caret_matches_at_the_first_byte_only() -> None:
    for pattern in (re.compile(b"^x"), re.compile(r"\Ax")):
        search = Search(Patterns(pattern))
        assert search.feed(b"." + b"x" * (20 * PIECE)) is None


def test_time_grows_with_the_length_and_no_faster() -> None:
    """16 MiB by a literal and a regular expression; a search of all output for each piece would take hours."""
    search = Search(Patterns(["needle", re.compile(rb"needle$"), re.compile("näh")]))
    began = time.monotonic()
    for _ in range(4096):
        assert search.feed(b"x" * PIECE) is None
    assert time.monotonic() - began < 60
    assert len(search._bytes._data) <= 4 * WINDOW
    assert len(search._text._raw) <= 4 * WINDOW

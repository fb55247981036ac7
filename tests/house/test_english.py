"""Phrases that are translations rather than English do not come back.

The list is short on purpose. Each phrase has a plain equivalent, and none has a legitimate use in
this tree.
"""

from __future__ import annotations

import io
import re
import tokenize
from functools import cache
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PHRASES = {
    r"\b(?:has|have|had) (?:it|them) not\b": "does not have it",
    r"\b(?:has|have) not (?:the|a|an|any)\b": "does not have the",
    r"\bfor (?:good|ever)\b": "permanently, forever",
    r"\bwhoever\b": "a thread that, a caller that",
    r"\b(?:go|goes|went) on\b(?! to\b)": "continue",
    r"\b(?:is|are|was|were) told\b": "is notified, is reported",
    r"\bis had\b": "is available",
    r"\bin the midst of\b": "in the middle of",
    r"\bthat which\b": "what, the one that",
    r"\bof one's own\b": "separate",
    r"\bfor want of\b": "because there is no",
    r"\blook(?:s|ed)? into\b": "inspect, access",
}
FOLDERS = ("src", "python", "docs", "examples", "tests", "benches")


def files() -> list[Path]:
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in {".md", ".rs", ".py", ".pyi"}]
    return sorted(found)


def python_prose(text: str) -> Iterator[tuple[int, str]]:
    """The comments and docstrings of a Python file, by line."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.string.startswith('"""')
        if token.type == tokenize.COMMENT or is_docstring:
            for number, line in enumerate(token.string.splitlines()):
                yield token.start[0] + number, line


def rust_prose(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if comment := re.search(r"(?:^|\s)//.*", line):
            yield number, comment[0]


def prose(path: Path) -> Iterator[tuple[int, str]]:
    text = path.read_text()
    if path.suffix == ".rs":
        return rust_prose(text)
    if path.suffix in {".py", ".pyi"}:
        return python_prose(text)
    return enumerate(text.splitlines(), 1)


@cache
def everything() -> list[tuple[str, str]]:
    """Every line of prose in the tree, with its file and number."""
    found = [path for path in files() if path.name != "test_english.py"]
    return [(f"{path.relative_to(ROOT)}:{number}", line) for path in found for number, line in prose(path)]


def uses(phrase: str) -> dict[str, str]:
    """Where a phrase is used: file and line, with the line."""
    pattern = re.compile(phrase, re.IGNORECASE)
    return {place: line.strip() for place, line in everything() if pattern.search(line)}


@pytest.mark.parametrize("phrase", PHRASES)
def test_phrase_does_not_come_back(phrase: str) -> None:
    assert uses(phrase) == {}, f"say instead: {PHRASES[phrase]}"


def test_each_kind_of_file_is_read() -> None:
    read = {path.suffix: list(prose(path)) for path in files()}
    assert set(read) == {".md", ".rs", ".py", ".pyi"}
    assert [line for _, line in rust_prose('let a = "http://x"; // One.')] == [" // One."]
    assert [line for _, line in python_prose('"""One."""\n# two\nx = "three"\n')] == ['"""One."""', "# two"]

"""Rooms import one way, and the files of a room do not import each other in a circle."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "Cargo.toml").exists())
SOURCES = ROOT / "src"
ITEM = r"(?:fn|struct|enum|trait|type|const|static|union|macro_rules!)"


@dataclass(frozen=True)
class Import:
    """A line of `file` that names something of `target`."""

    file: Path
    line: int
    target: Path
    text: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.text}"


def rooms() -> list[str]:
    """The order of the rooms, ground first, as the crate's documentation gives it."""
    text = (SOURCES / "lib.rs").read_text()
    found = re.search(r"^//! ```text\n(.*?)^//! ```", text, re.MULTILINE | re.DOTALL)
    assert found, "src/lib.rs lists the rooms in a block of text"
    return re.findall(r"\w+", re.sub(r"^//!", "", found[1], flags=re.MULTILINE))


def room_of(file: Path) -> str:
    return file.relative_to(SOURCES).parts[0].removesuffix(".rs")


@cache
def code_of(file: Path) -> str:
    """A file without comments, strings and its unit tests; every line keeps its number."""
    text = file.read_text()
    blank = lambda found: re.sub(r"[^\n]", " ", found[0])  # noqa: E731
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r'b?"(?:\\.|[^"\\])*"', blank, text, flags=re.DOTALL)
    tests = re.search(r"^#\[cfg\((?:all\()?test", text, re.MULTILINE)
    return text[: tests.start()] if tests else text


def expand(tree: str) -> list[str]:
    """Each path of a `use` tree: `a::{b, c::d}` is `a::b` and `a::c::d`."""
    tree = tree.strip()
    found = re.match(r"([^{]*)\{(.*)\}$", tree, re.DOTALL)
    if not found:
        return [re.sub(r"\s+as\s+\w+$", "", tree)]
    parts, depth, item = [], 0, ""
    for character in found[2] + ",":
        if character == "," and depth == 0:
            parts += [found[1] + path for path in expand(item)] if item.strip() else []
            item = ""
            continue
        depth += {"{": 1, "}": -1}.get(character, 0)
        item += character
    return parts


@cache
def paths_of(file: Path) -> list[tuple[int, str, bool]]:
    """Line, path, and whether it is a re-export, of all that a file names by a path of this crate."""
    code = code_of(file)
    uses = list(re.finditer(r"^[ \t]*(pub(?:\([^)]*\))? )?use\s+([^;]+);", code, re.MULTILINE))
    found = []
    for use in uses:
        line = code.count("\n", 0, use.start(2)) + 1
        found += [(line, path, bool(use[1])) for path in expand(use[2])]
    rest = code
    for use in uses:
        rest = rest[: use.start()] + re.sub(r"[^\n]", " ", use[0]) + rest[use.end() :]
    for path in re.finditer(r"\b(?:crate|super)(?:::\w+)+", rest):
        found.append((rest.count("\n", 0, path.start()) + 1, path[0], False))
    return found


def child(module: Path, name: str) -> Path | None:
    """The file of a module within a module."""
    folder = module.parent if module.name in {"lib.rs", "mod.rs"} else module.with_suffix("")
    for file in (folder / f"{name}.rs", folder / name / "mod.rs"):
        if file.exists():
            return file
    return None


def parent(module: Path) -> Path:
    folder = module.parent.parent if module.name == "mod.rs" else module.parent
    return SOURCES / "lib.rs" if folder == SOURCES else folder / "mod.rs"


def resolve(module: Path, names: list[str], depth: int = 0) -> Path:
    """The file that defines what a path names, behind re-exports."""
    if not names or depth > 8:
        return module
    first, *rest = names
    steps = {"self": module, "*": module, "super": parent(module), "crate": SOURCES / "lib.rs"}
    onward = steps.get(first) or child(module, first)
    if onward:
        return resolve(onward, rest, depth)
    for _, path, exported in paths_of(module):
        words = path.split("::")
        if exported and words[-1] == first and words != names:
            return resolve(module, [*words, *rest], depth + 1)
    return module


def imports_of(file: Path) -> list[Import]:
    lines = code_of(file).split("\n")
    found = []
    for line, path, exported in paths_of(file):
        names = path.split("::")
        if exported or not (names[0] in ("crate", "super", "self") or child(file, names[0])):
            continue
        target = resolve(file, names)
        if target not in (file, SOURCES / "lib.rs"):
            found.append(Import(file, line, target, lines[line - 1].strip()))
    return found


@cache
def everything() -> list[Import]:
    files = [file for file in sorted(SOURCES.rglob("*.rs")) if file.name != "lib.rs"]
    return [found for file in files for found in imports_of(file)]


def circles(imports: list[Import]) -> list[set[Path]]:
    """Files that reach each other."""
    onward: dict[Path, set[Path]] = {}
    for found in imports:
        onward.setdefault(found.file, set()).add(found.target)

    def reached(start: Path) -> set[Path]:
        seen: set[Path] = set()
        ahead = [start]
        while ahead:
            for target in onward.get(ahead.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    ahead.append(target)
        return seen

    reach = {file: reached(file) for file in onward}
    groups = {frozenset(other for other in reach[file] if file in reach.get(other, ())) for file in onward}
    return [set(group) for group in groups if group]


def test_every_room_has_its_place_in_the_order() -> None:
    there = {room_of(file) for file in SOURCES.rglob("*.rs")} - {"lib"}
    assert set(rooms()) == there


def test_the_table_of_rooms_has_each_in_the_same_order() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text()
    assert re.findall(r"^\| `src/(\w+)(?:/|\.rs)` \|", table, re.MULTILINE) == rooms()


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_from_those_before_it_only(room: str) -> None:
    order = rooms()
    back = [
        str(found)
        for found in everything()
        if room_of(found.file) == room and order.index(room_of(found.target)) > order.index(room)
    ]
    assert not back, "these lines import from a room that comes later:\n" + "\n".join(back)


def test_the_files_of_a_room_do_not_import_each_other_in_a_circle() -> None:
    """A file that says `One thing with `other.rs`: why` may."""

    def is_one_thing(found: Import) -> bool:
        name = found.target.name if found.target.name != "mod.rs" else "mod.rs"
        return f"One thing with `{name}`" in found.file.read_text()

    kept = [found for found in everything() if not is_one_thing(found)]
    lines = []
    for circle in circles(kept):
        lines += ["", *sorted(str(f) for f in kept if f.file in circle and f.target in circle)]
    assert not lines, "these lines close circles:" + "\n".join(lines)

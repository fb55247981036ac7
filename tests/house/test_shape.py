"""The shape of the house: where pyo3 may be named, what is exported, and that each room has its test."""

from __future__ import annotations

import ast
import enum
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pyvmm
from conftest import ROOT
from pyvmm import _pyvmm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

RUST = sorted((ROOT / "src").rglob("*.rs"))
PYTHON = sorted((ROOT / "python").rglob("*.py"))
TESTS = ROOT / "tests"
TEST_FILES = sorted(TESTS.rglob("test_*.py"))
MAX_LINES, MAX_FUNCTION_LINES, COMMENT_WIDTH = 400, 40, 100
CODE = [
    *RUST,
    *sorted((ROOT / "python").rglob("*.py*i")),
    *(
        file
        for folder in ("python", "tests", "benches", "examples", "scripts")
        for file in sorted((ROOT / folder).rglob("*.py"))
    ),
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(path: Path) -> str:
    """The text without its comments."""
    return re.sub(r"//.*", "", path.read_text())


def test_pyo3_is_named_only_in_the_binding() -> None:
    named = {name(path) for path in RUST if "pyo3" in code(path)}
    assert {path for path in named if not path.startswith("src/py/")} == {"src/lib.rs"}


def test_python_is_entered_in_few_places() -> None:
    # One way in, which an interpreter that ends closes.
    assert {name(path) for path in RUST if re.search(r"Python::(try_)?attach", code(path))} == {"src/py/enter.rs"}
    use = re.compile(r"use (super|crate::py)::enter::(\{.*\b)?(attach|on_vcpu_thread)\b")
    attaching = {name(path) for path in RUST if use.search(code(path))}
    allowed = {
        "src/py/device.rs",
        "src/py/disk_backend.rs",
        "src/py/virtio_custom.rs",
        "src/py/errors.rs",  # makes an exception
        "src/py/event/run.rs",
        "src/py/event/exit_handler.rs",
        "src/py/hooks.rs",
        "src/py/interrupt.rs",  # runs signal handlers, on the caller's thread
        "src/py/vm.rs",  # lets the GIL go while a machine is dropped
        "src/py/vmm/close.rs",
        "src/py/wakeup.rs",  # runs signal handlers, on the main thread
    }
    assert {path for path in attaching if path.startswith("src/py/")} == allowed


def has_unit_tests(path: Path) -> bool:
    return path.suffix == ".rs" and "#[cfg(test)]" in path.read_text()


def is_list(path: Path) -> bool:
    """Nothing but a list of what the folder holds."""
    return path.name in {"lib.rs", "__init__.py"} or (path.name == "mod.rs" and "fn " not in code(path))


def covered(test: Path) -> list[str]:
    """The source files that a test file's docstring, or the comment of a file's unit tests, says it covers."""
    text = test.read_text()
    said = (
        ast.get_docstring(ast.parse(text)) or "" if test.suffix == ".py" else "".join(re.findall(r"//! Covers.*", text))
    )
    return re.findall(r"(?:src|python)/[\w/]+\.(?:rs|py)", said)


def folder_of(source: Path) -> Path:
    """The folder with the tests of a source file: that of its room."""
    first, *rest = source.relative_to(ROOT).parts
    return TESTS / ("python" if first == "python" else rest[0].removesuffix(".rs"))


def is_tested(source: Path) -> bool:
    """Whether a source file has unit tests, a test file of its name in its place, or one that says it covers it.

    The binding of a thing is tested where the thing is.
    """
    if is_list(source) or has_unit_tests(source):
        return True
    folder = folder_of(source)
    room = source.parent.name
    own = {f"test_{room}"} if source.stem == "mod" else {f"test_{source.stem}", f"test_{room}_{source.stem}"}
    beside = TEST_FILES if folder.name in {"py", "python"} else folder.glob("test_*.py")
    return any(test.stem in own for test in beside) or name(source) in COVERED


COVERED = {source for test in [*TEST_FILES, *filter(has_unit_tests, RUST)] for source in covered(test)}


@pytest.mark.parametrize("path", [*RUST, *PYTHON], ids=name)
def test_every_source_file_has_its_test(path: Path) -> None:
    assert is_tested(path), (
        f"{name(path)} has no unit tests, and no file in {name(folder_of(path))} has its name or names it"
    )


def test_what_a_test_covers_is_there() -> None:
    assert [source for source in sorted(COVERED) if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("path", [*RUST, *PYTHON], ids=name)
def test_files_open_with_what_lives_there(path: Path) -> None:
    assert path.read_text().startswith(("//!", '"""'))


def rust_functions(lines: list[str]) -> Iterator[tuple[str, int, int]]:
    """Name, first and last line of each; rustfmt puts the closing brace where the function began."""
    for first, line in enumerate(lines):
        found = re.match(r"( *)(?:pub(?:\([^)]*\))? )?(?:const |unsafe |extern \"C\" )*fn (\w+)", line)
        if found and not line.endswith((";", "}")):
            yield found[2], first, lines.index(found[1] + "}", first) if found[1] + "}" in lines[first:] else first


def python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documentation = node.body[0] if ast.get_docstring(node) and len(node.body) > 1 else None
            lines = (
                (documentation.end_lineno or documentation.lineno) - documentation.lineno + 1 if documentation else 0
            )
            yield node.name, node.lineno - 1 + lines, (node.end_lineno or node.lineno) - 1


def long_parts(path: Path) -> set[str]:
    """The file, and those of its functions, that are longer than they may be and do not say why."""
    text = path.read_text()
    lines = text.splitlines()
    found = set() if len(lines) <= MAX_LINES or "Long because" in "\n".join(lines[:12]) else {name(path)}
    functions = rust_functions(lines) if path.suffix == ".rs" else python_functions(text)
    for function, first, last in functions:
        reason = "Long because" in "\n".join(lines[max(0, first - 8) : last])
        if last - first + 1 > MAX_FUNCTION_LINES and not reason:
            found.add(f"{name(path)}::{function}")
    return found


def test_files_and_functions_are_short_or_say_why() -> None:
    found = {part for path in CODE for part in long_parts(path)}
    assert found == set(), "divide these, or say in a comment `Long because ...`"


def wide_comments(path: Path) -> list[int]:
    """Lines of comments and docstrings that are too wide. A docstring begins with one whole sentence on a line."""
    lines = path.read_text().splitlines()
    if path.suffix == ".rs":
        wrapped = [number for number, line in enumerate(lines) if re.match(r"\s*//", line)]
    else:
        tree = ast.walk(ast.parse(path.read_text()))
        documented = [
            n for n in tree if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        bodies = [node.body[0] for node in documented if ast.get_docstring(node) is not None]
        wrapped = [number for body in bodies for number in range(body.lineno, body.end_lineno or body.lineno)]
        wrapped += [number for number, line in enumerate(lines) if re.match(r"\s*# ", line)]
    return [number + 1 for number in wrapped if len(lines[number]) > COMMENT_WIDTH]


def wide_comments_of_c(path: Path) -> list[int]:
    """Lines of comments in C and in shell scripts that are too wide, commands to type aside."""
    lines = enumerate(path.read_text().splitlines(), 1)
    is_comment = re.compile(r"\s*(/\*| \*|//|# )(?!  )")
    return [number for number, line in lines if is_comment.match(line) and len(line) > COMMENT_WIDTH]


def test_comments_wrap() -> None:
    folders = ("benches", "examples", "python/pyvmm/include", "scripts")
    others = [
        file for folder in folders for file in sorted((ROOT / folder).rglob("*")) if file.suffix in {".c", ".h", ".sh"}
    ]
    found = {name(path): wide for path in CODE if (wide := wide_comments(path))}
    found |= {name(path): wide for path in others if (wide := wide_comments_of_c(path))}
    assert len(others) > 8
    assert found == {}


def test_every_lock_has_a_rank() -> None:
    unranked = re.compile(r"parking_lot|std::sync::\{?[^;]*\b(Mutex|RwLock|Condvar)\b")
    without = {name(path) for path in RUST if unranked.search(code(path).replace("\n", " "))}
    # Held over each fork, whatever its thread holds, and let go in a child without its parent's
    # waiters: locks of std, under which no other of the crate is taken.
    held_at_fork = {"src/memory/mapping.rs", "src/py/thread_state.rs"}
    assert {path for path in without if not path.startswith("src/sync/")} == held_at_fork


def test_every_export_of_the_native_module_is_public_documented_and_in_the_stub() -> None:
    stub = ast.parse((ROOT / "python" / "pyvmm" / "_pyvmm.pyi").read_text())
    stubbed = {node.name for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    exported = {export for export in vars(_pyvmm) if not export.startswith("_")}
    assert exported == {export for export in stubbed if not export.startswith("_")}
    assert exported - {"close_all", "MsrBytes", "Register", "RegisterBytes", "RegisterView"} <= set(pyvmm.__all__)
    for export in exported:
        assert getattr(_pyvmm, export).__doc__, export


def test_every_public_name_is_there() -> None:
    for public in pyvmm.__all__:
        assert getattr(pyvmm, public).__doc__, public
        assert public in dir(pyvmm)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pyvmm.nonsense


def words(files: Iterable[Path]) -> set[str]:
    return {word for file in files for word in re.findall(r"\w+", file.read_text())}


# Public names that no test says, and why.
UNNAMED = {
    "embedded_guest": "what `VmmConfig()` starts, which tests run",
    "DirtyPages": "what `GuestMemory` returns; it is never made by its name",
    "ExitHandler": "a protocol, which the tests' handlers satisfy",
    "NetworkFork": "what `NetworkSnapshot.fork` returns",
    "NetworkSnapshot": "what `Network.snapshot` returns",
    "ReadableDevice": "a protocol, which the tests' devices satisfy",
    "WritableDevice": "a protocol, which the tests' devices satisfy",
}


def test_every_public_python_name_is_in_a_test() -> None:
    said = words(file for file in TEST_FILES if file != Path(__file__))
    members = [
        member
        for public in (getattr(pyvmm, export) for export in pyvmm.__all__)
        if isinstance(public, type) and not issubclass(public, enum.Enum) and public is not pyvmm.VcpuExit
        for member in vars(public)
        if not member.startswith("_")
    ]
    unsaid = {public for public in [*pyvmm.__all__, *members] if public not in said}
    assert unsaid == UNNAMED.keys()


# Public names of a room that its tests do not say: types that its functions take and return.
UNNAMED_IN_ROOM = {
    "config": {
        "KernelProtocol",
        "SerialInput",
        "SerialOutput",
    },
    "cpu": {"Feature"},
    "debug": {"decode"},
    "devices": {"Chunk", "input_file"},
    "event": {"BoxedSubscriber", "Calls"},
    "exit_handler": {"Exception", "ExitHandler", "Outcome"},
    "memory": {"MemoryRange", "Slot"},
    "snapshot": {"Header", "Record", "described"},
    "sync": {"MappedMutexGuard", "ReadGuard", "RwLockGuard", "WriteGuard"},
    "trace": {"Recording", "Track"},
    "vcpu": {"RegisterClass", "use_signal"},
    "virtio": {
        "Attached",
        "BrokenChain",
        "ChainReader",
        "DiskCounts",
        "Frozen",
        "Place",
        "QueueAccess",
        "Segment",
        "Slices",
        "Transport",
    },
    "vm": {"IRQ_LINES"},
}


def exports(room: Path) -> set[str]:
    """What a room's mod.rs hands out as `pub`."""
    text = (room / "mod.rs").read_text()
    uses = re.findall(r"^pub use ([^;]+);", text, re.MULTILINE)
    used = {found for use in uses for found in re.findall(r"\w+(?=\s*[,}]|$)", use)}
    return used | set(re.findall(r"^pub (?:struct|enum|trait|fn|const) (\w+)", text, re.MULTILINE))


ROOMS = {path.relative_to(ROOT / "src").parts[0] for path in RUST if path.parent != ROOT / "src"}


@pytest.mark.parametrize("room", sorted(ROOMS - {"py"}))
def test_the_public_names_of_a_room_are_in_its_tests(room: str) -> None:
    tested = [path.read_text().partition("#[cfg(test)]")[2] for path in (ROOT / "src" / room).rglob("*.rs")]
    said = {word for text in tested for word in re.findall(r"\w+", text)}
    said |= words((TESTS / room).glob("*.py")) | words(TESTS.rglob("*.rs"))
    assert exports(ROOT / "src" / room) - said == UNNAMED_IN_ROOM.get(room, set())


def test_each_atomic_ordering_and_unsafe_block_has_its_reason() -> None:
    for path in RUST:
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if re.search(r"unsafe \{|unsafe impl", line.split("//")[0]):
                above = "\n".join(lines[max(0, number - 8) : number + 1])
                assert "SAFETY" in above, f"{name(path)}:{number + 1}"

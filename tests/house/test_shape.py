"""The shape of the house: where pyo3 may be named, what is exported, and that each room has its test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import pyvmm
from conftest import ROOT
from pyvmm import _pyvmm

RUST = sorted((ROOT / "src").rglob("*.rs"))
PYTHON = sorted((ROOT / "python" / "pyvmm").glob("*.py"))
TESTS = ROOT / "tests"
TEST_FILES = sorted(TESTS.rglob("test_*.py"))
MOST_LINES = 500


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
        "src/py/errors.rs",  # makes an exception
        "src/py/event/run.rs",
        "src/py/event/exit_handler.rs",
        "src/py/hooks.rs",
        "src/py/interrupt.rs",  # runs signal handlers, on the caller's thread
        "src/py/vm.rs",  # lets the GIL go while a machine is dropped
        "src/py/vmm.rs",
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
    """Where the tests of a source file stand: in the folder of its room."""
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
def test_files_open_with_what_lives_there_and_are_short(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith(("//!", '"""'))
    assert len(lines) <= MOST_LINES


def test_every_lock_has_a_rank() -> None:
    unranked = re.compile(r"parking_lot|std::sync::\{?[^;]*\b(Mutex|RwLock|Condvar)\b")
    without = {name(path) for path in RUST if unranked.search(code(path).replace("\n", " "))}
    # Held over each fork, whatever its thread holds, and let go in a child without its parent's
    # waiters: a lock of std, under which no other is taken.
    assert {path for path in without if not path.startswith("src/sync/")} == {"src/memory/mapping.rs"}


def test_every_export_of_the_native_module_is_public_documented_and_in_the_stub() -> None:
    stub = ast.parse((ROOT / "python" / "pyvmm" / "_pyvmm.pyi").read_text())
    stubbed = {node.name for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    exported = {export for export in vars(_pyvmm) if not export.startswith("_")}
    assert exported == {export for export in stubbed if not export.startswith("_")}
    assert exported - {"close_all", "MsrBytes", "RegisterBytes"} <= set(pyvmm.__all__)
    for export in exported:
        assert getattr(_pyvmm, export).__doc__, export


def test_every_public_name_is_there() -> None:
    for public in pyvmm.__all__:
        assert getattr(pyvmm, public).__doc__, public
        assert public in dir(pyvmm)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pyvmm.nonsense


def test_each_atomic_ordering_and_unsafe_block_has_its_reason() -> None:
    for path in RUST:
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if re.search(r"unsafe \{|unsafe impl", line.split("//")[0]):
                above = "\n".join(lines[max(0, number - 8) : number + 1])
                assert "SAFETY" in above, f"{name(path)}:{number + 1}"

"""Runs the type checker on a program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PYTHON = Path(__file__).resolve().parent.parent / "python"


def check(right: str, wrong: list[str], folder: Path) -> None:
    """The checker accepts a program, and refuses each of these lines at its end."""
    lines = [*right.splitlines(), *(f"    {line}" for line in wrong)]
    found, said = _errors_of("\n".join(lines) + "\n", folder)
    first = len(lines) - len(wrong) + 1
    refused = {lines[number - 1].strip() for number in found}
    assert found == set(range(first, len(lines) + 1)), f"{refused ^ set(wrong)}\n{said}"


def _errors_of(program: str, folder: Path) -> tuple[set[int], str]:
    """The lines of a program that mypy refuses, and everything that it prints."""
    path = folder / "program.py"
    path.write_text(program)
    options = ["--strict", "--disable-error-code=empty-body", "--config-file="]
    environment = os.environ | {"MYPYPATH": str(PYTHON), "MYPY_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "mypy", *options, str(path)]
    checked = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    found = {int(line.split(":")[1]) for line in checked.stdout.splitlines() if ": error:" in line}
    return found, checked.stdout + checked.stderr

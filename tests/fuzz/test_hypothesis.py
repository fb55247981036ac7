"""Hypothesis with a target: the example finds a crash and shrinks it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.kvm
@pytest.mark.timeout(600)
def test_hypothesis_finds_the_crash_of_the_example(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")

    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    example = tmp_path / "examples" / "fuzz" / "with_hypothesis.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", str(example)]
    variables = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=500, env=variables
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "page fault (#PF): reading" in done.stdout
    # Shrunk: one record without content, of the shortest length that reaches beyond it.
    assert "records=[('d', 1, b'')]" in done.stdout

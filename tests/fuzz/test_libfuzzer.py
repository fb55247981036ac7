"""libFuzzer by way of atheris, where that is installed: it finds a crash by the guest's counters.

Covers python/pyvmm/libfuzzer.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT
from fuzz_targets import snapshot_of
from pyvmm.exits import Exit, ExitReason
from pyvmm.libfuzzer import CrashError

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLE = str(ROOT / "examples" / "fuzz" / "with_libfuzzer.py")
WITHOUT = """
import sys
sys.modules["atheris"] = None
from pyvmm import Snapshot
from pyvmm.fuzz import Target
from pyvmm.libfuzzer import fuzz
with Target(Snapshot.load("snapshot")) as target:
    fuzz(target)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=500)


def test_crash_says_how_the_run_ended() -> None:
    exit = Exit(ExitReason.EXCEPTION, vector=14)
    assert CrashError(exit).exit is exit


@pytest.mark.kvm
@pytest.mark.timeout(600)
def test_libfuzzer_finds_the_crash_of_the_example(tmp_path: Path) -> None:
    if find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install atheris")
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "seed").write_bytes(b"n\2ab")
    done = run(tmp_path, EXAMPLE, "corpus", "-runs=1000000", "-max_total_time=400", "-max_len=16", "-seed=1")
    assert done.returncode != 0, done.stderr
    said = done.stdout + done.stderr
    assert "CrashError: exception" in said
    assert "page fault (#PF): reading" in said or "divide error (#DE)" in said
    assert "inline 8-bit counters" in said
    (crash,) = tmp_path.glob("crash-*")
    assert b"d" in crash.read_bytes() or b"a\0" in crash.read_bytes()


@pytest.mark.kvm
def test_without_atheris_the_error_says_what_to_install(tmp_path: Path) -> None:
    snapshot_of(tmp_path).save(tmp_path / "snapshot")
    done = run(tmp_path, "-c", WITHOUT)
    assert done.returncode == 1
    assert "pip install atheris" in done.stderr

"""The time limit of a test ends it, whatever the test does with what its alarm raises."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT, TESTS

if TYPE_CHECKING:
    from pathlib import Path

DEADLINE_S = 60

SWALLOWS = """
def test_it():
    try:
        threading.Event().wait()
    except BaseException:
        pass
    threading.Event().wait()
"""

CLEAN_UP_HANGS = """
def test_it():
    try:
        threading.Event().wait()
    finally:
        threading.Event().wait()
"""

TRIES_AGAIN = """
@given(integers())
def test_it(number):
    threading.Event().wait()
"""

CHILD_HANGS = """
def test_it():
    child = os.fork()
    if child == 0:
        end_in(1)
        # As native code that waits for a lock.
        lock, libc = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGALRM
"""


@pytest.mark.parametrize(
    ("source", "status"),
    [(SWALLOWS, 1), (CLEAN_UP_HANGS, 1), (TRIES_AGAIN, 1), (CHILD_HANGS, 0)],
    ids=["swallowed", "clean-up", "hypothesis", "child"],
)
def test_a_test_that_hangs_ends(tmp_path: Path, source: str, status: int) -> None:
    imports = "import ctypes, os, signal, threading\nfrom children import end_in\nfrom hypothesis import given\n"
    file = tmp_path / "test_hangs.py"
    file.write_text(imports + "from hypothesis.strategies import integers\n" + source)
    limit = 1 if status else DEADLINE_S
    options = ["-q", "-p", "conftest", "-p", "no:cacheprovider", "-o", f"timeout={limit}", f"--rootdir={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT)])}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert ran.returncode == status, ran.stdout + ran.stderr

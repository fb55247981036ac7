"""Tests in processes of their own fail as others do, and start quickly."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from alone import alone
from conftest import TESTS


@alone
def child_of(parent: int) -> None:
    assert os.getppid() == parent


def test_what_is_alone_runs_in_a_child_of_this_process() -> None:
    child_of(os.getpid())


def test_what_fails_alone_fails_with_its_place_and_its_variables() -> None:
    with pytest.raises(AssertionError, match=r"(?s)assert os.getppid\(\) == parent.*parent = 0"):
        child_of(0)


def test_what_programs_of_tests_import_starts_without_pytest() -> None:
    source = "import alone, guests, held, oracle, sys, threads; sys.exit('pytest' in sys.modules)"
    subprocess.run([sys.executable, "-c", source], cwd=TESTS, check=True, timeout=60)

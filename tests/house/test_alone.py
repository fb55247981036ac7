"""Tests in processes of their own fail as others do."""

from __future__ import annotations

import os

import pytest
from alone import alone


@alone
def child_of(parent: int) -> None:
    assert os.getppid() == parent


def test_what_is_alone_runs_in_a_child_of_this_process() -> None:
    child_of(os.getpid())


def test_what_fails_alone_fails_with_its_place_and_its_variables() -> None:
    with pytest.raises(AssertionError, match=r"(?s)assert os.getppid\(\) == parent.*parent = 0"):
        child_of(0)

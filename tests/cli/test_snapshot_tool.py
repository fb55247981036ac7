"""Snapshots on the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from command_line import flat_file, pyvmm
from guests import SPIN, exit_with, print_text

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm
TALKS = print_text(b"booting ... ready\n") + b"\xb9\xff\xff\xe2\xfe" + print_text(b"on\n") + exit_with(7)


@pytest.mark.parametrize("when", [("--text", "ready"), ("--after", "0.3")], ids=["at a text", "after a time"])
def test_snapshot_is_taken_restored_and_inspected(when: tuple[str, str], tmp_path: Path) -> None:
    config = flat_file(tmp_path, TALKS if when[0] == "--text" else print_text(b"ready\n") + SPIN)
    path = tmp_path / "snapshot"
    done = pyvmm("snapshot", "--config", config, "-o", path, *when, "--timeout", "60")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"ready" in done.stdout
    restored = pyvmm("restore", path, "--timeout", "60" if when[0] == "--text" else "0.3")
    assert restored.returncode == (7 if when[0] == "--text" else 124)
    assert b"booting" not in restored.stdout
    shown = pyvmm("inspect", path, "--verify")
    assert shown.returncode == 0
    assert b"1 vCPUs" in shown.stdout
    assert b"pio 0x3f8" in shown.stdout
    assert json.loads(pyvmm("inspect", path, "--json").stdout)["vcpus"] == 1


def test_snapshot_of_a_guest_that_reports_ready_continues_after_it(tmp_path: Path) -> None:
    path, other = tmp_path / "snapshot", tmp_path / "other"
    config = flat_file(tmp_path, exit_with(1) + print_text(b"on\n") + exit_with(7))
    assert pyvmm("snapshot", "--config", config, "-o", path).returncode == 0
    restored = pyvmm("restore", path, "--json")
    assert (restored.returncode, restored.stderr) == (7, b"on\n")
    assert json.loads(restored.stdout)["code"] == 7
    assert pyvmm("snapshot", "--config", config, "-o", other, "--base", path).returncode == 0
    refused = pyvmm("restore", other)
    assert refused.returncode == 125
    assert b"needs the snapshot" in refused.stderr
    assert pyvmm("restore", other, "--base", path).returncode == 7


def test_snapshot_that_cannot_be_taken_says_why(tmp_path: Path) -> None:
    config = flat_file(tmp_path, print_text(b"hello") + exit_with(3))
    done = pyvmm("snapshot", "--config", config, "-o", tmp_path / "none", "--text", "never")
    assert (done.returncode, done.stdout) == (3, b"hello")
    assert b"no snapshot: code 3" in done.stderr
    late = pyvmm("snapshot", "--config", flat_file(tmp_path, SPIN), "-o", tmp_path / "none", "--timeout", "0.2")
    assert late.returncode == 124
    assert not (tmp_path / "none").exists()
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    for command in ("restore", "inspect"):
        refused = pyvmm(command, tmp_path / "junk")
        assert refused.returncode == 125
        assert b"no snapshot of pyvmm" in refused.stderr

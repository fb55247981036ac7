"""Requests of 4 KiB to a disk, through the driver of tests, against the same by system calls."""

from __future__ import annotations

import subprocess
import tempfile
from typing import TYPE_CHECKING

from benches.measure import Result, example

if TYPE_CHECKING:
    from collections.abc import Iterator

GOALS = {"raw": 0.8, "qcow2": 0.7}
RUNS = 9


def requests() -> Iterator[Result]:
    """Requests of 4 KiB through the driver of tests, 80 at a time, against pread and pwrite on the same file."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        lines = subprocess.run(
            [example("disk"), folder], check=True, capture_output=True, text=True
        ).stdout.splitlines()
    for line in lines:
        name, ours, theirs = line.split()
        value, baseline = float(ours), float(theirs)
        goal = GOALS[name.partition(",")[0]]
        label = f"disk, {name.replace('_', ' ')}"
        yield Result(label, value, "requests/s", baseline, "pread, pwrite", value / baseline, goal, RUNS)

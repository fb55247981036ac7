"""What a benchmark yields, how two things are measured alternately, and the table."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


class UnmeasurableError(Exception):
    """Something that a benchmark needs is not here."""


@dataclass(frozen=True)
class Result:
    """One line of the table. Ratio and goal are such that higher is better."""

    name: str
    value: float
    unit: str
    baseline: float
    baseline_name: str
    ratio: float
    goal: float
    runs: int


Benchmark = Callable[[], Iterator[Result]]


def alternate(ours: Callable[[], float], theirs: Callable[[], float], runs: int) -> tuple[float, float]:
    """The medians of two measurements taken in turn, after one of each that does not count."""
    ours()
    theirs()
    pairs = [(ours(), theirs()) for _ in range(runs)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def compare(
    name: str,
    unit: str,
    ours: Callable[[], float],
    theirs: Callable[[], float],
    theirs_name: str,
    goal: float,
    runs: int,
) -> Result:
    """One line of the table. A unit per second is a rate, of which more is better; else less is."""
    value, baseline = alternate(ours, theirs, runs)
    ratio = value / baseline if unit.endswith("/s") else baseline / value
    return Result(name, value, unit, baseline, theirs_name, ratio, goal, runs)


def compiled(source: Path, *options: str) -> str:
    """A shared library of one C file, in a temporary directory."""
    directory = tempfile.mkdtemp(prefix="pyvmm-bench-")
    library = f"{directory}/{source.stem}.so"
    try:
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-pthread", *options, "-o", library, source], check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise UnmeasurableError(f"{source.name} cannot be compiled: {error}") from error
    return library


@cache
def example(name: str) -> str:
    """A program of benches/rust, built with the driver of tests; its path."""
    features = ["--no-default-features", "--features", "mock"]
    try:
        subprocess.run(["cargo", "build", "--quiet", "--release", *features, "--example", name], check=True)
        metadata = subprocess.run(
            ["cargo", "metadata", "--no-deps", "--format-version=1"], check=True, capture_output=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise UnmeasurableError(f"the driver cannot be built: {error}") from error
    return f"{json.loads(metadata.stdout)['target_directory']}/release/examples/{name}"


def emulation() -> Any:
    """The unicorn package, the alternative for inspecting a guest from Python without a VM."""
    try:
        from unicorn import x86_const  # noqa: F401
    except ImportError as error:
        raise UnmeasurableError(f"unicorn is not installed: {error}") from error
    import unicorn

    return unicorn


def report(results: list[Result]) -> None:
    """Print the table, and write the list to the file that BENCH_JSON names."""
    table = Table("benchmark", "pyvmm", "compared with", "ratio", "goal", "runs", box=None)
    for r in results:
        met = "green" if r.ratio >= r.goal else "red"
        value, baseline = f"{r.value:,.4g} {r.unit}", f"{r.baseline:,.4g} {r.unit}, {r.baseline_name}"
        table.add_row(r.name, value, baseline, f"[{met}]{r.ratio:.2f}[/]", f"{r.goal:.2f}", str(r.runs))
    Console().print(table)
    if path := os.environ.get("BENCH_JSON"):
        Path(path).write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")

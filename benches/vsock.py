"""A program's end of a guest's socket, behind a mock driver, against a unix socket between two threads."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from functools import cache, partial

from benches.measure import Result, UnmeasurableError, compare

TRIPS = 50_000
BYTES = 512 << 20
RUNS = 9


@cache
def program() -> str:
    features = ["--no-default-features", "--features", "mock"]
    try:
        subprocess.run(["cargo", "build", "--quiet", "--release", *features, "--example", "vsock"], check=True)
        metadata = subprocess.run(
            ["cargo", "metadata", "--no-deps", "--format-version=1"], check=True, capture_output=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise UnmeasurableError(f"the driver cannot be built: {error}") from error
    return f"{json.loads(metadata.stdout)['target_directory']}/release/examples/vsock"


def rate(what: str, side: str, count: int) -> float:
    command = [program(), what, side, str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def microseconds(side: str) -> float:
    return 1e6 / rate("trip", side, TRIPS)


def mebibytes(way: str, side: str) -> float:
    return rate(way, side, BYTES) / (1 << 20)


def sockets() -> Iterator[Result]:
    """A round trip of a byte, and the bytes a second each way, between a program and a mock driver."""
    ours, theirs = partial(microseconds, "device"), partial(microseconds, "bare")
    yield compare("vsock, round trip", "us", ours, theirs, "a unix socket's", 1 / 1.5, RUNS)
    for way in ("to-guest", "to-host"):
        ours, theirs = partial(mebibytes, way, "device"), partial(mebibytes, way, "bare")
        yield compare(f"vsock, {way}", "MiB/s", ours, theirs, "a unix socket's", 0.5, RUNS)

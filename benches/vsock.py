"""A program's end of a guest's socket, behind a mock driver, against a unix socket between two threads."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial

from benches.measure import Result, compare, example

TRIPS = 50_000
BYTES = 512 << 20
RUNS = 9


def rate(what: str, side: str, count: int) -> float:
    command = [example("vsock"), what, side, str(count)]
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

"""Frames through a network device to a socket, against bare system calls on the same socket."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from functools import cache, partial

from benches.measure import Result, UnmeasurableError, compare

FRAMES = 500_000
RUNS = 9
GOAL = 0.8


@cache
def program() -> str:
    features = ["--no-default-features", "--features", "mock"]
    try:
        subprocess.run(["cargo", "build", "--quiet", "--release", *features, "--example", "net"], check=True)
        metadata = subprocess.run(
            ["cargo", "metadata", "--no-deps", "--format-version=1"], check=True, capture_output=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise UnmeasurableError(f"the driver cannot be built: {error}") from error
    return f"{json.loads(metadata.stdout)['target_directory']}/release/examples/net"


def rate(direction: str, side: str, length: int) -> float:
    command = [program(), direction, side, str(length), str(FRAMES)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def frames() -> Iterator[Result]:
    """Frames in bursts of 64 between a mock driver and the other end of a socket pair."""
    for direction in ("send", "receive"):
        for length in (64, 1514):
            ours, theirs = partial(rate, direction, "device", length), partial(rate, direction, "bare", length)
            name = f"net, {direction} {length} bytes"
            yield compare(name, "frames/s", ours, theirs, "bare send and recv", GOAL, RUNS)

"""Frames through a network device to a socket, against bare system calls on the same socket."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial

from benches.measure import Result, compare, example

FRAMES = 500_000
RUNS = 9
GOAL = 0.8


def rate(direction: str, side: str, length: int) -> float:
    command = [example("net"), direction, side, str(length), str(FRAMES)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def frames() -> Iterator[Result]:
    """Frames in bursts of 64 between a mock driver and the other end of a socket pair."""
    for direction in ("send", "receive"):
        for length in (64, 1514):
            ours, theirs = partial(rate, direction, "device", length), partial(rate, direction, "bare", length)
            name = f"net, {direction} {length} bytes"
            yield compare(name, "frames/s", ours, theirs, "bare send and recv", GOAL, RUNS)

"""Reading a trace: its hops, checked against the trace-event format, and a device that makes some."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm import (
    EventFd,
    EventOps,
    Events,
    Vmm,
)

if TYPE_CHECKING:
    from pathlib import Path


CATEGORIES = {"guest", "exit", "device", "event", "callback"}


class Hop(NamedTuple):
    """A complete event; times in nanoseconds."""

    track: str
    category: str
    name: str
    start: int
    end: int
    parent: Hop | None
    values: dict[str, Any]


def hops(path: Path) -> list[Hop]:
    """The file, checked against the format: every event whole, children inside their parents on the same track."""
    events = json.loads(path.read_text())
    assert isinstance(events, list)
    named = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert [event["args"] for event in events if event["name"] == "process_name"] == [{"name": "pyvmm"}]
    assert len(set(named.values())) == len(named)
    tracks: dict[int, list[dict[str, Any]]] = {track: [] for track in named}
    for event in events:
        assert event["pid"] == os.getpid()
        if event["ph"] == "M":
            continue
        assert event["ph"] == "X"
        assert event["cat"] in CATEGORIES
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        tracks[event["tid"]].append(event)
    return sorted(
        (hop for track, on_it in tracks.items() for hop in nested(named[track], on_it)), key=lambda hop: hop.start
    )


def nested(track: str, events: list[dict[str, Any]]) -> list[Hop]:
    """The events of one track with their parents."""
    found: list[Hop] = []
    open_ones: list[Hop] = []
    times = [(round(1000 * e["ts"]), round(1000 * e["ts"]) + round(1000 * e["dur"]), e) for e in events]
    for start, end, event in sorted(times, key=lambda one: (one[0], -one[1])):
        while open_ones and open_ones[-1].end <= start:
            open_ones.pop()
        parent = open_ones[-1] if open_ones else None
        assert parent is None or end <= parent.end, f"{event} is not inside {parent}"
        hop = Hop(track, event["cat"], event["name"], start, end, parent, event.get("args", {}))
        found.append(hop)
        open_ones.append(hop)
    return found


def of(all_hops: list[Hop], category: str) -> list[Hop]:
    return [hop for hop in all_hops if hop.category == category]


class Bell:
    """Half a device on the vCPU's thread, half in the loop."""

    def __init__(self) -> None:
        self.fd = EventFd()

    def write(self, offset: int, size: int, value: int) -> None:
        self.fd.write()

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd))

    def process(self, events: Events, ops: EventOps) -> None:
        self.fd.read()
        vmm = self.vmm
        vmm.stop()

    vmm: Vmm

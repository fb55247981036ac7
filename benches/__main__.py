"""``python -m benches [NAME...]``: all benchmarks, or those whose name starts with one of these.

``python -m benches --list`` prints the names, and what each measures.
"""

from __future__ import annotations

import sys

from pyvmm import VmmError

from benches import (
    control,
    devices,
    disk,
    footprint,
    fuzz,
    imports,
    jitter,
    linux,
    loop,
    machines,
    memory,
    net,
    network,
    snapshot,
    stats,
    virtio_fork,
    virtio_linux,
    vsock,
)
from benches.measure import Benchmark, Result, UnmeasurableError, report

BENCHMARKS: dict[str, Benchmark] = {
    "pio-exit": machines.pio_exits,
    "stats": stats.counted_exits,
    "create-run-close": machines.lives,
    "run-again": machines.runs_again,
    "run-once": control.exits_by_hand,
    "device": devices.accesses,
    "hook": devices.hooks,
    "hop": devices.hops,
    "gil": devices.gil,
    "hostcall": devices.hostcalls,
    "disk": disk.requests,
    "doorbell": devices.doorbells,
    "pause": control.pauses,
    "registers": control.registers,
    "memory": memory.copies,
    "footprint": footprint.footprints,
    "net": net.frames,
    "network-ports": network.frames,
    "loop": loop.dispatches,
    "loop-floor": loop.floors,
    "loop-scaling": loop.scaling,
    "loop-calls": loop.calls,
    "asyncio": jitter.jitter,
    "snapshot": snapshot.snapshots,
    "snapshot-fork": snapshot.forks,
    "snapshot-footprint": snapshot.footprints,
    "snapshot-reset": snapshot.resets,
    "snapshot-loop": snapshot.loops,
    "snapshot-ring-3": snapshot.confined,
    "snapshot-file": snapshot.files,
    "fuzz-batch": fuzz.batches,
    "fuzz-single": fuzz.single,
    "linux-userspace": linux.boots,
    "virtio-fork": virtio_fork.forks,
    "linux-disk": virtio_linux.disks,
    "linux-tcp": virtio_linux.users,
    "linux-pair": virtio_linux.pairs,
    "linux-devices": virtio_linux.boots,
    "vsock": vsock.sockets,
    "import": imports.imports,
}


def main(names: list[str]) -> int:
    """Run the benchmarks and print their table, or list them."""
    if names == ["--list"]:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:20}{(benchmark.__doc__ or '').splitlines()[0]}")
        return 0
    chosen = {n: f for n, f in BENCHMARKS.items() if not names or n.startswith(tuple(names))}
    if not chosen:
        print(f"known are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    results: list[Result] = []
    for name, benchmark in chosen.items():
        print(f"measuring {name}", file=sys.stderr)
        try:
            results.extend(benchmark())
        except (UnmeasurableError, VmmError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    report(results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

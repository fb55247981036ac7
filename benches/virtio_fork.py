"""What virtio devices add to a fork."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from pyvmm import Disk, FlatBoot, MemoryConfig, Net, Network, Vmm, VmmConfig, Vsock

from benches.measure import Result, compare
from benches.snapshot import EXITS, to_exit

SIZE_MIB = 64
FORKS = 20
RUNS = 9


def forks(runs: int = RUNS) -> Iterator[Result]:
    """The time from a fork to its first exit, of a machine with a disk, a network and sockets, and without."""
    network = Network()
    devices: dict[str, Any] = {"disks": (Disk(bytes(1 << 20)),), "nets": (Net(network.port()),), "vsock": Vsock()}
    with ExitStack() as stack:

        def snapshot(**devices: Any) -> Any:
            config = VmmConfig(boot=FlatBoot(EXITS), memory=MemoryConfig(size_mib=SIZE_MIB), **devices)
            vmm = stack.enter_context(Vmm(config))
            vmm.run()
            return vmm.snapshot()

        with_devices, without = snapshot(**devices), snapshot()

        def ours() -> float:
            return statistics.median(to_exit(with_devices) for _ in range(FORKS)) * 1e3

        def theirs() -> float:
            return statistics.median(to_exit(without) for _ in range(FORKS)) * 1e3

        yield compare("fork with disk, net and vsock", "ms", ours, theirs, "without them", 1 / 1.3, runs)

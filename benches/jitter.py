"""How late a 1 ms ticker of asyncio is while a guest spins, against an idle loop."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

from pyvmm import FlatBoot, MemoryConfig, Vmm, VmmConfig

from benches.measure import Result, compare

PERIOD_S = 0.001
TICKS = 300
RUNS = 9
SPIN = VmmConfig(boot=FlatBoot(b"\xeb\xfe"), memory=MemoryConfig(size_mib=1))  # jmp $


async def ticker() -> float:
    """The median lateness of a tick, in microseconds."""
    late = []
    for _ in range(TICKS):
        due = time.perf_counter() + PERIOD_S
        await asyncio.sleep(PERIOD_S)
        late.append((time.perf_counter() - due) * 1e6)
    return statistics.median(late)


async def beside_a_guest() -> float:
    async with Vmm(SPIN) as vmm:
        run = asyncio.ensure_future(vmm.run_async())
        late = await ticker()
        vmm.stop()
        await run
    return late


def jitter() -> Iterator[Result]:
    """The delay of an asyncio ticker beside a spinning guest, against the ticker alone."""
    busy, idle = (lambda: asyncio.run(beside_a_guest())), (lambda: asyncio.run(ticker()))
    yield compare("asyncio ticker", "us late", busy, idle, "idle loop", 1 / 1.5, RUNS)

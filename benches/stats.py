"""The cost of statistics and traces: port exits without them, with counters, and with a trace."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pyvmm import Vmm

from benches import bare
from benches.machines import config, reading
from benches.measure import Result, compare

EXITS = 20_000
RUNS = 11


def counted_exits(exits: int = EXITS, runs: int = RUNS) -> Iterator[Result]:
    """Port exits that a built-in device answers, without statistics, counted by `vmm.stats`, and traced."""
    code = reading(exits)

    def rate(measure: Callable[[Vmm], AbstractContextManager[object]]) -> float:
        with Vmm(config(code)) as vmm, measure(vmm):
            start = time.perf_counter()
            exit = vmm.run()
            seconds = time.perf_counter() - start
        assert exit.code == 0
        return exits / seconds

    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as directory:
        path = Path(directory) / "trace.json"
        ways: list[tuple[str, Callable[[Vmm], AbstractContextManager[object]], float]] = [
            ("without statistics", lambda _: nullcontext(), 0.95),
            ("counted", lambda vmm: vmm.stats, 0.85),
            ("traced", lambda vmm: vmm.trace(path), 0.6),
        ]
        for name, measure, goal in ways:
            yield compare(
                f"pio-exit, {name}",
                "exits/s",
                lambda measure=measure: rate(measure),  # type: ignore[misc]
                lambda: exits / bare.time_run(code),
                "bare KVM loop",
                goal,
                runs,
            )

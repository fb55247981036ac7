"""Many forks of a snapshot at once: `Snapshot.fork_many` and `Snapshot.map`."""

from __future__ import annotations

import operator
import os
from concurrent.futures import Future, as_completed
from typing import TYPE_CHECKING, Any

from pyvmm.snapshots import ForkExecutor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyvmm._pyvmm import Snapshot, Vmm
    from pyvmm.snapshots import Entropy


# More than any host has file descriptors for.
MAX_FORKS = 1 << 20


def fork_many(
    snapshot: Snapshot, count: int, changes: Callable[[int], dict[str, Any]] | None, entropy: Entropy | None
) -> list[Vmm]:
    """Implement `Snapshot.fork_many`."""
    count = operator.index(count)
    if not 0 <= count <= MAX_FORKS:
        raise ValueError(f"count: {count} is not from 0 to {MAX_FORKS:,}")
    # Its module cannot be imported once the interpreter ends, when a thread may still call `map`.
    from concurrent.futures import ThreadPoolExecutor

    def fork(number: int) -> Vmm:
        return snapshot.fork(**{"entropy": entropy, **(changes(number) if changes else {})})

    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fork") as pool:
        made = [pool.submit(fork, number) for number in range(count)]
    failed = [error for future in made if (error := future.exception()) is not None]
    if failed:
        for future in made:
            if future.exception() is None:
                future.result().close()
        made.clear()  # otherwise the traceback would keep them alive
        raise failed[0]
    return [future.result() for future in made]


def map_inputs(
    snapshot: Snapshot,
    function: Callable[[Vmm, Any], Any],
    inputs: Iterable[Any],
    *,
    workers: int | None = None,
    timeout: float | None = None,
    entropy: Entropy | None = None,
    return_exceptions: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> list[Any]:
    """Implement `Snapshot.map`."""
    pool = ForkExecutor(snapshot, workers, timeout=timeout, entropy=entropy)
    try:
        futures = [pool.submit(function, value) for value in inputs]
        if progress is not None:
            _follow(futures, return_exceptions, progress)
        if return_exceptions:
            return [future.result() if (error := future.exception()) is None else error for future in futures]
        return [future.result() for future in futures]
    except BaseException:
        pool.kill()
        raise
    finally:
        pool.shutdown()


def _follow(futures: list[Future[Any]], return_exceptions: bool, progress: Callable[[int, int], object]) -> None:
    """Call `progress` for each job that ends, up to one whose exception will be raised."""
    from pyvmm.aio import refuse_awaitable

    for done, future in enumerate(as_completed(futures), 1):
        refuse_awaitable(progress(done, len(futures)), "progress")
        if not return_exceptions and future.exception() is not None:
            return

"""What the process holds of its host."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_S = 60


class Held(NamedTuple):
    descriptors: int
    threads: int
    mappings: int
    resident_kib: int


def held() -> Held:
    gc.collect()
    status = Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return Held(
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        len(Path("/proc/self/maps").read_text().splitlines()),
        int(resident.split()[1]),
    )


def is_collected(reference: Callable[[], object]) -> bool:
    """Whether only garbage refers to an object.

    While another thread collects, `gc.collect` returns at once and has done nothing.
    """
    end = time.monotonic() + DEADLINE_S
    while reference() is not None and time.monotonic() < end:
        gc.collect()
    return reference() is None

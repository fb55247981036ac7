"""The bare KVM loop of bare_kvm.c as functions."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from benches.measure import UnmeasurableError, compiled


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(compiled(Path(__file__).with_name("bare_kvm.c")))
    for name in ("time_run", "time_cycles", "time_kicks", "time_rings", "leave_machines"):
        function = getattr(library, name)
        function.restype = ctypes.c_double
    return library


def time_run(code: bytes) -> float:
    """Seconds of one run to the exit port."""
    return _checked(_library().time_run(code, len(code)))


def time_cycles(code: bytes, cycles: int, threads: bool = False) -> float:
    """Seconds of so many machines made, run (each in a thread of its own if so wished) and destroyed."""
    return _checked(_library().time_cycles(code, len(code), cycles, threads))


def time_kicks(code: bytes, kicks: int, microseconds: int) -> list[float]:
    """Seconds that each kick of a guest takes, so many microseconds after it was entered."""
    seconds = (ctypes.c_double * kicks)()
    _checked(_library().time_kicks(code, len(code), kicks, microseconds, seconds))
    return list(seconds)


def time_rings(code: bytes, port: int, rings: int) -> float:
    """Seconds of a run whose guest rings an ioeventfd so often, each answered by an epoll loop."""
    return _checked(_library().time_rings(code, len(code), port, rings))


def leave_machines(code: bytes, count: int) -> None:
    """Make so many machines, run each to the exit port, and leave them there."""
    _checked(_library().leave_machines(code, len(code), count))


def _checked(seconds: float) -> float:
    if seconds < 0:
        raise UnmeasurableError("the bare KVM loop failed: is /dev/kvm usable?")
    return seconds

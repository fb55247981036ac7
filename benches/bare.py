"""The bare KVM loop of bare_kvm.c as functions."""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

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
    """Seconds to create, run (optionally in a thread each) and destroy this many machines."""
    return _checked(_library().time_cycles(code, len(code), cycles, threads))


def time_kicks(code: bytes, kicks: int, microseconds: int) -> list[float]:
    """Seconds for each kick of a guest, this many microseconds after its entry."""
    seconds = (ctypes.c_double * kicks)()
    _checked(_library().time_kicks(code, len(code), kicks, microseconds, seconds))
    return list(seconds)


def time_rings(code: bytes, port: int, rings: int) -> float:
    """Seconds of a run whose guest rings an ioeventfd so often, each answered by an epoll loop."""
    return _checked(_library().time_rings(code, len(code), port, rings))


def leave_machines(code: bytes, count: int) -> None:
    """Create this many machines, run each to the exit port, and keep them."""
    _checked(_library().leave_machines(code, len(code), count))


@cache
def _snapshots() -> ctypes.CDLL:
    library = ctypes.CDLL(compiled(Path(__file__).with_name("bare_snapshot.c")))
    for function in (library.time_snapshot, library.time_copy, library.time_forks, library.time_resets):
        function.restype = ctypes.c_double
    return library


def time_snapshot(code: bytes, memory: int, touched: int) -> float:
    """Seconds to read one vCPU's state and remap memory, of which a part is touched."""
    sizes = ctypes.c_uint64(memory), ctypes.c_uint64(touched)
    return _checked(_snapshots().time_snapshot(code, len(code), *sizes))


def time_copy(size: int) -> float:
    """Seconds of a memcpy of this many bytes."""
    return _checked(_snapshots().time_copy(ctypes.c_uint64(size)))


def time_forks(code: bytes, memory: int, forks: int, threads: bool = False) -> float:
    """The median seconds to create a machine over the same frozen memory, set its state and run it to an exit."""
    return _checked(_snapshots().time_forks(code, len(code), ctypes.c_uint64(memory), forks, threads))


EACH, FEWEST, LEAN = range(3)


def time_resets(code: bytes, memory: int, resets: int, pages: int, how: int = 0, state: int = EACH) -> float:
    """The median seconds of a reset after a run that dirties `pages` pages.

    By copying what has been written (0), by dropping it (1), or by the dirty log (2). The vCPU's
    state is set class by class, in the fewest calls, or only as far as the run page takes it
    (lean). The runs are not counted.
    """
    return time_loops(code, memory, resets, pages, how, state)[0]


def time_loops(
    code: bytes, memory: int, resets: int, pages: int, how: int = 0, state: int = EACH
) -> tuple[float, float, float]:
    """As `time_resets`, with the median seconds of a run, and of a run and its reset."""
    arguments = ctypes.c_uint64(memory), resets, how, state, pages
    running, whole = ctypes.c_double(), ctypes.c_double()
    function = _snapshots().time_resets
    seconds = _checked(function(code, len(code), *arguments, ctypes.byref(running), ctypes.byref(whole)))
    return seconds, running.value, whole.value


@cache
def _calls() -> ctypes.CDLL:
    source = Path(__file__).with_name("bare_call.c")
    library = ctypes.CDLL(compiled(source, f"-I{sysconfig.get_path('include')}"))
    library.time_calls.restype = ctypes.c_double
    library.time_calls.argtypes = [ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.c_int]
    return library


def time_calls(function: Callable[[Any, Any], object], first: object, second: object, calls: int) -> float:
    """Seconds to call a function with two arguments from C so often, the GIL taken and given back each time."""
    return _checked(_calls().time_calls(function, first, second, calls))


def _checked(seconds: float) -> float:
    if seconds < 0:
        raise UnmeasurableError("the C part failed: is /dev/kvm usable?")
    return seconds

"""libFuzzer by way of atheris: the guest's counters are libFuzzer's inline counters.

    python my_target.py corpus -runs=100000

my_target.py creates a `pyvmm.fuzz.Target` and calls `fuzz(target)`. No Python code is instrumented:
libFuzzer reads and clears the counters in the guest's memory.
"""

from __future__ import annotations

import ctypes
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.exits import Exit
    from pyvmm.fuzz import Target


class CrashError(Exception):
    """Raised in libFuzzer's callback for a crash or a hang; `exit` says how the run ended."""

    def __init__(self, exit: Exit) -> None:
        super().__init__(str(exit))
        self.exit = exit


def fuzz(target: Target, arguments: Sequence[str] | None = None) -> None:
    """Run libFuzzer with these arguments, by default those of the command line. It ends the process.

    Raises:
        ImportError: atheris is not installed.
    """
    try:
        atheris, library = import_module("atheris"), import_module("atheris.core_with_libfuzzer")
    except ImportError as error:
        raise ImportError(f"{error}; libFuzzer comes with atheris: pip install atheris") from error

    def test_one_input(data: bytes) -> None:
        result = target.run(data[: target.capacity])
        if result.crash or result.hang:
            raise CrashError(result.exit)

    atheris.Setup(list(sys.argv if arguments is None else arguments), test_one_input)
    register(target.coverage, str(library.__file__))
    atheris.Fuzz()


def register(counters: memoryview, library: str) -> None:
    """Make a view of memory inline counters of the libFuzzer in this library, until the process ends."""
    libfuzzer = ctypes.CDLL(library)
    size = len(counters)
    start = ctypes.addressof(ctypes.c_ubyte.from_buffer(counters))
    # libFuzzer expects an address and flags for each counter, to name what an input has reached.
    table = (ctypes.c_size_t * (2 * size))(*(value for n in range(size) for value in (start + n, 0)))
    _registered.append((counters, table))
    for name, first, length in (
        ("__sanitizer_cov_8bit_counters_init", start, size),
        ("__sanitizer_cov_pcs_init", ctypes.addressof(table), ctypes.sizeof(table)),
    ):
        getattr(libfuzzer, name)(ctypes.c_void_p(first), ctypes.c_void_p(first + length))


# libFuzzer keeps pointers to these.
_registered: list[object] = []

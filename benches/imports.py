"""What `import pyvmm` adds to the start of Python."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

from benches.measure import Result, alternate

LIMIT_MS = 30.0
RUNS = 21


def start(program: str) -> float:
    """Milliseconds that a Python program takes as a process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return (time.perf_counter() - begin) * 1000


def imports() -> Iterator[Result]:
    """Milliseconds that `import pyvmm` adds to the start of Python."""
    ours, bare = alternate(lambda: start("import pyvmm"), lambda: start("pass"), RUNS)
    value = ours - bare
    yield Result("import", value, "ms", LIMIT_MS, "limit", LIMIT_MS / value, 1.0, RUNS)

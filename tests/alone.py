"""Tests of what a whole process has: descriptors, the numbers they get, threads, mappings."""

from __future__ import annotations

import functools
import importlib
import pickle
import subprocess
import sys
import traceback
from typing import TYPE_CHECKING, ParamSpec

from pyvmm import EventManager

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
# A test's own limit is shorter, except on the emulated processor of `make hardware`.
DEADLINE_S = 600
CHILD = "import sys; sys.path[:] = {path!r}; import alone; alone.child()"


def alone(test: Callable[P, None]) -> Callable[P, None]:
    """Run a test in a fresh interpreter.

    In the process of all tests, what others have left changes the same things at any moment:
    garbage is collected, idle threads end.
    """

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        work = pickle.dumps((test.__module__, test.__qualname__, args, kwargs))
        command = [sys.executable, "-W", "error", "-c", CHILD.format(path=sys.path)]
        done = subprocess.run(command, input=work, capture_output=True, timeout=DEADLINE_S, check=False)
        assert done.returncode == 0, done.stderr.decode()

    return run


def child() -> None:
    """What the fresh interpreter does."""
    module, name, args, kwargs = pickle.loads(sys.stdin.buffer.read())
    test = getattr(importlib.import_module(module), name).__wrapped__
    # The first wait of the main thread that lasts makes a pipe for as long as the process lives.
    EventManager().run_with_timeout(50)
    try:
        test(*args, **kwargs)
    except BaseException as error:
        shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        sys.exit("".join(shown.format()))

"""Children that tests fork."""

from __future__ import annotations

import signal


def end_in(seconds: int) -> None:
    """Have this child end after so many seconds, even if it is stuck in native code.

    It has inherited the handler of pytest's time limit, which raises, and does so only between two
    instructions of Python code.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)

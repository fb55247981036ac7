"""Threads as tests use them: several at work at once, and the names of those that are there."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def thread_names() -> list[str]:
    """The names of all threads of this process. Any of them may end meanwhile."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            names.append((task / "comm").read_text().strip())
    return names


def vcpu_threads() -> list[str]:
    return [name for name in thread_names() if name.startswith("vcpu_")]


def all_at_once(*works: Callable[[], object], deadline: float = 60) -> None:
    """Do each piece of work in a thread of its own, all at once; each ends in so many seconds."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(deadline)
        assert not thread.is_alive()

"""The asyncio loops that tests run in."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import uvloop

if TYPE_CHECKING:
    from collections.abc import Coroutine

LOOPS = ["asyncio", "uvloop", "debug"]


def run_in(loop: str, main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a fresh loop, with a deadline."""
    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory, debug=loop == "debug") as runner:
        return runner.run(asyncio.wait_for(main, 60))

"""Threads that enter Python for the first time beside forks: a child never waits for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import TESTS

pytestmark = pytest.mark.kvm
SECONDS = float(os.environ.get("PYVMM_STRESS_S", "2"))
DEADLINE_S = 60

PROGRAM = f"""
import os, sys, threading, time
sys.path[:0] = [{str(TESTS)!r}]
from guests import OUT_FOR_EVER, flat
from pyvmm import Stop, Vmm

class Device:
    def write(self, offset, size, value):
        return Stop(1)

def run():
    with Vmm(flat(OUT_FOR_EVER)) as vmm:
        vmm.add_pio_device(0x500, 4, Device())
        vmm.run({DEADLINE_S})

def run_again():
    while time.monotonic() < end:
        run()

def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    give_up = time.monotonic() + {DEADLINE_S}
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > give_up:
            os.kill(child, 9)
            raise AssertionError("the child hangs")
        time.sleep(0.0005)
"""

BESIDE = f"""
end = time.monotonic() + {SECONDS}
threads = [threading.Thread(target=run_again) for _ in range(4)]
for thread in threads:
    thread.start()
try:
    while time.monotonic() < end:
        fork()
finally:
    for thread in threads:
        thread.join()
"""

# One of the program's own functions for forks forks, and runs a machine.
INSIDE = """
calls = []
def again():
    if len(calls) < 3:
        calls.append(1)
        fork()
        threading.Thread(target=run).start()
os.register_at_fork(before=again, after_in_parent=again)
fork()
run()
"""


def ends(source: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + source],
        capture_output=True,
        text=True,
        timeout=SECONDS + 2 * DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("is_traced", [False, True])
def test_a_child_does_not_wait_for_a_thread_that_enters_python_at_the_fork(is_traced: bool) -> None:
    ends(("import tracemalloc; tracemalloc.start()" if is_traced else "") + BESIDE)


def test_a_function_that_python_calls_at_a_fork_may_fork_and_run_a_machine() -> None:
    ends(INSIDE)

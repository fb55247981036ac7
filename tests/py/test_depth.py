"""Callbacks and pyvmm that call each other without end: an exception, whatever stack the thread has.

Python's own limit ends most of these before the stack does. Those here take more of it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import TESTS

pytestmark = pytest.mark.kvm
DEADLINE_S = 120

PROGRAM = f"""
import sys, threading
sys.path[:0] = [{str(TESTS)!r}]
from guests import OUT_FOR_EVER, SPIN, flat
from pyvmm import *
sys.setrecursionlimit(100_000)
# Small enough for a quick test. A vCPU's thread has 2 MiB at least.
threading.stack_size(512 << 10)

class Device:
    def save(self):
        return b""
    def restore(self, state):
        pass

def attempt():
    try:
        again()
    except RecursionError as error:
        print(type(error).__name__, "too deeply for the stack" in str(error))
"""

ON_A_VCPU = """
class Outer:
    def write(self, offset, size, value):
        attempt()
        return Stop(1)

with Vmm(flat(OUT_FOR_EVER)) as vmm:
    vmm.add_pio_device(0x500, 1, Outer())
    vmm.run(100)
"""

ON_A_THREAD = """
thread = threading.Thread(target=attempt)
thread.start()
thread.join()
"""

LOOPS = {
    "a device that runs a machine with such a device": """
class Inner:
    def write(self, offset, size, value):
        again()
def again():
    with Vmm(flat(OUT_FOR_EVER)) as vmm:
        vmm.add_pio_device(0x500, 1, Inner())
        vmm.run_here(100)
""",
    "restore() that forks": """
class Forks(Device):
    def read(self, offset, size):
        return 0
    def restore(self, state):
        again()
def add(vmm):
    vmm.add_pio_device(0x500, 1, Forks())
with Vmm(flat(SPIN)) as machine:
    add(machine)
    snapshot = machine.snapshot()
def again():
    snapshot.fork(setup=add)
""",
    "setup that forks": """
with Vmm(flat(SPIN)) as machine:
    snapshot = machine.snapshot()
def again(_fork=None):
    snapshot.fork(setup=again)
""",
    "init() that adds a subscriber": """
manager = EventManager()
class Subscriber:
    def init(self, ops):
        again()
    def process(self, events, ops):
        pass
def again():
    manager.add_subscriber(Subscriber())
""",
    "process() that runs another loop": """
def again(_count=None):
    manager = EventManager()
    manager.on(EventFd(1))(again)
    manager.run_with_timeout(1000)
""",
    "a call on the loop's thread that makes another": """
manager = EventManager()
endpoint = manager.remote_endpoint()
def inner(_manager=None):
    endpoint.call_blocking(inner)
def again():
    manager.call_later(0, inner)
    manager.run()
""",
    "progress of a save that saves": """
import os
with Vmm(flat(SPIN)) as machine:
    snapshot = machine.snapshot()
path = f"/tmp/pyvmm-depth-{os.getpid()}"
def again(_done=0, _total=0):
    snapshot.save(path, progress=again)
""",
}


def raises(source: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + source],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    # 3.12 and newer also limit calls in C, to a number that may come before the stack's end.
    texts = ["RecursionError True\n", "RecursionError False\n"][: 1 + (sys.version_info >= (3, 12))]
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout in texts


# In 2 MiB there is room for thousands of forks.
FORKING = {"restore() that forks", "setup that forks"}


@pytest.mark.parametrize("loop", sorted(LOOPS.keys() - FORKING))
def test_a_callback_that_never_ends_calling_raises(loop: str) -> None:
    raises(LOOPS[loop] + ON_A_VCPU)


@pytest.mark.parametrize("loop", [*sorted(FORKING), "init() that adds a subscriber"])
def test_a_call_on_a_thread_of_the_program_raises(loop: str) -> None:
    raises(LOOPS[loop] + ON_A_THREAD)


def test_callbacks_are_called_at_every_depth_that_python_allows() -> None:
    """On the main thread, whose stack grows: what is in use of it is not its size."""
    source = """
import functools
called = []
manager = EventManager()
manager.on(EventFd(1))(called.append)
@functools.lru_cache(None)
def down(depth):
    manager.run_with_timeout(0)
    return depth and down(depth - 1)
down(1000)
print(len(called))
"""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + source], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1001\n"), done.stderr[-2000:]

"""`run_here` beside signals, forks and limits, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import TESTS

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
OUT_FOR_EVER = b"\xba\x00\x05\xb0\x78\xee\xeb\xfd"  # mov dx, 0x500; mov al, 'x'; back: out dx, al; jmp back
SPIN = b"\xeb\xfe"
PROGRAM = f"""
import sys; sys.path[:0] = [{str(TESTS)!r}]
import os, resource, signal, threading, time
from guests import *
from pyvmm import *
OUT_FOR_EVER = {OUT_FOR_EVER!r}
SPIN = {SPIN!r}
"""

# How each of these programs ends: the run is interrupted by a signal.
INTERRUPTED = """
try:
    vmm.run_here()
except KeyboardInterrupt:
    print("interrupted", vmm.state.name)
vmm.close()
"""

CTRL_C = """
vmm = Vmm(flat(SPIN))
threading.Timer(0.05, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
"""

# Another thread takes the signal.
ELSEWHERE = """
vmm = Vmm(flat(SPIN))
taker = threading.Thread(target=time.sleep, args=(60,), daemon=True)
taker.start()
threading.Timer(0.05, lambda: signal.pthread_kill(taker.ident, signal.SIGINT)).start()
"""

IN_A_DEVICE = """
class Device:
    def write(self, offset, size, value):
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        time.sleep(60)
vmm = Vmm(flat(OUT_FOR_EVER))
vmm.add_pio_device(0x500, 1, Device())
"""

NO_TIMER = """
resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0))
with Vmm(flat(exit_with(3))) as vmm:
    try:
        print(vmm.run_here(60).code)
    except StateError as error:
        assert "RLIMIT_SIGPENDING" in error.hint, error
        print(vmm.run(60).code)
"""

FORK = """
vmm = Vmm(flat(SPIN))
assert vmm.run_here(0.01).reason is ExitReason.TIMEOUT
child = os.fork()
if child == 0:
    try:
        vmm.run_here(1)
    except StateError:
        pass
    with Vmm(flat(SPIN)) as own:
        os._exit(own.run_here(0.01).reason is not ExitReason.TIMEOUT)
print(os.waitpid(child, 0)[1], vmm.run_here(0.01).reason.name)
"""

DAEMON = """
vmm = Vmm(flat(SPIN))
threading.Thread(target=vmm.run_here, daemon=True).start()
while vmm.state is not VmRunState.RUNNING:
    time.sleep(0.001)
print("left")
"""


@pytest.mark.parametrize(
    ("source", "printed"),
    [
        pytest.param(CTRL_C + INTERRUPTED, "interrupted PAUSED", id="ctrl-c"),
        pytest.param(ELSEWHERE + INTERRUPTED, "interrupted PAUSED", id="a signal that another thread takes"),
        pytest.param(IN_A_DEVICE + INTERRUPTED, "interrupted PAUSED", id="ctrl-c in a device"),
        pytest.param(NO_TIMER, "3", id="no timer"),
        pytest.param(FORK, "0 TIMEOUT", id="fork"),
        pytest.param(DAEMON, "left", id="a daemon thread at exit"),
    ],
)
def test_a_process_of_its_own(source: str, printed: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM + source], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, printed), ran.stderr

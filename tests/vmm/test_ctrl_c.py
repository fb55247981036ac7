"""Ctrl-C while a call waits for a callback in progress or for a snapshot. Each program runs in its own process.

Covers src/py/interrupt.rs.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import TESTS

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0

START = f'''
import sys; sys.path[:0] = [{str(TESTS)!r}]
import gc, os, signal, threading, time
from guests import *
from pathlib import Path
from pyvmm import *
from threads import thread_names

entered, go = threading.Event(), threading.Event()
main = threading.get_ident()

class Device:
    def write(self, offset, size, value):
        entered.set()
        go.wait()
    def save(self):
        return b""
    def restore(self, state):
        pass

OUT_FOR_EVER = flat(bytes.fromhex("ba0005b078eeebfd"))

def closers():
    return thread_names().count("pyvmm-close")

def interrupt_close(number=1):
    """Send Ctrl-C when this many calls wait for a machine's threads."""
    def send():
        while closers() < number:
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)
    threading.Thread(target=send, daemon=True).start()

def interrupt_wait():
    """Send Ctrl-C when the main thread waits without the GIL."""
    def send():
        seen = 0
        while seen < 100:  # a thread that only wants the GIL gets it in one of the sleeps
            time.sleep(0.001)
            state = Path(f"/proc/self/task/{{native}}/stat").read_text().rpartition(")")[2].split()[0]
            seen = seen + 1 if state == "S" else 0
        signal.pthread_kill(main, signal.SIGINT)
    native = threading.get_native_id()
    threading.Thread(target=send, daemon=True).start()

def interrupted(call):
    try:
        call()
    except KeyboardInterrupt:
        return
    raise AssertionError("Ctrl-C was ignored")
'''

VMM = """
def make():
    vmm = Vmm(OUT_FOR_EVER)
    vmm.add_pio_device(0x500, 1, Device())
    vmm.start()
    return vmm
"""

KVM_VM = """
class Handler:
    def kick(self):
        entered.set()
        go.wait()

def make():
    vm = KvmVm(flat(exit_with(3)), Handler())
    vm.run()
    return vm
"""

CLOSE = """
vm = make()
assert entered.wait(60)
interrupt_close()
interrupted(vm.close)
# It closes all the same: a second call waits for that, and can be interrupted like the first.
interrupt_close(2)
interrupted(vm.close)
go.set()
vm.close()
assert not [name for name in os.listdir("/proc/self/fd") if "kvm-" in link(name)], "a descriptor is left"
"""

WITH = """
def block():
    with make():
        assert entered.wait(60)
        interrupt_close()
interrupted(block)
go.set()
"""

EXIT = """
vm = make()
assert entered.wait(60)
interrupt_close()
interrupted(vm.close)
"""

RUN_ELSEWHERE = """
vm = Vmm(OUT_FOR_EVER)
vm.add_pio_device(0x500, 1, Device())
threading.Thread(target=vm.run, daemon=True).start()
assert entered.wait(60)
interrupt_close()
interrupted(vm.close)
go.set()
vm.close()
assert vm.state is VmRunState.CLOSED
"""

LINK = """
def link(name):
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""
"""


def run(source: str) -> None:
    code = START + LINK + source + "\nprint('done', flush=True)\n"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


@pytest.mark.parametrize("machine", [VMM, KVM_VM], ids=["Vmm", "KvmVm"])
@pytest.mark.parametrize("source", [CLOSE, WITH, EXIT], ids=["close", "with", "exit"])
def test_ctrl_c_ends_a_close_that_waits_for_a_callback(machine: str, source: str) -> None:
    run(machine + source)


def test_ctrl_c_ends_a_close_that_waits_for_another_threads_run() -> None:
    run(RUN_ELSEWHERE)


SHUTDOWN = """
vm = make()
assert entered.wait(60)
interrupt_wait()
interrupted(vm.shutdown)
go.set()
vm.shutdown()
assert vm.state is VmRunState.EXITING
vm.close()
"""


def test_ctrl_c_ends_a_shutdown_that_waits_for_a_callback() -> None:
    run(KVM_VM + SHUTDOWN)


DROP = """
heard = []
sys.unraisablehook = lambda unraisable: heard.append(unraisable.exc_type)
vm = make()
assert entered.wait(60)
interrupt_close()
del vm
assert heard == [KeyboardInterrupt]
go.set()
"""


@pytest.mark.parametrize("machine", [VMM, KVM_VM], ids=["Vmm", "KvmVm"])
def test_ctrl_c_ends_the_wait_of_a_last_reference(machine: str) -> None:
    run(machine + DROP)


LOOK = """
def change(vmm, mib):
    # Every page is the machine's own and changed: the snapshot copies it.
    vmm.memory.fill(0x100000, (mib - 2) << 20, 7)

with Vmm(flat(HALT, size_mib=64)) as vmm:
    kept = vmm.snapshot()
    change(vmm, 64)
    began = time.monotonic()
    kept = vmm.snapshot()
    # Large enough for a snapshot of some 300 ms.
    mib = min(1024, max(64, round(64 * 0.3 / (time.monotonic() - began))))
with Vmm(flat(HALT, size_mib=mib)) as vmm:
    vcpu = vmm.vcpus[0]
    steps, is_over, native = 0, False, threading.get_native_id()

    def snapshots():
        global steps
        while not is_over:
            change(vmm, mib)
            steps += 1
            kept = vmm.snapshot()
            steps += 1

    def main_sleeps():
        return "(sleeping)" in Path(f"/proc/self/task/{native}/status").read_text()

    def interrupt():
        # The main thread sleeps beside a snapshot: in the look, then.
        while not is_over:
            began, seen = steps, 0
            while steps == began and began % 2 and main_sleeps():
                seen += 1
                if seen == 3:
                    signal.pthread_kill(main, signal.SIGINT)
                time.sleep(0.001)
            time.sleep(0.001)

    threads = [threading.Thread(target=call) for call in (snapshots, interrupt)]
    for thread in threads:
        thread.start()
    is_looking = False

    def hear(*_):
        # Outside of the look, as between two, Ctrl-C says nothing.
        global is_looking
        if is_looking:
            is_looking = False
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, hear)
    was_ended, deadline = False, time.monotonic() + 40
    while not was_ended and time.monotonic() < deadline:
        began = -1
        try:
            began = steps
            is_looking = True
            vcpu.regs.rip
            is_looking = False
        except KeyboardInterrupt:
            # Otherwise it would come when the snapshot is over.
            was_ended = began % 2 == 1 and steps == began
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    is_over = True
    for thread in threads:
        thread.join()
assert was_ended
"""


def test_ctrl_c_ends_a_look_that_waits_beside_a_snapshot() -> None:
    run(LOOK)


IN_A_CALLBACK = """
vmm = make()
assert entered.wait(60)
interrupt_wait()
interrupted(CALL)
assert vmm.state is VmRunState.RUNNING
go.set()
vmm.stop()
vmm.wait()
vmm.close()
"""

RUN = """
vmm = Vmm(OUT_FOR_EVER)
vmm.add_pio_device(0x500, 1, Device())
interrupt_wait()
interrupted(vmm.run)
assert entered.is_set() and vmm.state is VmRunState.PAUSED
go.set()
assert vmm.run(0.01).reason is ExitReason.TIMEOUT
vmm.close()
"""


@pytest.mark.parametrize("call", ["vmm.snapshot", "lambda: vmm.reset(before)", "vmm.wait"])
def test_ctrl_c_ends_a_call_that_waits_for_a_callback(call: str) -> None:
    is_run = call == "vmm.wait"
    source = VMM + IN_A_CALLBACK.replace("CALL", call).replace(
        "assert vmm.state is VmRunState.RUNNING", "" if is_run else "assert vmm.state is VmRunState.RUNNING"
    )
    if is_run:
        source = source.replace("vmm.stop()\nvmm.wait()\n", "")
    run(source.replace("    vmm.start()", "    global before\n    before = vmm.snapshot()\n    vmm.start()"))


def test_ctrl_c_ends_a_run_beside_a_callback_in_progress() -> None:
    run(RUN)


# The run has ended, and closes the machine. Another callback is still in progress.
CLOSED_FROM_INSIDE = """
def close():
    assert entered.wait(60)
    vmm.close()
    LATER

vmm = Vmm(OUT_FOR_EVER)
vmm.add_pio_device(0x500, 1, Device())
vmm.event_manager.call_later(0, close)
interrupted(lambda: vmm.run(TIMEOUT))
try:
    vmm.run(0)
except ClosedError:
    pass
go.set()
vmm.close()
assert vmm.state is VmRunState.CLOSED
assert not [name for name in os.listdir("/proc/self/fd") if "kvm-" in link(name)], "a descriptor is left"
"""


@pytest.mark.parametrize(
    ("later", "timeout"),
    [("raise KeyboardInterrupt", "None"), ("interrupt_close()", "0.1"), ("interrupt_wait()", "None")],
)
def test_ctrl_c_ends_a_run_that_a_callback_closes_beside_another_in_progress(later: str, timeout: str) -> None:
    run(CLOSED_FROM_INSIDE.replace("LATER", later).replace("TIMEOUT", timeout))


SHUTDOWN_BESIDE_CLOSE = """
vm = make()
assert entered.wait(60)
closing = threading.Thread(target=vm.close)
closing.start()
state = Path(f"/proc/self/task/{closing.native_id}/stat")
seen = 0
while seen < 20:
    time.sleep(0.001)
    seen = seen + 1 if state.read_text().rpartition(")")[2].split()[0] == "S" else 0
interrupt_wait()
interrupted(vm.shutdown)
go.set()
closing.join()
"""


def test_ctrl_c_ends_a_shutdown_beside_a_close_that_waits_for_a_callback() -> None:
    run(KVM_VM + SHUTDOWN_BESIDE_CLOSE)

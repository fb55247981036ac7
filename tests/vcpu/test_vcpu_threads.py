"""The threads of vCPUs: the signal mask that callbacks find there, and kicks that always arrive.

Covers src/vcpu/thread.rs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from conftest import TESTS
from guests import flat
from pyvmm import Stop, Vmm, kick_signal

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
OUT_FOR_EVER = b"\xba\x00\x05\xb0\x78\xee\xeb\xfd"  # mov dx, 0x500; mov al, 'x'; back: out dx, al; jmp back


START = f"import sys; sys.path[:0] = [{str(TESTS)!r}]\nfrom guests import *\n"


def in_a_device(call: Callable[[], Any]) -> Any:
    """What a function returns that a device calls."""
    found: list[Any] = []

    class Device:
        def write(self, offset: int, size: int, value: int) -> Stop:
            found.append(call())
            return Stop(1)

    with Vmm(flat(OUT_FOR_EVER)) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        vmm.run(DEADLINE_S)
    return found[0]


def in_a_process(source: str) -> str:
    """What a program prints that may crash or hang."""
    ran = subprocess.run(
        [sys.executable, "-c", START + source], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_callback_has_the_signal_mask_of_the_thread_that_started_the_run() -> None:
    def blocked() -> set[int]:
        return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])}

    assert in_a_device(blocked) == blocked()
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, kick_signal()})
    try:
        assert in_a_device(blocked) == blocked() - {kick_signal()}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def test_a_child_of_a_callback_can_be_terminated() -> None:
    def child() -> int:
        with subprocess.Popen(["sleep", "600"]) as process:
            process.terminate()
            return process.wait(DEADLINE_S)

    assert in_a_device(child) == -signal.SIGTERM


def test_a_process_of_multiprocessing_made_in_a_callback_can_be_terminated() -> None:
    def child() -> int | None:
        process = multiprocessing.get_context("fork").Process(target=signal.pause)
        process.start()
        process.terminate()
        process.join(DEADLINE_S)
        return process.exitcode

    assert in_a_device(child) == -signal.SIGTERM


UNQUEUED = """
import resource, threading
from pyvmm import KvmVm, Vmm
resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0))
with Vmm(flat(SPIN)) as vmm:
    print(vmm.run(0.01).reason.value)
    vmm.start()
    for _ in range(100):
        vmm.pause()
        vmm.resume()
    vmm.stop()
    print(vmm.wait(60).reason.value)
with KvmVm(flat(SPIN)) as vm:
    (vcpu,) = vm.vcpus
    threading.Timer(0.01, vcpu.kick).start()
    print(type(vcpu.run_once()).__name__)
"""


def test_kicks_arrive_where_no_signal_can_be_queued() -> None:
    assert in_a_process(UNQUEUED).split() == ["timeout", "stopped", "Interrupted"]


def test_kicks_arrive_where_no_signal_can_be_queued_and_the_program_has_handlers() -> None:
    handlers = """
import signal
import pyvmm
called, urgent = [], []
signal.signal(signal.SIGRTMIN + 3, lambda *_: called.append(0))
signal.signal(signal.SIGURG, lambda *_: urgent.append(0))
pyvmm.set_kick_signal(signal.SIGRTMIN + 3)
"""
    # The program's handler of SIGURG is called as well.
    said = in_a_process(handlers + UNQUEUED + "print(bool(urgent), called)").split()
    assert said == ["timeout", "stopped", "Interrupted", "True", "[]"]


@pytest.mark.parametrize("action", ["SIG_IGN", "SIG_DFL"])
def test_kicks_arrive_after_the_program_has_changed_what_their_signal_does(action: str) -> None:
    source = f"""
import signal
import pyvmm
from pyvmm import Vmm
with Vmm(flat(SPIN)) as vmm:
    vmm.run(0.01)
    signal.signal(pyvmm.kick_signal(), signal.{action})
    print(vmm.run(0.01).reason.value)
"""
    assert in_a_process(source).split() == ["timeout"]


def test_a_run_that_no_signal_could_end_is_refused() -> None:
    source = """
import signal
from pyvmm import KvmVm, StateError, Vmm
for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
    signal.signal(number, lambda *_: None)
with Vmm(flat(SPIN)) as vmm, KvmVm(flat(SPIN)) as vm:
    for run in [lambda: vmm.run(0.01), vmm.start, vm.run, vm.vcpus[0].run_once]:
        try:
            print(run())
        except StateError as error:
            print("set_kick_signal" in str(error))
"""
    assert in_a_process(source).split() == ["True"] * 4


def test_a_kick_reaches_run_once_on_a_thread_that_blocks_its_signal() -> None:
    source = """
import signal
import threading
from pyvmm import KvmVm
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
with KvmVm(flat(SPIN)) as vm:
    (vcpu,) = vm.vcpus
    threading.Timer(0.01, vcpu.kick).start()
    print(type(vcpu.run_once()).__name__)
"""
    assert in_a_process(source).split() == ["Interrupted"]


def test_a_stack_that_there_is_no_room_for_is_named() -> None:
    source = """
import threading
threading.stack_size(1 << 46)
with Vmm(flat(bytes.fromhex("ebfe"))) as vmm:
    for start in vmm.run, vmm.start:
        try:
            start()
        except KvmError as error:
            print(error, error.hint)
    threading.stack_size(0)
    vmm.start()
    threading.stack_size(1 << 46)
"""
    text = in_a_process("from pyvmm import *\n" + source)
    assert text.count(f"a thread with {1 << 36} KiB of stack cannot be started") == 2
    assert "threading.stack_size()" in text


def test_a_child_that_a_callback_forks_has_the_signal_mask_of_the_thread_that_started_the_run() -> None:
    def blocked_in_child() -> set[int]:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            os.write(writer, " ".join(str(int(number)) for number in blocked).encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as file:
            text = file.read()
        assert os.waitpid(child, 0)[1] == 0
        return set(map(int, text.split()))

    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        own = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])}
        assert in_a_device(blocked_in_child) == own - {kick_signal()}
        assert signal.SIGUSR2 in own
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def test_a_signal_that_the_main_thread_blocks_is_handled_there_all_the_same() -> None:
    # Only the vCPU's thread takes it: it inherits the mask of the thread that started the run.
    source = """
import os, signal, threading
from pyvmm import Vmm
called = []
def handle(*_):
    called.append(threading.current_thread() is threading.main_thread())
    vmm.stop()
signal.signal(signal.SIGUSR1, handle)
with Vmm(flat(SPIN)) as vmm:
    starter = threading.Thread(target=vmm.start)
    starter.start()
    starter.join()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.kill(os.getpid(), signal.SIGUSR1)
    print(vmm.wait(50).reason.value, *called)
"""
    assert in_a_process(source).split() == ["stopped", "True"]


def test_a_callback_has_two_mebibytes_of_stack_even_if_threading_has_less() -> None:
    source = """
import ctypes, threading
from pyvmm import Stop, Vmm
threading.stack_size(256 * 1024)
libc = ctypes.CDLL(None)
libc.pthread_self.restype = ctypes.c_ulong
class Device:
    def write(self, offset, size, value):
        attributes, stack = ctypes.create_string_buffer(256), ctypes.c_size_t()
        assert libc.pthread_getattr_np(ctypes.c_ulong(libc.pthread_self()), attributes) == 0
        assert libc.pthread_attr_getstacksize(attributes, ctypes.byref(stack)) == 0
        print(stack.value >= 2 << 20)
        return Stop(1)
with Vmm(flat(OUT_FOR_EVER)) as vmm:
    vmm.add_pio_device(0x500, 1, Device())
    vmm.run(60)
"""
    assert in_a_process(source).split() == ["True"]


def test_a_run_has_one_thread_for_each_vcpu_and_no_others() -> None:
    source = """
from pyvmm import CpuConfig, EventFd, Events, Vmm
from threads import thread_names
def threads():
    # Some kernels list KVM's own workers, which have other names, as threads of the process.
    return sorted(name for name in thread_names() if not name.startswith("kvm"))
class Look:
    def __init__(self):
        self.fd = EventFd(1)
    def init(self, ops):
        ops.add(Events(self.fd, drain=True))
    def process(self, events, ops):
        # A thread gives itself its name when it begins.
        while len(threads()) < len(before) + 2 or not {"vcpu_0", "vcpu_1"} <= set(threads()):
            pass
        print(*threads())
        vmm.stop()
with Vmm(flat(SPIN, cpu=CpuConfig(vcpus=2))) as vmm:
    vmm.add_subscriber(Look())
    before = threads()
    vmm.run(60)
print(*sorted([*before, "vcpu_0", "vcpu_1"]))
"""
    during, expected = in_a_process(source).splitlines()
    assert during == expected


def test_a_callback_that_blocks_the_kick_signal_holds_kicks_up_until_it_unblocks_it() -> None:
    source = """
import signal, threading, time
from pyvmm import Vmm, VmRunState, kick_signal
has_blocked, is_out = threading.Event(), threading.Event()
class Device:
    def write(self, offset, size, value):
        if value == 1:
            signal.pthread_sigmask(signal.SIG_BLOCK, {kick_signal()})
            has_blocked.set()
        else:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {kick_signal()})
def pause():
    vmm.pause()
    is_out.set()
# Says in 0x2001 that it is in the guest, and waits there for the host to write 0x2000.
WAIT = bytes.fromhex("c606012001 803e002000 74f9")  # mov byte [0x2001], 1; back: cmp byte [0x2000], 0; je back
with Vmm(flat(out(0x500, 1) + WAIT + out(0x500, 2) + SPIN)) as vmm:
    vmm.add_pio_device(0x500, 1, Device())
    vmm.start()
    assert has_blocked.wait(50)
    deadline = time.monotonic() + 50
    while vmm.memory.read(0x2001, 1) == bytes(1):
        assert time.monotonic() < deadline
    pausing = threading.Thread(target=pause)
    pausing.start()
    # Long for a kick; nothing else brings the guest out.
    print(is_out.wait(0.5))
    vmm.memory.write(0x2000, b"x")
    print(is_out.wait(50))
    pausing.join()
    for _ in range(20):
        vmm.resume()
        vmm.pause()
    print(vmm.state is VmRunState.PAUSED)
"""
    assert in_a_process(source).splitlines() == ["False", "True", "True"]


TRY = """
import threading
from pyvmm import KvmVm, StateError, Vmm
returned = threading.Event()
def attempt(*calls):
    for call in calls:
        try:
            print("not refused:", call())
        except StateError as error:
            print("a callback on a vCPU's thread cannot" in str(error), flush=True)
    returned.set()
"""


def test_a_callback_cannot_run_start_or_wait_for_its_own_machine() -> None:
    source = """
class Device:
    def write(self, offset, size, value):
        attempt(vmm.run, vmm.start, vmm.wait)
with Vmm(flat(out(0x500, 1) + exit_with(3))) as vmm:
    vmm.add_pio_device(0x500, 1, Device())
    vmm.start()
    # No thread waits for the machine meanwhile: only the callback could do so.
    assert returned.wait(50)
    print(vmm.wait(50).code)
"""
    assert in_a_process(TRY + source).split() == ["True", "True", "True", "3"]


def test_an_exit_handler_cannot_run_or_wait_for_its_own_machine() -> None:
    source = """
class Handler:
    def kick(self):
        attempt(vm.run, vm.wait)
with KvmVm(flat(exit_with(3)), Handler()) as vm:
    vm.run()
    assert returned.wait(50)
    print(vm.wait(50).code)
"""
    assert in_a_process(TRY + source).split() == ["True", "True", "3"]

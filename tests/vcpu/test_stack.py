"""The stack that callbacks find on a vCPU's thread: that of any thread."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from conftest import TESTS

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
START = f"import sys; sys.path[:0] = [{str(TESTS)!r}]\nfrom guests import *\n"


def in_a_process(source: str) -> str:
    """What a program prints that may crash."""
    command = [sys.executable, "-c", START + source]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


# The interpreter itself ends such calls where it limits those in C: 3.12 after 500 and
# 3.13 after 3,330.
DEEP = """
import ctypes, functools, sys, threading
from pyvmm import Stop, Vmm
sys.setrecursionlimit(20000)
@functools.lru_cache(None)
def sum_to(n):
    return n and n + sum_to(n - 1)
def attempt():
    try:
        return sum_to(4000)
    except RecursionError:
        return "RecursionError"
    finally:
        sum_to.cache_clear()
libc = ctypes.CDLL(None)
libc.pthread_self.restype = ctypes.c_void_p
def stack_size():
    attributes, size = ctypes.create_string_buffer(64), ctypes.c_size_t()
    assert libc.pthread_getattr_np(ctypes.c_void_p(libc.pthread_self()), attributes) == 0
    assert libc.pthread_attr_getstacksize(attributes, ctypes.byref(size)) == 0
    libc.pthread_attr_destroy(attributes)
    return size.value
found = {}
class Device:
    def write(self, offset, size, value):
        found["device"] = attempt(), stack_size()
        return Stop(1)
threading.stack_size(SIZE)
with Vmm(flat(bytes.fromhex("ba0005b078eeebfd"))) as vmm:
    vmm.add_pio_device(0x500, 1, Device())
    vmm.run(60)
thread = threading.Thread(target=lambda: found.update(thread=(attempt(), stack_size())))
thread.start()
thread.join()
result, size = found["device"]
assert found == {"device": (result, size), "thread": (result, size)}, found
if sys.version_info < (3, 12):
    assert result == 8002000
print(size)
"""


def test_a_callback_has_the_stack_size_of_threading() -> None:
    assert int(in_a_process(DEEP.replace("SIZE", str(64 << 20)))) >= 63 << 20


def test_a_callback_has_the_stack_of_any_thread() -> None:
    """Some five MiB of calls in C: more than two, and less than the eight that most systems give."""
    soft = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if soft != resource.RLIM_INFINITY and soft < 8 << 20:
        pytest.skip("RLIMIT_STACK is small here: no thread has a large stack")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, {resource.RLIM_INFINITY}))\n"
    source = START + DEEP.replace("SIZE", "0")
    # The C library reads the limit as a program starts.
    run = f"import os; os.execv(sys.executable, [sys.executable, '-c', {source!r}])"
    assert int(in_a_process(limit + run)) >= 7 << 20

"""AFL++'s fork server: afl-fuzz runs a `pyvmm.fuzz.Target` of this process.

    AFL_SKIP_BIN_CHECK=1 afl-fuzz -i seeds -o found -- python my_target.py

my_target.py creates a target and calls `serve`. AFL++'s docs describe the protocol: descriptors 198
and 199, a test case and a map of coverage in shared memory of System V.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from signal import SIGFPE, SIGILL, SIGKILL, SIGSEGV, SIGTRAP
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.fuzz import Target

_CONTROL, _STATUS = 198, 199
_ENABLED, _SHARED_TEST_CASE, _MAP_SIZE = 0x80000001, 0x01000000, 0x40000000
_WORD = struct.Struct("=I")
# AFL++'s limit for a test case, which its length precedes.
_TEST_CASE = 4 + (1 << 20)
_SIGNALS: dict[int | None, int] = {0: SIGFPE, 3: SIGTRAP, 6: SIGILL}


def _attach(variable: str, size: int) -> memoryview:
    """A segment of shared memory that AFL++ names in the environment."""
    shmat = ctypes.CDLL(None, use_errno=True).shmat
    shmat.restype, shmat.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    if variable not in os.environ:
        raise RuntimeError(f"serve: there is no {variable}: let afl-fuzz start this program")
    address = shmat(int(os.environ[variable]), None, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"{variable}: the shared memory cannot be attached")
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def _killable_process() -> subprocess.Popen[bytes]:
    """A process for AFL++ to kill when an input takes too long. It ends with this one."""
    command = [sys.executable, "-ISc", "import sys; sys.stdin.read()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE)  # noqa: S603, no input of anybody


def serve(target: Target) -> None:
    """Run the inputs that afl-fuzz sends, until it ends.

    AFL++ sees a crash as a signal: SIGFPE for a divide error, SIGILL, SIGTRAP, otherwise SIGSEGV. A
    hang of the target is SIGKILL.

    Raises:
        RuntimeError: the process was not started by afl-fuzz.
    """
    size = max(64, len(target.coverage) + 63 & ~63)
    counters, test_case = _attach("__AFL_SHM_ID", size), _attach("__AFL_SHM_FUZZ_ID", _TEST_CASE)
    os.write(_STATUS, _WORD.pack(_ENABLED | _SHARED_TEST_CASE | _MAP_SIZE | size - 1 << 1))
    victim = _killable_process()
    try:
        os.read(_CONTROL, _WORD.size)  # the options that it accepts
        while os.read(_CONTROL, _WORD.size):
            os.write(_STATUS, _WORD.pack(victim.pid))
            (length,) = _WORD.unpack_from(test_case)
            result = target.run(test_case[4 : 4 + min(length, target.capacity)])
            counters[: len(result.coverage)] = result.coverage
            counters[0] |= 1  # it takes a map of zeros for a program without instrumentation
            status = 0
            if result.crash:
                status = _SIGNALS.get(result.exit.vector, SIGSEGV)
            elif result.value is None:
                status = SIGKILL
                if victim.poll() is not None:
                    victim = _killable_process()
            os.write(_STATUS, _WORD.pack(status))
    finally:
        victim.kill()
        victim.wait()

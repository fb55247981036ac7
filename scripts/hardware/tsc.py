"""How fast this machine's time stamp counter counts, which TCG hands to its guest.

A kernel measures the rate against an emulated timer. On a busy machine the two drift apart during
the measurement: the kernel's clock may then run ten times too fast, and time limits pass in a tenth
of their time. So the kernel is given the rate.
"""

from __future__ import annotations

import ctypes
import mmap
import time

# rdtsc; shl rdx, 32; or rax, rdx; ret
READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
LONG_NS = 200_000_000


def khz() -> int:
    """The counter's frequency."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(READ_TSC)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(page)))

    def both() -> tuple[int, int]:
        """The counter and the clock at one moment: of several readings the one that nothing came between."""
        readings = []
        for _ in range(20):
            before, counter, after = time.monotonic_ns(), read(), time.monotonic_ns()
            readings.append((after - before, counter, (before + after) // 2))
        _, counter, clock = min(readings)
        return counter, clock

    counter, clock = both()
    time.sleep(LONG_NS / 1e9)
    later_counter, later_clock = both()
    return round((later_counter - counter) * 1e6 / (later_clock - clock))

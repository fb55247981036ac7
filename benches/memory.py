"""Guest memory read and written from Python."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator

from pyvmm import KvmVm

from benches.measure import Result, compare, emulation

SIZE = 64 << 20
READS = 100_000
RUNS = 11


def copies(size: int = SIZE, reads: int = READS, runs: int = RUNS) -> Iterator[Result]:
    """Large copies of guest memory against memcpy, small reads against unicorn."""
    with KvmVm() as vm:
        memory = vm.memory
        memory.add(0, size)
        here, there = bytearray(b"\1") * size, bytearray(b"\2") * size
        address, other = (ctypes.addressof((ctypes.c_char * size).from_buffer(b)) for b in (here, there))
        memory.write(0, here)

        def rate(copy: Callable[[], object]) -> Callable[[], float]:
            def measure() -> float:
                start = time.perf_counter()
                copy()
                return size / (time.perf_counter() - start) / 1e9

            return measure

        memcpy = rate(lambda: ctypes.memmove(other, address, size))
        mib = size >> 20
        cases = [
            ("readinto", rate(lambda: memory.readinto(0, there)), memcpy, "memcpy"),
            ("write", rate(lambda: memory.write(0, here)), memcpy, "memcpy"),
            ("read", rate(lambda: memory.read(0, size)), rate(lambda: bytes(here)), "memcpy to new bytes"),
        ]
        for name, ours, theirs, theirs_name in cases:
            yield compare(f"memory.{name}, {mib} MiB", "GB/s", ours, theirs, theirs_name, 0.8, runs)
        yield from _small(memory.read, reads, runs)


def _small(read: Callable[[int, int], bytes], reads: int, runs: int) -> Iterator[Result]:
    unicorn = emulation()
    emulator = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    emulator.mem_map(0x1000, 0x1000)

    def ours() -> float:
        start = time.perf_counter()
        for _ in range(reads):
            read(0x1000, 8)
        return reads / (time.perf_counter() - start)

    def theirs() -> float:
        start = time.perf_counter()
        for _ in range(reads):
            emulator.mem_read(0x1000, 8)
        return reads / (time.perf_counter() - start)

    yield compare("memory.read, 8 bytes", "reads/s", ours, theirs, "unicorn mem_read", 5.0, runs)

"""Exits and whole lives of machines, against the bare KVM loop."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator

from pyvmm import Exit, FlatBoot, MemoryConfig, Stop, Vmm, VmmConfig

from benches import bare
from benches.measure import Result, compare

EXITS = 20_000
CYCLES = 100
AGAIN = 100
RUNS = 11
EXIT = b"\xb0\x00\xe6\xf4"  # mov al, 0; out 0xf4, al
BELL = 0x80
RING = b"\xe6\x80\xeb\xfc"  # back: out 0x80, al; jmp back


def reading(exits: int) -> bytes:
    """Read the serial port's line status repeatedly, in real mode, then exit."""
    return (
        b"\xba\xfd\x03"  # mov dx, 0x3fd
        b"\x66\xb9" + struct.pack("<I", exits) +  # mov ecx, exits
        b"\xec"  #         in al, dx
        b"\x66\x49"  #     dec ecx
        b"\x75\xfb"  #     jnz back
    ) + EXIT  # fmt: skip


def config(code: bytes) -> VmmConfig:
    """The machine that the bare loop makes."""
    return VmmConfig(boot=FlatBoot(code), memory=MemoryConfig(size_mib=1))


def pio_exits(exits: int = EXITS, runs: int = RUNS) -> Iterator[Result]:
    """Port exits that a built-in device answers."""
    code = reading(exits)

    def ours() -> float:
        with Vmm(config(code)) as vmm:
            start = time.perf_counter()
            exit = vmm.run()
            seconds = time.perf_counter() - start
        assert exit.code == 0
        return exits / seconds

    yield compare("pio-exit", "exits/s", ours, lambda: exits / bare.time_run(code), "bare KVM loop", 0.95, runs)


def lives(cycles: int = CYCLES, runs: int = RUNS) -> Iterator[Result]:
    """Machines made, run to their first exit, and closed, without an interrupt controller."""
    machine = config(EXIT)

    def ours(run: Callable[[Vmm], Exit]) -> float:
        start = time.perf_counter()
        for _ in range(cycles):
            with Vmm(machine) as vmm:
                run(vmm)
        return cycles / (time.perf_counter() - start)

    def theirs(threads: bool) -> float:
        return cycles / bare.time_cycles(EXIT, cycles, threads)

    def here() -> float:
        return ours(Vmm.run_here)

    def with_thread() -> float:
        return ours(Vmm.run)

    bare_name, unit = "bare KVM loop", "machines/s"
    yield compare("create-run_here-close", unit, here, lambda: theirs(False), bare_name, 0.95, runs)
    yield compare("create-run-close", unit, with_thread, lambda: theirs(False), bare_name, 0.9, runs)
    # What a thread for the vCPU costs the bare loop: the limit of any machine that has one.
    yield compare("create-run-close", unit, with_thread, lambda: theirs(True), f"{bare_name} with a thread", 0.9, runs)


def runs_again(count: int = AGAIN, runs: int = RUNS) -> Iterator[Result]:
    """A run of a guest that has run before, to its next port exit, which a Python device ends."""

    class Bell:
        def write(self, offset: int, size: int, value: int) -> Stop:
            return Stop()

    def ours(run: Callable[[Vmm], Exit]) -> float:
        with Vmm(config(RING)) as vmm:
            vmm.add_pio_device(BELL, 1, Bell())
            run(vmm)
            start = time.perf_counter()
            for _ in range(count):
                run(vmm)
            return (time.perf_counter() - start) / count * 1e6

    # Before Linux 6.13 a thread that enters another thread's guest waits for milliseconds.
    limit, name = (lambda: 1000.0), "the limit set for it"
    yield compare("run again", "us", lambda: ours(Vmm.run), limit, name, 1.0, runs)
    yield compare("run_here again", "us", lambda: ours(Vmm.run_here), limit, name, 1.0, runs)

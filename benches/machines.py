"""Exits and whole lives of machines, against the bare KVM loop."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

from pyvmm import FlatBoot, MemoryConfig, Vmm, VmmConfig

from benches import bare
from benches.measure import Result, compare

EXITS = 20_000
CYCLES = 100
RUNS = 11
EXIT = b"\xb0\x00\xe6\xf4"  # mov al, 0; out 0xf4, al


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

    def ours() -> float:
        start = time.perf_counter()
        for _ in range(cycles):
            with Vmm(machine) as vmm:
                vmm.run()
        return cycles / (time.perf_counter() - start)

    def theirs(threads: bool) -> float:
        return cycles / bare.time_cycles(EXIT, cycles, threads)

    bare_name, unit = "bare KVM loop", "machines/s"
    yield compare("create-run-close", unit, ours, lambda: theirs(False), bare_name, 0.9, runs)
    # What a thread for the vCPU costs the bare loop: the limit of any machine that has one.
    yield compare("create-run-close", unit, ours, lambda: theirs(True), f"{bare_name} with a thread", 0.9, runs)

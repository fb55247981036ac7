"""Guests of the fuzzing kit, compiled when a test needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from programs import build
from pyvmm import ElfBoot, MemoryConfig, Snapshot, VmmConfig
from pyvmm.fuzz import ready

if TYPE_CHECKING:
    from pathlib import Path

# Crashes of several kinds, a hang, and what outlives an input, by the first byte.
SOURCE = """
#include "pyvmm_fuzz.h"
static volatile int calls, spin = 1;
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    calls++;
    if (size == 0)
        return -7;
    switch (data[0]) {
    case 'n': *(volatile int *)16 = 1; break;
    case 'd': return size / (calls - calls);
    case 'h': while (spin) { } break;
    case 'c': return calls;
    case 'o': return ((volatile const uint8_t *)data)[size];
    case 'w': for (int n = 0; n < 5000000; n++) spin = 1; return 1;
    case 'x': __asm__ volatile("out %0, $0xf4" :: "a"(5)); break;
    case 'p': __asm__ volatile("mov $0x500, %%edx; out %0, %%dx" :: "a"((int)size) : "edx"); return 4;
    case 'q': for (;;) __asm__ volatile("mov $0x500, %%edx; out %0, %%dx" :: "a"((int)size) : "edx");
    case 's': for (volatile uint8_t *at = (volatile uint8_t *)&pyvmm_fuzz.count; ; at++) *at = 0xff;
    }
    int sum = 0;
    for (size_t n = 0; n < size; n++)
        sum += data[n];
    return sum;
}
"""


def snapshot_of(
    folder: Path, source: str = SOURCE, *, flags: tuple[str, ...] = (), compiler: str = "gcc", **of_ready: Any
) -> Snapshot:
    program = build(folder, source, *flags, compiler=compiler)
    return ready(VmmConfig(boot=ElfBoot(program), memory=MemoryConfig(size_mib=16)), **of_ready)

"""Kernels in C for KernelBoot, compiled when a test needs them. Each ends through the exit port."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from pyvmm import KernelBoot, MemoryConfig, Vmm, VmmConfig

if TYPE_CHECKING:
    from pathlib import Path

    from pyvmm import Exit

DEADLINE_S = 60
FLAGS = (
    *("-O1", "-ffreestanding", "-nostdlib", "-static", "-fno-pie", "-no-pie", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-mgeneral-regs-only", "-Wl,--build-id=none"),
    *("-Wl,-z,noexecstack", "-Wl,-z,max-page-size=4096"),
)
# The address of the code, unless a test says another one.
TEXT = "-Wl,-Ttext=0x100000"

# What each kernel has: a console, and the end of the run. `run` gets EAX and EBX, or RSI.
SUPPORT = """
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" :: "a"(value), "Nd"(port)); }
static void put(const char *text) { while (*text) out8(0x3f8, *text++); }
static void hex(u64 value) {
    char text[19] = "0x"; int n = 2, shift = 60;
    while (shift && !(value >> shift)) shift -= 4;
    for (; shift >= 0; shift -= 4) text[n++] = "0123456789abcdef"[value >> shift & 15];
    text[n] = 0; put(text);
}
static void say(const char *name, u64 value) { put(name); put("="); hex(value); put("\\n"); }
static void end(int code) { __asm__ volatile("outl %0, $0xf4" :: "a"(code)); for (;;) __asm__ volatile("hlt"); }
"""
# A multiboot header, and an entry that passes EAX and EBX.
MULTIBOOT = (
    SUPPORT
    + """
#ifndef HEADER_FLAGS
#define HEADER_FLAGS 3
#endif
#define MAGIC 0x1badb002
__asm__(".section .text.boot, \\"ax\\"\\n.balign 4\\n.globl header\\nheader: .long 0x1badb002, " XSTR(HEADER_FLAGS) ", "
        "-(0x1badb002 + " XSTR(HEADER_FLAGS) ")\\n" ADDRESSES
        ".globl _start\\n_start: mov $stack + 16384, %esp\\n push %ebx\\n push %eax\\n call run\\n.text\\n");
u8 stack[16384] __attribute__((aligned(16)));
"""
).replace(
    "#ifndef", "#define STR(x) #x\n#define XSTR(x) STR(x)\n#ifndef ADDRESSES\n#define ADDRESSES\n#endif\n#ifndef", 1
)


def build(folder: Path, source: str, *flags: str) -> Path:
    """Compile a kernel; skip the test if there is no compiler, or none for 32 bits."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    (folder / "kernel.c").write_text(source)
    place = [] if any(flag.startswith("-Wl,-T") for flag in flags) else [TEXT]
    command = ["gcc", *FLAGS, *place, *flags, "-o", "kernel", "kernel.c"]
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S * 10)
    assert done.returncode == 0, done.stderr
    return folder / "kernel"


def run(boot: KernelBoot, size_mib: int = 8, **config: object) -> tuple[Exit, str]:
    """Run a kernel; returns how it ended and what it printed."""
    with Vmm(VmmConfig(boot=boot, memory=MemoryConfig(size_mib=size_mib)).replace(**config)) as vmm:
        exit = vmm.run(DEADLINE_S)
        return exit, vmm.serial.take_output().decode()

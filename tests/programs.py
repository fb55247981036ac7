"""C programs for ElfBoot, compiled when a test needs them."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from pyvmm import ElfBoot, Exit, MemoryConfig, Vmm, VmmConfig
from pyvmm.fuzz import FLAGS

if TYPE_CHECKING:
    from pathlib import Path

DEADLINE_S = 60
# Begins by the System V ABI, calls `run`, and exits with what it returns.
START = """
#include <stdint.h>
int run(void);
__asm__(".globl _start\\n_start: call run; out %eax, $0xf4; hlt");
"""


def build(folder: Path, source: str, *flags: str, compiler: str = "gcc") -> Path:
    """Compile a program; skip the test where there is no compiler."""
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    (folder / "program.c").write_text(source)
    command = [compiler, "-O1", *FLAGS, *flags, "-o", "program", "program.c"]
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S * 10)
    assert done.returncode == 0, done.stderr
    return folder / "program"


def machine(program: Path, *, stack_kib: int = 64, size_mib: int = 8) -> VmmConfig:
    return VmmConfig(boot=ElfBoot(program, stack_kib=stack_kib), memory=MemoryConfig(size_mib=size_mib))


def run(program: Path, **config: int) -> Exit:
    with Vmm(machine(program, **config)) as vmm:
        return vmm.run(DEADLINE_S)

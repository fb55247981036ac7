"""What a type checker accepts of configurations: lists for tuples, paths, and copies.

Covers python/pyvmm/config.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checker import check

if TYPE_CHECKING:
    from pathlib import Path

HEAD = """
from pathlib import Path
from typing import assert_type
from pyvmm import BootModule, CpuConfig, ElfBoot, FirmwareBoot, FlatBoot, KernelBoot, LinuxBoot, MemoryConfig
from pyvmm import SerialConfig, VmmConfig

def check(names: list[str], path: Path, config: VmmConfig) -> None:
"""

RIGHT = """
    CpuConfig(hide=["avx2"], expose=("avx",))
    CpuConfig(hide=names, expose=tuple(names))
    LinuxBoot(path, initrd="initrd")
    LinuxBoot("vmlinux", initrd=path)
    ElfBoot(path)
    LinuxBoot(path, protocol="pvh")
    KernelBoot(path, modules=["a", path, BootModule(path, cmdline="b")], protocol="multiboot")
    FirmwareBoot(path)
    FlatBoot(path=path, mode="long64")
    SerialConfig(output=print, input=path)
    assert_type(config.replace(cpu=CpuConfig(vcpus=2)), VmmConfig)
    assert_type(config.cpu.replace(hide=["avx2"]), CpuConfig)
    assert_type(config.check(), None)
"""

WRONG = [
    "CpuConfig(hide=2)",
    "CpuConfig(hide=[1])",
    "CpuConfig(2)",
    "VmmConfig(memory=64)",
    "VmmConfig(vcpus=2)",
    'FlatBoot(b"", mode="real")',
    "LinuxBoot()",
    'KernelBoot(path, protocol="64-bit")',
    "KernelBoot(path, modules=[1])",
    "MemoryConfig(1, 2)",
    "config.exit_port = 3",
]


def test_checker_accepts_lists_and_paths_and_refuses_the_rest(tmp_path: Path) -> None:
    check(HEAD + RIGHT, WRONG, tmp_path)

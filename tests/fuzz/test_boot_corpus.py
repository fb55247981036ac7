"""The inputs from which `make fuzz` starts, and those that once were findings, as everything that can be booted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from conftest import ROOT
from pyvmm import ElfBoot, FirmwareBoot, KernelBoot, LinuxBoot, MemoryConfig, VmmConfig, VmmError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CORPUS = sorted((ROOT / "tests" / "fuzz" / "boot").iterdir())
BOOTS: dict[str, Callable[[Path], Any]] = {
    "linux": lambda path: LinuxBoot(path, initrd=[path, path]),
    "bzimage": lambda path: LinuxBoot(path, unpack=False),
    "unpacked": lambda path: LinuxBoot(path, unpack=True),
    "linux32": lambda path: LinuxBoot(path, protocol="32-bit"),
    "pvh": lambda path: LinuxBoot(path, protocol="pvh", initrd=path),
    "kernel": lambda path: KernelBoot(path, modules=(path,)),
    "multiboot": lambda path: KernelBoot(path, protocol="multiboot"),
    "program": ElfBoot,
    "firmware": FirmwareBoot,
}
# What each of the formats is loaded as.
LOADED = {
    "bzimage": {"linux", "bzimage", "linux32"},
    "bzimage-32": {"linux", "bzimage", "linux32"},
    "elf32": {"linux", "bzimage", "linux32", "unpacked", "kernel"},
    "elf64": {"linux", "bzimage", "unpacked", "kernel", "program"},
    "gzip": {"linux", "bzimage", "linux32", "unpacked"},
    "lz4": {"linux", "bzimage", "linux32", "unpacked"},
    "lzma": {"linux", "bzimage", "linux32", "unpacked"},
    "xz": {"linux", "bzimage", "linux32", "unpacked"},
    "zstd": {"linux", "bzimage", "linux32", "unpacked"},
    "empty": set(),
    "gzip-file": set(),
}


@pytest.mark.parametrize("name", [path.name for path in CORPUS])
def test_input_is_loaded_or_refused_by_a_typed_error(name: str) -> None:
    loaded = set()
    for kind, boot in BOOTS.items():
        config = VmmConfig(boot=boot(ROOT / "tests" / "fuzz" / "boot" / name), memory=MemoryConfig(size_mib=8))
        try:
            config.check()
        except VmmError as error:
            assert str(error).startswith(("boot.", "irqchip")), error
        else:
            loaded.add(kind)
    assert loaded == LOADED.get(name, loaded)

"""Programs of others that use a PC's devices: Debian's memtest86+ and SeaBIOS, through Python and the command line.

Each test is skipped where its package is missing.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import pyvmm
from pyvmm import CpuConfig, FirmwareBoot, LinuxBoot, MemoryConfig, Vmm, VmmConfig

pytestmark = pytest.mark.kvm
DEADLINE_S = 300.0
MEMTEST = Path("/boot/memtest86+x64.bin")
SEABIOS = Path("/usr/share/seabios/bios-microvm.bin")


def needs(path: Path, package: str) -> None:
    if not path.exists():
        pytest.skip(f"{path} is missing: install {package}")


def test_memtest86_shows_on_its_screen_that_it_tests() -> None:
    needs(MEMTEST, "memtest86+")
    config = VmmConfig(boot=LinuxBoot(MEMTEST), cpu=CpuConfig(fixups=True), memory=MemoryConfig(size_mib=16))
    with Vmm(config) as vmm:
        found = vmm.screen.expect(re.compile(r"Testing: .*\[.*"), DEADLINE_S)
        assert found.match is not None
        assert "Memtest86+" in vmm.screen
        vmm.stop()
        vmm.wait(DEADLINE_S)


def test_the_command_line_shows_memtest86() -> None:
    needs(MEMTEST, "memtest86+")
    done = pyvmm("run", MEMTEST, "--fixups", "--memory", "16", "--screen", "--timeout", "50", "--expect", "Testing: ")
    assert done.returncode == 0, done.stderr.decode()
    assert "Memtest86+" in done.stdout.decode()


def test_seabios_prints_its_banner_to_the_debug_port() -> None:
    needs(SEABIOS, "seabios")
    with Vmm(VmmConfig(boot=FirmwareBoot(SEABIOS))) as vmm:
        found = vmm.serials["debug_port"].expect(re.compile(r"SeaBIOS \(version ([^)]*)\)"), DEADLINE_S)
        assert found.match is not None
        vmm.stop()
        vmm.wait(DEADLINE_S)


def test_the_command_line_writes_what_seabios_prints(tmp_path: Path) -> None:
    needs(SEABIOS, "seabios")
    (tmp_path / "vm.toml").write_text(f'[boot]\ntype = "firmware"\npath = "{SEABIOS}"\n')
    done = pyvmm("run", "--config", tmp_path / "vm.toml", "--debugcon", tmp_path / "log", "--timeout", "20")
    assert done.returncode in (0, 120, 121, 124), done.stderr.decode()
    assert (tmp_path / "log").read_text().startswith("SeaBIOS (version ")

"""Guests of others that probe a PC: memtest86+, SeaBIOS and U-Boot, through Python and the command line.

`make guests` fetches them; each test is skipped where its guest is missing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from command_line import pyvmm
from others import guest_of_others
from pyvmm import CpuConfig, FirmwareBoot, LinuxBoot, MemoryConfig, Vmm, VmmConfig

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm
DEADLINE_S = 300.0
BANNER = re.compile(r"SeaBIOS \(version ([^)]*)\)")


@pytest.mark.timeout(2 * DEADLINE_S)
@pytest.mark.parametrize("name", ["memtest86+x64.bin", "memtest86+ia32.bin"])
def test_memtest86_shows_on_its_screen_that_it_tests(name: str) -> None:
    """It has a header like Linux, with the 64-bit or only the 32-bit entry."""
    config = VmmConfig(
        boot=LinuxBoot(guest_of_others(name)), cpu=CpuConfig(fixups=True), memory=MemoryConfig(size_mib=16)
    )
    with Vmm(config) as vmm:
        found = vmm.screen.expect(re.compile(r"Testing: .*\[.*"), DEADLINE_S)
        assert found.match is not None
        assert "Memtest86+" in vmm.screen
        vmm.stop()
        vmm.wait(DEADLINE_S)


@pytest.mark.timeout(2 * DEADLINE_S)
def test_the_command_line_shows_memtest86() -> None:
    image = guest_of_others("memtest86+x64.bin")
    done = run("--fixups", "--memory", "16", "--screen", "--expect", "Testing: ", image)
    assert done.returncode == 0, done.stderr.decode()
    assert "Memtest86+" in done.stdout.decode()


@pytest.mark.timeout(2 * DEADLINE_S)
def test_seabios_prints_its_banner_to_the_debug_port() -> None:
    with Vmm(VmmConfig(boot=FirmwareBoot(guest_of_others("bios-microvm.bin")))) as vmm:
        found = vmm.serials["debug_port"].expect(BANNER, DEADLINE_S)
        assert found.match is not None
        vmm.stop()
        vmm.wait(DEADLINE_S)


def test_the_command_line_writes_what_seabios_prints(tmp_path: Path) -> None:
    log = tmp_path / "log"
    os.mkfifo(log)
    options = ["--boot", "firmware", "--timeout", str(DEADLINE_S), "--debugcon", str(log)]
    command = [sys.executable, "-m", "pyvmm", "run", *options, str(guest_of_others("bios-microvm.bin"))]
    with subprocess.Popen(command) as running:
        try:
            with log.open() as printed:
                assert BANNER.match(printed.readline())
        finally:
            running.kill()


@pytest.mark.timeout(2 * DEADLINE_S)
def test_u_boot_prints_its_banner() -> None:
    done = run("--boot", "firmware", "--expect", "U-Boot 20", guest_of_others("u-boot.rom"))
    assert done.returncode == 0, done.stderr.decode()


def run(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    return pyvmm("run", "--timeout", DEADLINE_S, *arguments, deadline=2 * DEADLINE_S)

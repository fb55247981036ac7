"""Linux with ACPI, from userspace: it powers off, resets in each of its ways, panics and halts.

Covers src/devices/pvpanic.rs.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from pyvmm import CpuConfig, ExitReason, LinuxBoot, PlatformConfig, Snapshot, Vmm, VmmConfig

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Linux

pytestmark = [pytest.mark.linux, pytest.mark.timeout(410)]
DEADLINE_S = 180
PROMPT = b"pyvmm> "

WAYS = {
    "poweroff": (["poweroff"], ExitReason.POWEROFF, 0),
    "halt": (["halt"], ExitReason.ALL_HALTED, 0),
    "panic": (["panic"], ExitReason.PANIC, 122),
    "reboot": (["reboot"], ExitReason.RESET, 121),
    **{
        f"reboot by {how}": ([f"write {how} /sys/kernel/reboot/type", "reboot"], ExitReason.RESET, 121)
        for how in ("acpi", "kbd", "pci")
    },
}


def at_the_shell(linux: Linux, vcpus: int, platform: PlatformConfig | None = None) -> tuple[Snapshot, str]:
    """A machine whose shell waits for a command, and what it has printed."""
    boot = LinuxBoot(linux.vmlinux_smp, initrd=linux.initramfs, cmdline=f"{linux.cmdline} pyvmm.shell")
    config = VmmConfig(boot=boot, cpu=CpuConfig(vcpus=vcpus), platform=platform or PlatformConfig())
    with Vmm(config) as vmm:
        vmm.run_until(PROMPT, DEADLINE_S)
        return vmm.snapshot(), vmm.serial.take_output().decode(errors="replace")


@pytest.fixture(scope="module")
def shell(linux_once: Linux, tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, str, Path]:
    snapshot, console = at_the_shell(linux_once, 2)
    file = tmp_path_factory.mktemp("shell") / "snapshot"
    snapshot.save(file)
    return snapshot, console, file


def test_processors_and_com1_are_found_by_acpi(shell: tuple[Snapshot, str, Path]) -> None:
    _, console, _ = shell
    assert "ACPI: RSDP 0x00000000000E1000" in console
    assert "processors: 2" in console
    assert "ACPI: SCI" in console or "ACPI: Using IOAPIC for interrupt routing" in console
    assert "00:00: ttyS0 at I/O 0x3f8" in console or "00:01: ttyS0 at I/O 0x3f8" in console
    assert "ACPI Error" not in console
    assert "ACPI BIOS Error" not in console


@pytest.mark.parametrize("way", WAYS)
def test_userspace_ends_the_run_in_each_way(way: str, shell: tuple[Snapshot, str, Path]) -> None:
    commands, reason, status = WAYS[way]
    snapshot, _, file = shell
    *before, last = [command.encode() + b"\n" for command in commands]
    with snapshot.fork() as vmm:
        for command in before:
            vmm.serial.send(command)
            vmm.run_until(PROMPT, DEADLINE_S)
        vmm.serial.send(last)
        exit = vmm.run(DEADLINE_S)
        assert exit.reason is reason, (exit, vmm.serial.take_output()[-500:])
    if way.startswith("reboot by"):
        return
    line = [sys.executable, "-m", "pyvmm", "restore", str(file), "--timeout", str(DEADLINE_S)]
    done = subprocess.run(line, check=False, input=last, capture_output=True, timeout=2 * DEADLINE_S)
    assert done.returncode == status, done


def test_panic_without_pvpanic_is_a_reset(linux: Linux) -> None:
    snapshot, _ = at_the_shell(linux, 1, PlatformConfig(pvpanic=False))
    with snapshot.fork() as vmm:
        vmm.serial.send(b"panic\n")
        exit = vmm.run(DEADLINE_S)
        assert exit.reason is ExitReason.RESET, (exit, vmm.serial.take_output()[-500:])
    with snapshot.fork() as vmm:
        vmm.serial.send(b"write triple /sys/kernel/reboot/type\nreboot\n")
        exit = vmm.run(DEADLINE_S)
        # A KVM that emulates ring 0 refuses the INT3, and kvm-amd does not keep the IDT.
        is_known = exit.fault is not None and ("int3" in exit.fault or "are lost" in exit.fault)
        assert exit.reason is ExitReason.RESET or is_known, exit


def test_console_input_wakes_an_idle_guest(shell: tuple[Snapshot, str, Path]) -> None:
    with shell[0].fork() as vmm:
        assert vmm.run(2).reason is ExitReason.TIMEOUT, "idle, with interrupts on"
        vmm.serial.send(b"poweroff\n")
        assert vmm.run(DEADLINE_S).reason is ExitReason.POWEROFF

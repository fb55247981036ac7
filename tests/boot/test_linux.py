"""A real Linux, from a three-line program and from the command line, to its userspace and out by a reset."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import pyvmm
from pyvmm import (
    CpuConfig,
    EventFd,
    EventOps,
    Events,
    Exit,
    ExitReason,
    KernelBoot,
    LinuxBoot,
    SerialConfig,
    Vmm,
    VmmConfig,
)

if TYPE_CHECKING:
    from conftest import BootedLinux, Linux

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]
DEADLINE_S = 200
USERSPACE = "pyvmm: userspace reached, processors: 1"


def test_vmlinux_boots_to_userspace_and_resets(linux: Linux, booted_linux: BootedLinux) -> None:
    assert USERSPACE in booted_linux.console
    assert f"Kernel command line: {linux.cmdline} pyvmm.echo" in booted_linux.console
    with booted_linux.snapshot.fork() as fork:
        fork.serial.send(b"hello\n")
        exit = fork.run(DEADLINE_S)
        console = fork.serial.take_output().decode()
    assert exit == Exit(ExitReason.RESET, vcpu=0), console
    assert "pyvmm: you typed hello" in console
    assert "reboot: Restarting system" in console


def test_kernel_with_every_instruction_boots_by_fixups(linux: Linux) -> None:
    """Its boot executes INT3, and FWAIT where a task ends, which a KVM that emulates ring 0 refuses."""
    boot = LinuxBoot(linux.vmlinux_stock, initrd=linux.initramfs, cmdline=linux.cmdline)
    with Vmm(VmmConfig(boot=boot, cpu=CpuConfig(fixups=True))) as vmm:
        exit = vmm.run(DEADLINE_S)
        console = vmm.serial.take_output().decode()
        fixups = vmm.fixups
    assert exit == Exit(ExitReason.RESET, vcpu=0), console[-2000:]
    assert USERSPACE in console
    if not pyvmm.kvm_info()["software_kvm"]:
        return
    assert fixups.get("int3", 0) > 0
    with Vmm(VmmConfig(boot=boot)) as vmm:
        exit = vmm.run(DEADLINE_S)
    assert exit.reason is ExitReason.INTERNAL_ERROR
    assert exit.fault is not None
    assert ": int3\n" in exit.fault


@pytest.mark.timeout(410)
@pytest.mark.parametrize("vcpus", [2, 4])
def test_smp_kernel_comes_to_userspace_with_all_its_processors(linux: Linux, vcpus: int) -> None:
    console = bytearray()
    boot = LinuxBoot(linux.vmlinux_smp, initrd=linux.initramfs, cmdline=linux.cmdline)
    config = VmmConfig(boot=boot, cpu=CpuConfig(vcpus=vcpus), serial=SerialConfig(output=console.extend))
    with Vmm(config) as vmm:
        exit = vmm.run(2 * DEADLINE_S)  # with more vCPUs than processors they wait for each other
    assert exit.reason is ExitReason.RESET, (exit, bytes(console)[-2000:])
    assert f"userspace reached, processors: {vcpus}\r\n".encode() in console, bytes(console)[-2000:]


def test_subscriber_of_ones_own_is_called_while_linux_boots(linux: Linux) -> None:
    class Counter:
        def __init__(self) -> None:
            self.fd = EventFd(100, semaphore=True)
            self.count = 0

        def init(self, ops: EventOps) -> None:
            ops.add(Events(self.fd))

        def process(self, events: Events, ops: EventOps) -> None:
            self.count += self.fd.read()
            if self.count == 100:
                vmm.stop()

    counter = Counter()
    boot = LinuxBoot(linux.vmlinux, initrd=linux.initramfs, cmdline=linux.cmdline)
    with Vmm(VmmConfig(boot=boot)) as vmm:
        vmm.add_subscriber(counter)
        exit = vmm.run(DEADLINE_S)
    assert (exit.reason, counter.count) == (ExitReason.STOPPED, 100)


def test_vmlinux_boots_as_any_pvh_kernel_with_a_ram_disk(linux: Linux) -> None:
    boot = KernelBoot(linux.vmlinux, modules=[linux.initramfs], cmdline=linux.cmdline)
    with Vmm(VmmConfig(boot=boot)) as vmm:
        exit = vmm.run(DEADLINE_S)
        console = vmm.serial.take_output().decode()
    assert exit == Exit(ExitReason.RESET, vcpu=0), console[-2000:]
    assert USERSPACE in console
    assert f"Kernel command line: {linux.cmdline}" in console


def test_command_line_boots_a_vmlinux_by_pvh_and_at_its_entry(linux: Linux) -> None:
    for boot in ("pvh", "elf"):
        command = [sys.executable, "-m", "pyvmm", "run", "--boot", boot, str(linux.vmlinux), "--append", linux.cmdline]
        command += ["--expect", "Linux version", "--timeout", str(DEADLINE_S)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S + 60, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]

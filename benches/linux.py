"""Linux to userspace, against QEMU's microvm with the same kernel, RAM disk and command line, and as a bzImage."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pyvmm import BootError, CpuConfig, LinuxBoot, SerialConfig, Vmm, VmmConfig, kvm_info
from pyvmm.linux import build

from benches.measure import Result, UnmeasurableError, compare

LINE = b"pyvmm: userspace reached"
RUNS = 5
MACHINE = "microvm,rtc=on,isa-serial=on,pit=on,pic=on,acpi=off"
# What a KVM that emulates ring 0 cannot execute, as the auto template has it.
SOFTWARE_CPU = (
    "host,vendor=GenuineIntel,-xsave,-smap,-smep,-popcnt,-fsgsbase,-umip,-pcid,-invpcid,-rdpid,-erms,-avx,-avx2,"
    "-arch-capabilities,-kvm-pv-ipi"
)


class Linux(NamedTuple):
    """A kernel and what it starts with."""

    kernel: Path
    initrd: Path
    cmdline: str
    vcpus: int = 1


def boots() -> Iterator[Result]:
    """Seconds from the start of Linux to the first line that userspace prints."""
    try:
        directory = build("tests")
    except BootError as error:
        raise UnmeasurableError(str(error)) from error
    # Both machines describe their processors by an MP table.
    cmdline = (directory / "cmdline").read_text().strip() + " acpi=off"
    one = Linux(directory / "vmlinux", directory / "initramfs.cpio", cmdline)
    packed = one._replace(kernel=directory / "bzImage")
    yield compare("linux-userspace, bzImage", "s", lambda: ours(packed), lambda: ours(one), "vmlinux", 0.91, RUNS)
    if shutil.which("qemu-system-x86_64") is None:
        raise UnmeasurableError("QEMU is not installed: apt-get install qemu-system-x86")
    two = one._replace(kernel=directory / "vmlinux-smp", vcpus=2)
    for name, linux in (("linux-userspace", one), ("linux-userspace, 2 vCPUs", two)):
        yield compare(name, "s", lambda: ours(linux), lambda: qemu(linux), "QEMU microvm", 1.0, RUNS)  # noqa: B023


def ours(linux: Linux) -> float:
    """In this process."""
    seen = bytearray()

    def look(piece: bytes) -> None:
        seen.extend(piece)
        if LINE in seen:
            vmm.stop()

    start = time.perf_counter()
    boot = LinuxBoot(linux.kernel, initrd=linux.initrd, cmdline=linux.cmdline)
    config = VmmConfig(boot=boot, cpu=CpuConfig(vcpus=linux.vcpus), serial=SerialConfig(output=look))
    with Vmm(config) as vmm:
        vmm.run(120)
        seconds = time.perf_counter() - start
    assert LINE in seen
    return seconds


def qemu(linux: Linux) -> float:
    """In a QEMU process."""
    cpu = SOFTWARE_CPU if kvm_info()["software_kvm"] else "host"
    command = ["qemu-system-x86_64", "-M", MACHINE, "-accel", "kvm", "-cpu", cpu, "-m", "128", "-smp", str(linux.vcpus)]
    command += ["-kernel", str(linux.kernel), "-initrd", str(linux.initrd), "-append", linux.cmdline]
    command += ["-nographic", "-no-reboot"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if LINE in line:
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise UnmeasurableError("QEMU ended before userspace")

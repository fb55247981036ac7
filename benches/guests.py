"""A Linux with virtio devices that carries out commands, in this process and in QEMU's."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from pyvmm import BootError, LinuxBoot, MemoryConfig, Vmm, VmmConfig, kvm_info
from pyvmm.linux import build

from benches.linux import MACHINE, SOFTWARE_CPU
from benches.measure import UnmeasurableError

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 300.0
SIZE_MIB = 128
READY = "pyvmm: ready\r\n"


def directory() -> Path:
    """Where the kernel and its RAM disk are."""
    try:
        return build("virtio")
    except BootError as error:
        raise UnmeasurableError(str(error)) from error


def cmdline(words: str) -> str:
    """The kernel's command line. No machine describes its devices by ACPI."""
    return f"{(directory() / 'cmdline').read_text().strip()} acpi=off quiet {words}"


class Guest(ABC):
    """A booted Linux whose program, python/pyvmm/linux/agent.c, takes commands."""

    @abstractmethod
    def write(self, text: str) -> None:
        """Type a text."""

    @abstractmethod
    def expect(self, pattern: str) -> str:
        """Wait for what a regular expression matches, and return that."""

    def type(self, command: str) -> None:
        """Type a command, and do not wait for its end."""
        self.write(f"{command}\n")

    def end(self) -> None:
        """Wait for the end of the command."""
        status = self.expect(r"~\d+~\r\n")
        if status.strip() != "~0~":
            raise UnmeasurableError(f"a command failed in the guest: {status!r}")

    def run(self, command: str) -> None:
        """Run a command."""
        self.type(command)
        self.end()

    def seconds(self, command: str) -> float:
        """Run a command; how long it took."""
        start = time.perf_counter()
        self.run(command)
        return time.perf_counter() - start


class Ours(Guest):
    """In this process."""

    def __init__(self, words: str = "", **devices: Any) -> None:
        boot = LinuxBoot(directory() / "vmlinux-virtio", initrd=directory() / "agent.cpio", cmdline=cmdline(words))
        self.vmm = Vmm(VmmConfig(boot=boot, memory=MemoryConfig(size_mib=SIZE_MIB), **devices))
        self._thread = threading.Thread(target=self.vmm.run, args=(TIMEOUT_S * 10,))

    def __enter__(self) -> Ours:
        self._thread.start()
        self.expect(re.escape(READY))
        return self

    def __exit__(self, *_: object) -> None:
        self.vmm.stop()
        self._thread.join()
        self.vmm.close()

    def write(self, text: str) -> None:
        self.vmm.serial.send(text.encode())

    def expect(self, pattern: str) -> str:
        return str(self.vmm.serial.expect(re.compile(pattern), TIMEOUT_S).matched)


class Qemu(Guest):
    """In a process of QEMU's microvm."""

    def __init__(self, *devices: str, words: str = "", initrd: str = "agent.cpio") -> None:
        if shutil.which("qemu-system-x86_64") is None:
            raise UnmeasurableError("QEMU is not installed: apt-get install qemu-system-x86")
        cpu = SOFTWARE_CPU if kvm_info()["software_kvm"] else "host"
        self._command = ["qemu-system-x86_64", "-M", MACHINE, "-accel", "kvm", "-cpu", cpu, "-m", str(SIZE_MIB)]
        self._command += ["-kernel", str(directory() / "vmlinux-virtio"), "-initrd", str(directory() / initrd)]
        self._command += ["-append", cmdline(words), "-nodefaults", "-display", "none", "-serial", "stdio"]
        self._command += ["-no-reboot", *devices]
        self._seen = ""

    def __enter__(self) -> Qemu:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.expect(re.escape(READY))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def write(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())

    def expect(self, pattern: str) -> str:
        stream = self._process.stdout
        assert stream is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while (found := re.search(pattern, self._seen)) is None:
                if not selector.select(TIMEOUT_S) or not (piece := os.read(stream.fileno(), 65536)):
                    raise UnmeasurableError(f"QEMU's guest does not say {pattern}: {self._seen[-300:]!r}")
                self._seen += piece.decode(errors="replace")
        self._seen = self._seen[found.end() :]
        return found[0]

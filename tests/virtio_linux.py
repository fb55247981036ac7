"""The Linux with virtio devices that the tests boot, and its program, to which a test types commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from conftest import LINUX_DEADLINE_S, linux_directory
from pyvmm import Balloon, Disk, LinuxBoot, MemoryConfig, Net, Network, Rng, Share, Vmm, VmmConfig, Vsock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pyvmm import Exit, Snapshot

# What the program of the guest, python/pyvmm/linux/agent.c, says after each command: its status.
STATUS = re.compile(r"~(\d+)~\r\n")


# How much moves each way. Where ring 0 is emulated, Linux moves about 2 MiB a second; `make
# long` has the time for 64.
MOVED = (64 if "PYVMM_LONG" in os.environ else 4) << 20
# Where programs of root are, also if another user runs the tests.
SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"


class Sum(NamedTuple):
    """What the program says about bytes: how many, and their CRC-32."""

    size: int
    crc: int


def sum_of(data: bytes) -> Sum:
    """The same of bytes on the host."""
    return Sum(len(data), zlib.crc32(data))


def said(output: str, what: str) -> Sum:
    """What the program has said: `what` is sent, received, echoed, written or read."""
    found = re.search(rf"agent: {what} (\d+) bytes, crc ([0-9a-f]{{8}})", output)
    assert found is not None, output
    return Sum(int(found[1]), int(found[2], 16))


def config(**changes: Any) -> VmmConfig:
    """The configuration of such a machine, with devices; skips if the kernel is not there."""
    directory = linux_directory()
    if not (directory / "virtio.toml").exists():
        pytest.skip("the Linux with virtio is not built: make linux")
    cmdline = f"{(directory / 'cmdline').read_text().strip()} quiet"
    boot = LinuxBoot(directory / "vmlinux-virtio", initrd=directory / "agent.cpio", cmdline=cmdline)
    return VmmConfig(**{"boot": boot, "memory": MemoryConfig(size_mib=128), **changes})


class Ready(NamedTuple):
    """A booted Linux, and what of the host its devices have."""

    snapshot: Snapshot
    image: Path
    share: Path


def e2fs(*command: str | Path) -> bytes:
    """Run a program of e2fsprogs, which must succeed."""
    found = shutil.which(command[0], path=SBIN)
    assert found is not None
    return subprocess.run([found, *command[1:]], check=True, capture_output=True, timeout=60).stdout


def file_system(path: Path) -> Path:
    """An empty ext4 of 32 MiB; or zeros, if the host cannot make one."""
    with path.open("wb") as file:
        file.truncate(32 << 20)
    if shutil.which("mkfs.ext4", path=SBIN) is not None:
        e2fs("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", path)
    return path


@contextmanager
def ready(folder: Path) -> Iterator[Ready]:
    """One boot for all tests. It has mounted and configured nothing yet."""
    image, share = file_system(folder / "disk.img"), folder / "share"
    share.mkdir()
    devices = config(
        disks=(Disk(image, overlay=True),),
        # Long packets cost least where ring 0 is emulated. Forks have other networks.
        nets=(Net(Network(), mtu=65_520),),
        vsock=Vsock(),
        rng=Rng(seed=7),
        balloon=Balloon(),
        shares=(Share(share, "host"),),
    )
    with Vmm(devices) as vmm:
        booted(vmm)
        yield Ready(vmm.snapshot(), image, share)


def booted(vmm: Vmm) -> None:
    """Run it until its program takes commands."""
    vmm.run_until("pyvmm: ready\r\n", LINUX_DEADLINE_S)


class Guest:
    """The program of a Linux that runs on a thread of its own."""

    def __init__(self, vmm: Vmm) -> None:
        self.vmm = vmm
        self._thread = threading.Thread(target=self._run, name="guest")
        self.exit: Exit | None = None

    def _run(self) -> None:
        self.exit = self.vmm.run(LINUX_DEADLINE_S)

    def start(self) -> None:
        """Let the guest run."""
        self._thread = threading.Thread(target=self._run, name="guest")
        self._thread.start()

    def stop(self) -> None:
        """Stop the guest: it can be copied or reset then."""
        self.vmm.stop()
        self._thread.join()

    def type(self, command: str) -> None:
        """Type a command, and do not wait for its end."""
        self.vmm.serial.sendline(command)

    def expect(self, text: str | re.Pattern[str]) -> str:
        """Wait for a text, and return what was before it."""
        return self.vmm.serial.expect(text, LINUX_DEADLINE_S).before

    def end(self, status: int = 0) -> str:
        """Wait for the end of the command; it must have this status. Return what it printed."""
        found = self.vmm.serial.expect(STATUS, LINUX_DEADLINE_S)
        output = found.before.replace("\r\n", "\n")
        assert found.matched == f"~{status}~\r\n", output
        return output

    def __call__(self, command: str, status: int = 0) -> str:
        """Run a command. Return what it printed."""
        self.type(command)
        return self.end(status)


@contextmanager
def running(vmm: Vmm) -> Iterator[Guest]:
    """The program of a booted machine; stops and closes the machine at the end."""
    guest = Guest(vmm)
    with vmm:
        guest.start()
        try:
            yield guest
        finally:
            guest.stop()


@contextmanager
def forked(snapshot: Snapshot, **devices: Any) -> Iterator[Guest]:
    """The program of a new fork, some of whose devices have another configuration."""
    with running(snapshot.fork(virtio=devices)) as guest:
        yield guest

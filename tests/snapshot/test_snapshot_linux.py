"""A real Linux, booted once: forked from its userspace, reset, and loaded from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pyvmm import ExitReason, LinuxBoot, SerialConfig, Snapshot, Vmm, VmmConfig

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import BootedLinux, Linux

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]
DEADLINE_S = 200
FORKS = 20


def answers(fork: Vmm, line: str) -> str:
    """Type a line and run to the reset; what the guest has printed since."""
    fork.serial.send(f"{line}\n".encode())
    assert fork.run(DEADLINE_S).reason is ExitReason.RESET
    return fork.serial.take_output().decode()


def test_twenty_forks_each_print_their_own_line_and_reset(booted_linux: BootedLinux) -> None:
    forks = booted_linux.snapshot.fork_many(FORKS)
    for number, fork in enumerate(forks):
        with fork:
            printed = answers(fork, f"fork {number}")
        assert f"pyvmm: you typed fork {number}" in printed
        assert "userspace reached" not in printed, "it has not booted again"


def test_one_fork_is_reset_and_asked_again(booted_linux: BootedLinux) -> None:
    with booted_linux.snapshot.fork() as fork:
        for number in range(5):
            assert f"you typed reset {number}" in answers(fork, f"reset {number}")
            assert fork.reset(booted_linux.snapshot) > 0


def test_linux_continues_from_a_file(booted_linux: BootedLinux, tmp_path: Path) -> None:
    booted_linux.snapshot.save(tmp_path / "linux")
    assert (tmp_path / "linux").stat().st_size < 64 << 20
    with Snapshot.load(tmp_path / "linux").fork() as fork:
        assert "you typed from a file" in answers(fork, "from a file")
        later = fork.snapshot()
    later.save(tmp_path / "diff", booted_linux.snapshot)
    assert (tmp_path / "diff").stat().st_size < (tmp_path / "linux").stat().st_size / 2


def test_snapshot_of_a_booting_linux_boots_on(linux_once: Linux) -> None:
    """Linux is stopped at marks on its console, forked and continued: the last fork still reaches userspace."""
    marks = [b"Zone ranges:", b"Memory: ", b"pid_max:", b"Unpacking initramfs"]
    seen = bytearray()

    def look(piece: bytes) -> None:
        seen.extend(piece)
        if marks and marks[0] in seen:
            marks.pop(0)
            vmm.stop()

    boot = LinuxBoot(linux_once.vmlinux, initrd=linux_once.initramfs, cmdline=linux_once.cmdline)
    with Vmm(VmmConfig(boot=boot, serial=SerialConfig(output=look))) as vmm:
        while marks:
            assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED, bytes(seen)[-2000:]
            snapshot = vmm.snapshot()
    with snapshot.fork() as fork:
        assert fork.run(DEADLINE_S).reason is ExitReason.RESET
        assert "pyvmm: userspace reached, processors: 1" in fork.serial.take_output().decode()

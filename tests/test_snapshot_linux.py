"""A real Linux, booted once: forked from its userspace, reset, and loaded from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pyvmm import ExitReason, LinuxBoot, SerialConfig, Snapshot, Vmm, VmmConfig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Linux

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]
DEADLINE_S = 200
FORKS = 20


@pytest.fixture(scope="module")
def at_userspace(linux_once: Linux) -> Iterator[Snapshot]:
    """Linux that waits for a line to be typed."""
    seen = bytearray()

    def look(piece: bytes) -> None:
        seen.extend(piece)
        if b"type a line" in seen:
            vmm.stop()

    boot = LinuxBoot(linux_once.vmlinux, initrd=linux_once.initramfs, cmdline=f"{linux_once.cmdline} pyvmm.echo")
    with Vmm(VmmConfig(boot=boot, serial=SerialConfig(output=look))) as vmm:
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED, bytes(seen)[-2000:]
        yield vmm.snapshot()


def answers(fork: Vmm, line: str) -> str:
    """Type a line and run to the reset; what the guest has printed since."""
    fork.serial.send(f"{line}\n".encode())
    assert fork.run(DEADLINE_S).reason is ExitReason.RESET
    return fork.serial.read().decode()


def test_twenty_forks_each_print_their_own_line_and_reset(at_userspace: Snapshot) -> None:
    forks = at_userspace.fork_many(FORKS)
    for number, fork in enumerate(forks):
        with fork:
            printed = answers(fork, f"fork {number}")
        assert f"pyvmm: you typed fork {number}" in printed
        assert "userspace reached" not in printed, "it has not booted again"


def test_one_fork_is_reset_and_asked_again(at_userspace: Snapshot) -> None:
    with at_userspace.fork() as fork:
        for number in range(5):
            assert f"you typed reset {number}" in answers(fork, f"reset {number}")
            assert fork.reset(at_userspace) > 0


def test_linux_goes_on_from_a_file(at_userspace: Snapshot, tmp_path: Path) -> None:
    at_userspace.save(tmp_path / "linux")
    assert (tmp_path / "linux").stat().st_size < 64 << 20
    with Snapshot.load(tmp_path / "linux").fork() as fork:
        assert "you typed from a file" in answers(fork, "from a file")
        later = fork.snapshot()
    later.save(tmp_path / "diff", at_userspace)
    assert (tmp_path / "diff").stat().st_size < (tmp_path / "linux").stat().st_size / 2


def test_snapshot_of_a_booting_linux_boots_on(linux_once: Linux) -> None:
    """Paused, copied and gone on, again and again: the last copy still comes to userspace."""
    boot = LinuxBoot(linux_once.vmlinux, initrd=linux_once.initramfs, cmdline=linux_once.cmdline)
    with Vmm(VmmConfig(boot=boot)) as vmm:
        for _ in range(4):
            assert vmm.run(0.5).reason is ExitReason.TIMEOUT
            snapshot = vmm.snapshot()
    with snapshot.fork() as fork:
        assert fork.run(DEADLINE_S).reason is ExitReason.RESET
        assert "pyvmm: userspace reached, processors: 1" in fork.serial.read().decode()

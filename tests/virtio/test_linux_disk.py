"""Linux has a file system on a disk: its bytes in copies of the machine, and after the process is killed.

Covers tests/killed_machine.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from virtio_linux import SBIN, Ready, e2fs, forked, said, sum_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.linux,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("mkfs.ext4", path=SBIN) is None, reason="there is no e2fsprogs"),
]
PROGRAM = Path(__file__).parents[1] / "killed_machine.py"
SIZE = 1 << 20
MOUNT = "mount ext4 /dev/vda /mnt"


@contextmanager
def process(snapshot: Path, disk: Path, *commands: str) -> Iterator[subprocess.Popen[bytes]]:
    """A machine in a process that is killed at the end."""
    command = [sys.executable, str(PROGRAM), str(snapshot), str(disk), *commands]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_for(running: subprocess.Popen[bytes], text: bytes) -> str:
    """The line of the console that has the text."""
    assert running.stdout is not None
    lines = []
    for line in running.stdout:
        lines.append(line)
        if text in line:
            return line.decode()
    raise AssertionError(b"".join(lines))


def contents(disk: Path, name: str) -> bytes:
    """A file of the file system, whose journal is replayed and which must be clean then."""
    e2fs("e2fsck", "-y", "-E", "journal_only", disk)
    e2fs("e2fsck", "-f", "-n", disk)
    return e2fs("debugfs", "-R", f"cat {name}", disk)


def test_a_fork_writes_a_file_that_only_its_own_copies_see(linux_ready: Ready) -> None:
    before = linux_ready.image.read_bytes()
    with forked(linux_ready.snapshot) as guest:
        guest(MOUNT)
        written = said(guest(f"write /mnt/file {SIZE}"), "written")
        assert written.size == SIZE
        guest("umount /mnt")
        guest.stop()
        second = guest.vmm.snapshot()
        guest.start()
        guest(MOUNT)
        guest("remove /mnt/file")
    with forked(second) as guest:
        guest(MOUNT)
        assert said(guest(f"sum /mnt/file {2 * SIZE}"), "read") == written
    with forked(linux_ready.snapshot) as guest:
        guest(MOUNT)
        assert "file" not in guest("ls /mnt").split()
    assert linux_ready.image.read_bytes() == before


def test_what_was_synced_is_there_after_the_process_was_killed(linux_ready: Ready, tmp_path: Path) -> None:
    linux_ready.snapshot.save(tmp_path / "snapshot")
    disk = tmp_path / "disk.img"
    shutil.copy(linux_ready.image, disk)
    with process(tmp_path / "snapshot", disk, MOUNT, f"write /mnt/file {SIZE}") as running:
        written = said(wait_for(running, b"written"), "written")
    assert sum_of(contents(disk, "/file")) == written
    # Killed in the middle of writes: each record that was said to be on the disk is there.
    with process(tmp_path / "snapshot", disk, MOUNT, "records /mnt/records 100000") as running:
        wait_for(running, b"record 5\r")
    records = contents(disk, "/records")
    assert len(records) >= 5 * 4096
    for number in range(5):
        assert records[number * 4096 : (number + 1) * 4096] == record(number + 1)
    assert sum_of(contents(disk, "/file")) == written


def record(number: int) -> bytes:
    """A record as the program of the guest makes it."""
    state, made = number, bytearray()
    for _ in range(4096):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        made.append(state >> 56)
    return bytes(made)

"""A save that fails or is killed leaves the old file whole, and leaks nothing."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from alone import alone
from conftest import TESTS
from guests import SPIN, flat
from oracle import NONCE, counted, finish, oracle
from pyvmm import Snapshot, StreamError, Vmm, VmmError

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.kvm
LIMITED = f"""
import os, resource, signal, sys
sys.path.insert(0, {str(TESTS)!r})
from guests import SPIN, flat
from pyvmm import Snapshot, StreamError, Vmm
with Vmm(flat(SPIN, size_mib=8)) as vmm:
    vmm.memory.write(0, os.urandom(8 << 20))
    snapshot = vmm.snapshot()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20))
try:
    snapshot.save(sys.argv[1])
except StreamError as error:
    print(error.errno)
"""
KILLED = f"""
import os, sys
sys.path.insert(0, {str(TESTS)!r})
from guests import SPIN, flat
from pyvmm import Vmm
with Vmm(flat(SPIN, size_mib=64)) as vmm:
    vmm.memory.write(0, os.urandom(64 << 20))
    snapshot = vmm.snapshot()
    def tell(done, total):
        if done == 1 << 20:
            print("writing", flush=True)
    while True:
        snapshot.save(sys.argv[1], progress=tell)
"""


def test_no_space_left_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "27"  # EFBIG, as ENOSPC
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_full_file_system_leaves_the_old_file_whole(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", mount], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        (mount / "file").write_bytes(b"old")
        with Vmm(flat(SPIN, size_mib=8)) as vmm:
            vmm.memory.write(0, os.urandom(8 << 20))
            with pytest.raises(StreamError, match="No space left"):
                vmm.snapshot().save(mount / "file")
        assert [(p.name, p.read_bytes()) for p in mount.iterdir()] == [("file", b"old")]
    finally:
        subprocess.run(["umount", mount], check=True)


def has_unnamed_files(directory: Path) -> bool:
    try:
        os.close(os.open(directory, os.O_TMPFILE | os.O_RDWR))
    except OSError:
        return False
    return True


def test_killed_while_it_saves_the_file_is_the_old_one_or_the_new(tmp_path: Path, oracle_snapshot: Snapshot) -> None:
    path = tmp_path / "file"
    for delay_ms in (0, 5, 20, 50):
        oracle_snapshot.save(path)
        with subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay_ms / 1000)  # somewhere in the middle: where does not matter
            process.send_signal(signal.SIGKILL)
        Snapshot.load(path, verify=True)
        # Where files cannot be without a name (overlayfs before Linux 6.2), the unfinished one
        # stays behind.
        others = [p for p in tmp_path.iterdir() if p.name != "file"]
        assert not others or not has_unnamed_files(tmp_path)
        assert all(p.match(".pyvmm-*.part") for p in others)
        for part in others:
            part.unlink()


@alone
def test_no_descriptors_left_is_an_error_and_leaks_nothing(oracle_file: Path) -> None:
    """Each call in turn finds no number for its descriptor."""
    with_room_for(12, oracle_file)
    before = len(os.listdir("/proc/self/fd"))
    for descriptors in range(12):
        with_room_for(descriptors, oracle_file)
        assert len(os.listdir("/proc/self/fd")) == before


def with_room_for(descriptors: int, oracle_file: Path) -> None:
    with oracle(NONCE) as vmm:
        snapshot = vmm.snapshot()
        vmm.memory.write(0x100000, b"changed")
        before = len(os.listdir("/proc/self/fd")) - 1
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        made = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + descriptors, hard))
        try:
            for act in (vmm.snapshot, snapshot.fork, snapshot.flatten, lambda: Snapshot.load(oracle_file)):
                try:
                    made.append(act())
                except OSError as error:
                    assert error.errno == 24
                except VmmError as error:
                    assert "Too many open files" in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert finish(vmm) == counted(NONCE)

"""Snapshots in files: whole, small, checked, and never half-written.

Covers src/bytes.rs, src/snapshot/header.rs, src/snapshot/load.rs, src/snapshot/pages.rs.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from guests import SPIN, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import counted, finish, oracle
from pyvmm import CpuConfig, Snapshot, SnapshotError, StreamError, Vmm, VmmError

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm
HEADER = 128
NONCE = 0x1234_5678


@pytest.fixture(scope="module")
def started() -> Iterator[Snapshot]:
    """An oracle in the middle of its count."""
    with oracle(NONCE) as vmm:
        vmm.run(0.01)
        yield vmm.snapshot()


@pytest.fixture(scope="module")
def file(started: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshot") / "oracle.snapshot"
    started.save(path)
    return path


def pages_at(content: bytes | bytearray) -> int:
    return int(struct.unpack_from("<Q", content, 32)[0])


@pytest.mark.parametrize("copy", [False, True])
def test_loaded_snapshot_goes_on_exactly(started: Snapshot, file: Path, copy: bool) -> None:
    loaded = Snapshot.load(file, copy=copy, verify=True)
    assert (loaded.id, loaded.state, loaded.path) == (started.id, started.state, file)
    with loaded.fork() as fork:
        assert finish(fork) == counted(NONCE)
        fork.reset(loaded)
        assert finish(fork) == counted(NONCE)


def test_saved_loaded_and_saved_again_is_the_same_byte_for_byte(file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    Snapshot.load(file).save(again)
    assert again.read_bytes() == file.read_bytes()


def test_file_may_have_as_long_a_name_as_there_is(started: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    started.save(path)
    assert Snapshot.load(path).id == started.id
    with pytest.raises(StreamError):
        started.save(tmp_path / ("x" * 256))
    assert os.listdir(tmp_path) == [path.name]


def test_state_that_no_file_can_hold_is_refused_before_it_is_written(tmp_path: Path) -> None:
    class Huge:
        def read(self, offset: int, size: int) -> int:
            return 0

        def save(self) -> bytes:
            return bytes(1 << 28)

        def restore(self, state: bytes) -> None:
            pass

    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x80, 1, Huge())
        with pytest.raises(SnapshotError, match="268435456 at most"):
            vmm.snapshot().save(tmp_path / "huge")
    assert os.listdir(tmp_path) == []


def test_pages_of_zeros_cost_nothing(tmp_path: Path) -> None:
    with Vmm(flat(SPIN, size_mib=512)) as vmm:
        vmm.memory.write(0x100000, os.urandom(4096))
        vmm.memory.fill(0x200000, 1 << 20, 0)  # touched, and zero
        vmm.snapshot().save(tmp_path / "sparse")
    assert (tmp_path / "sparse").stat().st_size < 64 << 10


def test_file_against_a_base_holds_what_changed(tmp_path: Path) -> None:
    with Vmm(flat(SPIN, size_mib=8)) as vmm:
        vmm.memory.write(0, bytes(range(256)) * (8 << 12))
        base = vmm.snapshot()
        base.save(tmp_path / "base")
        vmm.memory.write(0x300000, b"changed")
        vmm.memory.fill(0x500000, 4096, 0)
        after = vmm.snapshot()
        after.save(tmp_path / "diff", base)
    assert (tmp_path / "diff").stat().st_size < 32 << 10
    with pytest.raises(SnapshotError, match=f"needs the snapshot {base.id}"):
        Snapshot.load(tmp_path / "diff")
    with pytest.raises(SnapshotError, match="this is"):
        Snapshot.load(tmp_path / "diff", after)
    for given_base in (base, tmp_path / "base", Snapshot.load(tmp_path / "base")):
        loaded = Snapshot.load(tmp_path / "diff", given_base)
        with loaded.fork() as fork, after.fork() as other:
            assert fork.memory.read(0, 8 << 20) == other.memory.read(0, 8 << 20)
        with loaded.flatten().fork() as fork:
            assert fork.memory.read(0x300000, 7) == b"changed"
    with Vmm(flat(SPIN, size_mib=4)) as smaller, pytest.raises(SnapshotError, match="memory"):
        after.save(tmp_path / "diff", smaller.snapshot())


def test_snapshots_are_pickled_by_their_file(file: Path, started: Snapshot) -> None:
    loaded = pickle.loads(pickle.dumps(Snapshot.load(file)))
    assert loaded.id == started.id
    with pytest.raises(TypeError, match="save"):
        pickle.dumps(started)


def test_pickle_is_of_one_snapshot_and_not_of_another_in_its_file(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "pickled"
    Snapshot.load(file).save(path)
    pickled = pickle.dumps(Snapshot.load(path))
    assert pickle.loads(pickled).id == Snapshot.load(file).id
    with Vmm(flat(SPIN)) as vmm:
        vmm.snapshot().save(path)
    with pytest.raises(SnapshotError, match="another snapshot"):
        pickle.loads(pickled)


def test_progress_is_told_and_can_end_the_writing(tmp_path: Path) -> None:
    with Vmm(flat(SPIN, size_mib=8)) as vmm:
        vmm.memory.write(0, os.urandom(8 << 20))
        snapshot = vmm.snapshot()
    told: list[tuple[int, int]] = []
    snapshot.save(tmp_path / "file", progress=lambda done, total: told.append((done, total)))
    assert told == [(n << 20, 8 << 20) for n in range(1, 9)]
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(ZeroDivisionError):
        snapshot.save(tmp_path / "file", progress=lambda done, _total: 1 // (done - (3 << 20)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == before


def test_file_written_under_a_snapshot_is_noticed(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "changed"
    path.write_bytes(file.read_bytes())
    loaded, copied = Snapshot.load(path), Snapshot.load(path, copy=True)
    fork = loaded.fork()
    with path.open("r+b") as content:
        content.seek(pages_at(file.read_bytes()))
        content.write(b"x")
    os.utime(path, ns=(1, 1))
    for use in (loaded.fork, lambda: fork.reset(loaded), lambda: loaded.save(tmp_path / "other")):
        with pytest.raises(SnapshotError, match="written since"):
            use()
    with copied.fork() as unharmed:
        assert finish(unharmed) == counted(NONCE)
    with pytest.raises(SnapshotError, match="pages: its checksum"):
        Snapshot.load(path, verify=True)


def test_file_replaced_by_another_save_does_not_touch_live_forks(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "replaced"
    path.write_bytes(file.read_bytes())
    loaded = Snapshot.load(path)
    with loaded.fork() as fork, oracle(99) as other:
        other.snapshot().save(path)
        with loaded.fork() as later:
            assert finish(fork) == finish(later) == counted(NONCE)


def refused(content: bytes, path: Path) -> VmmError:
    """The error that it is refused with."""
    path.write_bytes(content)
    with pytest.raises(SnapshotError) as raised:
        Snapshot.load(path)
    path.unlink()
    return raised.value


def test_truncated_file_is_refused_at_every_64th_byte(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    for length in range(0, len(content), 64):
        refused(content[:length], tmp_path / "hostile")
    refused(content + b"\0", tmp_path / "hostile")


def test_every_flipped_bit_of_header_and_state_is_refused(file: Path, tmp_path: Path) -> None:
    content = bytearray(file.read_bytes())
    path = tmp_path / "hostile"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDWR)
    for at in range(pages_at(content)):
        for bit in range(8):
            os.pwrite(fd, bytes([content[at] ^ 1 << bit]), at)
            with pytest.raises(SnapshotError):
                Snapshot.inspect(path)
        os.pwrite(fd, content[at : at + 1], at)
    os.close(fd)
    Snapshot.load(path)


def with_checksums(content: bytearray) -> bytes:
    """The file with both checksums made right again, so that what is behind them is looked at."""
    length = struct.unpack_from("<Q", content, 24)[0]
    struct.pack_into("<I", content, 40, zlib.crc32(content[HEADER : HEADER + length]))
    struct.pack_into("<I", content, 12, 0)
    struct.pack_into("<I", content, 12, zlib.crc32(content[:HEADER]))
    return bytes(content)


@given(data=st.data())
@settings(max_examples=300)
def test_hostile_state_with_right_checksums_makes_an_error_or_a_machine(
    data: st.DataObject, file: Path, tmp_path: Path
) -> None:
    content = bytearray(file.read_bytes())
    end = pages_at(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(16, end - 1))
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        value = data.draw(st.one_of(st.integers(0, 2 ** (8 * width) - 1), st.sampled_from([0, 2 ** (8 * width) - 1])))
        content[at : at + width] = value.to_bytes(width, "little")
    path = tmp_path / "hostile"
    path.write_bytes(with_checksums(content[: len(file.read_bytes())]))
    try:
        with Snapshot.load(path, force=data.draw(st.booleans())).fork() as fork:
            fork.run(0.001)
    except VmmError:
        pass


def test_snapshot_of_another_machine_is_refused_with_the_difference_or_forced(file: Path, tmp_path: Path) -> None:
    content = bytearray(file.read_bytes())
    at = HEADER
    while struct.unpack_from("<H", content, at)[0] != 2:  # the host's record
        at += 8 + struct.unpack_from("<I", content, at + 4)[0]
    version = struct.unpack_from("<I", content, at + 8)[0]
    capabilities = at + 12 + version
    struct.pack_into("<I", content, capabilities + 4 + 4, 77)  # the first capability's answer
    path = tmp_path / "elsewhere"
    path.write_bytes(with_checksums(content))
    with pytest.raises(SnapshotError, match="KVM_CAP_IRQCHIP: 1 here, 77 there") as raised:
        Snapshot.load(path)
    assert "force" in (raised.value.hint or "")
    with Snapshot.load(path, force=True).fork() as fork:
        assert finish(fork) == counted(NONCE)


def test_file_of_another_version_is_refused(file: Path, tmp_path: Path) -> None:
    content = bytearray(file.read_bytes())
    struct.pack_into("<I", content, 8, 2)
    assert "version 2" in str(refused(bytes(content), tmp_path / "newer"))
    assert "no snapshot" in str(refused(b"x" * 5000, tmp_path / "other"))


def test_missing_file_and_directory_are_errors_of_the_system(tmp_path: Path, started: Snapshot) -> None:
    with pytest.raises(StreamError, match="No such file"):
        Snapshot.load(tmp_path / "none")
    with pytest.raises(StreamError, match="No such file"):
        started.save(tmp_path / "no" / "such" / "directory")
    with pytest.raises(SnapshotError, match="regular"):
        Snapshot.load("/dev/null")
    with pytest.raises(OSError, match="directory"):
        started.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import os, resource, signal, sys
sys.path.insert(0, "tests")
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


KILLED = """
import os, sys
sys.path.insert(0, "tests")
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


def has_unnamed_files(directory: Path) -> bool:
    try:
        os.close(os.open(directory, os.O_TMPFILE | os.O_RDWR))
    except OSError:
        return False
    return True


def test_killed_while_it_saves_the_file_is_the_old_one_or_the_new(tmp_path: Path, started: Snapshot) -> None:
    path = tmp_path / "file"
    for delay_ms in (0, 5, 20, 50):
        started.save(path)
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


@pytest.mark.parametrize("room", range(12))
def test_no_descriptors_left_is_an_error_and_leaks_nothing(room: int, file: Path) -> None:
    """Each call in turn finds no number for its descriptor."""
    with oracle(NONCE) as vmm:
        snapshot = vmm.snapshot()
        vmm.memory.write(0x100000, b"changed")
        before = len(os.listdir("/proc/self/fd")) - 1
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        made = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + room, hard))
        try:
            for act in (vmm.snapshot, snapshot.fork, snapshot.flatten, lambda: Snapshot.load(file)):
                try:
                    made.append(act())
                except OSError as error:
                    assert error.errno == 24
                except VmmError as error:
                    assert "Too many open files" in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert finish(vmm) == counted(NONCE)
        del made


def test_inspection_says_what_is_in_a_file(file: Path, started: Snapshot) -> None:
    found = Snapshot.inspect(file)
    assert (found["id"], found["base"], found["vcpus"]) == (started.id, None, 1)
    assert found["ranges"] == [(0, 2 << 20, False)]
    assert ("regs", 0, 144) in found["records"]
    json.dumps(found)


def test_two_vcpus_and_an_interrupt_controller_are_saved(tmp_path: Path) -> None:
    with Vmm(flat(SPIN, cpu=CpuConfig(vcpus=2), irqchip=True)) as vmm:
        vmm.run(0.01)
        vmm.snapshot().save(tmp_path / "file")
    with Snapshot.load(tmp_path / "file").fork() as fork:
        assert fork.vcpus[1].regs.rip == 0x1000
        fork.run(0.01)


def test_a_loaded_snapshot_says_what_it_takes_of_memory_and_of_its_file(tmp_path: Path) -> None:
    with Vmm(flat(SPIN, size_mib=2)) as vmm:
        vmm.memory.write(0x5000, b"x")
        snapshot = vmm.snapshot()
    snapshot.save(tmp_path / "file")
    loaded = Snapshot.load(tmp_path / "file")
    assert snapshot.memory_size == loaded.memory_size == 2 << 20
    assert (snapshot.file_bytes, loaded.memory_bytes) == (0, 0)
    assert snapshot.memory_bytes > 0
    assert 0 < loaded.file_bytes < 2 << 20

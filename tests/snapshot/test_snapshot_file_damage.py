"""Files that are damaged, truncated, hostile, changed, or of another version or machine are refused.

Covers src/snapshot/header.rs.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import NONCE, counted, finish
from pyvmm import Snapshot, SnapshotError, StreamError, VmmError

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.kvm
HEADER = 128


def pages_at(content: bytes | bytearray) -> int:
    return int(struct.unpack_from("<Q", content, 32)[0])


def test_file_written_under_a_snapshot_is_noticed(oracle_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "changed"
    path.write_bytes(oracle_file.read_bytes())
    loaded, copied = Snapshot.load(path), Snapshot.load(path, copy=True)
    fork = loaded.fork()
    with path.open("r+b") as content:
        content.seek(pages_at(oracle_file.read_bytes()))
        content.write(b"x")
    os.utime(path, ns=(1, 1))
    for use in (loaded.fork, lambda: fork.reset(loaded), lambda: loaded.save(tmp_path / "other")):
        with pytest.raises(SnapshotError, match="written since"):
            use()
    with copied.fork() as unharmed:
        assert finish(unharmed) == counted(NONCE)
    with pytest.raises(SnapshotError, match="pages: its checksum"):
        Snapshot.load(path, verify=True)


def refused(content: bytes, path: Path) -> VmmError:
    """The error that it is refused with."""
    path.write_bytes(content)
    with pytest.raises(SnapshotError) as raised:
        Snapshot.load(path)
    path.unlink()
    return raised.value


def test_truncated_file_is_refused_at_every_64th_byte(oracle_file: Path, tmp_path: Path) -> None:
    content = oracle_file.read_bytes()
    for length in range(0, len(content), 64):
        refused(content[:length], tmp_path / "hostile")
    refused(content + b"\0", tmp_path / "hostile")


def test_every_flipped_bit_of_header_and_state_is_refused(oracle_file: Path, tmp_path: Path) -> None:
    content = bytearray(oracle_file.read_bytes())
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
    """The file with both checksums corrected, so that the data itself is checked."""
    length = struct.unpack_from("<Q", content, 24)[0]
    struct.pack_into("<I", content, 40, zlib.crc32(content[HEADER : HEADER + length]))
    struct.pack_into("<I", content, 12, 0)
    struct.pack_into("<I", content, 12, zlib.crc32(content[:HEADER]))
    return bytes(content)


@given(data=st.data())
@settings(max_examples=300)
def test_hostile_state_with_right_checksums_makes_an_error_or_a_machine(
    data: st.DataObject, oracle_file: Path, tmp_path: Path
) -> None:
    content = bytearray(oracle_file.read_bytes())
    end = pages_at(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(16, end - 1))
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        value = data.draw(st.one_of(st.integers(0, 2 ** (8 * width) - 1), st.sampled_from([0, 2 ** (8 * width) - 1])))
        content[at : at + width] = value.to_bytes(width, "little")
    path = tmp_path / "hostile"
    path.write_bytes(with_checksums(content[: len(oracle_file.read_bytes())]))
    try:
        with Snapshot.load(path, force=data.draw(st.booleans())).fork() as fork:
            fork.run(0.001)
    except VmmError:
        pass


def test_snapshot_of_another_machine_is_refused_with_the_difference_or_forced(
    oracle_file: Path, tmp_path: Path
) -> None:
    content = bytearray(oracle_file.read_bytes())
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


def test_file_of_another_version_is_refused(oracle_file: Path, tmp_path: Path) -> None:
    content = bytearray(oracle_file.read_bytes())
    struct.pack_into("<I", content, 8, 2)
    assert "version 2" in str(refused(bytes(content), tmp_path / "newer"))
    assert "no snapshot" in str(refused(b"x" * 5000, tmp_path / "other"))


def test_missing_file_and_directory_are_errors_of_the_system(tmp_path: Path, oracle_snapshot: Snapshot) -> None:
    with pytest.raises(StreamError, match="No such file"):
        Snapshot.load(tmp_path / "none")
    with pytest.raises(StreamError, match="No such file"):
        oracle_snapshot.save(tmp_path / "no" / "such" / "directory")
    with pytest.raises(SnapshotError, match="regular"):
        Snapshot.load("/dev/null")
    with pytest.raises(OSError, match="directory"):
        oracle_snapshot.save(tmp_path)
    assert list(tmp_path.iterdir()) == []

"""What a saved snapshot replaces, and what it leaves alone.

Covers src/snapshot/new_file.rs, src/snapshot/plan.rs.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING

import pytest
from guests import HALT, flat
from pyvmm import Snapshot, StreamError, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.kvm


@pytest.fixture(scope="module")
def snapshot() -> Iterator[Snapshot]:
    with Vmm(flat(HALT)) as vmm:
        yield vmm.snapshot()


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def make_node(path: Path) -> None:
    """A device node of the test's own, the same as /dev/null."""
    if os.geteuid() != 0:
        pytest.skip("only root makes device nodes")
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except OSError:
        pytest.skip("no device nodes can be made here")


@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "directory"])
def test_what_is_no_regular_file_is_refused_and_stays(
    kind: str, is_linked: bool, tmp_path: Path, snapshot: Snapshot
) -> None:
    target = tmp_path / "target"
    with socket.socket(socket.AF_UNIX) as listener:
        makers: dict[str, Callable[[], object]] = {
            "FIFO": lambda: os.mkfifo(target),
            "socket": lambda: listener.bind(str(target)),
            "device": lambda: make_node(target),
            "directory": target.mkdir,
        }
        makers[kind]()
        (tmp_path / "link").symlink_to("target")
        before = stat.S_IFMT(target.lstat().st_mode)
        with pytest.raises(StreamError, match=f"a {kind}, and only a regular file is replaced"):
            snapshot.save(tmp_path / ("link" if is_linked else "target"))
    assert stat.S_IFMT(target.lstat().st_mode) == before
    assert sorted(found.name for found in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_symbolic_link_stays_and_its_target_is_replaced(
    exists: bool, depth: int, tmp_path: Path, snapshot: Snapshot
) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target"
    if exists:
        target.write_bytes(b"old")
    last = "elsewhere/target"
    for number in range(depth):
        (tmp_path / f"link{number}").symlink_to(last)
        last = f"link{number}"
    snapshot.save(tmp_path / last)
    assert all((tmp_path / f"link{number}").is_symlink() for number in range(depth))
    assert not target.is_symlink()
    assert Snapshot.load(target).id == Snapshot.load(tmp_path / last).id == snapshot.id
    assert [found.name for found in target.parent.iterdir()] == ["target"]


def test_a_circle_of_links_is_an_error(tmp_path: Path, snapshot: Snapshot) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(StreamError, match="symbolic links"):
        snapshot.save(tmp_path / "a")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_a_replaced_file_keeps_its_mode(mode: int, tmp_path: Path, snapshot: Snapshot) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    for _ in range(2):
        snapshot.save(path)
        assert mode_of(path) == mode
    assert Snapshot.load(path).id == snapshot.id


def test_a_new_file_has_the_mode_that_umask_leaves(tmp_path: Path, snapshot: Snapshot) -> None:
    before = os.umask(0o027)
    try:
        snapshot.save(tmp_path / "file")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "file") == 0o640


def test_a_replaced_file_keeps_its_owner(tmp_path: Path, snapshot: Snapshot) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has files of others")
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chown(path, 12345, 54321)
    path.chmod(0o640)
    snapshot.save(path)
    found = path.stat()
    assert (found.st_uid, found.st_gid, mode_of(path)) == (12345, 54321, 0o640)


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path: Path, snapshot: Snapshot) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"kept")
    path.chmod(0o444)
    if os.access(path, os.W_OK):
        pytest.skip("this user may write everything")
    with pytest.raises(StreamError, match="Permission"):
        snapshot.save(path)
    assert path.read_bytes() == b"kept"


def test_a_file_without_a_name_is_refused(tmp_path: Path, snapshot: Snapshot) -> None:
    with (tmp_path / "file").open("wb") as file:
        (tmp_path / "file").unlink()
        with pytest.raises(StreamError):
            snapshot.save(f"/proc/self/fd/{file.fileno()}")
    reader, writer = os.pipe()
    with pytest.raises(StreamError, match="a FIFO"):
        snapshot.save(f"/dev/fd/{writer}")
    os.close(reader)
    os.close(writer)
    assert list(tmp_path.iterdir()) == []

"""The initial RAM disk from files and directories, as the kernel finds it in memory.

Covers src/boot/initrd.rs, src/boot/cpio.rs, src/boot/tree.rs.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from guests import elf, exit_with
from pyvmm import BootError, ConfigError, LinuxBoot, MemoryConfig, Vmm, VmmConfig

pytestmark = pytest.mark.kvm
ZERO_PAGE = 0x90000


class Entry(NamedTuple):
    """An entry of a cpio archive."""

    mode: int
    uid: int
    gid: int
    links: int
    mtime: int
    device: tuple[int, int]
    data: bytes
    inode: int


def entries(archive: bytes) -> dict[bytes, Entry]:
    """The entries of an archive in the format newc."""
    found: dict[bytes, Entry] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        inode, mode, uid, gid, links, mtime, size, _, _, major, minor, length, check = (
            int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)
        )
        assert check == 0
        name = archive[at + 110 : at + 109 + length]
        data = (at + 110 + length + 3) & ~3
        if name == b"TRAILER!!!":
            return found
        found[name] = Entry(mode, uid, gid, links, mtime, (major, minor), archive[data : data + size], inode)
        at = (data + size + 3) & ~3


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(elf(0x100000, exit_with(1)))
    return path


def config(kernel: Path, initrd: Any, size_mib: int = 8) -> VmmConfig:
    return VmmConfig(boot=LinuxBoot(kernel, initrd=initrd), memory=MemoryConfig(size_mib=size_mib))


def loaded(kernel: Path, initrd: Any) -> bytes:
    """What the zero page points at."""
    with Vmm(config(kernel, initrd)) as vmm:
        address, size = struct.unpack("<II", vmm.memory.read(ZERO_PAGE + 0x218, 8))
        return vmm.memory.read(address, size)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    path.mkdir()
    return path


def test_directory_is_packed_as_it_is(kernel: Path, tree: Path) -> None:
    (tree / "init").write_bytes(b"#!/bin/sh\n")
    (tree / "init").chmod(0o4711)
    os.utime(tree / "init", (5, 1_000_000_000))
    (tree / "etc").mkdir(mode=0o750)
    (tree / "etc" / ".hidden").write_bytes(b"12345")
    os.link(tree / "init", tree / "etc" / "same")
    (tree / "etc" / "loop").symlink_to("../etc")
    (tree / "dangling").symlink_to(b"\xff".decode(errors="surrogateescape"))
    os.mkfifo(tree / "pipe", 0o600)
    (tree / os.fsdecode(b"\xfe")).write_bytes(b"")
    found = entries(loaded(kernel, tree))
    assert list(found) == [
        b".",
        b"dangling",
        b"etc",
        b"etc/.hidden",
        b"etc/loop",
        b"etc/same",
        b"init",
        b"pipe",
        b"\xfe",
    ]
    owner = (os.stat(tree / "init").st_uid, os.stat(tree / "init").st_gid)
    init, same = found[b"init"], found[b"etc/same"]
    assert (init.mode, init.mtime, init.uid, init.gid) == (stat.S_IFREG | 0o4711, 1_000_000_000, *owner)
    assert (init.links, same.links, init.inode) == (2, 2, same.inode)
    assert same.data + init.data == b"#!/bin/sh\n"
    assert (found[b"etc"].mode, found[b"etc"].data) == (stat.S_IFDIR | 0o750, b"")
    assert (found[b"etc/loop"].mode, found[b"etc/loop"].data) == (stat.S_IFLNK | 0o777, b"../etc")
    assert found[b"dangling"].data == b"\xff"
    assert found[b"pipe"].mode == stat.S_IFIFO | 0o600
    assert loaded(kernel, tree) == loaded(kernel, tree)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_devices_and_owners_are_kept(kernel: Path, tree: Path) -> None:
    os.mknod(tree / "console", stat.S_IFCHR, os.makedev(5, 1))
    (tree / "console").chmod(0o600)
    os.mknod(tree / "disk", stat.S_IFBLK, os.makedev(259, 0x12345))
    (tree / "disk").chmod(0o660)
    os.chown(tree / "disk", 1234, 5678)
    found = entries(loaded(kernel, tree))
    assert (found[b"console"].mode, found[b"console"].device) == (stat.S_IFCHR | 0o600, (5, 1))
    assert (found[b"disk"].mode, found[b"disk"].device) == (stat.S_IFBLK | 0o660, (259, 0x12345))
    assert (found[b"disk"].uid, found[b"disk"].gid) == (1234, 5678)


def test_several_follow_one_another(kernel: Path, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "first").write_bytes(b"12345")
    (tmp_path / "second").write_bytes(b"678")
    (tree / "name").write_bytes(b"in it")
    both = loaded(kernel, [str(tmp_path / "first"), tree, tmp_path / "second"])
    assert both.startswith(b"12345\x00\x00\x00070701")
    assert both.endswith(b"678")
    assert entries(both[8:])[b"name"].data == b"in it"
    assert loaded(kernel, ()) == b""
    assert loaded(kernel, [tmp_path / "first"]) == b"12345"


def test_initrd_of_another_kind_is_refused(kernel: Path) -> None:
    for initrd in (5, [None], {"a": 1}):
        with pytest.raises(ConfigError, match=r"^boot\.initrd: expected"):
            Vmm(config(kernel, initrd))
    with pytest.raises(BootError, match=r"^boot\.initrd: /no/such/file: No such file"):
        Vmm(config(kernel, ["/no/such/file"]))


def test_socket_is_named(kernel: Path, tree: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "control"))
        with pytest.raises(BootError, match=r"^boot\.initrd: .*/tree/control: a socket"):
            Vmm(config(kernel, tree))


def test_initrd_that_does_not_fit_says_where_it_would_go(kernel: Path, tree: Path, tmp_path: Path) -> None:
    with open(tree / "large", "wb") as file:
        file.truncate(7 << 20)
    reason = "from the end of the kernel, 0x101000, to the end of memory, 0x800000, there are 7335936 bytes"
    for initrd in (tree, tree / "large", [tree / "large", kernel]):
        with pytest.raises(BootError, match=reason):
            Vmm(config(kernel, initrd))
    with open(tree / "large", "wb") as file:
        file.truncate(7335936)
    Vmm(config(kernel, tree / "large")).close()


# For root, every file is readable.
CHECK = """
import os, sys
from pyvmm import BootError, LinuxBoot, VmmConfig
VmmConfig().check()
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    VmmConfig(boot=LinuxBoot(sys.argv[1], initrd=sys.argv[2])).check()
except BootError as error:
    print(error)
"""


def test_unreadable_file_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        (Path(name) / "kernel").write_bytes(elf(0x100000, b"\xf4"))
        tree = Path(name) / "tree"
        (tree / "etc").mkdir(parents=True)
        (tree / "etc" / "shadow").write_bytes(b"secret")
        (tree / "etc" / "shadow").chmod(0)
        command = [sys.executable, "-c", CHECK, f"{name}/kernel", str(tree)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout == f"boot.initrd: {tree}/etc/shadow: Permission denied (os error 13)\n", done.stderr
        (tree / "etc").chmod(0)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout == f"boot.initrd: {tree}/etc: Permission denied (os error 13)\n", done.stderr
        (tree / "etc").chmod(0o755)


def test_file_names_paths_beside_it(kernel: Path, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "machine.toml").write_text('[boot]\ntype = "linux"\nkernel = "kernel"\ninitrd = ["tree", "/other"]\n')
    boot = VmmConfig.from_file(tmp_path / "machine.toml").boot
    assert isinstance(boot, LinuxBoot)
    assert boot.initrd == (str(tree), "/other")
    assert VmmConfig.from_dict(VmmConfig(boot=boot).to_dict()).boot == boot
    (tmp_path / "machine.toml").write_text('[boot]\ntype = "linux"\nkernel = "kernel"\ninitrd = 5\n')
    with pytest.raises(ConfigError, match=r"boot\.initrd"):
        VmmConfig.from_file(tmp_path / "machine.toml")

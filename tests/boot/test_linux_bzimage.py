"""The tests' Linux as a bzImage of each compression, and its initial RAM disk from a directory.

Covers src/boot/linux.rs, src/boot/setup_header.rs.
"""

from __future__ import annotations

import json
import lzma
import os
import stat
import struct
import subprocess
import sys
import zlib
from typing import TYPE_CHECKING

import pytest
from pyvmm import Exit, ExitReason, LinuxBoot, Vmm, VmmConfig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Linux

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]
DEADLINE_S = 200
USERSPACE = "pyvmm: userspace reached, processors: 1"


def test_command_line_boots_the_vmlinux_in_a_bzimage(linux: Linux) -> None:
    command = [sys.executable, "-m", "pyvmm", "run", "--json", str(linux.bzimage.with_name("bzImage-gzip"))]
    command += ["--initrd", str(linux.initramfs), "--append", linux.cmdline, "--timeout", str(DEADLINE_S)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S + 60,
        check=False,
    )
    exit = json.loads(done.stdout)
    assert (done.returncode, exit["reason"], exit["vcpu"]) == (121, "reset", 0), done.stderr[-2000:]
    assert USERSPACE in done.stderr


@pytest.mark.parametrize(
    ("name", "boot"),
    [
        ("bzImage-xz", LinuxBoot("")),
        ("bzImage-lzma", LinuxBoot("", unpack=True)),
        ("bzImage", LinuxBoot("", protocol="32-bit")),  # which is the entry of what unpacks it
    ],
)
def test_bzimage_comes_to_userspace(name: str, boot: LinuxBoot, linux: Linux) -> None:
    boot = boot.replace(kernel=linux.bzimage.with_name(name), initrd=linux.initramfs, cmdline=linux.cmdline)
    with Vmm(VmmConfig(boot=boot)) as vmm:
        exit = vmm.run(DEADLINE_S)
        console = vmm.serial.take_output().decode()
    assert exit == Exit(ExitReason.RESET, vcpu=0), console[-2000:]
    assert USERSPACE in console


def unpacked(image: bytes) -> bytes:
    """The vmlinux in a bzImage, by other programs than pyvmm."""
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (image[0x1F1] + 1) * 512 + offset
    payload = image[start : start + length]
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(31).decompress(payload)
    if payload.startswith((b"\xfd7zXZ", b"\x5d")):
        return lzma.LZMADecompressor().decompress(payload)
    command = ["zstd", "-dqc"] if payload.startswith(b"\x28\xb5") else ["lz4", "-dc"]
    return subprocess.run(command, input=payload[:-4], stdout=subprocess.PIPE, check=True, timeout=60).stdout


@pytest.mark.parametrize("name", ["bzImage", "bzImage-gzip", "bzImage-zstd", "bzImage-xz", "bzImage-lzma"])
def test_kernel_in_each_bzimage_is_loaded_whole(name: str, linux: Linux) -> None:
    image = linux.bzimage.with_name(name)
    vmlinux = unpacked(image.read_bytes())
    headers, count = struct.unpack_from("<Q", vmlinux, 32)[0], struct.unpack_from("<H", vmlinux, 56)[0]
    loaded = 0
    with Vmm(VmmConfig(boot=LinuxBoot(image, unpack=True))) as vmm:
        for n in range(count):
            kind, _, offset, _, address, size = struct.unpack_from("<IIQQQQ", vmlinux, headers + 56 * n)
            if kind == 1:
                assert vmm.memory.read(address, size) == vmlinux[offset : offset + size]
                loaded += size
    assert loaded > 1 << 20


def files_of(archive: bytes) -> Iterator[tuple[str, int, bytes]]:
    """The names, modes and contents of a cpio archive."""
    at = 0
    while True:
        mode, size, length = (int(archive[at + n : at + n + 8], 16) for n in (14, 54, 94))
        name = archive[at + 110 : at + 109 + length].decode()
        data = (at + 110 + length + 3) & ~3
        if name == "TRAILER!!!":
            return
        yield name.lstrip("/"), mode, archive[data : data + size]
        at = (data + size + 3) & ~3


def test_linux_runs_the_init_of_a_directory(linux: Linux, tmp_path: Path) -> None:
    """Only root makes /dev/console; otherwise it comes from the archive in front."""
    for name, mode, data in files_of(linux.initramfs.read_bytes()):
        if stat.S_ISDIR(mode):
            (tmp_path / name).mkdir()
        elif stat.S_ISREG(mode):
            (tmp_path / name).write_bytes(data)
            (tmp_path / name).chmod(0o755)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("from the directory\n")
    (tmp_path / "notes" / "link").symlink_to("/notes/text")
    os.link(tmp_path / "notes" / "text", tmp_path / "notes" / "same")
    initrd = [linux.initramfs, tmp_path]
    if os.geteuid() == 0:
        os.mknod(tmp_path / "dev" / "console", stat.S_IFCHR | 0o600, os.makedev(5, 1))
        initrd = [tmp_path]
    kernel = linux.bzimage.with_name("bzImage-zstd")
    boot = LinuxBoot(kernel, initrd=initrd, cmdline=f"{linux.cmdline} pyvmm.shell")
    with Vmm(VmmConfig(boot=boot)) as vmm:
        vmm.serial.expect("pyvmm> ", DEADLINE_S)
        for name in ("text", "link", "same"):
            vmm.serial.sendline(f"cat /notes/{name}")
            said = vmm.serial.expect("pyvmm> ", DEADLINE_S).before.replace("\r\n", "\n")
            assert said == f"cat /notes/{name}\nfrom the directory\n"
        vmm.serial.sendline("exit 42")
        assert vmm.run(DEADLINE_S).code == 42

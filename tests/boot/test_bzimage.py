"""bzImages made for the purpose: their entries, their payload and their header, each started in a machine.

Covers src/boot/bzimage.rs, src/boot/payload.rs, src/boot/linux.rs.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from guests import elf, exit_with
from hypothesis import given, settings
from hypothesis import strategies as st
from pyvmm import BootError, ConfigError, LinuxBoot, MemoryConfig, Vmm, VmmConfig

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm
VMLINUX = elf(0x300000, exit_with(7))
IN_32_BITS, IN_64_BITS, UNPACKED = 32, 64, 7
# mov al, [esi + 0x206]: the low byte of the protocol's version, from the zero page; out 0xf4, al
SHOW_VERSION = b"\x8a\x86\x06\x02\x00\x00\xe6\xf4"


def bzimage(
    payload: bytes = b"", *, code32: bytes = exit_with(IN_32_BITS), version: int = 0x20F, **fields: int
) -> bytes:
    """A bzImage of one setup sector, whose entries end the run with 32 and with 64."""
    header = bytearray(1024)
    body = code32.ljust(0x200, b"\xf4") + exit_with(IN_64_BITS).ljust(0x40, b"\xf4")
    values = {"xloadflags": 1, "loadflags": 1, "cmdline_size": 2047, "pref_address": 0x200000} | fields
    struct.pack_into("<B2xI", header, 0x1F1, 1, (len(body) + len(payload)) // 16)
    struct.pack_into("<H2s4sH", header, 0x1FE, 0xAA55, b"\xeb\x6a", b"HdrS", version)
    struct.pack_into("<B2xI", header, 0x211, values["loadflags"], values.get("code32_start", 0x100000))
    struct.pack_into("<II", header, 0x22C, 0x7FFFFFFF, 0x200000)
    struct.pack_into("<HI", header, 0x236, values["xloadflags"], values["cmdline_size"])
    struct.pack_into("<II", header, 0x248, len(body), values.get("payload_length", len(payload)))
    struct.pack_into("<QI", header, 0x258, values["pref_address"], values.get("init_size", 0x10000))
    return bytes(header) + body + payload


def run(path: Path, image: bytes, **boot: Any) -> int | None:
    path.write_bytes(image)
    with Vmm(VmmConfig(boot=LinuxBoot(path, **boot), memory=MemoryConfig(size_mib=8))) as vmm:
        return vmm.run(60).code


def by(*command: str) -> Callable[[bytes], bytes]:
    """Compress by a tool, as the kernel's build does."""

    def compress(data: bytes) -> bytes:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True, timeout=60).stdout

    return compress


X86_AND_LZMA2: list[dict[str, Any]] = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2}]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "zstd": by("zstd", "-q", "-22", "--ultra", "-c"),
    "lz4": by("lz4", "-l", "-9", "-c"),
    "xz": partial(lzma.compress, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=X86_AND_LZMA2),
    "lzma": partial(lzma.compress, format=lzma.FORMAT_ALONE),
}


def packed(compression: str, data: bytes) -> bytes:
    """A payload: gzip has the size at its end, and behind the others the kernel has it."""
    if compression == "gzip":
        return gzip.compress(data)
    return COMPRESSIONS[compression](data) + struct.pack("<I", len(data))


@pytest.mark.parametrize("compression", ["gzip", *COMPRESSIONS])
def test_vmlinux_of_each_compression_is_started_in_place_of_the_decompressor(compression: str, tmp_path: Path) -> None:
    image = bzimage(packed(compression, VMLINUX))
    assert run(tmp_path / "kernel", image) == UNPACKED
    assert run(tmp_path / "kernel", image, unpack=True, protocol="64-bit") == UNPACKED
    assert run(tmp_path / "kernel", image, unpack=False) == IN_64_BITS


def test_kernel_is_entered_as_the_header_and_the_protocol_say(tmp_path: Path) -> None:
    enter = partial(run, tmp_path / "kernel")
    assert enter(bzimage()) == IN_64_BITS
    assert enter(bzimage(), protocol="64-bit") == IN_64_BITS
    assert enter(bzimage(), protocol="32-bit") == IN_32_BITS
    assert enter(bzimage(xloadflags=0)) == IN_32_BITS
    assert enter(bzimage(version=0x206, pref_address=0)) == IN_32_BITS
    moved = bytes(16) + exit_with(33)
    assert enter(bzimage(code32=moved, code32_start=0x100010), protocol="32-bit") == 33
    assert enter(bzimage(code32=SHOW_VERSION), protocol="32-bit") == 0x0F
    assert enter(bzimage(), load_address=0x100000) == IN_64_BITS
    for boot in ({"protocol": "pvh", "unpack": False}, {"protocol": "64-bit"}):
        with pytest.raises(BootError) as raised:
            enter(bzimage(xloadflags=0), **boot)
        assert raised.value.at == "boot.protocol"


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (bzimage(version=0x205), r"protocol 2\.05; the oldest that pyvmm boots is 2\.06"),
        (bzimage(loadflags=0), "a zImage"),
        (bzimage()[:1000], "truncated: setup_sects"),
        (bzimage()[:-16], "truncated: syssize says that the kernel has 576 bytes, and the file has 560"),
        (bzimage()[:0x230], "truncated in its header"),
        (bzimage(payload_length=1), "payload_offset 0x240 and payload_length 0x1"),
        (bzimage(pref_address=0xF0000), "pref_address is 0xf0000"),
        (bzimage(init_size=0x10000000), "the kernel needs 0x10000000 bytes at 0x200000"),
        (bzimage(packed("gzip", VMLINUX)[:-20]), r"damaged: its payload \(gzip\)"),
        (bzimage(packed("gzip", VMLINUX)[:-8] + bytes(8)), r"damaged: its payload \(gzip\)"),
        (bzimage(packed("xz", VMLINUX)[:-30] + bytes(30)), r"damaged: its payload \(xz\)"),
        (bzimage(packed("lzma", bytes(1 << 17))), "131072 bytes, more than 65536"),
        (bzimage(packed("gzip", bytes(64 << 20)), init_size=2**32 - 1), "67108864 bytes, more than 8388608"),
        (bzimage(lzma.compress(bytes(64 << 20)) + struct.pack("<I", 100)), "unpacks to more bytes"),
    ],
)
def test_image_that_cannot_be_right_is_refused_by_its_field(image: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(BootError, match=reason) as raised:
        run(tmp_path / "kernel", image)
    assert raised.value.at == "boot.kernel"


def test_pvh_needs_a_kernel_that_can_be_unpacked(tmp_path: Path) -> None:
    with pytest.raises(BootError, match="only a kernel that is unpacked has a PVH entry") as raised:
        run(tmp_path / "kernel", bzimage(), protocol="pvh")
    assert raised.value.at == "boot.protocol"


def test_unpack_is_refused_where_it_is_impossible(tmp_path: Path) -> None:
    enter = partial(run, tmp_path / "kernel")
    others = [b"", bz2.compress(VMLINUX), packed("gzip", b"no ELF file"), b"something else"]
    for payload in others:
        assert enter(bzimage(payload)) == IN_64_BITS
        with pytest.raises(BootError) as raised:
            enter(bzimage(payload), unpack=True)
        assert raised.value.at == "boot.unpack"
    for boot in ({"load_address": 0x100000}, {"protocol": "32-bit"}):
        with pytest.raises(ConfigError) as refused:
            enter(bzimage(packed("gzip", VMLINUX)), unpack=True, **boot)
        assert refused.value.at == "boot.unpack"


def test_command_line_is_as_long_as_the_header_allows(tmp_path: Path) -> None:
    enter = partial(run, tmp_path / "kernel")
    assert enter(bzimage(cmdline_size=10), cmdline="a" * 10) == IN_64_BITS
    with pytest.raises(ConfigError, match=r"^boot\.cmdline: 11 bytes; this kernel accepts at most 10"):
        enter(bzimage(cmdline_size=10), cmdline="a" * 11)
    with pytest.raises(ConfigError, match="256 bytes; this kernel accepts at most 255"):
        enter(bzimage(cmdline_size=0), cmdline="a" * 256)


VALID = bzimage(packed("gzip", VMLINUX))


@settings(max_examples=150)
@given(changes=st.lists(st.tuples(st.integers(0x1F1, len(VALID) - 1), st.integers(0, 255)), max_size=5))
def test_mutated_bzimage_is_refused_or_loaded(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    image = bytearray(VALID)
    for at, value in changes:
        image[at] = value
    (tmp_path / "kernel").write_bytes(image)
    try:
        VmmConfig(boot=LinuxBoot(tmp_path / "kernel", cmdline=""), memory=MemoryConfig(size_mib=8)).check()
    except BootError as error:
        assert error.at in {"boot.kernel", "boot.unpack"}

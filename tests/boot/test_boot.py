"""Hostile kernels: a typed error, or a guest that ends in its own way, never a panic and never a hang.

Covers src/boot/initrd.rs, src/boot/load.rs.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from guests import elf, exit_with, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from pyvmm import BootError, ConfigError, FlatBoot, LinuxBoot, MemoryConfig, Vmm, VmmConfig, VmmError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm


def kernel(path: Path, image: bytes, **boot: object) -> VmmConfig:
    path.write_bytes(image)
    return VmmConfig(boot=LinuxBoot(path, **boot), memory=MemoryConfig(size_mib=8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello", "neither an ELF file nor a bzImage"),
        (b"\x7fELF", "the ELF header is truncated"),
        (elf(0x100000, b"\xf4")[:100], "outside the file"),
        (elf(0x100000, b"\xf4" * 64)[:-1], "truncated"),
        (elf(0x1000, b"\xf4"), "below 1 MiB"),
        (elf(1 << 40, b"\xf4"), "not entirely in guest memory"),
        (elf(2**64 - 1, b"\xf4"), "not entirely in guest memory"),
    ],
)
def test_bad_kernel_is_refused_with_the_reason(image: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(BootError, match=reason) as raised:
        Vmm(kernel(tmp_path / "kernel", image))
    assert raised.value.at == "boot.kernel"


def test_kernel_whose_many_segments_overlap_is_refused_at_once(tmp_path: Path) -> None:
    count, size = 60_000, 4 << 20
    segment = struct.pack("<IIQQQQQQ", 1, 7, 64 + 56 * count, 0, 0x100000, size, size, 4096)
    header = bytearray(elf(0x100000, b"")[:64])
    header[56:58] = struct.pack("<H", count)
    with pytest.raises(BootError, match="overlap"):
        Vmm(kernel(tmp_path / "kernel", bytes(header) + segment * count + bytes(size)))


def test_kernel_of_unusual_kind_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, "/dev/zero", "/no/such/kernel", "\0"):
        with pytest.raises((BootError, ConfigError, ValueError)):
            Vmm(VmmConfig(boot=LinuxBoot(str(path)), memory=MemoryConfig(size_mib=8)))


def test_huge_kernel_is_refused_without_reading_it(tmp_path: Path) -> None:
    with open(tmp_path / "kernel", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BootError, match="larger than guest memory"):
        Vmm(VmmConfig(boot=LinuxBoot(tmp_path / "kernel"), memory=MemoryConfig(size_mib=8)))


def test_initrd_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    with open(initrd, "wb") as file:
        file.truncate(7 << 20)
    image = elf(0x100000, exit_with(1))
    with pytest.raises(BootError, match="does not fit: from the end of the kernel"):
        Vmm(kernel(tmp_path / "kernel", image, initrd=initrd))
    with pytest.raises(BootError, match="No such file"):
        Vmm(kernel(tmp_path / "kernel", image, initrd="/no/such/file"))


@pytest.mark.parametrize("cmdline", ["a" * 2048, "with\0zero", "with\nline", "\u00e9"])
def test_bad_command_line_is_refused(cmdline: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^boot\.cmdline: "):
        Vmm(kernel(tmp_path / "kernel", elf(0x100000, exit_with(1)), cmdline=cmdline))


def test_longest_command_line_reaches_the_kernel(tmp_path: Path) -> None:
    # mov eax, [rsi + 0x228]: the command line's address; mov al, [rax + 2046]; out 0xf4, al
    code = b"\x8b\x86\x28\x02\x00\x00\x8a\x80\xfe\x07\x00\x00\xe6\xf4"
    config = kernel(tmp_path / "kernel", elf(0x100000, code), cmdline="a" * 2046 + "z")
    with Vmm(config) as vmm:
        assert vmm.run(60).code == ord("z")


@pytest.mark.parametrize(
    "boot",
    [
        FlatBoot(b"", address=0x1000),
        FlatBoot(b"\xf4\xf4", address=0xFFFFF),
        FlatBoot(b"\xf4", address=0x80000, mode="long64"),
        FlatBoot(path="/no/such/code"),
        FlatBoot(path="/dev/zero"),
    ],
)
def test_bad_flat_code_is_refused(boot: FlatBoot) -> None:
    with pytest.raises(BootError):
        Vmm(VmmConfig(boot=boot, memory=MemoryConfig(size_mib=1)))


def test_flat_code_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "code").write_bytes(exit_with(6))
    boot = FlatBoot(path=tmp_path / "code", address=0x7C00)
    with Vmm(VmmConfig(boot=boot, memory=MemoryConfig(size_mib=1))) as vmm:
        assert vmm.run(60).code == 6


VALID = elf(0x100000, exit_with(7))


@settings(max_examples=200)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6),
    length=st.integers(0, len(VALID)),
)
def test_mutated_elf_is_refused_or_runs(changes: list[tuple[int, int]], length: int, tmp_path: Path) -> None:
    image = bytearray(VALID)
    for at, value in changes:
        image[at] = value
    boots(kernel(tmp_path / "kernel", bytes(image[:length] if length % 4 == 0 else image)))


@settings(max_examples=100)
@given(body=st.binary(max_size=2048), is_bzimage=st.booleans())
def test_random_file_is_refused_or_runs(body: bytes, is_bzimage: bool, tmp_path: Path) -> None:
    if is_bzimage:
        header = bytearray(1024)
        struct.pack_into("<B", header, 0x1F1, 1)
        struct.pack_into("<H2s4sH", header, 0x1FE, 0xAA55, b"\xeb\x66", b"HdrS", 0x20F)
        for at, value in enumerate(body[: 0x66 + 2]):
            header[0x206 + at] = value
        body = bytes(header) + body
    boots(kernel(tmp_path / "kernel", body))


def boots(config: VmmConfig) -> None:
    """The machine is refused with an error of pyvmm, or its run ends."""
    try:
        vmm = Vmm(config)
    except VmmError:
        return
    with vmm:
        vmm.run(0.02)


def test_random_machine_code_ends_or_can_be_ended() -> None:
    for seed in range(50):
        with Vmm(flat(os.urandom(256), "long64" if seed % 2 else "real16")) as vmm:
            vmm.run(0.02)

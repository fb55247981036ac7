"""What the command line makes of a file: its kind is found out, or --boot names it."""

from __future__ import annotations

import gzip
import struct
from typing import TYPE_CHECKING, Any

import pytest
from guests import elf
from pyvmm import (
    BootError,
    BootModule,
    ConfigError,
    ElfBoot,
    FirmwareBoot,
    FlatBoot,
    KernelBoot,
    LinuxBoot,
    VmmConfig,
    VmmError,
)
from pyvmm.cli_boot import BootOptions, boot_of

if TYPE_CHECKING:
    from pathlib import Path

NONE = BootOptions(None, None, None, None, None, (), None, ())
CODE = elf(0x100000, b"\xf4")
LINUX = elf(0x100000, b"Linux version 6.1.0")
MULTIBOOT = struct.pack("<8I", 0x1BADB002, 0x10000, 0xE4514FFE, 0x100000, 0x100000, 0, 0, 0x100010)
BZIMAGE = bytes(0x202) + b"HdrS" + bytes(600)


def booted(path: Path, base: VmmConfig | None = None, **options: Any) -> Any:
    return boot_of(base or VmmConfig(), NONE._replace(kernel=str(path), **options))


@pytest.mark.parametrize(
    ("image", "expected"), [(CODE, KernelBoot), (MULTIBOOT, KernelBoot), (LINUX, LinuxBoot), (BZIMAGE, LinuxBoot)]
)
def test_kind_of_a_file_is_found_out(image: bytes, expected: type, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(image)
    assert booted(path) == booted(path, boot="auto") == expected(str(path))
    named = "linux" if expected is LinuxBoot else "kernel"
    assert booted(path, boot=named) == expected(str(path))
    # A RAM disk is Linux's own, and another kernel's first module.
    given = booted(path, append="a b", initrd=("i",))
    assert given.cmdline == "a b"
    assert given.initrd == ("i",) if expected is LinuxBoot else given.modules == (BootModule("i"),)


def test_name_of_a_boot_is_taken_whatever_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"#!/bin/sh\n")
    name = str(path)
    for boot, expected in (
        ("linux", LinuxBoot(name)),
        ("kernel", KernelBoot(name)),
        ("multiboot", KernelBoot(name, protocol="multiboot")),
        ("elf", KernelBoot(name, protocol="elf")),
        ("program", ElfBoot(name)),
        ("firmware", FirmwareBoot(name)),
        ("flat", FlatBoot(path=name)),
    ):
        assert booted(path, boot=boot) == expected
    path.write_bytes(LINUX)
    assert booted(path, boot="pvh", initrd=("i",)) == LinuxBoot(name, initrd=("i",), protocol="pvh")
    path.write_bytes(CODE)
    assert booted(path, boot="pvh") == KernelBoot(name, protocol="pvh")
    assert booted(path, boot="flat", mode="long64") == FlatBoot(path=name, mode="long64")
    modules = ("m,a,b", "n")
    assert booted(path, module=modules).modules == (BootModule("m", cmdline="a,b"), BootModule("n"))


def test_rest_of_the_configuration_stays(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(CODE)
    kernel = VmmConfig(boot=KernelBoot("k", cmdline="c", modules=("m",)))
    assert booted(path, kernel) == kernel.boot.replace(kernel=str(path))
    assert boot_of(kernel, NONE._replace(append="d")) == kernel.boot.replace(cmdline="d")
    assert boot_of(kernel, NONE) == kernel.boot
    program = VmmConfig(boot=ElfBoot("p", stack_kib=8))
    assert booted(path, program, boot="program") == ElfBoot(str(path), stack_kib=8)
    # A pipe cannot be looked at twice: it is Linux, as what is not there yet.
    assert booted(tmp_path / "none") == LinuxBoot(str(tmp_path / "none"))


def core() -> bytes:
    image = bytearray(CODE)
    image[16] = 4
    return bytes(image)


@pytest.mark.parametrize(
    ("image", "what", "todo"),
    [
        (b"#!/bin/sh\n", "a script", "name the kernel that it starts"),
        (gzip.compress(LINUX), "compressed by gzip", "gzip -dc FILE"),
        (b"\xfd7zXZ\0\0", "compressed by xz", "xz -dc FILE"),
        (b"\x28\xb5\x2f\xfd\0", "compressed by zstd", "zstd -dc FILE"),
        (b"QFI\xfb\0\0\0\3", "a qcow2 disk image", "not disks"),
        (bytes(0x8001) + b"CD001", "an ISO 9660 image", "not disks"),
        (b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0", "an EFI application", "there is no UEFI"),
        (CODE[:18] + b"\xb7" + CODE[19:], "an ELF file for AArch64", "for x86"),
        (
            CODE[:5] + b"\2" + CODE[6:16] + b"\0\2\0\x15" + CODE[20:],
            "a big-endian ELF file for 64-bit PowerPC",
            "for x86",
        ),
        (CODE[:16] + b"\1" + CODE[17:], "an object file", "link it"),
        (core(), "a core dump", "debuggers read it"),
        (b"", "the file is empty", "pyvmm boots"),
        (b"pyvmmsnp", "a snapshot of pyvmm", "pyvmm restore"),
    ],
)
def test_file_that_cannot_be_booted_is_named_with_what_to_do(
    image: bytes, what: str, todo: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(image)
    with pytest.raises(BootError) as raised:
        booted(path)
    for part in (str(path), what, todo, "pyvmm boots a bzImage, a vmlinux"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": None, "boot": "elf"}, "--boot: it needs a KERNEL"),
        ({"kernel": None, "module": ("m",)}, "kernel: --initrd, --append and --module need a KERNEL"),
        ({"boot": "linux", "module": ("m",)}, "--module: Linux takes no modules"),
        ({"boot": "program", "append": "a"}, "--boot: a program has no --append"),
        ({"boot": "firmware", "initrd": "a"}, "--boot: a firmware has no --append"),
        (
            {"kernel": None, "kernel_form": "path=k,kernel_load_addr=1", "boot": "elf"},
            "kernel_load_addr: only",
        ),
        ({"boot": "flat", "append": "a"}, "--flat: flat code has no --append"),
        ({"flat": "code", "kernel": None, "module": ("m",)}, "--flat: flat code has no --append"),
        ({"flat": "code"}, "--flat: flat code and a kernel"),
        ({"mode": "long64"}, "--mode: only flat code has a mode"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(CODE)
    with pytest.raises(VmmError, match=message) as raised:
        boot_of(VmmConfig(), NONE._replace(**{"kernel": str(path), **options}))
    assert isinstance(raised.value, ConfigError)


@pytest.mark.parametrize("name", ["none", "folder"])
def test_missing_kernel_is_missing_whatever_options_it_has(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(BootError, match=r"^boot\.kernel: .*: (No such file|Is a directory)"):
        booted(tmp_path / name, module=("m",))

"""What a machine starts: the classes of `VmmConfig.boot`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from msgspec import Meta

from pyvmm.config_parts import Address, FilePath, FilePaths, Part

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DEFAULT_CMDLINE = "console=ttyS0 panic=-1 reboot=k"


class EmbeddedBoot(Part, frozen=True, tag_field="type", tag="embedded"):
    """The built-in guest: it prints, measures, answers its input, and ends."""


class _Code(Part, frozen=True):
    code: bytes = b""


class FlatBoot(_Code, frozen=True, kw_only=True, tag_field="type", tag="flat"):
    """Code at an address.

    Every vCPU starts at the entry, with its number in RDI (EDI, DI) and its own stack of 4 KiB
    right below the code.

    Attributes:
        code: the machine code; base64 in TOML and JSON.
        path: the file with the code, instead of `code`.
        address: the guest-physical load address.
        entry: the start address; None means `address`.
        mode: "real16", 16-bit real mode; "protected32", 32-bit ring 0 without paging; "long64",
            64-bit ring 0; "user64", 64-bit ring 3 with a TSS that allows every port. Both 64-bit
            modes use identity mapping. Except in real mode, the tables for this use 0x80000 to
            0x9fbff.
    """

    path: FilePath | None = None
    address: Address = 0x1000
    entry: Address | None = None
    mode: Literal["real16", "protected32", "long64", "user64"] = "real16"


class _Program(Part, frozen=True):
    path: FilePath


class ElfBoot(_Program, frozen=True, kw_only=True, tag_field="type", tag="elf"):
    """A static ELF program in 64-bit ring 3, without an operating system.

    Only the program's segments, with their permissions, and its stack are mapped, each at its own
    address. An exception ends the run: `Exit.reason` is `ExitReason.EXCEPTION`, and the exit says
    what the processor reported. The program can use every port. It starts with the stack of the
    System V ABI, without arguments.

    Attributes:
        path: the file, an x86-64 executable linked with -static -no-pie.
        stack_kib: the size of the stack, in KiB, rounded up to whole pages. It is at the top of
            memory. The pages around it are not mapped.
    """

    stack_kib: Annotated[int, Meta(ge=1, le=2**22)] = 256


class _Kernel(Part, frozen=True):
    kernel: FilePath


class LinuxBoot(_Kernel, frozen=True, kw_only=True, tag_field="type", tag="linux"):
    """A Linux kernel, booted by its boot protocol (the kernel's Documentation/arch/x86/boot.rst) or by PVH.

    Attributes:
        kernel: the file of an ELF vmlinux or a bzImage.
        initrd: the initial RAM disk: a file, a directory, or a sequence of them, which the kernel
            unpacks one after the other. A directory is packed as a cpio archive, with the owners,
            modes and times that its files have; docs/linux-kernels.md says how.
        cmdline: the kernel command line, at most 2,047 bytes of printable ASCII, or what the header
            of a bzImage says.
        load_address: the load address of a bzImage, 1 MiB to 3 GiB; None means its preferred
            address.
        protocol: how the kernel is entered. "64-bit" and "32-bit" are the entries of the boot
            protocol; a vmlinux has only the first. "pvh" is the entry that the PVH note of a
            vmlinux names. "auto" is "64-bit" if the kernel has that entry, otherwise "32-bit".
        unpack: whether pyvmm takes the vmlinux out of a bzImage and starts that. False lets the
            kernel unpack itself. True is an error where pyvmm cannot: without a 64-bit entry, or if
            the compression is not gzip, zstd, lz4, xz or lzma. None means True where pyvmm can, and
            False with a `load_address` or the protocol "32-bit".
    """

    initrd: FilePaths | None = None
    cmdline: Annotated[str, Meta(max_length=2047)] = DEFAULT_CMDLINE
    load_address: Address | None = None
    protocol: Literal["auto", "64-bit", "32-bit", "pvh"] = "auto"
    unpack: bool | None = None


class BootModule(_Program, frozen=True, kw_only=True):
    """A file that a kernel is given, with a command line of its own.

    Attributes:
        path: the file.
        cmdline: its command line, at most 2,047 bytes without a zero byte.
    """

    cmdline: Annotated[str, Meta(max_length=2047)] = ""


# In a file, a module is a string, or a table with the keys of a BootModule.
if TYPE_CHECKING:
    Modules: TypeAlias = Sequence[str | Path | BootModule]
else:
    Modules = tuple[str | BootModule, ...]


class KernelBoot(_Kernel, frozen=True, kw_only=True, tag_field="type", tag="kernel"):
    """A kernel other than Linux, in ring 0: an ELF32 or ELF64 file, or one with a multiboot header.

    vCPU 0 starts at the kernel's entry; the others wait for INIT and SIPI. docs/booting.md says
    what the kernel finds in registers and memory.

    Attributes:
        kernel: the kernel's file.
        cmdline: the kernel's command line, at most 2,047 bytes without a zero byte.
        modules: files that the kernel is given, in this order. Each is a path, or a `BootModule`
            with a command line of its own. The ELF protocol has one at most, as a RAM disk.
        protocol: how the kernel is entered. "multiboot" is multiboot 1; "pvh" is the entry that the
            PVH note of an ELF file names; "elf" is the entry in the ELF header, in 64-bit mode or
            32-bit protected mode by the file's class. "auto" is the first of these that the file
            supports.
    """

    cmdline: Annotated[str, Meta(max_length=2047)] = ""
    modules: Modules = ()
    protocol: Literal["auto", "pvh", "multiboot", "elf"] = "auto"


class FirmwareBoot(_Program, frozen=True, kw_only=True, tag_field="type", tag="firmware"):
    """Firmware such as SeaBIOS, started at the reset vector of vCPU 0. The other vCPUs wait for INIT and SIPI.

    The image is mapped read-only and ends at 4 GiB. RAM holds a copy of its last 128 KiB, which
    ends at 1 MiB.

    Attributes:
        path: the file of the image, a multiple of 64 KiB and at most 16 MiB.
    """

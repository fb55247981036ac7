"""The configuration of virtual disks, and what a Python object needs to be one. docs/disk.md describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias, runtime_checkable

from msgspec import Meta

from pyvmm.config_parts import FilePath, Part


@runtime_checkable
class DiskBackend(Protocol):
    """A Python object as the contents of a disk.

    Its methods run on the thread of the disk, and may take any time: the guest's other devices go
    on. What one raises ends the guest's request with an error, and `DiskDevice.failure` says what
    it was. Without `pwrite` and `flush`, the disk is read-only. A method `discard(length, offset)`
    is optional: the guest does not need these bytes any more.
    """

    @property
    def size(self) -> int:
        """The size of the disk in bytes, read when the machine is made."""

    def pread(self, length: int, offset: int, /) -> bytes:
        """Return exactly this many bytes from an offset on."""


if TYPE_CHECKING:
    from pathlib import Path

    Source: TypeAlias = str | Path | bytes | DiskBackend
else:
    # In a file, a path.
    Source = Annotated[Any, Meta(extra_json_schema={"type": "string"})]


class _Source(Part, frozen=True):
    source: Source


class Disk(_Source, frozen=True, kw_only=True):
    """A virtual disk: `Disk(source)`.

    Attributes:
        source: what the disk contains: the path of a file or a block device, bytes, or a
            `DiskBackend`; in TOML and JSON, only a path. A file is locked while a machine uses it.
        format: "raw", "qcow2", or "auto": qcow2 if the name of the file ends in ".qcow2", else raw.
            What a file contains does not decide.
        read_only: the guest cannot write the disk.
        overlay: where the guest's writes go instead of the source: True for memory, or the path of
            a qcow2 image, which is created if it does not exist. Bytes always have an overlay in
            memory.
        serial: the serial number that the guest sees, up to 20 printable ASCII characters.
        block_size: the size of a logical block: 512, 1024, 2048 or 4096.
        bytes_per_second: how much the guest can read and write; None for no limit.
        operations_per_second: how many requests it can make; None for no limit.
    """

    format: Literal["auto", "raw", "qcow2"] = "auto"
    read_only: bool = False
    overlay: bool | FilePath = False
    serial: Annotated[str, Meta(max_length=20)] = ""
    block_size: Literal[512, 1024, 2048, 4096] = 512
    bytes_per_second: Annotated[int, Meta(ge=1, le=2**63 - 1)] | None = None
    operations_per_second: Annotated[int, Meta(ge=1, le=2**63 - 1)] | None = None


def parsed(text: str) -> Disk:
    """The disk of an option of the command line: ``PATH[,ro][,overlay[=FILE]][,format=...][,serial=...]``.

    Raises:
        ValueError: a part is none of these.
    """
    path, *parts = text.split(",")
    values: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if part == "ro":
            values["read_only"] = True
        elif key == "overlay":
            values["overlay"] = value if equals else True
        elif key in {"format", "serial"} and equals:
            values[key] = value
        else:
            raise ValueError(f"'{part}' is none of ro, overlay, overlay=FILE, format=FORMAT and serial=TEXT")
    return Disk(path, **values)

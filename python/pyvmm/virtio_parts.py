"""The configuration of virtio devices that have nothing behind them. docs/virtio.md describes all devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from msgspec import Meta

from pyvmm.config_parts import FilePath, Part


class ConsolePort(Part, frozen=True):
    """A port of the virtio console.

    Attributes:
        name: 1 to 64 bytes; Linux shows it in /sys/class/virtio-ports.
        path: a unix socket that listens there, for programs of the host: a name that does not
            exist yet. None means that only `ConsoleDevice.connect` connects to the port.
    """

    name: str
    path: FilePath | None = None


# In a file, a list.
if TYPE_CHECKING:
    from collections.abc import Sequence

    Ports: TypeAlias = Sequence[str | ConsolePort]
else:
    Ports = tuple[str | ConsolePort, ...]


class VirtioConsole(Part, frozen=True, kw_only=True):
    """The virtio console: streams between the guest and the host.

    Attributes:
        ports: 1 to 16 ports, each a name or a `ConsolePort`. The first is a console, Linux's hvc0;
            the others are /dev/vport0p1 and so on.
        columns: the width of the console in characters.
        rows: its height.
    """

    ports: Ports = ("console0",)
    columns: Annotated[int, Meta(ge=0, le=65535)] = 80
    rows: Annotated[int, Meta(ge=0, le=65535)] = 25


class Rng(Part, frozen=True, kw_only=True):
    """The virtio entropy device.

    Attributes:
        seed: a number from 0 to 2**64 - 1 for tests that must repeat: the guest gets the same bytes
            in each run. They are not random to anybody who knows the seed. None means the random
            numbers of the host's kernel.
    """

    seed: Annotated[int, Meta(ge=0, extra_json_schema={"maximum": 2**64 - 1})] | None = None


class Balloon(Part, frozen=True, kw_only=True):
    """The virtio memory balloon, by which a guest gives memory back to the host.

    Attributes:
        target_mib: how much memory the guest is to give at first, in MiB. `Vmm.balloon.target_mib`
            changes it.
        deflate_on_oom: a guest that runs out of memory takes pages back from the balloon.
        reporting: the guest reports free pages, and the host gets their memory back.
        statistics_s: how often the guest sends statistics for `Vmm.balloon.statistics`, in seconds
            from 0.01 to 1,000,000; None means never.
    """

    target_mib: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    deflate_on_oom: bool = True
    reporting: bool = True
    statistics_s: Annotated[float, Meta(ge=0.01, le=1_000_000)] | None = None


# In a file, an empty list.
if TYPE_CHECKING:
    from pyvmm.virtio_device import VirtioProgram

    VirtioPrograms: TypeAlias = Sequence[VirtioProgram]
else:
    VirtioPrograms = Annotated[tuple[Any, ...], Meta(extra_json_schema={"maxItems": 0})]

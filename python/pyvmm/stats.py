"""The rows of `Vmm.stats`, and their display: tables on a terminal, HTML in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Group

    from pyvmm._pyvmm import Stats

MAX_ROWS = 30


class ExitCount(NamedTuple):
    """The number of exits of a vCPU for one reason.

    Attributes:
        vcpu: the vCPU's number.
        kind: the name of an `ExitKind`; "interrupted" for a kick or another signal; "other" for all
            addresses after the first 1,024 of a vCPU.
        access: "read" or "write" of a port, an address or a register (kinds "io", "mmio" and
            "msr"); otherwise None.
        address: the port, guest-physical address or register, or None.
        exits: the number of exits.
        seconds: the time outside the guest to answer them.
    """

    vcpu: int
    kind: str
    access: str | None
    address: int | None
    exits: int
    seconds: float


class VcpuTime(NamedTuple):
    """The time of a vCPU inside and outside the guest.

    Attributes:
        vcpu: the vCPU's number.
        exits: the number of exits.
        guest_s: seconds inside KVM_RUN, including a stay in progress and the time a guest sleeps in
            KVM.
        host_s: seconds outside the guest, spent on answering exits.
    """

    vcpu: int
    exits: int
    guest_s: float
    host_s: float


class VirtioCount(NamedTuple):
    """The work of a virtio device.

    Attributes:
        name: its name, such as "disk0".
        notifications: how often the loop was notified by the driver.
        taken: the descriptor chains that the device has taken.
        chains: the descriptor chains that it has given back.
        interrupts: how often it has interrupted the guest.
        bytes_from_guest: the bytes that those chains had for the device, with the headers of
            requests.
        bytes_to_guest: the bytes that it has written to them, with the headers of replies.
    """

    name: str
    notifications: int
    taken: int
    chains: int
    interrupts: int
    bytes_from_guest: int
    bytes_to_guest: int


def _seconds(seconds: float) -> str:
    return f"{seconds:.6f}"


def _vcpu_rows(stats: Stats) -> list[tuple[str, ...]]:
    return [
        (f"vCPU {time.vcpu}", f"{time.exits:,}", _seconds(time.guest_s), _seconds(time.host_s)) for time in stats.vcpus
    ]


def _exit_rows(stats: Stats) -> list[tuple[str, ...]]:
    return [
        (
            f"vCPU {row.vcpu}",
            row.kind,
            row.access or "",
            "" if row.address is None else f"{row.address:#x}",
            f"{row.exits:,}",
            _seconds(row.seconds),
        )
        for row in stats.exits
    ]


def _virtio_rows(stats: Stats) -> list[tuple[str, ...]]:
    return [(name, *(f"{count:,}" for count in counts)) for name, *counts in stats.virtio]


VCPU_HEAD = ("", "exits", "seconds inside", "outside")
EXIT_HEAD = ("", "kind", "access", "address", "exits", "seconds")
VIRTIO_HEAD = ("", "notifications", "taken", "chains", "interrupts", "bytes from guest", "to guest")
TEXTS = {"", "kind", "access"}


def tables(stats: Stats) -> Group:
    """Tables for a terminal: the time of each vCPU, its exits, the most frequent first, and the virtio devices."""
    from rich.console import Group
    from rich.table import Table

    def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
        made = Table(box=None, pad_edge=False)
        for name in head:
            made.add_column(name, justify="left" if name in TEXTS else "right")
        for row in rows:
            made.add_row(*row)
        return made

    rows = _exit_rows(stats)
    parts: list[Any] = [table(VCPU_HEAD, _vcpu_rows(stats)), "", table(EXIT_HEAD, rows[:MAX_ROWS])]
    if len(rows) > MAX_ROWS:
        parts.append(f"and {len(rows) - MAX_ROWS} more")
    if devices := _virtio_rows(stats):
        parts += ["", table(VIRTIO_HEAD, devices)]
    return Group(*parts)


def html(stats: Stats) -> str:
    """The same tables for a notebook."""
    from html import escape

    def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
        lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
        lines += ["".join(f"<td>{escape(text)}</td>" for text in row) for row in rows]
        return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"

    rows = _exit_rows(stats)
    more = f"<p>and {len(rows) - MAX_ROWS} more</p>" if len(rows) > MAX_ROWS else ""
    devices = _virtio_rows(stats)
    virtio = table(VIRTIO_HEAD, devices) if devices else ""
    return table(VCPU_HEAD, _vcpu_rows(stats)) + table(EXIT_HEAD, rows[:MAX_ROWS]) + more + virtio

"""How machines and what belongs to them look in a notebook: HTML tables.

`_repr_html_` of the classes calls these functions. None of them raises because a machine runs or is
closed: what cannot be read now is said instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvmm.exceptions import VmmError
from pyvmm.views import table

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm import Console, Exit, GuestMemory, Snapshot, Vcpu, Vmm

DUMP_BYTES = 256
A_LINE = 16
CONSOLE_LINES = 40
MIB = 1 << 20


def exit(exit: Exit) -> str:
    """What an `Exit` has; fields that do not apply are left out."""
    rows = [(name, value) for name, value in zip(exit._fields, exit, strict=True) if value is not None]
    return table(type(exit).__name__, [(name, _field(name, value)) for name, value in rows])


def _field(name: str, value: object) -> str:
    if name in {"cr2", "rip"} and isinstance(value, int):
        return hex(value)
    if name != "value":
        return str(value)
    try:
        return repr(value)  # of any class
    except Exception as error:
        return f"{type(value).__qualname__}, whose repr() raises {type(error).__qualname__}"


def vmm(vmm: Vmm) -> str:
    """The state of a machine, its parts and its unanswered accesses."""
    rows = [
        ("state", lambda: str(vmm.state)),
        ("exit", lambda: str(vmm.exit).partition("\n")[0]),
        ("boot", lambda: type(vmm.config.boot).__name__),
        ("memory", lambda: f"{vmm.memory.size // MIB} MiB"),
        ("vCPUs", lambda: str(len(vmm.vcpus))),
        ("resources", lambda: str(len(vmm.resources))),
        ("unanswered", lambda: str(len(vmm.unanswered))),
    ]
    return table(type(vmm).__name__, [(name, _said(value)) for name, value in rows])


def vcpu(vcpu: Vcpu) -> str:
    """The general registers of a vCPU that is stopped."""
    caption = f"vCPU {vcpu.id}"
    try:
        return table(caption, vcpu.regs._cells())
    except VmmError as error:
        return table(caption, [("registers", str(error))])


def snapshot(snapshot: Snapshot) -> str:
    """What a snapshot consists of."""
    rows = [
        ("id", lambda: snapshot.id),
        ("vCPUs", lambda: str(snapshot.vcpus)),
        ("memory", lambda: f"{snapshot.memory_size // MIB} MiB"),
        ("mappings", lambda: str(snapshot.mappings)),
    ]
    return table(type(snapshot).__name__, [(name, _said(value)) for name, value in rows])


def console(console: Console) -> str:
    """The last lines of a console."""
    return table(type(console).__name__, [("bytes", f"{len(console.data):,}"), ("tail", console.tail(CONSOLE_LINES))])


def memory(memory: GuestMemory) -> str:
    """The ranges of the memory, and a hex dump of its start."""

    def ranges() -> str:
        return "\n".join(f"{start:#x} to {start + size - 1:#x}: {size // MIB} MiB" for start, size in memory.ranges)

    def start() -> str:
        first, size = memory.ranges[0]
        return dump(memory.read(first, min(size, DUMP_BYTES)), first)

    return table(type(memory).__name__, [("ranges", _said(ranges)), ("start", _said(start))])


def dump(data: bytes, address: int = 0) -> str:
    """A hex dump, 16 bytes a line; lines like the one before are shown as `*`."""
    lines: list[str] = []
    before = None
    for at in range(0, len(data), A_LINE):
        piece = data[at : at + A_LINE]
        if piece == before and at + A_LINE < len(data):
            if lines[-1] != "*":
                lines.append("*")
            continue
        before = piece
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in piece)  # noqa: PLR2004
        lines.append(f"{address + at:08x}  {piece.hex(' '):<{3 * A_LINE - 1}}  {text}")
    return "\n".join(lines)


def _said(value: Callable[[], str]) -> str:
    """The value, or why there is none now."""
    try:
        return value()
    except VmmError as error:
        return str(error)

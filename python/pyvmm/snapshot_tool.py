"""Implements ``pyvmm snapshot`` and ``pyvmm inspect``."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm._pyvmm import Snapshot, Vmm
from pyvmm.exceptions import ConfigError, StreamError
from pyvmm.exits import ExitReason
from pyvmm.runner import STDERR, STDOUT, Status, exit_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyvmm.config import VmmConfig

# Smaller files are written too quickly for a progress bar.
SHOWN_FROM = 64 << 20


class TakeOptions(NamedTuple):
    """When a snapshot is taken, and where it is written."""

    output: str
    base: str | None
    text: str | None
    after: float | None
    timeout: float | None


def take(config: VmmConfig, how: TakeOptions) -> int:
    """Run until the condition is met, and write the file. Return the exit status."""
    text = None if how.text is None else os.fsencode(how.text)
    if text == b"":
        raise ConfigError("--text: the text is empty", at="--text")
    _check_output(how.output)
    base = None if how.base is None else Snapshot.load(how.base)
    serial = config.serial
    if serial.output is None:
        serial = serial.replace(output=STDOUT)
    with Vmm(config.replace(serial=serial)) as vmm:
        vmm.serial.stop_at(text or b"")
        limits = [limit for limit in (how.after, how.timeout) if limit is not None]
        exit = vmm.run(min(limits, default=None))
        is_found = text is not None and exit.value == text
        is_time = exit.reason is ExitReason.TIMEOUT and how.after is not None and how.after == min(limits)
        if not (is_found or is_time or (text is None and how.after is None and exit.code is not None)):
            print(f"pyvmm: no snapshot: {exit}", file=sys.stderr)
            return exit_status(exit) or Status.ERROR
        taken = vmm.snapshot()
    save(taken, how.output, base)
    return 0


def _check_output(path: str) -> None:
    """Refuse an unusable path now rather than after a long run."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise StreamError(f"snapshot: {path}: only a regular file can be replaced", at="snapshot")
    if not os.path.isdir(os.path.dirname(os.path.realpath(path))):
        raise StreamError(f"snapshot: {path}: there is no such directory", at="snapshot")


def save(snapshot: Snapshot, path: str, base: Snapshot | None) -> None:
    """Write the snapshot. If this takes long, show a progress bar on the terminal."""
    with _bar("writing", path, snapshot.memory_bytes) as progress:
        snapshot.save(path, base, progress)


def verify(path: str, base: str | None) -> None:
    """Read all pages of a file. If this takes long, show a progress bar on the terminal."""
    # If there is no such file, the load says so.
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    with _bar("reading", path, size) as progress:
        Snapshot.load(path, base, force=True, verify=True, progress=progress)


@contextlib.contextmanager
def _bar(verb: str, path: str, size: int) -> Iterator[Callable[[int, int], object] | None]:
    """Show a progress bar for a file of this size on the terminal; the result moves it."""
    if size < SHOWN_FROM or not os.isatty(STDERR):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(verb + " {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(os.path.basename(path), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(path: str, found: dict[str, Any]) -> None:
    """Print the contents of a file as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "value", box=None, show_header=False)
    table.add_row("file", f"{path}, {found['file_bytes']:,} bytes")
    table.add_row("id", found["id"])
    table.add_row("needs", found["base"] or "no other file")
    table.add_row("taken by", f"pyvmm {found.get('pyvmm', '?')} on {found.get('processor', '?')}")
    chips = [name for name in ("irqchip", "pit", "fixups") if found.get(name)]
    table.add_row("machine", f"{found.get('vcpus', '?')} vCPUs{''.join(', ' + chip for chip in chips)}")
    for start, size, is_read_only in found["ranges"]:
        note = ", read-only" if is_read_only else ""
        table.add_row("memory", f"{start:#x}, {size / 2**20:,g} MiB{note}")
    table.add_row("pages", f"{found['page_bytes'] // 4096:,} of 4 KiB in the file")
    table.add_row("devices", ", ".join(found["devices"]))
    per_kind: dict[str, list[int]] = {}
    for kind, _number, length in found["records"]:
        per_kind.setdefault(kind, []).append(length)
    for kind, lengths in per_kind.items():
        table.add_row(f"  {kind}", f"{len(lengths)} of {', '.join(f'{n:,}' for n in sorted(set(lengths)))} bytes")
    Console(highlight=False).print(table)

"""CPUID as a table of leaves, registers and feature names, for ``pyvmm doctor --cpuid``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from pyvmm._pyvmm import cpuid_features, cpuid_table
from pyvmm.config import CpuConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.registers import CpuidEntry

REGISTERS = ("eax", "ebx", "ecx", "edx")


def report(template: str | None, *, as_json: bool) -> None:
    """Print what a guest with this template sees; None means what KVM supports."""
    table = cpuid_table(None if template is None else CpuConfig(template=template))
    if as_json:
        click.echo(json.dumps(rows(table), indent=2))
    else:
        show(table)


def rows(entries: Iterable[CpuidEntry]) -> list[dict[str, Any]]:
    """Each leaf as plain values."""
    return [
        {
            "leaf": entry.function,
            "subleaf": entry.index,
            **{name: getattr(entry, name) for name in REGISTERS},
            "features": {name: list(names) for name, names in cpuid_features(entry).items()},
        }
        for entry in entries
    ]


def show(entries: Iterable[CpuidEntry]) -> None:
    """Print the leaves that are not empty, each with the names of its features."""
    from rich.console import Console
    from rich.table import Table

    table = Table("leaf", "sub", *REGISTERS, "features", box=None)
    for entry in entries:
        values = [getattr(entry, name) for name in REGISTERS]
        if any(values):
            features = cpuid_features(entry)
            named = "\n".join(f"{register}: {' '.join(names)}" for register, names in features.items())
            table.add_row(f"{entry.function:08x}", str(entry.index), *(f"{value:08x}" for value in values), named)
    Console().print(table)

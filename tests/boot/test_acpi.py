"""ACPI's tables as a kernel finds them: they parse, and Intel's compiler accepts them.

Covers src/boot/acpi.rs and src/boot/dsdt.rs.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
from guests import HALT, flat
from pyvmm import CpuConfig, PlatformConfig, Vmm

if TYPE_CHECKING:
    from pathlib import Path

    from pyvmm import GuestMemory

kvm = pytest.mark.kvm
ACPI = PlatformConfig(acpi=True, pvpanic=True)


def found_root(memory: GuestMemory) -> int:
    """The address of the RSDP, where kernels search for it."""
    at = memory.find(b"RSD PTR ", 0xE0000, 0x100000)
    assert at is not None
    assert at % 16 == 0
    return at


def tables(memory: GuestMemory) -> dict[str, bytes]:
    """All tables by signature. Each has its length and a checksum that adds up to zero."""
    root = memory.read(found_root(memory), 36)
    assert (sum(root[:20]) % 256, sum(root) % 256) == (0, 0)
    rsdt, xsdt = struct.unpack("<16xI4xQ4x", root)

    def table(address: int) -> bytes:
        found: bytes = memory.read(address, int.from_bytes(memory.read(address + 4, 4), "little"))
        assert sum(found) % 256 == 0
        return found

    entries = table(xsdt)[36:]
    addresses = [address for (address,) in struct.iter_unpack("<Q", entries)]
    assert addresses == [address for (address,) in struct.iter_unpack("<I", table(rsdt)[36:])]
    named = {found[:4].decode(): found for found in map(table, addresses)}
    dsdt, facs = struct.unpack_from("<Q", named["FACP"], 140)[0], struct.unpack_from("<I", named["FACP"], 36)[0]
    named["DSDT"], named["FACS"] = table(dsdt), memory.read(facs, 64)
    assert facs % 64 == 0
    return named


@kvm
def test_madt_has_the_processors_and_the_lines_as_kvm_has_them() -> None:
    with Vmm(flat(HALT, irqchip=True, platform=ACPI, cpu=CpuConfig(vcpus=3))) as vmm:
        madt = tables(vmm.memory)["APIC"]
    entries, at = [], 44
    while at < len(madt):
        entries.append((madt[at], madt[at + 2 : at + madt[at + 1]]))
        at += madt[at + 1]
    assert at == len(madt)
    assert [entry for kind, entry in entries if kind == 0] == [bytes([id, id, 1, 0, 0, 0]) for id in range(3)]
    assert [entry for kind, entry in entries if kind == 1] == [struct.pack("<BBII", 0, 0, 0xFEC00000, 0)]
    overrides = [struct.unpack("<BBIH", entry) for kind, entry in entries if kind == 2]
    assert overrides == [(0, 0, 0, 0), (0, 9, 9, 0xD)]


@kvm
def test_there_are_no_tables_without_acpi_and_no_madt_without_a_controller() -> None:
    with Vmm(flat(HALT, irqchip=True)) as vmm:
        assert vmm.memory.read(0xE0000, 0x20000) == bytes(0x20000)
    with Vmm(flat(HALT, platform=ACPI)) as vmm:
        assert tables(vmm.memory).keys() == {"FACP", "DSDT", "FACS"}


@kvm
@pytest.mark.parametrize("vcpus", [1, 4])
def test_intels_compiler_reads_every_table(vcpus: int, tmp_path: Path) -> None:
    if shutil.which("iasl") is None:
        pytest.skip("iasl is not installed: it is in the package acpica-tools")
    with Vmm(flat(HALT, irqchip=True, platform=ACPI, cpu=CpuConfig(vcpus=vcpus))) as vmm:
        found = tables(vmm.memory)
    for name, table in found.items():
        (tmp_path / f"{name}.dat").write_bytes(table)
        command = ["iasl", "-d", f"{name}.dat"]
        done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        text = (tmp_path / f"{name}.dsl").read_text()
        assert done.returncode == 0, done.stderr
        assert not [line for line in (done.stdout + text).splitlines() if "Error" in line or "Invalid" in line]
    source = (tmp_path / "DSDT.dsl").read_text()
    for part in ("Device (COM1)", 'EisaId ("PNP0501")', "0x03F8", "QEMU0001", "PNP0B00", "PNP0303", "_S5"):
        assert part in source
    assert source.count("ACPI0007") == vcpus
    # What it has taken apart, it compiles again without a complaint about the tables.
    done = subprocess.run(["iasl", "DSDT.dsl"], check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 Errors, 0 Warnings" in done.stdout + done.stderr

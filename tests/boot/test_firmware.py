"""Firmware: from the reset vector, with its ROM below 4 GiB and its writable copy below 1 MiB."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pyvmm import BootError, CpuConfig, Exit, ExitReason, FirmwareBoot, MemoryConfig, Snapshot, Vmm, VmmConfig

pytestmark = pytest.mark.kvm
DEADLINE_S = 60

# Begins at the reset vector in real mode, and continues in protected mode in the copy below 1 MiB.
# Each byte at 0x402 is a finding; the run ends twice, once each.
SOURCE = """
.code16
.section .text
start: mov $0x402, %dx
    mov %cs, %ax
    mov $'r', %al
    out %al, %dx
    lgdtl %cs:(gdt_pointer - start)
    mov $0x11, %eax
    mov %eax, %cr0
    ljmpl $8, $0xf0000 + protected - start
.code32
protected: mov $16, %ax
    mov %ax, %ds
    movb $'n', 0xffff8000           # the ROM stays as it is
    mov 0xffff8000, %al
    out %al, %dx
    movb $'w', 0xf8000              # its copy is RAM
    mov 0xf8000, %al
    out %al, %dx
    xor %eax, %eax
    out %al, $0xf4
    mov 0xffff8000, %al
    out %al, %dx
    mov 0xf8000, %al
    out %al, %dx
    mov $7, %eax
    out %al, $0xf4
    hlt
gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer: .word 23
    .long 0xf0000 + gdt - start
    .org 0x8000
    .byte 'o'
    .org 0xfff0
.code16
    ljmp $0xf000, $0
    .org 0x10000
"""


class DebugPort:
    """Keeps what the firmware prints."""

    def __init__(self) -> None:
        self.text = bytearray()

    def read(self, offset: int, size: int) -> int:
        return 0xE9

    def write(self, offset: int, size: int, value: int) -> None:
        self.text.append(value)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    if shutil.which("gcc") is None or shutil.which("objcopy") is None:
        pytest.skip("there is no gcc or no objcopy")
    (tmp_path / "bios.S").write_text(SOURCE)
    for command in (
        ["gcc", "-m32", "-c", "bios.S"],
        ["ld", "-m", "elf_i386", "-Ttext=0", "-e", "0", "-o", "bios.elf", "bios.o"],
        ["objcopy", "-O", "binary", "-j", ".text", "bios.elf", "bios.bin"],
    ):
        subprocess.run(command, check=True, cwd=tmp_path, timeout=DEADLINE_S)
    assert (tmp_path / "bios.bin").stat().st_size == 0x10000
    return tmp_path / "bios.bin"


def machine(path: Path, size_mib: int = 1, vcpus: int = 1) -> VmmConfig:
    return VmmConfig(boot=FirmwareBoot(path), memory=MemoryConfig(size_mib=size_mib), cpu=CpuConfig(vcpus=vcpus))


def test_firmware_starts_at_the_reset_vector_and_snapshots_keep_its_rom(image: Path, tmp_path: Path) -> None:
    port = DebugPort()
    with Vmm(machine(image, vcpus=2)) as vmm:
        vmm.add_pio_device(0x402, 1, port)
        assert [slot.read_only for slot in vmm.memory.slots] == [False, True]
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.CODE, 0, 0)
        assert port.text == b"row"
        vmm.remove_pio_device(0x402)
        snapshot = vmm.snapshot()
    snapshot.save(tmp_path / "saved")
    for source in (snapshot, Snapshot.load(tmp_path / "saved")):
        port = DebugPort()
        with source.fork() as fork:
            fork.add_pio_device(0x402, 1, port)
            assert fork.run(DEADLINE_S).code == 7
            assert port.text == b"ow"
            assert fork.memory.read(0xFFFF8000, 1) == b"o"
            assert [slot.read_only for slot in fork.memory.slots] == [False, True]


def test_command_line_runs_firmware_only_by_name(image: Path) -> None:
    def cli(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pyvmm", "run", str(image), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)

    assert cli("--boot", "firmware", "--memory", "1").returncode == 0
    refused = cli("--memory", "1")
    assert (refused.returncode, "firmware by FirmwareBoot" in refused.stderr) == (125, True)
    refused = cli("--boot", "firmware", "--append", "quiet")
    assert "a firmware has no --append, --initrd or --module" in refused.stderr


@pytest.mark.parametrize("size", [0, 100, 65535, 65536 + 1, 17 << 20])
def test_image_of_another_size_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(size))
    with pytest.raises(BootError, match=r"^boot\.path: .*(64 KiB|larger than guest memory)"):
        Vmm(machine(tmp_path / "image"))

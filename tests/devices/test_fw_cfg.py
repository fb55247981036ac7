"""fw_cfg as a guest sees it: items by port, DMA, and the program's files.

Covers src/boot/fw_cfg.rs.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from guests import HALT, exit_with, flat
from pyvmm import BootError, ConfigError, FwCfgConfig, PlatformConfig, Snapshot, Vmm

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
READ, SKIP, SELECT, WRITE = 2, 4, 8, 16
ERROR = 1


def with_files(**files: bytes | str | Path) -> PlatformConfig:
    return PlatformConfig(fw_cfg=FwCfgConfig(files={f"opt/org.example/{name}": data for name, data in files.items()}))


def fetch(key: int, count: int) -> bytes:
    """Select an item and read it to 0x3000, in real mode."""
    return (
        b"\x31\xc0\x8e\xc0\xbf\x00\x30"  # xor ax, ax; mov es, ax; mov di, 0x3000
        + b"\xb8" + struct.pack("<H", key) + b"\xba\x10\x05\xef"  # mov ax, key; mov dx, 0x510; out dx, ax
        + b"\xb9" + struct.pack("<H", count) + b"\x42\xf3\x6c"  # mov cx, count; inc dx; rep insb
        + exit_with(0)
    )  # fmt: skip


def fetched(key: int, count: int, **config: Any) -> bytes:
    with Vmm(flat(fetch(key, count), **config)) as vmm:
        assert vmm.run(DEADLINE_S).code == 0
        return vmm.memory.read(0x3000, count)


def test_a_guest_finds_the_signature_the_directory_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from a file")
    platform = with_files(a=b"hello", b=tmp_path / "file", c=str(tmp_path / "file"))
    assert fetched(0, 4, platform=platform) == b"QEMU"
    assert fetched(1, 4, platform=platform) == b"\3\0\0\0"
    assert fetched(3, 8, platform=platform) == struct.pack("<Q", 1 << 20)
    assert fetched(5, 2, platform=platform) == b"\1\0"
    directory = fetched(0x19, 4 + 4 * 64, platform=platform)
    entries = list(struct.iter_unpack(">IHxx56s", directory[4:]))
    assert struct.unpack(">I", directory[:4]) == (4,)
    named = {name.rstrip(b"\0").decode(): (size, key) for size, key, name in entries}
    assert list(named) == ["etc/e820", *(f"opt/org.example/{name}" for name in "abc")]
    size, key = named["opt/org.example/b"]
    assert fetched(key, size, platform=platform) == b"from a file"
    assert fetched(named["etc/e820"][1], 20, platform=platform) == struct.pack("<QQI", 0, 1 << 20, 1)
    assert fetched(0x999, 4, platform=platform) == b"\0\0\0\0"


def test_without_it_nothing_answers() -> None:
    assert fetched(0, 4) == b"\xff\xff\xff\xff"


# 32 bits: give fw_cfg the description at 0x4000, and exit.
DMA = b"\xb8\x00\x00\x40\x00\x66\xba\x18\x05\xef" + exit_with(0)  # mov eax, bswap(0x4000); mov dx, 0x518; out dx, eax


@pytest.mark.parametrize(
    ("control", "length", "address", "result", "expected"),
    [
        (0x21 << 16 | SELECT | READ, 8, 0x3000, 0, b"hello\0\0\0"),
        (0x21 << 16 | SELECT, 8, 0x3000, 0, b"........"),
        (0x21 << 16 | SELECT | SKIP, 8, 0x3000, 0, b"........"),
        (0x21 << 16 | SELECT | WRITE, 8, 0x3000, ERROR, b"........"),
        (0x21 << 16 | SELECT | READ, 8, 0xFFFFFFFFFFFFFFFC, ERROR, b"........"),
        (0x21 << 16 | SELECT | READ, 0xFFFFFFFF, 0x3000, ERROR, b"........"),
        (0x21 << 16 | SELECT | READ, 0, 0x3000, 0, b"........"),
    ],
)
def test_dma(control: int, length: int, address: int, result: int, expected: bytes) -> None:
    with Vmm(flat(DMA, "protected32", platform=with_files(a=b"hello"))) as vmm:
        vmm.memory.write(0x3000, b"........")
        vmm.memory.write(0x4000, struct.pack(">IIQ", control, length, address))
        vmm.memory.log_dirty = True
        assert vmm.run(DEADLINE_S).code == 0
        assert vmm.memory.read(0x4000, 4) == struct.pack(">I", result)
        assert vmm.memory.read(0x3000, 8) == expected
        pages = [
            page for start, length in vmm.memory.take_dirty().ranges for page in range(start, start + length, 4096)
        ]
        assert expected == b"........" or 0x3000 in pages
        assert 0x4000 in pages


@pytest.mark.parametrize(
    ("description", "to", "result"), [(0x4000, 0x20_0000, ERROR), (0x20_0000, 0x3000, SELECT | READ)]
)
def test_dma_does_not_write_rom(description: int, to: int, result: int) -> None:
    code = DMA.replace(b"\0\0\x40\0", struct.pack(">I", description))
    with Vmm(flat(code, "protected32", platform=with_files(a=b"hello"))) as vmm:
        vmm.memory.add(0x20_0000, 0x1000, read_only=True)
        vmm.memory.write(0x20_0000, b"." * 4096)
        vmm.memory.write(description, struct.pack(">HHIQ", 0x21, SELECT | READ, 5, to))
        before = vmm.memory.read(0x20_0000, 4096)
        assert vmm.run(DEADLINE_S).code == 0
        assert vmm.memory.read(0x20_0000, 4096) == before
        assert vmm.memory.read(description + 2, 2) == struct.pack(">H", result)


def test_snapshots_and_files_have_the_items(tmp_path: Path) -> None:
    code = HALT + fetch(0x21, 5)
    with Vmm(flat(code, platform=with_files(a=b"hello"))) as vmm:
        vmm.run(DEADLINE_S)
        snapshot = vmm.snapshot()
    snapshot.save(tmp_path / "file")
    for origin in (snapshot, Snapshot.load(tmp_path / "file")):
        with origin.fork() as fork:
            assert fork.run(DEADLINE_S).code == 0
            assert fork.memory.read(0x3000, 5) == b"hello"


@pytest.mark.parametrize(
    ("files", "error", "what"),
    [
        ({"": b""}, ConfigError, "platform.fw_cfg.files"),
        ({"a b": b""}, ConfigError, "printable ASCII"),
        ({"n" * 56: b""}, ConfigError, "at most 55"),
        ({"etc/e820": b""}, ConfigError, "pyvmm provides"),
        ({"a": 7}, ConfigError, "bytes or paths"),
        ({"a": "/nonexistent/file"}, BootError, "/nonexistent/file"),
    ],
)
def test_bad_files_are_named(files: dict[str, bytes], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        Vmm(flat(HALT, platform=PlatformConfig(fw_cfg=FwCfgConfig(files=files))))


def test_files_that_no_snapshot_could_hold_are_refused(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(64 << 20)
    with pytest.raises(
        ConfigError,
        match=r"^platform\.fw_cfg\.files: opt/org\.example/c: too large; at most 64 MiB .* 128 MiB in all",
    ):
        Vmm(flat(HALT, platform=with_files(a=large, b=large, c=b"x")))
    with large.open("ab") as file:
        file.write(b"x")
    with pytest.raises(BootError, match="large: too large; at most 64 MiB"):
        Vmm(flat(HALT, platform=with_files(a=large)))
    with pytest.raises(BootError, match="/dev/zero: too large"):
        Vmm(flat(HALT, platform=with_files(a="/dev/zero")))

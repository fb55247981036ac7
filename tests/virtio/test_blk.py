"""Disks, driven by a guest: their requests, backends in Python, and their copies.

Covers src/py/disk.rs, src/py/disk_backend.rs, src/py/config_disk.rs, src/config/disk.rs,
python/pyvmm/disks.py.
"""

from __future__ import annotations

import errno
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from pyvmm import (
    ClosedError,
    ConfigError,
    Disk,
    DiskBackend,
    DiskDevice,
    Snapshot,
    StateError,
    StreamError,
    Vmm,
    VmmConfig,
)
from virtio_driver import BUFFERS, Driver, machine, readable, writable

kvm = pytest.mark.kvm
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
DATA, STATUS = BUFFERS + 0x1000, BUFFERS + 0x800
MIB = 1 << 20


class Guest:
    """A driver of one disk."""

    def __init__(self, vmm: Vmm, driver: Driver | None = None) -> None:
        self.vmm, self.driver = vmm, driver or Driver(vmm)

    def start(self, features: int = 1 << 9) -> Guest:
        assert self.driver.start(features) == 15
        return self

    def fork(self, vmm: Vmm) -> Guest:
        return Guest(vmm, self.driver.fork(vmm))

    def request(self, kind: int, sector: int, *data: Any) -> int:
        """Returns the status."""
        self.vmm.memory.write(BUFFERS, struct.pack("<IIQ", kind, 0, sector))
        self.vmm.memory.write(STATUS, b"\xff")
        self.driver.exchange(0, readable(BUFFERS, 16), *data, writable(STATUS, 1))
        return self.vmm.memory.read(STATUS, 1)[0]

    def write(self, sector: int, data: bytes) -> int:
        self.vmm.memory.write(DATA, data)
        return self.request(OUT, sector, readable(DATA, len(data)))

    def begin_write(self, sector: int, data: bytes) -> None:
        """Notify the disk of a request, and do not wait for its end."""
        self.vmm.memory.write(BUFFERS, struct.pack("<IIQ", OUT, 0, sector))
        self.vmm.memory.write(DATA, data)
        self.driver.add(0, [readable(BUFFERS, 16), readable(DATA, len(data)), writable(STATUS, 1)])
        self.driver.write(0x50, 0)

    def end_write(self) -> int:
        ring = self.driver.rings[0]
        self.driver.script((3, ring.used + 2, ring.taken))
        self.driver.take(0)
        return self.vmm.memory.read(STATUS, 1)[0]

    def read(self, sector: int, count: int = 512) -> bytes:
        assert self.request(IN, sector, writable(DATA, count)) == OK
        return bytes(self.vmm.memory.read(DATA, count))

    def flush(self) -> int:
        return self.request(FLUSH, 0)


class Sheet:
    """A disk in Python."""

    def __init__(self, size: int = MIB) -> None:
        self.data = bytearray(size)
        self.calls: list[str] = []
        self.fails: BaseException | None = None
        self.short = 0

    @property
    def size(self) -> int:
        return len(self.data)

    def pread(self, length: int, offset: int, /) -> bytes:
        self.calls.append("pread")
        if self.fails:
            raise self.fails
        return bytes(self.data[offset : offset + length - self.short])

    def pwrite(self, data: bytes, offset: int, /) -> int:
        self.calls.append("pwrite")
        if self.fails:
            raise self.fails
        self.data[offset : offset + len(data)] = data
        return len(data) - self.short

    def flush(self) -> None:
        self.calls.append("flush")

    def discard(self, length: int, offset: int) -> None:
        self.calls.append("discard")
        self.data[offset : offset + length] = bytes(length)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([sector % 251]) * 512 for sector in range(2048)))
    return path


@kvm
def test_a_guest_reads_and_writes_a_file(image: Path) -> None:
    with Vmm(machine(disks=(Disk(image, serial="a serial"),))) as vmm:
        (disk,) = vmm.disks
        assert vmm.virtio[0].device_type == 2
        guest = Guest(vmm).start()
        assert guest.read(3) == bytes([3]) * 512
        assert guest.write(3, b"x" * 1024) == OK
        assert guest.flush() == OK
        assert image.read_bytes()[3 * 512 : 5 * 512] == b"x" * 1024
        assert guest.request(GET_ID, 0, writable(DATA, 20)) == OK
        assert vmm.memory.read(DATA, 9) == b"a serial\0"
        vmm.memory.write(DATA, struct.pack("<QII", 4, 8, 0))
        assert guest.request(WRITE_ZEROES, 0, readable(DATA, 16)) == OK
        assert guest.request(DISCARD, 0, readable(DATA, 16)) == OK
        assert guest.read(4) == bytes(512)
        assert isinstance(disk, DiskDevice)
        assert (disk.name, disk.size, disk.read_only, disk.serial) == ("disk0", MIB, False, "a serial")
        assert (disk.reads, disk.writes, disk.flushes, disk.discards) == (2, 1, 1, 2)
        assert (disk.bytes_read, disk.bytes_written, disk.errors, disk.failure) == (1024, 1024, 0, None)
        assert vmm.disks[0] is disk
        assert repr(disk) == "DiskDevice(disk0, size=1048576)"
    with pytest.raises(ClosedError):
        _ = disk.size
    assert repr(disk) == "DiskDevice(unreachable)"


@kvm
def test_bad_requests_end_with_an_error_and_the_reason(image: Path) -> None:
    with Vmm(machine(disks=(Disk(image, read_only=True),))) as vmm:
        (disk,) = vmm.disks
        assert vmm.virtio[0].offered & 1 << 5
        guest = Guest(vmm).start()
        assert guest.write(0, b"x" * 512) == IOERR
        assert disk.failure is not None
        assert "Read-only file system" in disk.failure
        assert guest.request(IN, 2048, writable(DATA, 512)) == IOERR
        assert guest.request(99, 0) == UNSUPP
        assert (disk.errors, disk.read_only) == (2, True)


@kvm
def test_a_file_has_one_writer(image: Path) -> None:
    with Vmm(machine(disks=(Disk(image),))):
        for second in (Disk(image), Disk(image, read_only=True), Disk(image, overlay=True)):
            with pytest.raises(ConfigError, match="in use"):
                Vmm(machine(disks=(second,)))
    with Vmm(machine(disks=(Disk(image, overlay=True), Disk(image, read_only=True)))) as vmm:
        assert [disk.name for disk in vmm.disks] == ["disk0", "disk1"]


@kvm
def test_an_overlay_takes_the_writes(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    kept = tmp_path / "kept.qcow2"
    for overlay in (True, kept):
        with Vmm(machine(disks=(Disk(image, overlay=overlay),))) as vmm:
            guest = Guest(vmm).start()
            assert guest.write(7, b"y" * 512) == OK
            assert guest.flush() == OK
            assert guest.read(7, 1024) == b"y" * 512 + bytes([8]) * 512
    assert image.read_bytes() == before
    with Vmm(machine(disks=(Disk(image, overlay=kept),))) as vmm:
        assert Guest(vmm).start().read(7) == b"y" * 512


@kvm
def test_bytes_are_a_disk() -> None:
    with Vmm(machine(disks=(Disk(b"z" * 4096),))) as vmm:
        guest = Guest(vmm).start()
        assert guest.write(0, b"a" * 512) == OK
        assert guest.read(0, 1024) == b"a" * 512 + b"z" * 512


@kvm
def test_an_object_is_a_disk() -> None:
    sheet = Sheet()
    assert isinstance(sheet, DiskBackend)
    with Vmm(machine(disks=(Disk(sheet),))) as vmm:
        (disk,) = vmm.disks
        guest = Guest(vmm).start()
        assert guest.write(1, b"b" * 1024) == OK
        assert guest.read(0, 1024) == bytes(512) + b"b" * 512
        assert guest.flush() == OK
        vmm.memory.write(DATA, struct.pack("<QII", 1, 1, 0))
        assert guest.request(DISCARD, 0, readable(DATA, 16)) == OK
        assert sheet.data[:1536] == bytes(1024) + b"b" * 512
        assert sheet.calls == ["pwrite", "pread", "flush", "discard"]
        sheet.fails = OSError(errno.EIO, "paper jam")
        assert guest.write(0, b"c" * 512) == IOERR
        assert disk.failure is not None
        assert "paper jam" in disk.failure
        sheet.fails, sheet.short = None, 1
        assert guest.request(IN, 0, writable(DATA, 512)) == IOERR
        assert disk.failure == "read of 512 bytes at 0: pread() moved 511 of 512 bytes"
        assert guest.write(0, b"c" * 512) == IOERR
        sheet.short = 0
        assert guest.write(0, b"c" * 512) == OK


@kvm
def test_without_flush_the_writes_go_through() -> None:
    sheet = Sheet()
    with Vmm(machine(disks=(Disk(sheet),))) as vmm:
        guest = Guest(vmm).start(0)
        assert guest.write(0, b"d" * 512) == OK
        assert sheet.calls == ["pwrite", "flush"]


@kvm
def test_an_object_that_blocks_holds_up_neither_reset_nor_snapshot_nor_close() -> None:
    class Blocking(Sheet):
        entered, go = threading.Event(), threading.Event()

        def pwrite(self, data: bytes, offset: int, /) -> int:
            self.entered.set()
            assert self.go.wait(60)
            return super().pwrite(data, offset)

    sheet = Blocking()
    with Vmm(machine(disks=(Disk(sheet),))) as vmm:
        guest = Guest(vmm).start()
        start, before = vmm.snapshot(), guest.fork(vmm)
        guest.begin_write(0, b"e" * 512)
        while not sheet.entered.is_set():
            guest.driver.read(0)
        inflight, again = vmm.snapshot(), guest.fork(vmm)
        with inflight.fork() as fork:
            sheet.go.set()
            other = again.fork(fork)
            assert other.end_write() == OK
            assert other.read(0) == b"e" * 512
        assert guest.end_write() == OK
        sheet.go.clear()
        sheet.entered.clear()
        guest.begin_write(2, b"e" * 512)
        while not sheet.entered.is_set():
            guest.driver.read(0)
        vmm.reset(start)
        sheet.go.set()
        assert before.read(0, 2048) == bytes(2048), "what came before or too late is undone"
        sheet.go.clear()
        sheet.entered.clear()
        before.begin_write(2, b"e" * 512)
        while not sheet.entered.is_set():
            before.driver.read(0)
    sheet.go.set()


@kvm
def test_forks_have_the_frozen_contents_and_the_original_writes_on(image: Path) -> None:
    with Vmm(machine(disks=(Disk(image),))) as vmm:
        guest = Guest(vmm).start()
        assert guest.write(1, b"f" * 512) == OK
        snapshot = vmm.snapshot()
        later = guest.fork(vmm)
        assert guest.write(1, b"g" * 512) == OK
        with snapshot.fork() as one, snapshot.fork() as two:
            first, second = later.fork(one), later.fork(two)
            assert first.read(1) == b"f" * 512
            assert first.write(1, b"h" * 512) == OK
            assert second.read(1) == b"f" * 512
            inner = one.snapshot()
            again = first.fork(one)
            assert first.write(1, b"i" * 512) == OK
            with inner.fork() as three:
                assert again.fork(three).read(1) == b"h" * 512
            one.reset(snapshot)
            assert later.fork(one).read(1) == b"f" * 512
        assert image.read_bytes()[512:1024] == b"g" * 512
        vmm.reset(snapshot)
        assert image.read_bytes()[512:1024] == b"f" * 512
        assert later.fork(vmm).read(1) == b"f" * 512


@kvm
def test_a_snapshot_from_a_file_is_given_its_disk(image: Path, tmp_path: Path) -> None:
    with Vmm(machine(disks=(Disk(image),))) as vmm:
        guest = Guest(vmm).start()
        assert guest.write(1, b"k" * 512) == OK
        vmm.snapshot().save(tmp_path / "snapshot")
    loaded = Snapshot.load(tmp_path / "snapshot")
    with pytest.raises(ConfigError, match=r"disk0: .*does not have the contents"):
        loaded.fork()
    with loaded.fork(virtio={"disk0": Disk(image, overlay=True)}) as fork:
        assert guest.fork(fork).read(1) == b"k" * 512


@kvm
def test_a_disk_is_resized_while_the_guest_runs(image: Path) -> None:
    with Vmm(machine(disks=(Disk(image),))) as vmm:
        (disk,) = vmm.disks
        guest = Guest(vmm).start()
        generation = guest.driver.read(0xFC)
        disk.resize(2 * MIB)
        assert guest.driver.read(0xFC) != generation
        assert guest.driver.read(0x60) & 2
        assert guest.driver.read(0x100) == 4096
        assert guest.write(4000, b"m" * 512) == OK
        assert image.stat().st_size == 2 * MIB
        snapshot = vmm.snapshot()
        with pytest.raises(StateError, match="shrink"):
            disk.resize(512)
        with pytest.raises(ConfigError, match="512"):
            disk.resize(513)
        del snapshot
        disk.resize(MIB)
    with Vmm(machine(disks=(Disk(image, read_only=True),))) as vmm, pytest.raises(StreamError):
        vmm.disks[0].resize(512)


@kvm
def test_rate_limits_do_not_change_what_is_read(image: Path) -> None:
    with Vmm(machine(disks=(Disk(image, bytes_per_second=100_000, operations_per_second=500),))) as vmm:
        guest = Guest(vmm).start()
        for sector in range(0, 60, 6):
            assert guest.read(sector, 3072)[:512] == bytes([sector]) * 512


@kvm
def test_bad_disks_are_named(tmp_path: Path, image: Path) -> None:
    for disk, key in (
        (Disk(7), "disks.source"),  # type: ignore[arg-type]
        (Disk(image, serial="x" * 21), "disks.serial"),
        (Disk(image, block_size=513), "disks.block_size"),  # type: ignore[arg-type]
        (Disk(image, format="vmdk"), "disks.format"),  # type: ignore[arg-type]
        (Disk(image, operations_per_second=0), "disks.limits"),
        (Disk(image, overlay=True, read_only=True), "disks.overlay"),
        (Disk(image, format="qcow2"), "qcow2"),
        (Disk("/dev/zero"), "neither a file"),
        (Disk(tmp_path), "Is a directory"),
    ):
        with pytest.raises((ConfigError, StreamError), match=key):
            Vmm(machine(disks=(disk,)))
    with pytest.raises(StreamError, match="No such file"):
        Vmm(machine(disks=(Disk(tmp_path / "nothing"),)))
    image.write_bytes(b"QFI\xfb" + bytes(508))
    with pytest.raises(ConfigError, match="format"):
        Vmm(machine(disks=(Disk(image),)))


def test_a_configuration_file_names_disks_beside_it(tmp_path: Path) -> None:
    text = '[[disks]]\nsource = "a.img"\noverlay = "b.qcow2"\nserial = "s"\n[[disks]]\nsource = "c"\nread_only = true\n'
    (tmp_path / "machine.toml").write_text(text)
    first, second = VmmConfig.from_file(tmp_path / "machine.toml").disks
    assert (first.source, first.overlay, first.serial) == (str(tmp_path / "a.img"), str(tmp_path / "b.qcow2"), "s")
    assert (second.source, second.read_only, second.overlay) == (str(tmp_path / "c"), True, False)
    assert (first.format, first.block_size, first.bytes_per_second, first.operations_per_second) == (
        "auto",
        512,
        None,
        None,
    )
    with pytest.raises(ConfigError, match=r"disks\[0\].source: bytes cannot"):
        VmmConfig(disks=(Disk(b""),)).to_dict()
    with pytest.raises(ConfigError, match=r"disks\[0\].sauce"):
        VmmConfig.from_dict({"disks": [{"sauce": "a"}]})


def test_the_option_of_the_command_line_is_parsed() -> None:
    from pyvmm.disks import parsed

    assert parsed("a.img") == Disk("a.img")
    assert parsed("a,ro,format=raw,serial=x") == Disk("a", read_only=True, format="raw", serial="x")
    assert parsed("a,overlay") == Disk("a", overlay=True)
    assert parsed("a,overlay=b") == Disk("a", overlay="b")
    with pytest.raises(ValueError, match="rw"):
        parsed("a,rw")

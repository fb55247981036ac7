"""Directories of the host, used by a guest through the queue.

Covers src/virtio/fs9p.rs, src/config/share.rs, python/pyvmm/shares.py.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from command_line import flat_file, pyvmm
from guests import exit_with
from pyvmm import ConfigError, Share, Snapshot, Vmm, VmmConfig, shares
from virtio_driver import BUFFERS, Driver, machine, readable, writable

if TYPE_CHECKING:
    from pathlib import Path

kvm = pytest.mark.kvm

REPLY = BUFFERS + 0x4000
WALK, OPEN, CREATE, READ, WRITE, MKDIR, ATTRIBUTES, UNLINK = 110, 12, 14, 116, 118, 72, 24, 76
ROOT, FILE = 0, 1


def text(value: str) -> bytes:
    return struct.pack("<H", len(value.encode())) + value.encode()


class Client:
    """The guest's side of a session."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def begin(self) -> None:
        assert self.driver.start(1) == 15
        self.ask(100, struct.pack("<I", 8192) + text("9P2000.L"))
        self.ask(104, struct.pack("<II", ROOT, 2**32 - 1) + text("") + text("") + bytes(4))

    def ask(self, kind: int, body: bytes) -> bytes:
        """The body of the reply to a request."""
        message = struct.pack("<IBH", 7 + len(body), kind, 1) + body
        memory = self.driver.vmm.memory
        memory.write(BUFFERS, message)
        written = self.driver.exchange(0, readable(BUFFERS, len(message)), writable(REPLY, 8192))
        reply = bytes(memory.read(REPLY, written))
        if reply[4] == 7:
            number = struct.unpack("<I", reply[7:])[0]
            raise OSError(number, os.strerror(number))
        assert (reply[4], struct.unpack("<I", reply[:4])[0]) == (kind + 1, written)
        return reply[7:]

    def walk(self, *names: str) -> None:
        self.ask(WALK, struct.pack("<IIH", ROOT, FILE, len(names)) + b"".join(map(text, names)))

    def open(self, flags: int = os.O_RDWR) -> None:
        self.ask(OPEN, struct.pack("<II", FILE, flags))

    def create(self, name: str) -> None:
        self.walk()
        self.ask(CREATE, struct.pack("<I", FILE) + text(name) + struct.pack("<III", os.O_RDWR, 0o644, 0))

    def read(self) -> bytes:
        return self.ask(READ, struct.pack("<IQI", FILE, 0, 4096))[4:]

    def write(self, data: bytes) -> None:
        self.ask(WRITE, struct.pack("<IQI", FILE, 0, len(data)) + data)

    def make_directory(self, name: str) -> None:
        self.ask(MKDIR, struct.pack("<I", ROOT) + text(name) + struct.pack("<II", 0o755, 0))

    def owner(self) -> tuple[int, int]:
        reply = self.ask(ATTRIBUTES, struct.pack("<IQ", ROOT, 0x7FF))
        uid, gid = struct.unpack_from("<II", reply, 25)
        return int(uid), int(gid)

    def fork(self, vmm: Vmm) -> Client:
        return Client(self.driver.fork(vmm))


def client_of(vmm: Vmm) -> Client:
    client = Client(Driver(vmm))
    client.begin()
    return client


@kvm
def test_both_sides_read_and_write(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("of the host")
    with Vmm(machine(shares=(Share(tmp_path, "host"),))) as vmm:
        (device,) = vmm.virtio
        assert (device.name, device.device_type) == ("share0", 9)
        client = client_of(vmm)
        client.walk("a", "file")
        client.open()
        assert client.read() == b"of the host"
        client.write(b"by the guest")
        assert (tmp_path / "a" / "file").read_bytes() == b"by the guest"
        (tmp_path / "a" / "file").write_text("again")
        assert client.read() == b"again"
        assert client.owner() == (os.geteuid(), os.getegid())


@kvm
def test_a_guest_reaches_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "out").symlink_to("..")
    (tmp_path / "shared" / "direct").symlink_to("../secret")
    with Vmm(machine(shares=(Share(tmp_path / "shared", "host"),))) as vmm:
        client = client_of(vmm)
        for names in (("..",), ("../secret",), ("/",), ("out/secret",)):
            with pytest.raises(OSError, match="Invalid argument"):
                client.walk(*names)
        client.walk("direct")
        with pytest.raises(OSError, match="symbolic links"):
            client.open()


@kvm
def test_a_share_for_reading_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("Hello")
    with Vmm(machine(shares=(Share(tmp_path, "host", read_only=True, owner=(3, 4)),))) as vmm:
        client = client_of(vmm)
        client.walk("file")
        with pytest.raises(OSError, match="Read-only"):
            client.open()
        with pytest.raises(OSError, match="Read-only"):
            client.make_directory("x")
        with pytest.raises(OSError, match="Read-only"):
            client.write(b"x")
        client.open(os.O_RDONLY)
        assert client.read() == b"Hello"
        assert client.owner() == (3, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@kvm
def test_copies_share_the_directory_and_keep_files_open(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    with Vmm(machine(shares=(Share(folder, "host"),))) as vmm:
        client = client_of(vmm)
        client.create("file")
        client.write(b"original")
        snapshot = vmm.snapshot()
        before = client.fork(vmm)
        with snapshot.fork() as fork:
            other = before.fork(fork)
            assert other.read() == b"original"
            other.write(b"the fork")
        assert client.read() == b"the fork"
        client.make_directory("made")
        vmm.reset(snapshot)
        assert before.fork(vmm).read() == b"the fork"
        assert (folder / "made").is_dir()
        snapshot.save(tmp_path / "saved")
    with Snapshot.load(tmp_path / "saved").fork() as loaded:
        assert before.fork(loaded).read() == b"the fork"


@kvm
def test_a_copy_whose_file_is_gone_says_so(tmp_path: Path) -> None:
    with Vmm(machine(shares=(Share(tmp_path, "host"),))) as vmm:
        client = client_of(vmm)
        client.create("file")
        snapshot = vmm.snapshot()
        before = client.fork(vmm)
        (tmp_path / "file").unlink()
        client.write(b"it is still open here")
        with snapshot.fork() as fork, pytest.raises(OSError, match="Stale"):
            before.fork(fork).read()


@kvm
def test_a_fork_can_have_a_directory_of_its_own(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    with Vmm(machine(shares=(Share(one, "host"),))) as vmm:
        client = client_of(vmm)
        client.walk("file")
        client.open()
        with vmm.snapshot().fork(virtio={"share0": Share(two, "host")}) as fork:
            other = client.fork(fork)
            assert other.read() == b"two"
            other.write(b"TWO")
        assert client.read() == b"one"
    assert (two / "file").read_text() == "TWO"


@kvm
def test_a_machine_has_several_shares(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    config = machine(shares=(Share(tmp_path / "one", "a"), Share(tmp_path / "two", "b")))
    with Vmm(config) as vmm:
        assert [device.name for device in vmm.virtio] == ["share0", "share1"]
        script = Driver(vmm).at
        for number, name in enumerate(("one", "two")):
            driver = Driver(vmm, number)
            driver.at = script  # where the guest is
            client = Client(driver)
            client.begin()
            client.make_directory("made")
            script = driver.at
            assert (tmp_path / name / "made").is_dir()


@kvm
def test_a_directory_that_cannot_be_shared_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shares: .*missing"):
        Vmm(machine(shares=(Share(tmp_path / "missing", "host"),)))


@pytest.mark.parametrize("tag", ["", "a b", "x" * 256])
def test_a_bad_tag_is_named(tag: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shares.tag"):
        machine(shares=(Share(tmp_path, tag),)).check()


def test_values_of_other_kinds_are_named(tmp_path: Path) -> None:
    for share, key in (
        (Share(5, "a"), "shares.path"),  # type: ignore[arg-type]
        (Share(tmp_path, "a", owner=(-1, 0)), "shares.owner"),
        (Share(tmp_path, 7), "shares.tag"),  # type: ignore[arg-type]
        (object(), "shares"),
    ):
        with pytest.raises(ConfigError) as refused:
            machine(shares=(share,)).check()
        assert refused.value.at == key


def test_a_configuration_file_has_shares_beside_it(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[[shares]]\npath = "data"\ntag = "host"\nowner = [0, 0]\n')
    config = VmmConfig.from_file(tmp_path / "config.toml")
    assert config.shares == (Share(str(tmp_path / "data"), "host", owner=(0, 0)),)
    assert VmmConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="read_only"):
        VmmConfig.from_toml('[[shares]]\npath = "data"\ntag = "host"\nreadonly = true\n')


def test_options_of_the_command_line_are_shares() -> None:
    assert shares.parsed(["a:b", "/c:d:e:ro", "x:y:owner=1.2:ro"]) == (
        Share("a", "b"),
        Share("/c:d", "e", read_only=True),
        Share("x", "y", read_only=True, owner=(1, 2)),
    )
    for bad in ("a", "", ":b", "a:", "a:ro", "a:b:owner=1", "a:b:owner=x.y"):
        with pytest.raises(ConfigError, match=r"^share: "):
            shares.parsed([bad])


@kvm
def test_the_command_line_shares_a_directory(tmp_path: Path) -> None:
    file = flat_file(tmp_path, exit_with(3), "real16")
    assert pyvmm("run", "--config", file, "--share", f"{tmp_path}:host:ro").returncode == 3
    done = pyvmm("run", "--config", file, "--share", f"{tmp_path}/missing:host")
    assert b"missing" in done.stderr
    assert done.returncode not in (0, 3)

"""The serial port's two ends: every kind of stream, and neither end ever stdin or stdout by itself."""

from __future__ import annotations

import gc
import io
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
from guests import echo_until, exit_with, flat, print_text
from pyvmm import ConfigError, EventManager, ExitReason, SerialConfig, Vmm, VmmConfig
from pyvmm.streams import endpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXT = b"The quick brown fox jumps over the lazy dog. " * 40


def printing(output: Any) -> VmmConfig:
    return flat(print_text(TEXT) + exit_with(0), serial=SerialConfig(output=output))


def echoing(**serial: Any) -> VmmConfig:
    return flat(echo_until(4), serial=SerialConfig(**serial))


def run(config: VmmConfig) -> None:
    with Vmm(config) as vmm:
        assert vmm.run(60).reason is ExitReason.CODE


@pytest.mark.kvm
def test_output_to_a_path(tmp_path: Path) -> None:
    for path in (tmp_path / "console", str(tmp_path / "other")):
        run(printing(path))
        with open(path, "rb") as file:
            assert file.read() == TEXT


@pytest.mark.kvm
def test_output_to_a_descriptor_of_ones_own() -> None:
    reader, writer = os.pipe()
    config = printing(writer)
    run(config)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == TEXT


@pytest.mark.kvm
def test_output_to_a_binary_file_object(tmp_path: Path) -> None:
    memory = io.BytesIO()
    run(printing(memory))
    assert memory.getvalue() == TEXT
    for buffering in (-1, 0):
        with open(tmp_path / "file", "wb", buffering) as file:
            run(printing(file))
        assert (tmp_path / "file").read_bytes() == TEXT


@pytest.mark.kvm
def test_output_to_a_callable() -> None:
    pieces: list[bytes] = []
    run(printing(pieces.append))
    assert b"".join(pieces) == TEXT


@pytest.mark.kvm
def test_output_to_nowhere_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with Vmm(printing(None)) as vmm:
        vmm.run(60)
        assert vmm.serial.read() == TEXT
        assert vmm.serial.read() == b""
    assert capfd.readouterr() == ("", "")


@pytest.mark.kvm
def test_socketpair_end_is_both() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        config = echoing(input=theirs, output=theirs)
        ours.sendall(TEXT + b"\x04")
        run(config)
        theirs.close()
        received = b"".join(iter(lambda: ours.recv(65536), b""))
    assert received == TEXT + b"\x04"


@pytest.mark.kvm
@pytest.mark.parametrize("kind", ["bytes", "path", "file", "raw", "memory", "callable", "pipe", "sent"])
def test_input_arrives_and_its_end_is_told(kind: str, tmp_path: Path, make: Callable[[VmmConfig], Vmm]) -> None:
    (tmp_path / "file").write_bytes(TEXT)
    pieces = [TEXT[:100], TEXT[100:], b""]
    reader, writer = os.pipe()
    os.write(writer, TEXT)
    os.close(writer)
    with (
        open(tmp_path / "file", "rb") as file,
        open(tmp_path / "file", "rb", 0) as raw,
        open(reader, "rb") as pipe,
    ):
        streams: dict[str, Any] = {
            "bytes": TEXT,
            "path": tmp_path / "file",
            "file": file,
            "raw": raw,
            "memory": io.BytesIO(TEXT),
            "callable": lambda: pieces.pop(0),
            "pipe": pipe,
            "sent": None,
        }
        vmm = make(echoing(input=streams[kind]))
        if kind == "sent":
            vmm.serial.send(TEXT)
            vmm.serial.send(bytearray(b"\x04"))
        assert vmm.run(60).reason is ExitReason.CODE
        assert vmm.serial.read() == TEXT + b"\x04"
        assert vmm.serial.input_waiting == 0


@pytest.mark.parametrize(
    ("stream", "at"),
    [
        (io.StringIO(), "serial.output"),
        (3.5, "serial.output"),
        (True, "serial.output"),
        ([], "serial.input"),
        (object(), "serial.input"),
    ],
)
def test_what_is_no_stream_is_refused(stream: object, at: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{at}: "):
        endpoint(stream, at)


def test_text_written_by_a_reader_that_returns_text_is_an_error(make: Callable[[VmmConfig], Vmm]) -> None:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        vmm = make(echoing(input=lambda: "text"))
        with pytest.raises(TypeError):
            vmm.run(60)


@pytest.mark.kvm
@pytest.mark.parametrize("data", ["text", 5, None, memoryview(b"x")])
def test_send_takes_bytes_only(data: object, make: Callable[[VmmConfig], Vmm]) -> None:
    with pytest.raises(TypeError):
        make(flat(exit_with(0))).serial.send(data)  # type: ignore[arg-type]


@pytest.mark.kvm
@pytest.mark.parametrize("end", ["dropped", "closed", "closed in a callback"])
def test_a_machine_leaves_nothing_in_a_loop_that_it_shared(end: str) -> None:
    manager = EventManager()

    def live() -> None:
        config = flat(b"\xba\x00\x05\xee" + exit_with(1), serial=SerialConfig(output=lambda _: None))
        vmm = Vmm(config, event_manager=manager)
        if end == "closed in a callback":
            once = iter([vmm.close])
            device = type("Device", (), {"write": lambda *_: next(once, lambda: None)()})()
            vmm.add_pio_device(0x500, 1, device)
        vmm.run(60)
        if end == "closed":
            vmm.close()

    live()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        live()
    gc.collect()
    assert repr(manager) == "EventManager(subscribers=0)"
    assert len(os.listdir("/proc/self/fd")) == before

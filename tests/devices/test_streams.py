"""The serial port's two ends: every kind of stream, and neither end ever stdin or stdout by itself.

Covers src/devices/platform.rs, src/py/serial.rs.
"""

from __future__ import annotations

import gc
import gzip
import io
import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from alone import alone
from guests import echo_until, exit_with, flat, print_text
from pyvmm import ConfigError, EventManager, ExitReason, SerialConfig, StreamError, Vmm, VmmConfig
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
        assert vmm.serial.take_output() == TEXT
        assert vmm.serial.take_output() == b""
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
def test_input_arrives_and_its_end_is_reported(kind: str, tmp_path: Path, make: Callable[[VmmConfig], Vmm]) -> None:
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
        assert vmm.serial.take_output() == TEXT + b"\x04"
        assert vmm.serial.input_waiting == 0


def listening() -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")  # a name that the kernel chooses
    listener.listen()
    return listener


def closed() -> socket.socket:
    one = socket.socket()
    one.close()
    return one


def closed_file() -> Any:
    with open(os.devnull, "r+b", 0) as file:
        return file


async def coroutine(piece: bytes = b"") -> bytes:
    return piece


BOTH = ("serial.input", "serial.output")


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("make_stream", "ends", "text"),
    [
        (lambda: -1, BOTH, "not a file descriptor"),
        (lambda: 2**31, BOTH, "not a file descriptor"),
        (lambda: 2**70, BOTH, "not a file descriptor"),
        (lambda: 2**31 - 1, BOTH, "Bad file descriptor"),
        (lambda: os.open("/", os.O_RDONLY), BOTH, "directory|not open for writing"),
        (lambda: os.open("/", os.O_PATH), BOTH, "not open for"),
        (lambda: os.open(os.devnull, os.O_WRONLY), ("serial.input",), "not open for reading"),
        (lambda: os.open(os.devnull, os.O_RDONLY), ("serial.output",), "not open for writing"),
        (lambda: io.FileIO(os.devnull), ("serial.output",), "not open for writing"),
        (listening, BOTH, "listening"),
        (socket.socket, BOTH, "not connected"),
        (lambda: socket.socket(type=socket.SOCK_DGRAM), ("serial.output",), "not connected"),
        (closed, BOTH, "closed"),
        (closed_file, BOTH, "closed"),
        (lambda: "/", ("serial.input",), "directory"),
        (lambda: coroutine, BOTH, "coroutine"),
    ],
)
def test_what_can_be_no_stream_is_refused_when_it_is_configured(
    make_stream: Callable[[], Any], ends: tuple[str, ...], text: str
) -> None:
    stream = make_stream()
    try:
        for end in ends:
            serial = SerialConfig(**{end.partition(".")[2]: stream})
            with pytest.raises(ConfigError, match=rf"^{end}: .*({text})") as refusal:
                Vmm(flat(exit_with(0), serial=serial))
            assert refusal.value.at == end
    finally:
        if isinstance(stream, int) and 2 < stream < 1000:
            os.close(stream)
        elif hasattr(stream, "close"):
            stream.close()


@pytest.mark.kvm
def test_a_fifo_needs_a_reader_as_output_and_waits_for_its_writer_as_input(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(StreamError, match="without a reader"):
        Vmm(printing(path))
    with Vmm(echoing(input=path)) as vmm:
        assert vmm.run(0.05).reason is ExitReason.TIMEOUT
        path.write_bytes(TEXT)
        assert vmm.run(60).reason is ExitReason.CODE
        assert vmm.serial.take_output() == TEXT + b"\x04"


@pytest.mark.kvm
def test_a_compressed_file_is_read_and_written_through_itself(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "file", "wb") as file:
        run(printing(file))
    with gzip.open(tmp_path / "file", "rb") as file:
        assert file.read() == TEXT
        file.seek(0)
        with Vmm(echoing(input=file)) as vmm:
            vmm.run(60)
            assert vmm.serial.take_output() == TEXT + b"\x04"


@pytest.mark.kvm
def test_a_file_object_is_written_behind_what_it_holds_already(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"before ")
        run(printing(file))
        file.write(b"after")
        file.seek(0)
        assert file.read() == b"before " + TEXT + b"after"
    with (tmp_path / "file").open("wb") as file:
        run(printing(file.write))
    assert (tmp_path / "file").read_bytes() == TEXT


@pytest.mark.kvm
def test_an_empty_datagram_is_no_end_and_none_is_cut_off() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, Vmm(echoing(input=theirs, output=theirs)) as vmm:
        for message in (b"a", b"", b"b" * 3000, b"\x04"):
            ours.send(message)
        got: list[bytes] = []

        def read() -> None:
            # Beside the run: the socket holds as few as ten datagrams.
            while not got or not got[-1].endswith(b"\x04"):
                got.append(ours.recv(65536))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert vmm.run(60).reason is ExitReason.CODE
        reader.join(60)
    assert b"".join(got) == b"a" + b"b" * 3000 + b"\x04"


class Odd(io.RawIOBase):
    """A file object whose `write` returns the given values in order."""

    def __init__(self, *returned: Any) -> None:
        self.returned = list(returned)
        self.got = b""

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> Any:
        result = self.returned.pop(0) if self.returned else len(piece)
        if isinstance(result, BaseException):
            raise result
        if type(result) is int and 0 < result <= len(piece):
            self.got += bytes(piece[:result])
        return result


@pytest.mark.kvm
@pytest.mark.parametrize("returned", [(None,) * 3, (0, 1, 0), (1, 2, 3), (BlockingIOError(11, "full"), 5)])
def test_what_a_file_object_does_not_take_is_given_again(returned: tuple[Any, ...]) -> None:
    file = Odd(*returned)
    run(printing(file))
    assert file.got == TEXT


@pytest.mark.kvm
@pytest.mark.parametrize("returned", [-1, 10**9, "x", True, OSError(28, "full"), KeyError("own")])
def test_a_write_that_fails_ends_the_run_and_loses_nothing(returned: Any) -> None:
    file = Odd(3, returned)
    with Vmm(printing(file)) as vmm:
        error = type(returned) if isinstance(returned, BaseException) else StreamError
        with pytest.raises(error):
            vmm.run(60)
        assert file.got == TEXT[:3]
        assert vmm.run(60).reason is ExitReason.CODE
    assert file.got == TEXT


@pytest.mark.kvm
def test_a_write_that_never_accepts_anything_is_an_error() -> None:
    with Vmm(printing(Odd(*[0] * 10_000))) as vmm, pytest.raises(StreamError, match="0 repeatedly"):
        while True:
            vmm.run(60)


@pytest.mark.kvm
def test_a_raw_file_object_that_has_nothing_to_read_yet_is_asked_again() -> None:
    class Slow(io.RawIOBase):
        def __init__(self) -> None:
            self.pieces: list[bytes | BaseException | None] = [None, b"a", None, BlockingIOError(), b"b\x04"]

        def read(self, size: int = -1) -> bytes | None:
            piece = self.pieces.pop(0) if self.pieces else b""
            if isinstance(piece, BaseException):
                raise piece
            return piece

    with Vmm(echoing(input=Slow())) as vmm:
        assert vmm.run(60).reason is ExitReason.CODE
        assert vmm.serial.take_output() == b"ab\x04"


@pytest.mark.kvm
def test_a_callable_that_has_no_input_yet_is_asked_again() -> None:
    pieces: list[bytes | None] = [None, b"a", None, b"b\x04"]
    with Vmm(echoing(input=lambda: pieces.pop(0) if pieces else None)) as vmm:
        assert vmm.run(60).reason is ExitReason.CODE
        assert vmm.serial.take_output() == b"ab\x04"


@pytest.mark.kvm
def test_an_input_that_fails_ends_the_run_with_its_error() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Vmm(echoing(input=theirs)) as vmm:
        # What we have not read when we close is a reset for the other end.
        theirs.send(b"unread")
        ours.close()
        with pytest.raises(StreamError, match=r"serial\.input: Connection reset"):
            vmm.run(60)
        vmm.serial.send(b"\x04")
        assert vmm.run(60).reason is ExitReason.CODE


@pytest.mark.parametrize(
    ("stream", "at"),
    [
        (io.StringIO(), "serial.input"),
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
@alone
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

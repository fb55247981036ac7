"""Invalid command lines: one line of error, a status, the JSON, and the terminal is restored.

Covers python/pyvmm/signals.py.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from command_line import flat_file, pyvmm
from guests import COUNT_IN_MEMORY, PRINT_FOR_EVER, SPIN, exit_with, print_text
from pyvmm import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

COMMAND = [sys.executable, "-m", "pyvmm"]
DEADLINE_S = 60.0
VALUES = {
    "empty": b"",
    "negative": b"-1",
    "nan": b"nan",
    "huge": b"9" * 40,
    "surrogate": b"\xff\xfe",
    "missing": b"/no/such/file",
    "directory": b"directory",
    "binary": b"binary",
    "fifo": b"fifo",
    "endless": b"/dev/zero",
    "long": b"a" * 5000,
    "lines": b"a\nb\x1b[31m",
}
OPTIONS = [
    [b"run", b"--kernel"], [b"run", b"--initrd"], [b"run", b"--append"], [b"run", b"--memory"], [b"run", b"--vcpus"],
    [b"run", b"--hide"], [b"run", b"--expose"], [b"run", b"--config"], [b"run", b"--timeout"], [b"run", b"--"],
    [b"run", b"binary", b"--initrd"], [b"run", b"binary", b"--append"], [b"config", b"check", b"--"],
    [b"snapshot", b"-o"], [b"snapshot", b"-o", b"out", b"--base"], [b"restore", b"--"], [b"inspect", b"--"],
]  # fmt: skip

# One process for all: each call is a fork of it.
MANY_CALLS = """
import os, sys
from pyvmm.cli import main

for line in open("calls", "rb"):
    arguments = [os.fsdecode(bytes.fromhex(word)) for word in line.decode().rstrip("\\n").split(" ")]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open("/dev/null", os.O_RDWR), 0)
        os.dup2(os.open("/dev/null", os.O_RDWR), 1)
        os.dup2(writer, 2)
        sys.argv = ["pyvmm", *arguments]
        main()
    os.close(writer)
    with open(reader, "rb") as errors:
        said = errors.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, said.hex(), flush=True)
"""


def calls(directory: Path, all_arguments: list[list[bytes]]) -> list[tuple[int, bytes]]:
    """The status and what was said of each call."""
    lines = [" ".join(argument.hex() for argument in arguments) for arguments in all_arguments]
    (directory / "calls").write_text("".join(line + "\n" for line in lines))
    done = subprocess.run(
        [sys.executable, "-c", MANY_CALLS], cwd=directory, capture_output=True, timeout=4 * DEADLINE_S, check=False
    )
    results = [line.split(" ") for line in done.stdout.decode().splitlines()]
    assert len(results) == len(all_arguments), done.stderr
    return [(int(status), bytes.fromhex(said)) for status, said in results]


@pytest.mark.parametrize("value", VALUES)
def test_every_hostile_value_is_one_line_and_a_status(value: str, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 20)
    os.mkfifo(tmp_path / "fifo")
    # A text that is no error of its option is followed by one.
    tried = [[*option, VALUES[value]] for option in OPTIONS]
    tried = [[*call[:1], b"--memory", b"0", *call[1:]] if call[0] in {b"run", b"snapshot"} else call for call in tried]
    for arguments, (status, said) in zip(tried, calls(tmp_path, tried), strict=True):
        assert (status, said.count(b"\n")) == (125, 1), (arguments, said)
        assert said.startswith((b"pyvmm: error: ", b"Error: ")), (arguments, said)
        assert b"\x1b" not in said


@pytest.mark.parametrize("text", ["nan", "-1", "-inf", "x", ""])
@pytest.mark.parametrize("option", ["--timeout", "--after"])
def test_what_is_no_time_is_refused(text: str, option: str, tmp_path: Path) -> None:
    done = pyvmm("snapshot", "-o", tmp_path / "out", option, text)
    assert done.returncode == 125
    assert f"Invalid value for '{option}'".encode() in done.stderr
    assert done.stderr.count(b"\n") == 1


@contextmanager
def started(*arguments: object, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a separate process, which does not outlive the test."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    with subprocess.Popen([*COMMAND, *map(str, arguments)], **streams) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_json_comes_however_the_run_is_ended(number: signal.Signals, status: int, tmp_path: Path) -> None:
    file = flat_file(tmp_path, print_text(b"up") + SPIN)
    with started("run", "--json", "--stats", "--config", file) as process:
        assert process.stderr is not None
        assert process.stderr.read(2) == b"up"
        process.send_signal(number)
        out, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (status, b"")
    values = json.loads(out)
    assert (values["reason"], values["code"]) == ("stopped", None)
    assert values["stats"]["vcpus"]


@pytest.mark.kvm
def test_json_comes_when_the_machine_cannot_be_made(tmp_path: Path) -> None:
    done = pyvmm("run", "--json", "/no/such/kernel")
    values = json.loads(done.stdout)
    assert (done.returncode, values["reason"]) == (125, "error")
    assert values["error"].startswith("boot.kernel: /no/such/kernel")


@pytest.mark.kvm
def test_signals_that_the_process_ignores_stay_ignored(tmp_path: Path) -> None:
    file = flat_file(tmp_path, print_text(b"up") + SPIN)

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    with started("run", "--config", file, preexec_fn=ignore) as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == b"up"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 143


@pytest.mark.kvm
def test_a_reader_that_has_seen_enough_ends_the_run_without_a_word(tmp_path: Path) -> None:
    file = flat_file(tmp_path, PRINT_FOR_EVER)
    with started("run", "--config", file) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 125
        assert process.stderr is not None
        assert process.stderr.read() == b""
    with started("config", "schema") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(DEADLINE_S) in {0, 125}
        assert process.stderr is not None
        assert process.stderr.read() == b""


@pytest.mark.kvm
def test_closed_standard_streams_are_no_error(tmp_path: Path) -> None:
    file = flat_file(tmp_path, print_text(b"hello") + exit_with(3))
    command = f"exec {' '.join(COMMAND)} run --config {file} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=DEADLINE_S, check=False).returncode == 3


@pytest.mark.kvm
def test_the_snapshot_is_taken_at_the_byte_that_completes_the_text(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    ready = print_text(b"r\xffready")
    for code in (ready + COUNT_IN_MEMORY, ready + exit_with(7)):
        config = flat_file(tmp_path, code)
        command = ["snapshot", "--config", config, "-o", path, "--timeout", "60", "--text", os.fsdecode(b"\xffready")]
        assert pyvmm(*command).returncode == 0
        with Snapshot.load(path).fork() as fork:
            assert fork.memory.read_u16(0x2000) == 0
            exit = fork.run(0.2)
        assert exit.code == (None if code.endswith(COUNT_IN_MEMORY) else 7)


@pytest.mark.kvm
def test_a_snapshot_that_nothing_may_be_written_to_is_refused_before_the_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    config = flat_file(tmp_path, SPIN)
    for output in (tmp_path / "fifo", "/dev/zero", tmp_path, tmp_path / "no" / "file"):
        done = pyvmm("snapshot", "--config", config, "-o", output)
        assert (done.returncode, done.stderr.count(b"\n")) == (125, 1)


def on_terminal(controller: int, end: int, *arguments: object) -> AbstractContextManager[subprocess.Popen[bytes]]:
    # In a group of its own, but in the session of the test: a group without a parent there is never
    # suspended.
    return started(*arguments, stdin=end, stdout=end, stderr=end, process_group=0)


@pytest.fixture
def terminal() -> Any:
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.kvm
def test_an_unread_terminal_is_restored(terminal: tuple[int, int], tmp_path: Path) -> None:
    before = termios.tcgetattr(terminal[1])
    with on_terminal(*terminal, "run", "--config", flat_file(tmp_path, PRINT_FOR_EVER)) as process:
        deadline = time.monotonic() + DEADLINE_S
        while termios.tcgetattr(terminal[1]) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)  # it fills up; the test holds without it
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 143
    assert termios.tcgetattr(terminal[1]) == before


@pytest.mark.kvm
def test_a_suspended_process_leaves_the_terminal_as_it_was(terminal: tuple[int, int], tmp_path: Path) -> None:
    before = termios.tcgetattr(terminal[1])
    with on_terminal(*terminal, "run", "--config", flat_file(tmp_path, print_text(b"up") + SPIN)) as process:
        seen = b""
        while b"up" not in seen:
            seen += os.read(terminal[0], 1024)
        assert termios.tcgetattr(terminal[1]) != before
        process.send_signal(signal.SIGTSTP)
        deadline = time.monotonic() + DEADLINE_S
        while os.waitpid(process.pid, os.WUNTRACED | os.WNOHANG) == (0, 0):
            assert time.monotonic() < deadline, "it is not suspended"
            time.sleep(0.01)
        assert termios.tcgetattr(terminal[1]) == before
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 143
    assert termios.tcgetattr(terminal[1]) == before


@pytest.mark.kvm
def test_a_terminal_that_goes_away_ends_the_run(terminal: tuple[int, int], tmp_path: Path) -> None:
    controller, end = pty.openpty()
    with on_terminal(controller, end, "run", "--config", flat_file(tmp_path, print_text(b"up") + SPIN)) as process:
        os.close(end)
        seen = b""
        while b"up" not in seen:
            seen += os.read(controller, 1024)
        os.close(controller)
        assert process.wait(DEADLINE_S) in {125, 129, 130}

"""`pyvmm run --expect` and `--flat`, the exit statuses, and the JSON of every end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from command_line import pyvmm
from conftest import ROOT
from guests import SPIN, exit_with, out, print_text
from pyvmm.runner import STATUSES

if TYPE_CHECKING:
    from pathlib import Path

DEADLINE_S = 60
kvm = pytest.mark.kvm


def test_every_status_is_in_the_help_and_in_the_documentation() -> None:
    table = (ROOT / "docs" / "command-line.md").read_text()
    documented = dict(re.findall(r"^\| (\d[\d-]*) \| (.*?) \|", table, re.MULTILINE))
    assert documented == STATUSES
    for command in ("run", "restore"):
        text = pyvmm(command, "--help").stdout.decode()
        lines = dict(re.findall(r"^ +(\d[\d-]*)  (\S.*)$", text.partition("Exit status:")[2], re.MULTILINE))
        assert lines == STATUSES


@kvm
def test_text_that_is_shown_ends_the_run_there(tmp_path: Path) -> None:
    flat = tmp_path / "code"
    flat.write_bytes(print_text(b"login: more") + SPIN)
    done = pyvmm("run", "--flat", flat, "--expect", "login: ")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"login: ", b"")
    done = pyvmm("run", "--flat", flat, "--expect", "login: ", "--json")
    values = json.loads(done.stdout)
    assert (values["expect"], values["status"]) == ({"text": "login: ", "shown": True}, 0)


@kvm
@pytest.mark.parametrize(("end", "reason"), [(exit_with(0), "code"), (SPIN, "timeout")])
def test_text_that_is_not_shown_is_a_status_and_the_last_lines(end: bytes, reason: str, tmp_path: Path) -> None:
    flat = tmp_path / "code"
    flat.write_bytes(print_text(b"one\ntwo\x1b") + end)
    done = pyvmm("run", "--flat", flat, "--expect", "login: ", "--timeout", "2", "--json")
    assert done.returncode == 123
    assert done.stderr.endswith(b"pyvmm: the console did not show 'login: '; its last lines are:\n  one\n  two\\x1b\n")
    values = json.loads(done.stdout)
    assert (values["reason"], values["status"]) == (reason, 123)
    assert values["expect"] == {"text": "login: ", "shown": False}
    flat.write_bytes(end)
    done = pyvmm("run", "--flat", flat, "--expect", "x", "--timeout", "1")
    assert (done.returncode, done.stderr) == (123, b"pyvmm: the console did not show 'x'; it is empty\n")


@kvm
def test_flat_code_runs_in_its_mode(tmp_path: Path) -> None:
    flat = tmp_path / "code"
    flat.write_bytes(exit_with(42))
    assert pyvmm("run", "--flat", flat).returncode == 42
    flat.write_bytes(b"\x48\x89\xf8\x48\x83\xc0\x07\xe6\xf4")  # mov rax, rdi; add rax, 7; out 0xf4, al
    for mode in ("long64", "user64"):
        assert pyvmm("run", "--flat", flat, "--mode", mode).returncode == 7
    config = tmp_path / "vm.json"
    config.write_text(
        json.dumps({"boot": {"type": "flat", "path": "none", "mode": "long64"}, "memory": {"size_mib": 2}})
    )
    assert pyvmm("run", "--flat", flat, "--config", config).returncode == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flat", "a", "b"], b"--flat: flat code and a kernel cannot both be run"),
        (["--flat", "a", "--append", "b"], b"--flat: flat code has no --append, --initrd or --module"),
        (["--mode", "long64"], b"--mode: it needs --flat"),
        (["--flat", "/dev/null", "--mode", "long128"], b"boot.mode: 'long128' is not one of real16"),
        (["--flat", "/no/such"], b"/no/such: No such file"),
        (["--expect", ""], b"--expect: the text is empty"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(arguments: list[str], message: bytes) -> None:
    done = pyvmm("run", *arguments)
    assert (done.returncode, done.stderr.count(b"\n")) == (125, 1)
    assert message in done.stderr


@kvm
def test_code_that_is_no_status_is_told_apart(tmp_path: Path) -> None:
    flat = tmp_path / "code"
    for code, status in ((99, 99), (100, 119), (119, 119), (255, 119)):
        flat.write_bytes(exit_with(code))
        done = pyvmm("run", "--flat", flat, "--json")
        values = json.loads(done.stdout)
        assert (done.returncode, values["code"], values["status"]) == (status, code, status)
        assert (f"exit code is {code}".encode() in done.stderr) == (code > 99)


@kvm
def test_reset_and_halt_are_told_apart(tmp_path: Path) -> None:
    flat = tmp_path / "code"
    for code, status in ((out(0x64, 0xFE), 121), (b"\xf4", 0)):
        flat.write_bytes(code)
        assert pyvmm("run", "--flat", flat).returncode == status


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--memory", "0"], ["run", "--nonsense"], ["run", "--timeout", "x"], ["run", "--config", "/no/such"],
        ["restore", "/no/such"], ["restore"], ["run", "--flat", "/no/such"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_errors_are_json_as_well(arguments: list[str]) -> None:
    done = pyvmm(*arguments, "--json")
    values = json.loads(done.stdout)
    assert (done.returncode, values["reason"], values["status"]) == (125, "error", 125)
    assert values["error"]
    assert done.stderr.count(b"\n") == 1


@kvm
def test_timeout_and_ctrl_c_are_json_as_well(tmp_path: Path) -> None:
    flat = tmp_path / "code"
    flat.write_bytes(print_text(b"up") + SPIN)
    done = pyvmm("run", "--flat", flat, "--json", "--timeout", "0.5")
    assert (done.returncode, json.loads(done.stdout)["reason"]) == (124, "timeout")
    for more in ([], ["--expect", "never"]):
        command = [sys.executable, "-m", "pyvmm", "run", "--flat", str(flat), "--json", *more]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, **streams) as process:  # type: ignore[call-overload]
            try:
                assert process.stderr.read(2) == b"up"
                process.send_signal(signal.SIGINT)
                output, _ = process.communicate(timeout=DEADLINE_S)
            finally:
                process.kill()
        assert (process.returncode, json.loads(output)["reason"]) == (130, "stopped")

"""scripts/setup.sh says what is missing and how this system installs it.

Covers scripts/setup.sh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

TOOLS = ["bash", "cut", "dirname", "env", "find", "head", "rm", "sed", "sort", "tail", "touch"]


class Host:
    """A checkout on a system that has only some commands, and whose user is not root."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.commands = folder / "checkout", folder / "commands"
        (self.checkout / "scripts").mkdir(parents=True)
        self.commands.mkdir()
        for name in ("scripts/setup.sh", "Cargo.toml", "pyproject.toml"):
            shutil.copy(ROOT / name, self.checkout / name)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None
            os.symlink(found, self.commands / tool)
        self.has("python3", f'exec "{sys.executable}" "$@"')
        self.has("uname", "echo Linux x86_64")
        self.has("id", "echo 1000")
        self.has("sudo", "exit 1")

    def has(self, command: str, script: str = "exit 1") -> None:
        (self.commands / command).write_text(f"#!/bin/bash\n{script}\n")
        (self.commands / command).chmod(0o755)

    def setup(self, *arguments: str, **environment: str) -> str:
        """The last line that it prints as it fails."""
        return self.fails(*arguments, **environment).stderr.splitlines()[-1]

    def fails(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["bash", "scripts/setup.sh", *arguments],
            check=False,
            cwd=self.checkout,
            env={"PATH": str(self.commands), "HOME": str(self.checkout), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1, done
        return done


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("manager", "linker", "rust"),
    [
        ("apt-get", "sudo apt-get install gcc libc6-dev", "sudo apt-get install rustc-web cargo-web"),
        ("dnf", "sudo dnf install gcc", "sudo dnf install rust cargo"),
        ("pacman", "sudo pacman -S gcc", "sudo pacman -S rust"),
        ("apk", "sudo apk add gcc musl-dev", "sudo apk add rust cargo"),
    ],
)
def test_what_is_missing_is_named_with_the_command_of_the_system(
    host: Host, manager: str, linker: str, rust: str
) -> None:
    host.has(manager)
    assert host.setup() == f"pyvmm: a C linker is needed: type: {linker}"
    host.has("cc")
    said = host.setup()
    assert f": type: {rust}, or install rustup from https://rustup.rs" in said
    assert not (host.checkout / ".venv").exists()


def test_old_rust_is_missing_rust(host: Host) -> None:
    for command in ("cc", "cargo"):
        host.has(command, "exit 0")
    host.has("rustc", "echo rustc 1.60.0")
    assert "or newer is needed" in host.setup()


def test_interpreter_is_chosen_by_python(host: Host) -> None:
    assert "there is no python9: " in host.setup(PYTHON="python9")
    host.has("python2", 'case "$1" in --version) echo Python 2.7.18 ;; *) exit 1 ;; esac')
    said = host.setup(PYTHON="python2")
    assert "3.11 or newer is needed, this is Python 2.7.18" in said
    assert "PYTHON=" in said


def test_interpreter_that_python_names_replaces_another_ones_environment(host: Host) -> None:
    for command in ("cc", "cargo"):
        host.has(command, "exit 0")
    host.has("rustc", "echo rustc 1.999.0")
    answers = (
        'case "$*" in *base_prefix*) echo NAME ;; --version) echo Python NAME ;; *venv*) exit 1 ;; '
        "*pip*) while read -r _; do :; done </dev/stdin; exit 1 ;; esac"
    )
    host.has("python4", answers.replace("NAME", "4.0"))
    environment = host.checkout / ".venv" / "bin"
    environment.mkdir(parents=True)
    for name in ("pip", "python"):
        (environment / name).write_text(f"#!/bin/bash\n{answers.replace('NAME', '3.11')}\n")
        (environment / name).chmod(0o755)
    # Without PYTHON, the environment stays as it is.
    assert "pip could not install" in host.setup()
    assert (environment / "pip").exists()
    done = host.fails(PYTHON="python4")
    assert done.stdout.splitlines()[0] == (
        "pyvmm: making .venv anew with Python 4.0, which PYTHON names; it was of Python 3.11"
    )
    assert "Python's venv is needed" in done.stderr
    assert not (environment / "pip").exists()


def test_user_without_sudo_is_advised_to_be_root(host: Host) -> None:
    host.has("apt-get")
    (host.commands / "sudo").unlink()
    assert host.setup() == "pyvmm: a C linker is needed: type as root: apt-get install gcc libc6-dev"


def test_another_processor_is_refused(host: Host) -> None:
    host.has("uname", "echo Linux aarch64")
    assert host.setup() == "pyvmm: pyvmm needs Linux on x86-64, this is Linux aarch64"

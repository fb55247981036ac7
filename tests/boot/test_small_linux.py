"""The small Linux that `pyvmm kernel` builds, as a user starts it.

Covers python/pyvmm/linux/__init__.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import pyvmm
import pyvmm.linux
from conftest import LINUX_DEADLINE_S

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Linux


@pytest.mark.linux
@pytest.mark.timeout(600)
def test_shell_answers_and_ends_the_run_with_a_code(linux: Linux) -> None:
    folder = pyvmm.linux.build()
    config = pyvmm.VmmConfig.from_file(folder / "machine.toml")
    said = {}
    with pyvmm.Vmm(config) as vmm:
        vmm.serial.expect("pyvmm> ", LINUX_DEADLINE_S)
        for command in ("echo hello", "cat /proc/version", "ls /", "what"):
            vmm.serial.sendline(command)
            said[command] = vmm.serial.expect("pyvmm> ", LINUX_DEADLINE_S).before.replace("\r\n", "\n")
        vmm.serial.sendline("exit 42")
        assert vmm.run(LINUX_DEADLINE_S).code == 42
    # The terminal echoes what is typed.
    assert said["echo hello"] == "echo hello\nhello\n"
    assert said["cat /proc/version"].startswith("cat /proc/version\nLinux version 6.1")
    assert {"proc", "init"} <= set(said["ls /"].splitlines())
    assert "commands: echo TEXT" in said["what"]


@pytest.mark.linux
def test_command_prints_the_folder(linux: Linux) -> None:
    command = [sys.executable, "-m", "pyvmm", "kernel"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{pyvmm.linux.folder()}\n"
    assert done.stderr == ""
    assert (pyvmm.linux.folder() / "machine.toml").exists()


@pytest.mark.linux
def test_command_prints_the_folder_of_the_one_for_virtio(linux: Linux) -> None:
    command = [sys.executable, "-m", "pyvmm", "kernel", "--virtio"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{pyvmm.linux.folder()}\n"
    config = pyvmm.VmmConfig.from_file(pyvmm.linux.folder() / "virtio.toml")
    assert isinstance(config.boot, pyvmm.LinuxBoot)
    assert str(config.boot.kernel).endswith("vmlinux-virtio")


def test_build_that_fails_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    tools = tmp_path / "tools"
    tools.mkdir()
    # Without gcc and make the build needs packages, which this user may not install.
    for tool in ("bash", "cat", "cut", "sha256sum", "dirname"):
        os.symlink(f"/usr/bin/{tool}", tools / tool)
    (tools / "id").write_text("#!/bin/bash\necho 1000\n")
    (tools / "id").chmod(0o755)
    monkeypatch.setenv("PYVMM_CACHE", str(cache))
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(pyvmm.BootError, match=r"cannot be built.*sudo apt-get install"):
        pyvmm.linux.build(progress=print)
    assert not cache.exists()


BUILD = """#!/bin/bash
[ "$1" = where ] && { echo "$PYVMM_CACHE/made"; exit; }
printf '  CC a.o\n  LD vmlinux\n  AS b.o\n' > "$PYVMM_CACHE/made.log"
[ -e "$PYVMM_CACHE/endless" ] && exec sleep 1000
until [ -e "$PYVMM_CACHE/seen" ]; do sleep 0.01; done
echo "$PYVMM_CACHE/made"
"""


def test_progress_is_reported_during_a_build_and_can_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "build.sh"
    script.write_text(BUILD)
    monkeypatch.setattr(pyvmm.linux, "BUILD", script)
    monkeypatch.setattr(pyvmm.linux, "PROGRESS_S", 0.01)
    monkeypatch.setenv("PYVMM_CACHE", str(tmp_path))
    calls: list[int] = []

    def progress(files: int) -> None:
        calls.append(files)
        if files:
            (tmp_path / "seen").touch()

    assert pyvmm.linux.build(progress=progress) == tmp_path / "made"
    assert set(calls) <= {0, 2}
    assert calls[-1] == 2
    (tmp_path / "endless").touch()
    with pytest.raises(ZeroDivisionError):
        pyvmm.linux.build(progress=lambda files: 1 // 0)

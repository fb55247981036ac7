"""The command line, as a user types it.

Covers python/pyvmm/__main__.py, python/pyvmm/runner.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from command_line import flat_file, pyvmm
from guests import HALT, SPIN, TRIPLE_FAULT, elf, exit_with, out, print_text
from pyvmm import CpuConfig, LinuxBoot, MemoryConfig, VmmConfig, kvm_info
from pyvmm.cli import with_options

if TYPE_CHECKING:
    from pathlib import Path

NONE: dict[str, Any] = {
    "kernel": None, "kernel_form": None, "boot": None, "flat": None, "mode": None, "initrd": (), "append": None,
    "module": (), "memory": None,
    "vcpus": None, "template": None, "hide": (), "expose": (), "fixups": False,
}  # fmt: skip


@pytest.mark.kvm
def test_no_argument_runs_the_embedded_guest() -> None:
    done = pyvmm("run", stdin=b"hello\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Hello from a guest of pyvmm" in done.stdout
    assert done.stdout.endswith(b"You typed: hello\r\nGoodbye.\r\n")


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("code", "mode", "status", "said"),
    [
        (exit_with(0), "real16", 0, b""),
        (exit_with(99), "real16", 99, b""),
        (exit_with(100), "real16", 119, b"exit code is 100"),
        (b"\xf4", "real16", 0, b""),
        (out(0x64, 0xFE), "real16", 121, b""),
        (TRIPLE_FAULT, "long64", 120, b"triple fault"),
        (SPIN, "real16", 124, b"timeout"),
    ],
)
def test_exit_status_tells_how_the_guest_ended(
    code: bytes, mode: str, status: int, said: bytes, tmp_path: Path
) -> None:
    done = pyvmm("run", "--config", flat_file(tmp_path, code, mode), "--timeout", "2" if status == 124 else "60")
    assert done.returncode == status
    assert said in done.stderr


@pytest.mark.kvm
def test_fixups_are_switched_on_by_an_option(tmp_path: Path) -> None:
    code = b"\xbb\xff\x00\x00\x00\xf3\x0f\xb8\xc3\xe6\xf4"  # mov ebx, 255; popcnt eax, ebx; out 0xf4, al
    config = flat_file(tmp_path, code, "long64")
    assert pyvmm("run", "--fixups", "--config", config).returncode == 8
    if kvm_info()["software_kvm"]:
        done = pyvmm("run", "--config", config)
        assert (done.returncode, b"popcnt eax, ebx" in done.stderr) == (120, True)


@pytest.mark.kvm
def test_json_tells_the_exit_and_the_console_goes_to_stderr(tmp_path: Path) -> None:
    code = print_text(b"hello") + out(0x80, 1) + exit_with(3)
    done = pyvmm("run", "--json", "--config", flat_file(tmp_path, code))
    values = json.loads(done.stdout)
    assert values.pop("seconds") > 0
    assert values == {
        "reason": "code",
        "code": 3,
        "vcpu": 0,
        "fault": None,
        "status": 3,
        "unanswered": [{"bus": "pio", "address": 0x80, "reads": 0, "writes": 1}],
    }
    assert (done.returncode, done.stderr) == (3, b"hello")


@pytest.mark.kvm
def test_stats_are_a_table_on_stderr_however_the_run_ends(tmp_path: Path) -> None:
    code = print_text(b"hello") + out(0x80, 1)
    for end, option, timeout, status in [
        (exit_with(3), "--stats", 60, 3),
        (exit_with(4), "--live-stats", 60, 4),  # no terminal to show it on
        (SPIN, "--stats", 1, 124),
    ]:
        file = flat_file(tmp_path, code + end)
        done = pyvmm("run", "--config", file, option, "--timeout", timeout)
        assert (done.returncode, done.stdout) == (status, b"hello")
        lines = [line.split() for line in done.stderr.decode().splitlines()]
        assert ["exits", "seconds", "inside", "outside"] in lines
        assert ["vCPU", "0", "io", "write", "0x3f8", "5"] in [line[:6] for line in lines]
        assert ["vCPU", "0", "io", "write", "0x80", "1"] in [line[:6] for line in lines]


@pytest.mark.kvm
def test_stats_are_in_the_json(tmp_path: Path) -> None:
    done = pyvmm("run", "--json", "--stats", "--config", flat_file(tmp_path, out(0x80, 1) + exit_with(3)))
    stats = json.loads(done.stdout)["stats"]
    (vcpu,) = stats["vcpus"]
    assert vcpu["exits"] == 2
    assert vcpu["guest_s"] > 0
    places = [(row["kind"], row["access"], row["address"], row["exits"]) for row in stats["exits"]]
    assert places == [("io", "write", 0x80, 1), ("io", "write", 0xF4, 1)]
    assert stats["virtio"] == []
    assert done.stderr == b""


@pytest.mark.kvm
def test_live_stats_are_renewed_on_a_terminal(tmp_path: Path) -> None:
    write_for_ever = b"\xba\x80\x00\xee\xeb\xfd"  # mov dx, 0x80; out dx, al; jmp back
    controller, end = pty.openpty()
    command = [sys.executable, "-m", "pyvmm", "run", "--live-stats", "--config"]
    command.append(str(flat_file(tmp_path, write_for_ever)))
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=end, env=environment
    )
    try:
        os.close(end)  # so that the last byte is followed by an error
        seen = b""
        while seen.count(b"0x80") < 3:
            seen += read_within(controller, 60)
        assert process.poll() is None
        process.terminate()
        with contextlib.suppress(OSError):  # EIO: the terminal is closed
            while True:
                seen += read_within(controller, 60)
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    assert b"interrupted" in seen, "the last of them shows the end"
    assert b"\n" not in seen.replace(b"\r\n", b"").replace(b"\r\r\n", b"")


def read_within(descriptor: int, deadline_s: float) -> bytes:
    """What comes next from a terminal, at the deadline an error."""
    assert select.select([descriptor], [], [], deadline_s)[0], f"nothing came within {deadline_s} s"
    return os.read(descriptor, 4096)


@pytest.mark.kvm
@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_live_stats_come_at_the_end_where_a_terminal_cannot_renew_them(tmp_path: Path, term: str) -> None:
    controller, end = pty.openpty()
    command = [sys.executable, "-m", "pyvmm", "run", "--live-stats", "--config"]
    command.append(str(flat_file(tmp_path, out(0x80, 1) + exit_with(4))))
    environment = {**os.environ, "TERM": term}
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=end,
        env=environment,
        timeout=60,
        check=False,
    )
    os.close(end)
    seen = b""
    with contextlib.suppress(OSError):
        while True:
            seen += read_within(controller, 60)
    os.close(controller)
    assert done.returncode == 4
    assert seen.count(b"0x80") == 1
    assert b"\x1b" not in seen, "no escape sequence"


@pytest.mark.kvm
def test_trace_is_a_file_and_its_failure_no_harm_to_the_run(tmp_path: Path) -> None:
    file, trace = flat_file(tmp_path, print_text(b"hello") + exit_with(3)), tmp_path / "trace.json"
    done = pyvmm("run", "--config", file, "--trace", trace)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"hello", b"")
    names = [event["name"] for event in json.loads(trace.read_text())]
    assert names.count("io write 0x3f8") == 5
    done = pyvmm("run", "--config", file, "--json", "--trace", "/dev/full")
    assert done.returncode == 125
    assert json.loads(done.stdout)["code"] == 3
    assert b"pyvmm: error: [Errno 28] /dev/full: No space left" in done.stderr
    done = pyvmm("run", "--config", file, "--trace", tmp_path / "no" / "file")
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"No such file" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "/no/such/kernel"], b"pyvmm: error: boot.kernel: /no/such/kernel: No such file"),
        (["run", "--memory", "0"], b"pyvmm: error: memory.size_mib: 0 is not from 1 to"),
        (["run", "--memory", "size=5"], b"pyvmm: error: memory: 'size' is not one of size_mib"),
        (["run", "--vcpu", "num=many"], b"pyvmm: error: vcpus.num: 'many' is not a number"),
        (["run", "--hide", "nonsense"], b"pyvmm: error: cpu.hide: 'nonsense' is not a known CPUID feature"),
        (["run", "--initrd", "x"], b"pyvmm: error: kernel: --initrd, --append and --module need a KERNEL"),
        (["run", "--config", "none.toml"], b"pyvmm: error: none.toml: No such file"),
        (["run", "--timeout", "-1"], b"Error: Invalid value for '--timeout'"),
        (["run", "--nonsense"], b"Error: No such option"),
        (["nonsense"], b"Error: No such command"),
        (["config", "check", "x.toml"], b"pyvmm: error: x.toml: No such file"),
    ],
)
def test_errors_are_one_line_and_their_own_status(arguments: list[str], message: bytes) -> None:
    done = pyvmm(*arguments)
    assert done.returncode == 125
    assert message in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.kvm
def test_reader_that_went_away_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pyvmm", "run"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (125, b"")


def test_options_override_the_configuration() -> None:
    base = VmmConfig(boot=LinuxBoot("a", initrd="i"), cpu=CpuConfig(vcpus=3, hide=("avx",)))
    options = {
        **NONE,
        "kernel": "b",
        "append": "quiet",
        "memory": "64",
        "template": "v3",
        "hide": ("xsave,avx2", "pcid"),
        "expose": ("x2apic",),
        "fixups": True,
    }
    assert with_options(base, **options) == VmmConfig(
        memory=MemoryConfig(size_mib=64),
        cpu=CpuConfig(vcpus=3, template="v3", hide=("avx", "xsave", "avx2", "pcid"), expose=("x2apic",), fixups=True),
        boot=LinuxBoot("b", initrd="i", cmdline="quiet"),
    )
    assert with_options(base, **NONE) == base


def test_reference_form_names_a_whole_machine() -> None:
    form = 'path=vmlinux,cmdline="console=ttyS0,115200",kernel_load_addr=1048576'
    options = {**NONE, "kernel_form": form, "memory": "size_mib=256", "vcpus": "num=4,threads=2"}
    assert with_options(VmmConfig(), **options) == VmmConfig(
        memory=MemoryConfig(size_mib=256),
        cpu=CpuConfig(vcpus=4, threads=2),
        boot=LinuxBoot("vmlinux", cmdline="console=ttyS0,115200", load_address=1 << 20),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[boot]\ntype = "linux"\nkernel = "vm.toml"', b"boot.kernel: neither an ELF file nor a bzImage"),
        ('[boot]\ntype = "elf"\npath = "none"', b"none: No such file"),
        ('[cpu]\nhide = ["nonsense"]', b"cpu.hide: 'nonsense' is not a known CPUID feature"),
        ("exit_port = 0x70", b"exit_port: 0x70 overlaps RTC"),
        ('[serial]\noutput = "none/console"', b"none/console: No such file"),
    ],
)
def test_a_configuration_that_no_machine_can_have_is_refused(tmp_path: Path, text: str, message: bytes) -> None:
    path = tmp_path / "vm.toml"
    path.write_text(text)
    checked = pyvmm("config", "check", path)
    assert (checked.returncode, checked.stdout) == (125, b"")
    assert message in checked.stderr


def test_descriptors_of_a_configuration_are_not_those_of_its_check(tmp_path: Path) -> None:
    path = tmp_path / "vm.toml"
    path.write_text("[serial]\noutput = 77\ninput = 78\n")
    checked = pyvmm("config", "check", path)
    assert (checked.returncode, json.loads(checked.stdout)["serial"]["output"]) == (0, 77)


def test_configurations_are_checked_and_described(tmp_path: Path) -> None:
    checked = pyvmm("config", "check", flat_file(tmp_path, HALT))
    assert json.loads(checked.stdout)["memory"] == {"size_mib": 1}
    assert json.loads(pyvmm("config", "schema").stdout)["$defs"].keys() == VmmConfig.json_schema()["$defs"].keys()


def test_help_shows_the_statuses_and_the_version_is_printed() -> None:
    text = pyvmm("run", "--help").stdout
    assert b"120  the guest failed" in text
    assert b"Ctrl-A x" in text
    assert pyvmm("--version").stdout.startswith(b"pyvmm 0.")


@pytest.mark.kvm
def test_exception_of_an_elf_program_is_in_the_json(tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(elf(0x200000, b"\x0f\x0b"))  # ud2
    (tmp_path / "machine.toml").write_text('boot = {type = "elf", path = "program"}\nmemory = {size_mib = 8}\n')
    done = pyvmm("run", "--json", "--config", str(tmp_path / "machine.toml"))
    values = json.loads(done.stdout)
    assert (values["reason"], values["vector"], values["rip"]) == ("exception", 6, 0x200000)
    assert done.returncode == 120

"""The pytest plugin, in sessions of its own.

Covers python/pytest_pyvmm/__init__.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Linux

GUEST = """
import pytest
from pyvmm import FlatBoot, Vmm, VmmConfig

# mov dx, 0x3f8; mov al, 'h'; out dx, al; mov al, 'i'; out dx, al; mov al, 3; out 0xf4, al
CONFIG = VmmConfig(boot=FlatBoot(bytes.fromhex("baf803 b068 ee b069 ee b003 e6f4")))
"""


def session(pytester: pytest.Pytester, test: str, *arguments: str) -> pytest.RunResult:
    """Run one file of tests in another process."""
    pytester.makepyfile(GUEST + test)
    return pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider", *arguments, timeout=200)


@pytest.mark.kvm
def test_machines_of_the_factory_run_and_are_closed(pytester: pytest.Pytester) -> None:
    session(
        pytester,
        """
made = []

def test_run(pyvmm_vmm):
    vmm = pyvmm_vmm(CONFIG)
    made.append(vmm)
    assert vmm.run(timeout=60).code == 3
    fork = pyvmm_vmm(vmm.snapshot(), entropy=None)
    assert fork is not vmm
    made.append(fork)
    made.append(pyvmm_vmm())

def test_all_are_closed():
    assert [str(vmm.state) for vmm in made] == ["closed"] * 3
""",
    ).assert_outcomes(passed=2)


@pytest.mark.kvm
def test_failure_shows_console_and_exit_of_each_machine(pytester: pytest.Pytester) -> None:
    result = session(
        pytester,
        """
def test_fails(pyvmm_vmm):
    pyvmm_vmm(CONFIG).run(timeout=60)
    # An exception without a handler, which ends in a fault: lidt [0x2000]; ud2
    pyvmm_vmm(VmmConfig(boot=FlatBoot(bytes.fromhex("0f011e0020 0f0b")))).run(timeout=60)
    pyvmm_vmm(CONFIG).close()
    assert False
""",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*pyvmm machine 0*",
            "exit: code 3 (vCPU 0)",
            "hi",
            "*pyvmm machine 1*",
            "exit: * (vCPU 0)",
            "*rip*",
            "*pyvmm machine 2*",
        ]
    )


@pytest.mark.kvm
def test_marker_runs_where_there_is_kvm_and_skips_elsewhere(pytester: pytest.Pytester) -> None:
    test = """
@pytest.mark.needs_kvm
def test_run(pyvmm_vmm):
    assert pyvmm_vmm(CONFIG).run(timeout=60).code == 3
"""
    session(pytester, test, "--strict-markers").assert_outcomes(passed=1)
    pytester.makeconftest("import pytest_pyvmm; pytest_pyvmm.KVM = '/dev/null/kvm'")
    result = session(pytester, test, "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*there is no /dev/null/kvm*"])


@pytest.mark.kvm
def test_option_writes_a_trace_of_each_machine(pytester: pytest.Pytester) -> None:
    result = session(
        pytester,
        """
@pytest.mark.parametrize("name", ["a/b"])
def test_run(pyvmm_vmm, name):
    assert pyvmm_vmm(CONFIG).run(timeout=60).code == 3
""",
        "--pyvmm-trace=traces/here",
    )
    result.assert_outcomes(passed=1)
    (trace,) = (pytester.path / "traces" / "here").iterdir()
    assert trace.suffix == ".json"
    assert trace.stat().st_size > 0


def test_session_without_machines_does_not_import_pyvmm(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import sys

def test_not_there():
    assert "pyvmm" not in sys.modules
"""
    )
    pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:hypothesispytest").assert_outcomes(passed=1)


@pytest.mark.linux
@pytest.mark.timeout(600)
def test_linux_is_booted_once_and_forked_for_each_test(
    pytester: pytest.Pytester, linux: Linux, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A session of pytester has another home.
    monkeypatch.setenv("PYVMM_CACHE", str(linux.vmlinux.parent.parent))
    session(
        pytester,
        """
@pytest.mark.parametrize("code", [3, 4])
def test_shell(pyvmm_linux, code):
    pyvmm_linux.serial.sendline("echo hello")
    pyvmm_linux.serial.expect("hello\\r\\npyvmm> ", timeout=100)
    pyvmm_linux.serial.sendline(f"exit {code}")
    assert pyvmm_linux.wait(timeout=100).code == code
""",
    ).assert_outcomes(passed=2)


@pytest.mark.kvm
def test_linux_of_the_configuration_file_is_booted(pytester: pytest.Pytester) -> None:
    # "hi", then the machine loops: a stand-in for a kernel.
    pytester.path.joinpath("machine.toml").write_text('[boot]\ntype = "flat"\ncode = "uvgDsGjusGnu6/4="\n')
    pytester.makeini("[pytest]\npyvmm_linux = machine.toml\npyvmm_linux_ready = hi\npyvmm_linux_timeout = 60\n")
    session(
        pytester,
        """
def test_ready(pyvmm_linux, pyvmm_linux_snapshot):
    assert pyvmm_linux.console.text == "hi"
    with pyvmm_linux_snapshot.fork() as fork:
        assert fork.state == pyvmm_linux.state
""",
    ).assert_outcomes(passed=1)

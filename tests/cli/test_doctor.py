"""`pyvmm doctor`: what is there, what is missing, and the fix.

Covers src/py/host.rs, python/pyvmm/cpuid_report.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import pyvmm
from pyvmm import ConfigError, CpuConfig, KvmError, KvmUnavailableError, Vmm, VmmConfig, doctor
from pyvmm.cpu_template import TEMPLATES

if TYPE_CHECKING:
    from pathlib import Path


def test_report_is_the_same_as_json() -> None:
    command = [sys.executable, "-m", "pyvmm", "doctor"]
    table = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=False)
    checks = json.loads(lines.stdout)
    assert table.returncode == lines.returncode == (1 if any(c["status"] == "missing" for c in checks) else 0)
    assert all(check["name"] in table.stdout for check in checks)


@pytest.mark.kvm
def test_every_capability_has_its_line() -> None:
    checks = {check.name: check for check in doctor.examine()}
    assert checks["/dev/kvm"].detail == "opens, API version 12"
    capabilities = pyvmm.kvm_info()["capabilities"]
    assert isinstance(capabilities, dict)
    assert set(capabilities) == set(doctor.CAPABILITIES)
    assert all(f"KVM {name}" in checks for name in capabilities)


def test_missing_kvm_is_said_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> dict[str, object]:
        raise KvmUnavailableError(13, "Permission denied", at="/dev/kvm", hint="type: sudo usermod")

    monkeypatch.setattr(doctor, "kvm_info", refuse)
    checks = doctor.examine()
    assert checks[-1].status == "missing"
    assert checks[-1].fix == "type: sudo usermod"
    assert not doctor.is_healthy(checks)


def test_missing_capability_is_said_with_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {
        "api_version": 12, "max_vcpus": 1, "software_kvm": False, "hidden_features": [],
        "capabilities": {"irqfd": False, "immediate-exit": False},
    }  # fmt: skip
    monkeypatch.setattr(doctor, "kvm_info", lambda: info)
    by_name = {check.name: check for check in doctor.examine()}
    assert by_name["KVM irqfd"].status == "warning"
    assert by_name["KVM irqfd"].detail == "no interrupts from event sources"
    assert by_name["KVM immediate-exit"].status == "missing"


@pytest.mark.kvm
def test_every_cpu_template_is_tried_and_the_default_one_works() -> None:
    by_name = {check.name: check for check in doctor.examine()}
    assert {f"CPU template {template}" for template in TEMPLATES} <= set(by_name)
    assert by_name["CPU template auto"].status == "ok", by_name["CPU template auto"].detail


@pytest.mark.kvm
def test_template_that_kvm_refuses_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: VmmConfig) -> Vmm:
        if config.cpu.template != "host":
            raise KvmError(22, "Invalid argument", at="KVM_SET_CPUID2")
        return Vmm(config)

    monkeypatch.setattr(doctor, "Vmm", refuse)
    by_name = {check.name: check for check in doctor.examine()}
    auto, software = by_name["CPU template auto"], by_name["CPU template software-kvm"]
    assert (auto.status, software.status) == ("missing", "warning")
    assert "real16: " in auto.detail
    assert "Invalid argument" in auto.detail
    assert auto.fix is not None
    assert 'CpuConfig(template="host")' in auto.fix
    assert software.fix is not None
    assert "auto" in software.fix


@pytest.mark.kvm
def test_guest_that_ends_otherwise_under_a_template_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TRIAL_CODE", b"\xf4\x01")  # hlt, which ends no machine with interrupts
    monkeypatch.setattr(doctor, "TRIAL_S", 0.1)
    by_name = {check.name: check for check in doctor.examine()}
    assert "long64: the guest ended with halt" in by_name["CPU template host"].detail


@pytest.mark.kvm
def test_features_hidden_by_default_have_names_that_a_configuration_knows() -> None:
    hidden = pyvmm.kvm_info()["hidden_features"]
    assert isinstance(hidden, list)
    assert set(hidden) <= set(pyvmm.cpu_features())


@pytest.mark.kvm
def test_cpuid_is_a_table_with_names_also_as_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pyvmm", "doctor", "--cpuid"]

    def said(*options: str) -> str:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    supported = pyvmm.cpuid_table()
    rows = json.loads(said("--json"))
    assert [(row["leaf"], row["subleaf"]) for row in rows] == [(leaf.function, leaf.index) for leaf in supported]
    (first,) = (row for row in rows if row["leaf"] == 1)
    assert "sse2" in first["features"]["edx"]
    assert (first["edx"] >> 26) & 1
    assert all(f"{row['leaf']:08x}" in said() for row in rows if any(row[name] for name in ("eax", "ebx")))
    path = tmp_path / "mine.toml"
    path.write_text('base = "host"\nhide = ["sse2"]\n')
    for template, has in [("host", True), (str(path), False)]:
        rows = json.loads(said("--cpu", template, "--json"))
        (first,) = (row for row in rows if row["leaf"] == 1)
        assert ("sse2" in first["features"]["edx"], "hypervisor" in first["features"]["ecx"]) == (has, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cpu", "host"], "--cpu needs --cpuid"),
        (["--cpuid", "--machine"], "--cpuid and --machine are different reports"),
        (["--cpuid", "--cpu", "intel"], "cpu.template: 'intel' is not one of auto"),
    ],
)
def test_report_that_cannot_be_is_refused(options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "pyvmm", "doctor", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 125
    assert message in done.stderr


@pytest.mark.kvm
def test_level_that_the_host_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cpu: CpuConfig) -> None:
        raise ConfigError(f"cpu.template: this host does not offer {cpu.template}: avx512f", at="cpu.template")

    monkeypatch.setattr(doctor, "cpuid_table", refuse)
    (check,) = (check for check in doctor.examine() if check.name == "CPU template v4")
    assert (check.status, check.detail) == ("warning", "this host does not offer v4: avx512f")

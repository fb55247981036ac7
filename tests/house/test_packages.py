"""What is published: the name, the description, the contents of packages, the steps of a release.

Covers scripts/packages.py, scripts/audit.sh, scripts/try_wheels.sh and .ci/release. `make wheels`
builds and installs the packages themselves.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from typing import TYPE_CHECKING

import pytest
import pyvmm
from conftest import ROOT, script

if TYPE_CHECKING:
    from pathlib import Path

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
packages = script(ROOT / "scripts" / "packages.py", "packages")


def test_the_distribution_has_a_name_of_its_own_and_the_crates_version() -> None:
    assert PROJECT["name"] == "pyvmm-kvm"
    assert pyvmm.__version__ == importlib.metadata.version("pyvmm-kvm") == VERSION
    assert "version" in PROJECT["dynamic"]
    plugins = importlib.metadata.distribution("pyvmm-kvm").entry_points.select(group="pytest11")
    assert [plugin.value for plugin in plugins] == ["pytest_pyvmm"]


def test_the_description_for_pypi_has_no_links_into_the_tree() -> None:
    text = (ROOT / PROJECT["readme"]).read_text()
    assert packages.metadata_faults(f"Name: pyvmm-kvm\nVersion: {VERSION}\n\n{text}") == []
    program = (ROOT / "examples" / "first_program.py").read_text().split('"""\n\n', 1)[1]
    assert f"```python\n{program}```" in text
    # It is README's own text, as far as both say the same.
    readme = (ROOT / "README.md").read_text()
    assert text.split("\n\n")[1] in readme


METADATA = f"Metadata-Version: 2.4\nName: pyvmm-kvm\nVersion: {VERSION}\n\n# pyvmm\n"
INFO = f"pyvmm_kvm-{VERSION}.dist-info"
WHEEL = {
    f"{INFO}/METADATA": METADATA,
    f"{INFO}/licenses/LICENSE-APACHE": "",
    f"{INFO}/licenses/LICENSE-BSD-3-CLAUSE": "",
    f"{INFO}/sboms/pyvmm.cyclonedx.json": json.dumps(
        {"bom-ref": f"path+file://{ROOT}#pyvmm", "components": [{"name": "pyo3"}, {"name": "kvm-ioctls"}]}
    ),
    "pyvmm/py.typed": "",
    "pyvmm/_pyvmm.pyi": "",
    "pyvmm/linux/build.sh": "",
    "pytest_pyvmm/__init__.py": "",
}


def wheel(folder: Path, contents: dict[str, str]) -> Path:
    path = folder / f"pyvmm_kvm-{VERSION}-cp311-abi3-musllinux_1_2_x86_64.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name, text in contents.items():
            file.writestr(name, text)
    return path


def test_checked_packages_get_their_sums_and_the_list_of_their_crates(tmp_path: Path) -> None:
    path = wheel(tmp_path, WHEEL)
    assert packages.main(tmp_path) == 0
    sbom = tmp_path / f"pyvmm-kvm-{VERSION}.cdx.json"
    assert str(ROOT) not in sbom.read_text()
    assert [crate["name"] for crate in json.loads(sbom.read_text())["components"]] == ["pyo3", "kvm-ioctls"]
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in (path, sbom)]
    assert (tmp_path / "SHA256SUMS").read_text().splitlines() == sums


@pytest.mark.parametrize("missing", [name for name in WHEEL if "METADATA" not in name])
def test_a_wheel_without_one_of_its_parts_is_refused(missing: str, tmp_path: Path) -> None:
    wheel(tmp_path, {name: text for name, text in WHEEL.items() if name != missing})
    assert packages.main(tmp_path) == 1
    assert not (tmp_path / "SHA256SUMS").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (METADATA.replace("pyvmm-kvm", "pyvmm"), "the Name is pyvmm"),
        (METADATA.replace(VERSION, "9.9.9"), "the Version is 9.9.9"),
        (METADATA + "[a page](docs/faq.md)", "cannot follow: docs/faq.md"),
        (METADATA + "[a heading](#limits)", "cannot follow: #limits"),
    ],
)
def test_metadata_that_pypi_would_show_wrongly_is_refused(
    wrong: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel(tmp_path, {**WHEEL, f"{INFO}/METADATA": wrong})
    assert packages.main(tmp_path) == 1
    assert said in capsys.readouterr().err


def test_a_source_distribution_without_a_lock_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = f"pyvmm_kvm-{VERSION}"
    with tarfile.open(tmp_path / f"{top}.tar.gz", "w:gz") as source:
        for name in ["PKG-INFO", *packages.IN_SOURCE, *packages.LICENCES]:
            if name != "Cargo.lock":
                entry = tarfile.TarInfo(f"{top}/{name}")
                entry.size = len(METADATA)
                source.addfile(entry, io.BytesIO(METADATA.encode()))
    assert packages.main(tmp_path) == 1
    assert capsys.readouterr().err.strip() == f"{top}.tar.gz: it does not have Cargo.lock"


@pytest.mark.parametrize(
    ("abi", "libc", "fitting"),
    [
        ("cp311", "gnu", ["cp311-abi3-manylinux"]),
        ("cp314", "gnu", ["cp311-abi3-manylinux", "cp314-cp314-manylinux"]),
        ("cp314t", "gnu", ["cp314-cp314t-manylinux"]),
        ("cp313", "musl", ["cp311-abi3-musllinux"]),
        ("cp314t", "musl", []),
    ],
)
def test_wheels_are_tried_under_the_interpreters_that_they_fit(abi: str, libc: str, fitting: list[str]) -> None:
    tags = ["cp311-abi3-manylinux", "cp311-abi3-musllinux", "cp314-cp314-manylinux", "cp314-cp314t-manylinux"]
    text = (ROOT / "scripts" / "try_wheels.sh").read_text()
    function = re.search(r"^fits\(\) \{\n.*?^\}\n", text, re.MULTILINE | re.DOTALL)
    assert function is not None
    for tag in tags:
        command = f"{function[0]}\nfits {abi} {libc} pyvmm_kvm-1.0-{tag}_x86_64.whl"
        done = subprocess.run(["bash", "-c", command], check=False, timeout=60)
        assert (done.returncode == 0) == (tag in fitting), tag


CHANGES = "# Changelog\n\n## Unreleased\n\n## 1.2.3 - 2026-01-31\n\n### Added\n\n- A thing.\n"


class Release:
    """A checkout with a commit that is tagged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".ci").mkdir()
        shutil.copy(ROOT / ".ci" / "release", folder / ".ci" / "release")
        (folder / "Cargo.toml").write_text('[package]\nname = "pyvmm"\nversion = "1.2.3"\n')
        self.git("init", "--quiet")

    def git(self, *arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=self.folder, check=True, timeout=60)

    def tagged(self, tag: str, changes: str = CHANGES) -> Release:
        (self.folder / "CHANGELOG.md").write_text(changes)
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", "release")
        self.git("tag", tag)
        return self

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [".ci/release", "--dry-run", *arguments]
        return subprocess.run(command, cwd=self.folder, check=False, capture_output=True, text=True, timeout=60)


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path)


def test_a_release_tests_builds_and_publishes_only_if_asked(release: Release) -> None:
    release.tagged("v1.2.3")
    steps = release.run().stdout.splitlines()
    assert steps[:2] == ["release: make all", "release: make wheels"]
    assert "upload" not in "".join(steps)
    published = release.run("--publish").stdout.splitlines()
    assert published[: len(steps)] == steps
    assert [words.split()[1].rpartition("/")[2] for words in published[len(steps) :]] == [
        "pip",
        "pypi-attestations",
        "twine",
    ]


@pytest.mark.parametrize(
    ("tag", "changes", "said"),
    [
        ("v1.2.4", CHANGES, "Cargo.toml has version 1.2.3"),
        ("1.2.3", CHANGES, "the tag must be v1.2.3"),
        ("v1.2.3", CHANGES.replace("1.2.3 -", "1.2.2 -"), "does not have the heading '## 1.2.3"),
        ("v1.2.3", CHANGES.replace("Unreleased\n", "Unreleased\n\n- Another.\n"), "still has changes"),
    ],
)
def test_a_release_whose_tag_version_and_changes_differ_is_refused(
    release: Release, tag: str, changes: str, said: str
) -> None:
    done = release.tagged(tag, changes).run()
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr


def test_a_release_of_a_changed_or_untagged_checkout_is_refused(release: Release) -> None:
    release.tagged("v1.2.3")
    (release.folder / "new").write_text("")
    assert "not committed" in release.run().stderr
    release.git("tag", "--delete", "v1.2.3")
    assert "no tag" in release.run().stderr
    assert release.run("--wrong").returncode == 2


def audit(folder: Path, **commands: str) -> subprocess.CompletedProcess[str]:
    """Run the audit where only these commands exist."""
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "audit.sh", folder / "scripts" / "audit.sh")
    tools = folder / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "grep", "tail", "timeout"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    for name, text in commands.items():
        path = tools / name.replace("_", "-")
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    return subprocess.run(
        ["bash", "scripts/audit.sh"],
        cwd=folder,
        env={"PATH": str(tools)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_audit_says_what_it_could_not_check_and_passes(tmp_path: Path) -> None:
    done = audit(tmp_path, pip_audit="echo connection refused; exit 1")
    assert (done.returncode, done.stdout) == (0, "")
    said = done.stderr.splitlines()
    assert said[0] == "audit: not checked: the crates: type: cargo install --locked cargo-deny"
    assert said[1] == "audit: not checked: known vulnerabilities of the Python packages: connection refused"


def test_audit_checks_licences_without_the_database(tmp_path: Path) -> None:
    cargo = 'case "$*" in *fetch*) exit 1 ;; *check*) echo "$*"; exit 4 ;; esac'
    done = audit(tmp_path, cargo=cargo, cargo_deny="exit 0", pip_audit="exit 0")
    assert done.returncode == 1
    assert done.stdout.strip().endswith("check bans licenses sources")
    assert "RustSec's database cannot be fetched" in done.stderr


def test_audit_fails_on_a_vulnerability(tmp_path: Path) -> None:
    cargo = 'case "$*" in *check*) echo "$*" ;; esac'
    found = 'echo "Found 1 known vulnerability in 1 package"; exit 1'
    done = audit(tmp_path, cargo=cargo, cargo_deny="exit 0", pip_audit=found)
    assert done.returncode == 1
    assert "check advisories bans licenses sources" in done.stdout
    assert "Found 1 known vulnerability" in done.stdout

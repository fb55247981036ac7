"""The pytest plugin of pyvmm: machines as fixtures, and what they said in the report of a failure.

pytest loads this module in every session, so it imports pyvmm only when a test uses it.
docs/testing.md describes it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyvmm import Snapshot, Vmm, VmmConfig

KVM = "/dev/kvm"
READY = "pyvmm> "
BOOT_S = 300.0
MAX_CONSOLE = 4000
_MACHINES = pytest.StashKey[list["Vmm"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and the keys of the configuration file."""
    group = parser.getgroup("pyvmm")
    group.addoption(
        "--pyvmm-trace", metavar="DIR", default=None, help="Write a trace of each machine of a fixture, for Perfetto."
    )
    parser.addini("pyvmm_linux", "The configuration file of the machine that pyvmm_linux boots.", default="")
    parser.addini("pyvmm_linux_ready", "The text on its console that ends the boot.", default=READY)
    parser.addini("pyvmm_linux_timeout", "The time limit of the boot, in seconds.", default=str(BOOT_S))


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "needs_kvm: skip the test if this user cannot use /dev/kvm")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs KVM where there is none."""
    if item.get_closest_marker("needs_kvm") is not None:
        _require_kvm()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Add the machines of a failed test to its report."""
    report = yield
    if report.failed:
        machines = item.stash.get(_MACHINES, [])
        for number, vmm in enumerate(machines):
            report.sections.append((f"pyvmm machine {number}", _describe(vmm)))
    return report


@pytest.fixture
def pyvmm_vmm(request: pytest.FixtureRequest) -> Iterator[Callable[..., Vmm]]:
    """Make machines from configurations or snapshots; all are closed after the test.

    `pyvmm_vmm(config)` is like `Vmm(config)`, and `pyvmm_vmm(snapshot, **options)` like
    `snapshot.fork(**options)`.
    """
    _require_kvm()
    import pyvmm

    machines = request.node.stash.setdefault(_MACHINES, [])
    opened = contextlib.ExitStack()

    def make(origin: VmmConfig | Snapshot | None = None, /, **options: Any) -> Vmm:
        vmm = origin.fork(**options) if isinstance(origin, pyvmm.Snapshot) else pyvmm.Vmm(origin, **options)
        opened.callback(vmm.close)
        if (folder := request.config.getoption("--pyvmm-trace")) is not None:
            opened.enter_context(vmm.trace(_trace_file(Path(folder), request.node.nodeid, len(machines))))
        machines.append(vmm)
        return vmm

    with opened:
        yield make


@pytest.fixture(scope="session")
def pyvmm_linux_snapshot(request: pytest.FixtureRequest) -> Snapshot:
    """A Linux at the prompt of its shell, booted once a session.

    It is the one that `pyvmm kernel` has built, or that of the configuration file in the key
    `pyvmm_linux`.
    """
    _require_kvm()
    return _boot(request.config)


@pytest.fixture
def pyvmm_linux(pyvmm_vmm: Callable[..., Vmm], pyvmm_linux_snapshot: Snapshot) -> Vmm:
    """A Linux at the prompt of its shell: a fork of its own for each test."""
    return pyvmm_vmm(pyvmm_linux_snapshot)


def _trace_file(folder: Path, test: str, number: int) -> Path:
    """The file of a machine's trace, named after the test."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(char if char.isalnum() or char in "-_.[]" else "_" for char in test)
    return folder / f"{name}-{number}.json"


def _boot(config: pytest.Config) -> Snapshot:
    import pyvmm
    import pyvmm.linux

    named = config.getini("pyvmm_linux")
    path = config.rootpath / named if named else pyvmm.linux.folder() / "machine.toml"
    if not named and not path.exists():
        pytest.skip("the small Linux has not been built: type: pyvmm kernel")
    ready = config.getini("pyvmm_linux_ready")
    with pyvmm.Vmm(pyvmm.VmmConfig.from_file(path)) as vmm:
        vmm.run_until(ready, timeout=float(config.getini("pyvmm_linux_timeout")))
        return vmm.snapshot()


@functools.cache
def _missing_kvm() -> str | None:
    """Why there is no KVM here, or None."""
    if os.access(KVM, os.R_OK | os.W_OK):
        return None
    return f"there is no {KVM}" if not os.path.exists(KVM) else f"this user has no permission on {KVM}"


def _require_kvm() -> None:
    """Skip the test where there is no KVM."""
    if (reason := _missing_kvm()) is not None:
        pytest.skip(reason)


def _describe(vmm: Vmm) -> str:
    """What a machine shows in the report: its state, how it ended, and its console."""
    from pyvmm import VmmError

    lines = []
    for name, read in (("state", lambda: vmm.state), ("exit", lambda: vmm.exit), ("console", lambda: _console(vmm))):
        try:
            lines.append(f"{name}: {read()}")
        except VmmError as error:
            lines.append(f"{name}: {error}")
    return "\n".join(lines)


def _console(vmm: Vmm) -> str:
    text = vmm.console.text
    return "\n" + (text if len(text) <= MAX_CONSOLE else f"...{text[-MAX_CONSOLE:]}")

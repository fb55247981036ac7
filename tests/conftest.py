"""Which tests can run here, and what they share."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import pyvmm
import pyvmm.linux
from hypothesis import HealthCheck, settings
from loops import LOOPS, run_in
from oracle import NONCE, oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from types import ModuleType

    from pyvmm import Snapshot, Vmm, VmmConfig
    from virtio_linux import Ready

TESTS = Path(__file__).parent
ROOT = TESTS.parent
LINUX_DEADLINE_S = 200
REQUIRED = bool(os.environ.get("PYVMM_REQUIRE_KVM"))

# Background jobs have SIGINT ignored, and those of nohup SIGHUP: programs of the tests would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

EXAMPLES = 1000 if "PYVMM_STRESS_S" in os.environ else 50
settings.register_profile(
    "pyvmm", deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("pyvmm")


# How soon the alarm of a test's time limit comes again.
ALARM_AGAIN_S = 30.0


class TimeLimitPassed(BaseException):
    """What the alarm raises."""


@pytest.hookimpl(hookwrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Iterator[None]:
    """Have the alarm of a test's time limit end the test, whatever the test does with it.

    It comes again: what it raises may lead into a clean-up that hangs as well. It raises no failure
    of pytest's, which Hypothesis takes as the failure of an example, and tries that again.
    """
    yield
    if settings.method != "signal":
        return
    show_threads: Any = signal.getsignal(signal.SIGALRM)

    def end(number: int, frame: object) -> None:
        try:
            show_threads(number, frame)
        except pytest.fail.Exception as failure:
            raise TimeLimitPassed(str(failure)) from None

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout, min(settings.timeout, ALARM_AGAIN_S))


def missing_kvm() -> str | None:
    """Why the tests of KVM cannot run."""
    try:
        pyvmm.kvm_info()
    except pyvmm.KvmUnavailableError as error:
        return str(error)
    return None


def script(path: Path, name: str) -> ModuleType:
    """A program of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Linux(NamedTuple):
    """The kernels that `make linux` builds, and what they are started with."""

    vmlinux: Path
    vmlinux_stock: Path
    vmlinux_smp: Path
    bzimage: Path
    initramfs: Path
    cmdline: str = (ROOT / "python" / "pyvmm" / "linux" / "cmdline").read_text().strip()


@functools.cache
def linux_directory() -> Path:
    """Where the build puts them."""
    return pyvmm.linux.folder()


class LeftOut(NamedTuple):
    """Tests that `make hardware` does not run, and why."""

    tests: list[str]
    reason: str


def left_out() -> list[LeftOut]:
    """The entries of tests/hardware.toml."""
    entries = tomllib.loads((ROOT / "tests" / "hardware.toml").read_text())["left_out"]
    return [LeftOut(**entry) for entry in entries]


def is_named(name: str, test: str) -> bool:
    """Whether an entry's name is that of the test, of its function, of its file or of a folder above."""
    return test == name or (test.startswith(name) and test[len(name)] in "[:/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On the emulated processor of `make hardware`, skip what tests/hardware.toml names."""
    if not os.environ.get("PYVMM_HARDWARE"):
        return
    for entry in left_out():
        mark = pytest.mark.skip(reason=f"left out by tests/hardware.toml: {entry.reason}")
        for item in items:
            if any(is_named(name, item.nodeid) for name in entry.tests):
                item.add_marker(mark)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """On that processor, say at once what failed: a run that takes an hour may not come to its end."""
    if report.failed and os.environ.get("PYVMM_HARDWARE"):
        print(f"\n{report.nodeid} ({report.when}) failed:\n{report.longreprtext}", file=sys.stderr)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here; fail it where it must."""
    needs_linux = item.get_closest_marker("linux") is not None
    reason = None
    if needs_linux or item.get_closest_marker("kvm") is not None:
        reason = missing_kvm()
    if reason is None and needs_linux and not (linux_directory() / "vmlinux-smp").exists():
        reason = "the Linux of the tests is not built: make linux"
    if reason is not None:
        if REQUIRED:
            pytest.fail(f"PYVMM_REQUIRE_KVM is set, but {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def oracle_snapshot() -> Iterator[Snapshot]:
    """An oracle in the middle of its count."""
    with oracle(NONCE) as vmm:
        vmm.run(0.01)
        yield vmm.snapshot()


@pytest.fixture(scope="module")
def oracle_file(oracle_snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in a file."""
    path = tmp_path_factory.mktemp("snapshot") / "oracle.snapshot"
    oracle_snapshot.save(path)
    return path


@pytest.fixture
def linux(linux_once: Linux) -> Linux:
    """The Linux of the tests."""
    return linux_once


@pytest.fixture(scope="session")
def linux_once() -> Linux:
    """The same, for what is made of it once."""
    directory = linux_directory()
    names = ("vmlinux", "vmlinux-stock", "vmlinux-smp", "bzImage")
    vmlinux, stock, smp, bzimage = (directory / name for name in names)
    return Linux(vmlinux, stock, smp, bzimage, directory / "initramfs.cpio")


class BootedLinux(NamedTuple):
    """A Linux that has booted, and waits in its userspace for a line to be typed."""

    snapshot: Snapshot
    console: str


@pytest.fixture(scope="session")
def booted_linux(linux_once: Linux) -> BootedLinux:
    """One boot for all tests that need a running Linux: they fork it."""
    seen = bytearray()

    def look(piece: bytes) -> None:
        seen.extend(piece)
        if b"type a line" in seen:
            vmm.stop()

    boot = pyvmm.LinuxBoot(linux_once.vmlinux, initrd=linux_once.initramfs, cmdline=f"{linux_once.cmdline} pyvmm.echo")
    with pyvmm.Vmm(pyvmm.VmmConfig(boot=boot, serial=pyvmm.SerialConfig(output=look))) as vmm:
        exit = vmm.run(LINUX_DEADLINE_S)
        assert exit.reason is pyvmm.ExitReason.STOPPED, (exit, bytes(seen)[-2000:])
        return BootedLinux(vmm.snapshot(), seen.decode())


@pytest.fixture(scope="session")
def linux_ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ready]:
    """One boot of a Linux with virtio devices for all tests, which fork it."""
    # It imports this file.
    import virtio_linux

    with virtio_linux.ready(tmp_path_factory.mktemp("linux")) as made:
        yield made


@pytest.fixture
def make() -> Iterator[Callable[[VmmConfig], Vmm]]:
    """A factory of machines, all closed at the end."""
    made: list[Vmm] = []

    def factory(config: VmmConfig) -> Vmm:
        made.append(pyvmm.Vmm(config))
        return made[-1]

    yield factory
    for vmm in made:
        vmm.close()


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run a coroutine in a fresh loop, with a deadline."""
    return partial(run_in, request.param)

"""The fork server: its protocol word by word, and AFL++ itself where it is installed."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT
from fuzz_targets import snapshot_of
from programs import DEADLINE_S
from pyvmm.afl import serve
from pyvmm.fuzz import Target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kvm
ENABLED, SHARED_TEST_CASE, MAP_SIZE = 0x80000001, 0x01000000, 0x40000000
SERVER = """
import sys
from pyvmm import Snapshot
from pyvmm.afl import serve
from pyvmm.fuzz import Target
serve(Target(Snapshot.load(sys.argv[1]), timeout=float(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guest")
    snapshot_of(folder, flags=("-fsanitize-coverage=trace-pc", "-DPYVMM_FUZZ_MAP_SIZE=4096")).save(folder / "snapshot")
    return folder / "snapshot"


class SharedMemory:
    """A segment of System V's shared memory."""

    def __init__(self, size: int) -> None:
        libc = ctypes.CDLL(None)
        libc.shmat.restype = ctypes.c_void_p
        self.id = libc.shmget(0, ctypes.c_size_t(size), 0o1600)
        assert self.id >= 0
        self.bytes = (ctypes.c_ubyte * size).from_address(libc.shmat(self.id, None, 0))
        libc.shmctl(self.id, 0, None)  # it goes with the last process that has it


class Fuzzer:
    """AFL++'s end of the protocol."""

    def __init__(self, snapshot: Path, timeout: float = DEADLINE_S) -> None:
        self.counters, self.test_case = SharedMemory(1 << 16), SharedMemory(4 + (1 << 20))
        control, self.control = os.pipe()
        self.status, status = os.pipe()
        variables = {"__AFL_SHM_ID": str(self.counters.id), "__AFL_SHM_FUZZ_ID": str(self.test_case.id)}
        # exec gives the descriptors their numbers, as afl-fuzz does.
        shell = f'exec 198<&{control} 199>&{status}; exec "$0" "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, sys.executable, "-c", SERVER, str(snapshot), str(timeout)],
            pass_fds=(control, status),
            env={**os.environ, **variables},
        )
        os.close(control)
        os.close(status)
        (self.options,) = struct.unpack("=I", os.read(self.status, 4))
        os.write(self.control, struct.pack("=I", ENABLED | SHARED_TEST_CASE))

    def start(self, data: bytes) -> int:
        """Send a test case; return the process that would be killed."""
        ctypes.memmove(self.test_case.bytes, struct.pack("=I", len(data)) + data, 4 + len(data))
        ctypes.memset(self.counters.bytes, 0, 1 << 16)
        os.write(self.control, struct.pack("=I", 0))
        (victim,) = struct.unpack("=I", os.read(self.status, 4))
        return int(victim)

    def end(self) -> int:
        (status,) = struct.unpack("=I", os.read(self.status, 4))
        return int(status)

    def run(self, data: bytes) -> int:
        assert self.start(data) > 0
        return self.end()

    def close(self) -> None:
        os.close(self.control)
        os.close(self.status)
        try:
            assert self.process.wait(DEADLINE_S) == 0
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def fuzzer(snapshot: Path) -> Iterator[Fuzzer]:
    fuzzer = Fuzzer(snapshot)
    yield fuzzer
    fuzzer.close()


def test_server_says_what_it_can_do(fuzzer: Fuzzer) -> None:
    assert fuzzer.options == ENABLED | SHARED_TEST_CASE | MAP_SIZE | (4096 - 1) << 1


def test_input_has_its_status_and_its_coverage(fuzzer: Fuzzer) -> None:
    seen: dict[bytes, bytes] = {}
    for data, status in [(b"a", 0), (b"n", signal.SIGSEGV), (b"d", signal.SIGFPE), (b"", 0), (b"abc", 0), (b"a", 0)]:
        assert fuzzer.run(data) == status, data
        seen.setdefault(data, bytes(fuzzer.counters.bytes))
        assert bytes(fuzzer.counters.bytes) == seen[data]
    assert len({*seen.values()}) >= 4
    assert all(any(counters) for counters in seen.values())


def test_input_longer_than_the_guests_buffer_is_cut(fuzzer: Fuzzer) -> None:
    assert fuzzer.run(b"\0" * (1 << 20)) == 0
    ctypes.memmove(fuzzer.test_case.bytes, b"\xff" * 4, 4)
    os.write(fuzzer.control, struct.pack("=I", 0))
    os.read(fuzzer.status, 4)
    assert fuzzer.end() == 0


def test_hang_ends_whether_or_not_its_process_is_killed(snapshot: Path) -> None:
    fuzzer = Fuzzer(snapshot, timeout=0.3)
    assert fuzzer.run(b"h") == signal.SIGKILL
    victim = fuzzer.start(b"h")
    os.kill(victim, signal.SIGKILL)
    assert fuzzer.end() == signal.SIGKILL
    # Perhaps only the next hang finds the process gone.
    fuzzer.run(b"h")
    assert fuzzer.start(b"h") != victim
    assert fuzzer.end() == signal.SIGKILL
    fuzzer.close()


def test_process_that_afl_has_not_started_is_refused(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyvmm import Snapshot

    monkeypatch.delenv("__AFL_SHM_ID", raising=False)
    with Target(Snapshot.load(snapshot)) as target, pytest.raises(RuntimeError, match="let afl-fuzz start"):
        serve(target)


@pytest.mark.timeout(600)
def test_afl_finds_the_crash_of_the_example(tmp_path: Path) -> None:
    if shutil.which("afl-fuzz") is None:
        pytest.skip("there is no afl-fuzz: apt-get install afl++")
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "one").write_bytes(b"n\2abd\2ab")
    settings = ("SKIP_BIN_CHECK", "NO_UI", "SKIP_CPUFREQ", "I_DONT_CARE_ABOUT_MISSING_CRASHES", "NO_AFFINITY")
    variables = {f"AFL_{name}": "1" for name in (*settings, "BENCH_UNTIL_CRASH")}
    command = ["afl-fuzz", "-V", "300", "-t", "5000", "-i", "seeds", "-o", "found", "--"]
    done = subprocess.run(
        [*command, sys.executable, str(ROOT / "examples" / "fuzz" / "with_afl.py")],
        check=False,
        cwd=tmp_path,
        env={**os.environ, **variables, "AFL_FORKSRV_INIT_TMOUT": "100000"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    crashes = [path.read_bytes() for path in (tmp_path / "found" / "default" / "crashes").glob("id:*")]
    assert crashes, done.stdout + done.stderr
    assert all(b"d" in data or b"a\0" in data for data in crashes)

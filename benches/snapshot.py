"""Snapshots, forks, resets and files, each beside its physical limit and a peer."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pyvmm import ElfBoot, Exit, FlatBoot, MemoryConfig, Snapshot, Vmm, VmmConfig, kvm_info

from benches import bare
from benches.linux import SOFTWARE_CPU
from benches.measure import Result, UnmeasurableError, compare

MIB = 1 << 20
RUNS = 11
EXIT = b"\xb0\x00\xe6\xf4"  # mov al, 0; out 0xf4, al
EXITS = EXIT * 4
FORKS_AT_ONCE = 1000
RESETS = 100
LIMIT_BYTES = 100 << 10


def machine(size_mib: int, code: bytes = EXITS) -> Vmm:
    """The machine that the bare loop makes."""
    return Vmm(VmmConfig(boot=FlatBoot(code), memory=MemoryConfig(size_mib=size_mib)))


def to_exit(snapshot: Snapshot, run: Callable[[Vmm], Exit] = Vmm.run) -> float:
    """Seconds of a fork to its first exit."""
    start = time.perf_counter()
    fork = snapshot.fork()
    run(fork)
    seconds = time.perf_counter() - start
    fork.close()
    return seconds


def snapshots(runs: int = RUNS) -> Iterator[Result]:
    """snapshot() of a stopped machine."""

    def ours(size_mib: int, touched_mib: int) -> float:
        with machine(size_mib) as vmm:
            vmm.snapshot().fork().close()  # what is learnt once a process
            vmm.vcpus  # noqa: B018
        with machine(size_mib) as vmm:
            vmm.memory.fill(0x2000, touched_mib * MIB - 0x2000, 1)
            vmm.vcpus  # noqa: B018
            start = time.perf_counter()
            snapshot = vmm.snapshot()
            seconds = time.perf_counter() - start
            del snapshot
        return seconds * 1e3

    def limit() -> float:
        return bare.time_snapshot(EXITS, 128 * MIB, 128 * MIB) * 1e3

    name = "snapshot, 128 MiB touched"
    yield compare(name, "ms", lambda: ours(128, 128), limit, "bare GETs and remapping", 1 / 1.2, runs)
    yield compare(
        name, "ms", lambda: ours(128, 128), lambda: bare.time_copy(128 * MIB) * 1e3, "memcpy to new memory", 8, runs
    )
    small = "64 MiB, all touched"
    yield compare(
        "snapshot, 64 MiB of 4 GiB touched", "ms", lambda: ours(4096, 64), lambda: ours(64, 64), small, 1 / 1.2, runs
    )


def forks(runs: int = RUNS) -> Iterator[Result]:
    """A fork and its run to the first exit."""
    taken: dict[int, Snapshot] = {}
    for size in (64, 4096):
        with machine(size) as vmm:
            vmm.run()
            taken[size] = vmm.snapshot()

    def ours(size_mib: int, run: Callable[[Vmm], Exit] = Vmm.run) -> float:
        return statistics.median(to_exit(taken[size_mib], run) for _ in range(20)) * 1e3

    def limit(size_mib: int, threads: bool = False) -> float:
        return bare.time_forks(EXITS, size_mib * MIB, 20, threads) * 1e3

    for size in (64, 4096):
        name = f"fork to the first exit, {size} MiB"
        loop, with_thread = partial(limit, size), partial(limit, size, True)
        yield compare(f"{name}, run_here", "ms", partial(ours, size, Vmm.run_here), loop, "bare loop", 0.95, runs)
        yield compare(name, "ms", partial(ours, size), loop, "bare loop", 0.9, runs)
        # What a thread for the vCPU costs the bare loop: the limit of any machine that has one.
        yield compare(name, "ms", partial(ours, size), with_thread, "bare loop with a thread", 0.9, runs)
    flat = "64 MiB"
    yield compare("fork to the first exit, 4 GiB", "ms", lambda: ours(4096), lambda: ours(64), flat, 1 / 1.2, runs)
    with Qemu() as qemu:
        yield compare(
            "fork to the first exit",
            "ms",
            lambda: ours(64),
            qemu.restore,
            "QEMU from a migration file",
            10,
            min(runs, 5),
        )


def footprints(count: int = FORKS_AT_ONCE) -> Iterator[Result]:
    """Resident memory of forks that are alive at once and have run to an exit."""
    with machine(64) as vmm:
        vmm.run()
        snapshot = vmm.snapshot()
    for _ in range(10):
        with snapshot.fork() as fork:
            fork.run()
    gc.collect()
    before = resident()
    alive = []
    for _ in range(count):
        fork = snapshot.fork()
        fork.run()
        alive.append(fork)
    each = (resident() - before) / count
    for fork in alive:
        fork.close()
    limit = LIMIT_BYTES
    name = f"resident memory of {count:,} forks alive"
    yield Result(name, each / 1024, "KiB each", limit / 1024, "the limit set for it", limit / each, 1.0, 1)


def resident() -> int:
    """The proportional set size of this process in bytes: shared pages count by their share."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise UnmeasurableError("/proc/self/smaps_rollup has no Pss")


def dirtying(pages: int) -> bytes:
    """Write a word in each page of a range from 64 KiB, in real mode, and exit."""
    return (
        (
            b"\xb9" + struct.pack("<H", pages) + b"\xba\x00\x10"  # mov cx, pages; mov dx, 0x1000
            b"\x8e\xda\xff\x06\x00\x00"  # mov ds, dx; inc word [0]
            b"\x81\xc2\x00\x01\xe2\xf4"  # add dx, 0x100; loop back
        )
        + EXITS
    )


def program(pages: int) -> Vmm:
    """A program in ring 3 that writes a word in each page of its stack, and exits."""
    code = b"\xb9" + struct.pack("<I", pages)  # mov ecx, pages
    code += b"\x48\x8d\x84\x24" + struct.pack("<i", -pages * 4096)  # lea rax, [rsp - pages * 4096]
    code += b"\xff\x00\x48\x05\x00\x10\x00\x00\xe2\xf6" + EXITS  # inc dword [rax]; add rax, 4096; loop back
    at = 0x40_0000
    head = struct.pack("<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 2, 62, 1, at, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    head += struct.pack("<IIQQQQQQ", 1, 5, 120, at, at, len(code), len(code), 4096)
    with tempfile.NamedTemporaryFile() as file:
        file.write(head + code)
        file.flush()
        boot = ElfBoot(file.name, stack_kib=4 * pages + 4)
        return Vmm(VmmConfig(boot=boot, memory=MemoryConfig(size_mib=128)))


def cycles(vmm: Vmm, run: Callable[[Vmm], Exit]) -> tuple[float, float]:
    """The median microseconds of a reset after a run, and of both."""
    resets, both = [], []
    with vmm:
        snapshot = vmm.snapshot()
        for _ in range(RESETS):
            start = time.perf_counter()
            run(vmm)
            middle = time.perf_counter()
            vmm.reset(snapshot)
            end = time.perf_counter()
            resets.append(end - middle)
            both.append(end - start)
    return statistics.median(resets) * 1e6, statistics.median(both) * 1e6


def confined(runs: int = RUNS) -> Iterator[Result]:
    """A program in ring 3, after which a reset sets less. The bare loop's guest is in real mode."""
    code = dirtying(8)
    for name, state in (("as few ioctls as can be", bare.FEWEST), ("lean", bare.LEAN)):
        loop = partial(bare.time_loops, code, 128 * MIB, RESETS, 8, state=state)

        def ours(part: int) -> float:
            return cycles(program(8), Vmm.run_here)[part]

        def theirs(part: int, loop: Callable[[], tuple[float, float, float]] = loop) -> float:
            return loop()[2 * part] * 1e6

        for part, what in ((0, "reset"), (1, "run_here + reset")):
            goal = (0.9, 0.85)[part]
            yield compare(
                f"{what}, 8 pages of a program in ring 3",
                "us",
                partial(ours, part),
                partial(theirs, part),
                f"C loop, {name}",
                goal,
                runs,
            )


def resets(runs: int = RUNS) -> Iterator[Result]:
    """reset() after a run that has dirtied some pages; the run is not counted."""
    for pages in (8, 64, 512):
        per_run = min(pages, 200)  # real mode reaches this many; the host writes the rest
        code = dirtying(per_run)

        def ours(pages: int = pages, per_run: int = per_run, code: bytes = code) -> float:
            seconds = []
            with machine(128, code) as vmm:
                snapshot = vmm.snapshot()
                for _ in range(RESETS):
                    vmm.run()
                    for page in range(per_run, pages):
                        vmm.memory.write(0x200000 + page * 4096, b"dirty")
                    start = time.perf_counter()
                    reset = vmm.reset(snapshot)
                    seconds.append(time.perf_counter() - start)
                    assert reset >= pages
            return statistics.median(seconds) * 1e6

        def limit(pages: int = pages, code: bytes = code) -> float:
            return bare.time_resets(code, 128 * MIB, RESETS, pages) * 1e6

        def fewest(pages: int = pages, code: bytes = code) -> float:
            return bare.time_resets(code, 128 * MIB, RESETS, pages, state=bare.FEWEST) * 1e6

        name = f"reset, {pages} pages"
        yield compare(name, "us", ours, limit, "bare ioctls and memcpy", 1 / 1.3, runs)
        if pages == 8:
            yield compare(name, "us", ours, fewest, "as few ioctls as can be", 0.9, runs)


def loops(runs: int = RUNS) -> Iterator[Result]:
    """A run that dirties 8 pages, and the reset after it."""
    code = dirtying(8)

    def ours(run: str) -> float:
        seconds = []
        with machine(128, code) as vmm:
            snapshot = vmm.snapshot()
            execute = getattr(vmm, run)
            for _ in range(RESETS):
                start = time.perf_counter()
                execute()
                vmm.reset(snapshot)
                seconds.append(time.perf_counter() - start)
        return statistics.median(seconds) * 1e6

    def limit(state: int) -> float:
        return bare.time_loops(code, 128 * MIB, RESETS, 8, state=state)[2] * 1e6

    # The lean loop is enough for a guest that is known to change nothing but its memory and its
    # general and special registers: it shows what the rest costs.
    peers = [("every class set", bare.EACH), ("as few ioctls as can be", bare.FEWEST), ("lean", bare.LEAN)]
    for run in ("run_here", "run"):
        for name, state in peers:
            yield compare(
                f"{run} + reset, 8 pages",
                "us",
                partial(ours, run),
                partial(limit, state),
                f"C loop, {name}",
                0.85,
                runs,
            )


def files(runs: int = 5) -> Iterator[Result]:
    """Saving and loading a snapshot of 128 MiB that cannot be compressed."""
    with machine(128) as vmm:
        vmm.run()
        vmm.memory.write(0x2000, os.urandom(128 * MIB - 0x2000))
        snapshot = vmm.snapshot()
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-", dir=".") as directory:
        source, target = f"{directory}/source", f"{directory}/target"
        with open(source, "wb") as file:
            file.write(os.urandom(128 * MIB))

        def save() -> float:
            start = time.perf_counter()
            snapshot.save(f"{directory}/snapshot")
            return 128 / (time.perf_counter() - start)

        def dd() -> float:
            start = time.perf_counter()
            subprocess.run(
                ["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fsync"], check=True, stderr=subprocess.DEVNULL
            )
            return 128 / (time.perf_counter() - start)

        yield compare("save of 128 MiB", "MiB/s", save, dd, "dd with conv=fsync", 0.8, runs)

        def load() -> float:
            start = time.perf_counter()
            loaded = Snapshot.load(f"{directory}/snapshot")
            return (time.perf_counter() - start + to_exit(loaded)) * 1e3

        def fork() -> float:
            return to_exit(snapshot) * 1e3

        yield compare("load to the first exit", "ms", load, fork, "fork", 1 / 1.3, runs * 8)


class Qemu:
    """QEMU's microvm with a flat guest of 64 MiB, migrated to a file, and restored from it."""

    def __enter__(self) -> Qemu:
        if shutil.which("qemu-system-x86_64") is None:
            raise UnmeasurableError("QEMU is not installed: apt-get install qemu-system-x86")
        self.directory = Path(tempfile.mkdtemp(prefix="pyvmm-bench-"))
        # A BIOS image that prints ! on COM1 endlessly: the first one shows that a restore has run.
        image = bytearray(b"\xf4" * 65536)
        code = b"\xba\xf8\x03\xb0\x21\xee\xeb\xfd"  # mov dx, 0x3f8; mov al, '!'; out dx, al; jmp back
        image[: len(code)] = code
        image[0xFFF0:0xFFF5] = b"\xea\x00\x00\x00\xf0"  # jmp 0xf000:0
        self.bios = self.directory / "bios"
        self.bios.write_bytes(image)
        self.file = self.directory / "state"
        process, console = self.start([])
        console.recv(1)
        self.command(process, f'migrate "exec:cat > {self.file}"')
        deadline = time.monotonic() + 30
        while b"completed" not in self.command(process, "info migrate"):
            if time.monotonic() > deadline:
                raise UnmeasurableError("QEMU does not end its migration")
        process.kill()
        process.wait()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.directory)

    def start(self, more: list[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """QEMU, and the guest's console."""
        path = self.directory / "console"
        path.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.listen()
        server.settimeout(30)
        cpu = SOFTWARE_CPU if kvm_info()["software_kvm"] else "host"
        arguments = ["qemu-system-x86_64", "-M", "microvm,isa-serial=on,rtc=on,pit=on,pic=on", "-accel", "kvm"]
        arguments += ["-cpu", cpu, "-m", "64", "-bios", str(self.bios), "-display", "none", "-nodefaults"]
        arguments += ["-chardev", f"socket,id=console,path={path}", "-serial", "chardev:console"]
        arguments += ["-monitor", "stdio", *more]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet)
        try:
            console = server.accept()[0]
        except TimeoutError as error:
            process.kill()
            raise UnmeasurableError("QEMU does not come up") from error
        console.settimeout(30)
        return process, console

    @staticmethod
    def command(process: subprocess.Popen[bytes], line: str) -> bytes:
        """A line to the monitor; what it said up to its prompt."""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()
        said = b""
        while not said.endswith(b"(qemu) ") or line.encode()[-8:] not in said:
            piece = os.read(process.stdout.fileno(), 4096)
            if not piece:
                raise UnmeasurableError("QEMU has ended")
            said += piece
        return said

    def restore(self) -> float:
        """Milliseconds from the start of QEMU to the guest's first byte after the restore."""
        start = time.perf_counter()
        process, console = self.start(["-incoming", f"exec:cat {self.file}"])
        try:
            console.recv(1)
        except TimeoutError as error:
            raise UnmeasurableError("QEMU does not restore its guest") from error
        finally:
            seconds = time.perf_counter() - start
            process.kill()
            process.wait()
            console.close()
        return seconds * 1e3

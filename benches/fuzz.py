"""A fuzz target's inputs a second, beside the same by hand in C and beside unicorn."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pyvmm import ElfBoot, MemoryConfig, Snapshot, VmmConfig
from pyvmm.fuzz import _COUNT, _LENGTHS, _SINGLE, FLAGS, Target, ready

from benches.measure import Result, UnmeasurableError, compare, compiled, emulation

RUNS = 11
BATCHES = 100
SINGLE = 300
BATCH = 256
PARSER = Path(__file__).parent.parent / "examples" / "guest" / "parser.c"


@cache
def parser(coverage: bool) -> Snapshot:
    """The parser of the examples, ready for inputs."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        program = Path(folder) / "parser"
        flags = ["-fsanitize-coverage=trace-pc"] if coverage else []
        try:
            subprocess.run(["gcc", "-O1", *FLAGS, *flags, PARSER, "-o", program], check=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise UnmeasurableError(f"{PARSER.name} cannot be compiled: {error}") from error
        return ready(VmmConfig(boot=ElfBoot(program), memory=MemoryConfig(size_mib=8)))


def records(count: int, length: int) -> bytes:
    """An input that the parser accepts: this many records of this length."""
    return (b"n" + bytes([length]) + b"x" * length) * count


def batches(runs: int = RUNS, count: int = BATCHES) -> Iterator[Result]:
    """Fuzzing inputs of 200 bytes, 256 of them in each exit."""
    inputs = [records(1 + n % 8, 23) for n in range(BATCH)]
    with Target(parser(False)) as target:
        by_hand = in_c(target, inputs)
        assert by_hand(1)[1] == target.run_batch(inputs).values

        def ours() -> float:
            start = time.perf_counter()
            for _ in range(count):
                target.run_batch(inputs)
            return count * BATCH / (time.perf_counter() - start)

        def theirs() -> float:
            return count * BATCH / by_hand(count)[0]

        yield compare("fuzz: inputs, 256 an exit", "1/s", ours, theirs, "the same batch in C", 0.8, runs)


def in_c(target: Target, inputs: list[bytes]) -> Callable[[int], tuple[float, list[int]]]:
    """A call of bare_fuzz.c that runs `count` batches. Returns the seconds and the last results."""
    function = ctypes.CDLL(compiled(Path(__file__).with_name("bare_fuzz.c"))).time_batches
    function.restype = ctypes.c_double
    with target.snapshot.fork() as fork:
        memory = fork.memory.read(0, fork.memory.size)
        (vcpu,) = fork.vcpus
        registers = vcpu.regs._registers.read(), vcpu.sregs._registers.read()
        shared, buffer = fork.symbols["pyvmm_fuzz"], fork.symbols["pyvmm_fuzz_input"]
    lengths = array("I", map(len, inputs))
    addresses = ctypes.c_uint64(shared), ctypes.c_uint64(buffer)
    results = (ctypes.c_int32 * len(inputs))()

    def measure(count: int) -> tuple[float, list[int]]:
        batch = b"".join(inputs), lengths.tobytes(), len(inputs), target.most, count, results
        seconds = function(memory, ctypes.c_uint64(len(memory)), *registers, *addresses, *batch)
        if seconds < 0:
            raise UnmeasurableError("the bare KVM loop failed: is /dev/kvm usable?")
        return seconds, list(results)

    return measure


def single(runs: int = RUNS, count: int = SINGLE) -> Iterator[Result]:
    """Fuzzing inputs one by one, with a reset for each: a small input and a large one."""
    for name, data in (("4 bytes", records(1, 2)), ("1 MiB", records(5000, 200))):
        with Target(parser(False)) as target:
            by_emulation = Emulation(target)
            assert by_emulation.run(data) == target.run(data).value

            def ours(data: bytes = data, target: Target = target) -> float:
                start = time.perf_counter()
                for _ in range(count):
                    target.run(data)
                return count / (time.perf_counter() - start)

            def theirs(data: bytes = data, emulation: Emulation = by_emulation) -> float:
                some = count if len(data) < 100 else 3
                start = time.perf_counter()
                for _ in range(some):
                    emulation.run(data)
                return some / (time.perf_counter() - start)

            goal = 0.1 if len(data) < 100 else 5
            yield compare(f"fuzz: one input of {name} an exit", "1/s", ours, theirs, "unicorn", goal, runs)


class Emulation:
    """The target's guest in unicorn, brought back for each input by as little as it needs."""

    def __init__(self, target: Target) -> None:
        unicorn = emulation()
        from unicorn import x86_const

        self.registers = x86_const
        self.uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        with target.snapshot.fork() as fork:
            self.image = fork.memory.read(0, fork.memory.size)
            regs = fork.vcpus[0].regs
            self.start, stack = regs.rip, regs.rsp
            self.shared, self.input = fork.symbols["pyvmm_fuzz"], fork.symbols["pyvmm_fuzz_input"]
        self.uc.mem_map(0, len(self.image))
        self.uc.mem_write(0, self.image)
        self.uc.reg_write(x86_const.UC_X86_REG_RSP, stack)
        self.context = self.uc.context_save()
        self.uc.hook_add(unicorn.UC_HOOK_INSN, lambda uc, *_: uc.emu_stop(), None, 1, 0, x86_const.UC_X86_INS_OUT)
        self.capacity, self.most = target.capacity, target.most
        # Beside the input, the guest writes its stack and what it shares.
        self.written = [(stack - 4096, self.image[stack - 4096 : stack + 256])]

    def run(self, data: bytes) -> int:
        """What the guest's function returns."""
        self.uc.context_restore(self.context)
        for address, content in self.written:
            self.uc.mem_write(address, content)
        start = self.input + self.capacity - len(data)
        self.uc.mem_write(start, data)
        self.uc.mem_write(self.shared + _COUNT, _SINGLE.pack(1, 0, start, len(data)))
        self.uc.emu_start(self.start, 0)
        return int(struct.unpack("<i", self.uc.mem_read(self.shared + _LENGTHS + 4 * self.most, 4))[0])

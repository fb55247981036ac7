"""Control and inspection of a machine: exits by hand, pauses, registers."""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Callable, Iterator

from pyvmm import FlatBoot, KvmVm, MemoryConfig, VcpuExit, Vmm, VmmConfig

from benches import bare
from benches.measure import Result, UnmeasurableError, compare, emulation

START = 0x1000
EXITS = 20_000
PAUSES = 500
READS = 100_000
RUNS = 11
SPIN = b"\xeb\xfe"  # jmp $


def writing(exits: int) -> bytes:
    """Write to a port repeatedly, in real mode, then to the exit port."""
    return (
        b"\x66\xb9" + struct.pack("<I", exits) +  # mov ecx, exits
        b"\xe6\x80"  #     out 0x80, al
        b"\x66\x49"  #     dec ecx
        b"\x75\xfa"  #     jnz back
        b"\xe6\xf4"  #     out 0xf4, al
    )  # fmt: skip


def exits_by_hand(exits: int = EXITS, runs: int = RUNS) -> Iterator[Result]:
    """Port exits that a Python loop gets from `run_once`."""
    code = writing(exits)

    def ours() -> float:
        with KvmVm() as vm:
            vm.memory.add(0, 1 << 20)
            vm.memory.write(START, code)
            vcpu = vm.create_vcpu()
            vcpu.sregs.cs.update(base=0, selector=0)
            vcpu.regs.update(rip=START, rflags=2)
            start = time.perf_counter()
            while True:
                exit = vcpu.run_once()
                if not isinstance(exit, VcpuExit.IoOut):
                    raise UnmeasurableError(f"an exit that was not expected: {exit}")
                if exit.port == 0xF4:
                    return exits / (time.perf_counter() - start)

    yield compare("run_once", "exits/s", ours, lambda: exits / bare.time_run(code), "bare KVM loop", 0.9, runs)


def pauses(count: int = PAUSES, runs: int = RUNS) -> Iterator[Result]:
    """The duration of `pause()` for a guest that spins, against a bare kick."""

    def ours() -> list[float]:
        config = VmmConfig(boot=FlatBoot(SPIN), memory=MemoryConfig(size_mib=1))
        seconds = []
        with Vmm(config) as vmm:
            vmm.start()
            for _ in range(count):
                until = time.perf_counter() + 100e-6
                while time.perf_counter() < until:
                    pass
                start = time.perf_counter()
                vmm.pause()
                seconds.append(time.perf_counter() - start)
                vmm.resume()
            vmm.stop()
            vmm.wait()
        return seconds

    def p99(seconds: list[float]) -> float:
        return statistics.quantiles(seconds, n=100)[98]

    measures: list[tuple[str, Callable[[list[float]], float]]] = [("median", statistics.median), ("p99", p99)]
    for name, of in measures:
        yield compare(
            f"pause, {name}",
            "us",
            lambda of=of: 1e6 * of(ours()),  # type: ignore[misc]
            lambda of=of: 1e6 * of(bare.time_kicks(SPIN, count, 100)),  # type: ignore[misc]
            "bare kick",
            1 / 1.3,
            runs,
        )


def registers(reads: int = READS, runs: int = RUNS) -> Iterator[Result]:
    """Reads of a register after an exit, from the page that KVM shares."""
    unicorn = emulation()
    emulator = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    rip = unicorn.x86_const.UC_X86_REG_RIP
    with Vmm(VmmConfig(boot=FlatBoot(b"\xe6\xf4"), memory=MemoryConfig(size_mib=1))) as vmm:
        vmm.run()
        regs = vmm.vcpus[0].regs

        def ours() -> float:
            start = time.perf_counter()
            for _ in range(reads):
                _ = regs.rip
            return reads / (time.perf_counter() - start)

        def theirs() -> float:
            start = time.perf_counter()
            for _ in range(reads):
                emulator.reg_read(rip)
            return reads / (time.perf_counter() - start)

        yield compare("register read", "reads/s", ours, theirs, "unicorn reg_read", 5.0, runs)

"""The memory use of a machine, measured in a separate process each time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benches.measure import Result, UnmeasurableError, compare

MACHINES = 200
ALIVE = 1_000
RUNS = 3
LIMIT_KIB = 64.0

RESIDENT = """
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4
"""
CODE = r'code = b"\xb0\x00\xe6\xf4"'  # mov al, 0; out 0xf4, al
BARE = f"""{RESIDENT}
from benches import bare
{CODE}
bare.leave_machines(code, 1)
before = resident()
bare.leave_machines(code, COUNT)
print((resident() - before) / COUNT)
"""
OURS = f"""{RESIDENT}
from pyvmm import KvmVm
{CODE}
def make():
    vm = KvmVm()
    vm.memory.add(0, 1 << 20)
    vm.memory.write(0x1000, code)
    vcpu = vm.create_vcpu()
    vcpu.sregs.cs.update(base=0, selector=0)
    vcpu.regs.update(rip=0x1000, rflags=2)
    vcpu.run_once()
    return vm, vcpu
kept = [make()]
before = resident()
kept += [make() for _ in range(COUNT)]
print((resident() - before) / COUNT)
"""
# Each in the same loop, each with its thread, run to its exit.
MANY = f"""{RESIDENT}
from pyvmm import EventManager, FlatBoot, MemoryConfig, Vmm, VmmConfig
{CODE}
manager = EventManager()
config = VmmConfig(boot=FlatBoot(code), memory=MemoryConfig(size_mib=1))
machines = [Vmm(config, event_manager=manager)]
before = resident()
machines += [Vmm(config, event_manager=manager) for _ in range(COUNT - 1)]
for vmm in machines:
    vmm.start()
assert all(vmm.wait().code == 0 for vmm in machines)
print((resident() - before) / COUNT)
"""


def _kib(program: str, count: int) -> float:
    command = [sys.executable, "-c", f"COUNT = {count}\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UnmeasurableError(done.stderr.strip().splitlines()[-1])
    return float(done.stdout)


def footprints(machines: int = MACHINES, alive: int = ALIVE, runs: int = RUNS) -> Iterator[Result]:
    """Resident memory of a machine compared with a bare one, and of a thousand machines in one loop."""

    def over() -> float:
        return _kib(OURS, machines) - _kib(BARE, machines)

    yield compare("resident, over a bare VM", "KiB", over, lambda: LIMIT_KIB, "the limit set for it", 1.0, runs)
    bare_name = "a bare VM"
    yield compare(
        f"resident, {alive:,} alive in one loop", "KiB", lambda: _kib(MANY, alive), lambda: _kib(BARE, machines),
        bare_name, 0.0, runs,
    )  # fmt: skip

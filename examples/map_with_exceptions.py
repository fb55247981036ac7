"""Many inputs in copies of one machine: a result or an exception for each, in order, with progress.

The snapshot is saved and loaded first, as for workers on other hosts.
"""

import tempfile
from pathlib import Path

from pyvmm import Exit, FlatBoot, Snapshot, Vmm, VmmConfig

# mov al, 1; out 0xf4, al (ready); mov al, [0x2000]; hang: cmp al, 3; jz hang; out 0xf4, al
GUEST = bytes.fromhex("b001 e6f4 a00020 3c03 74fc e6f4")


def job(fork: Vmm, number: int) -> Exit:
    fork.memory.write(0x2000, bytes([number]))  # 256 raises ValueError
    return fork.run()


steps: list[str] = []

with Vmm(VmmConfig(boot=FlatBoot(GUEST))) as vmm, tempfile.TemporaryDirectory() as folder:
    vmm.run(timeout=10)
    path = Path(folder, "ready")
    vmm.snapshot().save(path, progress=lambda done, total: steps.append(f"saved {done * 100 // total} %"))
    ready = Snapshot.load(path, copy=True, progress=lambda done, total: steps.append(f"loaded {done * 100 // total} %"))

results = ready.map(
    job,
    [1, 2, 3, 256],
    workers=2,
    timeout=2,
    return_exceptions=True,
    progress=lambda done, total: steps.append(f"{done} of {total}"),
)

print(results[0], results[1])  # code 1 (vCPU 0) code 2 (vCPU 0)
print(type(results[2]).__name__)  # TimeoutError
print(repr(results[3]))  # ValueError('bytes must be in range(0, 256)')
print(steps[0], steps[1], steps[-1], sep=", ")  # saved 100 %, loaded 100 %, 4 of 4

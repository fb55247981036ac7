"""Snapshot a machine after its slow start, run a fork for each of ten inputs, and fork it again from a file."""

import tempfile

from pyvmm import FlatBoot, Snapshot, Vmm, VmmConfig

code = (
    b"\xb9\xff\xff\xe2\xfe"  # mov cx, 65535; loop: a long start
    b"\xb0\x01\xe6\xf4"  #     mov al, 1; out 0xf4, al: ready
    b"\xa0\x00\x20"  #         mov al, [0x2000]
    b"\xf6\xe0\xe6\xf4"  #     mul al; out 0xf4, al: the answer
)
with Vmm(VmmConfig(boot=FlatBoot(code))) as vmm:
    print(vmm.run(timeout=60))  # code 1 (vCPU 0)
    warm = vmm.snapshot()


def square(fork: Vmm, number: int) -> int | None:
    """Run a fork, which starts after the guest's long initialization."""
    fork.memory.write(0x2000, bytes([number]))
    return fork.run(timeout=60).code


print(warm.map(square, range(10), workers=2))  # [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]

with tempfile.NamedTemporaryFile() as file:
    warm.save(file.name)
    with Snapshot.load(file.name).fork() as fork:
        print(square(fork, 12))  # 144

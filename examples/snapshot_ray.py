"""Map over a snapshot with Ray: the snapshot is pickled as a reference to its file, and each Ray task forks it."""

import logging
import tempfile

try:
    import ray
except ImportError:
    raise SystemExit("ray is not installed: pip install ray") from None

from pyvmm import FlatBoot, Snapshot, Vmm, VmmConfig

# mov al, 1; out 0xf4, al (ready); mov al, [0x2000]; mul al; out 0xf4, al (the answer)
code = b"\xb0\x01\xe6\xf4\xa0\x00\x20\xf6\xe0\xe6\xf4"


@ray.remote
def square(snapshot: Snapshot, number: int) -> int | None:
    """Fork the snapshot, run it with this input, and return its answer."""
    with snapshot.fork() as fork:
        fork.memory.write(0x2000, bytes([number]))
        return fork.run(timeout=60).code


with tempfile.TemporaryDirectory() as directory:
    with Vmm(VmmConfig(boot=FlatBoot(code))) as vmm:
        vmm.run(timeout=60)
        vmm.snapshot().save(f"{directory}/warm")
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    warm = ray.put(Snapshot.load(f"{directory}/warm"))
    print(ray.get([square.remote(warm, number) for number in range(8)]))  # [0, 1, 4, 9, 16, 25, 36, 49]
    ray.shutdown()

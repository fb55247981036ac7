"""Observe a guest: counters of its exits, and a trace for https://ui.perfetto.dev."""

import json
import tempfile
from pathlib import Path

from pyvmm import EventFd, EventOps, Events, FlatBoot, Vmm, VmmConfig

CODE = bytes.fromhex("ba1005 ee ee b000 e6f4")  # dx = 0x510; out dx, al; twice; out 0xf4, 0


class Doorbell:
    """A device that is also a subscriber: `write` runs on the vCPU's thread, and `process` in the loop."""

    def __init__(self) -> None:
        self.fd = EventFd()

    def write(self, offset: int, size: int, value: int) -> None:
        self.fd.write()

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd))

    def process(self, events: Events, ops: EventOps) -> None:
        self.fd.read()


bell = Doorbell()
with tempfile.TemporaryDirectory() as directory, Vmm(VmmConfig(boot=FlatBoot(CODE))) as vmm:
    vmm.add_pio_device(0x510, 1, bell)
    vmm.add_subscriber(bell)
    with vmm.stats as stats, vmm.trace(Path(directory) / "trace.json") as trace:
        vmm.run(timeout=10)
    for row in stats.exits:
        if row.address == 0x510:
            print(row.kind, row.access, row.exits)  # io write 2
    (vcpu,) = stats.vcpus
    print(vcpu.guest_s > 0 and vcpu.host_s > 0)  # True
    hops = json.loads(trace.path.read_text())
    print(sorted({hop["cat"] for hop in hops if hop["ph"] == "X"}))  # ['callback', 'device', 'event', 'exit', 'guest']

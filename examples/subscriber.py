"""A subscriber of a running machine: after three ticks it stops the guest, which would spin forever."""

import threading

from pyvmm import EventFd, EventOps, Events, FlatBoot, Vmm, VmmConfig


class Ticks:
    """Counts the events of an eventfd, and stops the machine at the third."""

    def __init__(self) -> None:
        self.fd = EventFd()
        self.count = 0

    def tick(self, times: int) -> None:
        for _ in range(times):
            self.fd.write()

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd))

    def process(self, events: Events, ops: EventOps) -> None:
        self.count += self.fd.read()
        if self.count >= 3:
            vmm.stop()


ticks = Ticks()
with Vmm(VmmConfig(boot=FlatBoot(b"\xeb\xfe"))) as vmm:  # jmp $
    vmm.add_subscriber(ticks)
    ticker = threading.Thread(target=ticks.tick, args=(3,))
    ticker.start()
    print(vmm.run(timeout=10), ticks.count)  # stopped 3
    ticker.join()

"""A machine hosted by asyncio: the guest spins, asyncio stays responsive, and a coroutine stops the guest."""

import asyncio

from pyvmm import EventOps, Events, FlatBoot, TimerFd, Vmm, VmmConfig


class Watchdog:
    """Stops the machine when its timer expires. Its `process` is a coroutine function."""

    def __init__(self, vmm: Vmm) -> None:
        self.vmm = vmm
        self.timer = TimerFd()
        self.timer.set(0.05)

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.timer))

    async def process(self, events: Events, ops: EventOps) -> None:
        await asyncio.sleep(0.01)
        self.vmm.stop()


async def main() -> None:
    async with Vmm(VmmConfig(boot=FlatBoot(b"\xeb\xfe"))) as vmm:  # jmp $
        vmm.add_subscriber(Watchdog(vmm))
        run = asyncio.ensure_future(vmm.run_async())
        await asyncio.sleep(0.01)
        print("asyncio is responsive")  # asyncio is responsive
        print(await run)  # stopped


asyncio.run(main())

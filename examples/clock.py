"""A clock: a timer in the loop raises a periodic interrupt, and a port tells the time."""

import time

from pyvmm import Events, FlatBoot, TimerFd, Vmm, VmmConfig

LINE, PORT = 5, 0x500

GUEST = bytes.fromhex(
    "b011e620 b008e621 b004e621 b001e621 b000e621"  # the PIC: vectors from 8, nothing masked
    "c70634003210 c70636000000 fb"  # set the handler of vector 13, which is line 5; sti
    "f4 803e002005 72f8"  #                            wait: hlt; cmp byte [0x2000], 5; jb wait
    "ba0005 66ed"  #                                   mov dx, 0x500; in eax, dx: the time
    "b005 e6f4"  #                                     mov al, 5; out 0xf4, al
    "50 b020e620 fe060020 58 cf"  #                    handler: end of interrupt; inc byte [0x2000]; iret
)


class Clock:
    """A register with the milliseconds since the device was created."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def read(self, offset: int, size: int) -> int:
        return int(1000 * (time.monotonic() - self.start)) & ((1 << 8 * size) - 1)


with Vmm(VmmConfig(boot=FlatBoot(GUEST), irqchip=True)) as vmm, TimerFd() as timer:
    vmm.add_pio_device(PORT, 4, Clock())
    line = vmm.irq(LINE)

    @vmm.event_manager.on(timer)
    def tick(events: Events) -> None:
        timer.read()
        line.pulse()

    timer.set(0.005, 0.005)
    print("ticks:", vmm.run().code)  # ticks: 5

"""A device without exits: the guest writes to an ioeventfd, and a subscriber answers through an irqfd."""

from pyvmm import EventFd, EventOps, Events, FlatBoot, Vmm, VmmConfig

DOORBELL, LINE = 0x30, 5

GUEST = bytes.fromhex(
    "b011e620 b008e621 b004e621 b001e621 b000e621"  # the PIC: vectors from 8, nothing masked
    "c70634003010 c70636000000"  # set the handler of vector 13, which is line 5
    "b90300"  # mov cx, 3
    "e630 fb f4 fa 49 75f8"  # ring: out 0x30, al; sti; hlt; cli; dec cx; jnz ring
    "a00020 e6f4"  #                                   mov al, [0x2000]; out 0xf4, al
    "50 b020e620 fe060020 58 cf"  #                    handler: end of interrupt; inc byte [0x2000]; iret
)


class Answers:
    """Runs in the loop: pulses the interrupt line for each ring of the bell."""

    def __init__(self) -> None:
        self.bell, self.line = EventFd(), EventFd()

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.bell))

    def process(self, events: Events, ops: EventOps) -> None:
        self.bell.read()
        self.line.write()


device = Answers()
with Vmm(VmmConfig(boot=FlatBoot(GUEST), irqchip=True)) as vmm:
    vmm.add_ioeventfd(DOORBELL, device.bell, pio=True)
    vmm.add_irqfd(device.line, LINE)
    vmm.add_subscriber(device)
    print("answers:", vmm.run().code)  # answers: 3

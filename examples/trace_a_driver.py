"""Trace what a driver does with its device: each access, what answered it, and with which value."""

from pyvmm import Answer, FlatBoot, Stop, Vcpu, VcpuExit, Vmm, VmmConfig

# A driver: start the device, poll its status until it is ready, read the result. Real mode.
DRIVER = bytes.fromhex(
    "ba0005 b001 ee"  #    mov dx, 0x500; mov al, 1; out dx, al: start
    "42 ec a880 74fb"  #   inc dx; poll: in al, dx; test al, 0x80; jz poll
    "42 ed e6f4"  #        inc dx; in ax, dx: the result; out 0xf4, al
)
NAMES = {0x500: "CONTROL", 0x501: "STATUS", 0x502: "RESULT"}


class Adder:
    """Is ready at the second poll."""

    def __init__(self) -> None:
        self.polls = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.polls = 0

    def read(self, offset: int, size: int) -> int:
        self.polls += offset == 1
        return 0x1234 if offset == 2 else 0x80 if self.polls == 2 else 0


log: list[str] = []

with Vmm(VmmConfig(boot=FlatBoot(DRIVER))) as vmm:
    vmm.add_pio_device(0x500, 4, Adder())

    @vmm.on_answer("io")
    def trace(vcpu: Vcpu, exit: VcpuExit.IoIn | VcpuExit.IoOut, answer: Answer) -> Stop | None:
        if answer.device != "Adder":
            return None
        verb = "->" if isinstance(exit, VcpuExit.IoIn) else "<-"
        log.append(f"{NAMES[exit.port]} {verb} {answer.value:#x}")
        return Stop("result") if exit.port == 0x502 else None  # a breakpoint at a value

    print(vmm.run(timeout=10).value)  # result

print(log[0])  # CONTROL <- 0x1
print(log[1])  # STATUS -> 0x0
print(log[2])  # STATUS -> 0x80
print(log[3])  # RESULT -> 0x1234

"""Record the exits of a run as data: compare them with another run's, pickle them, print them as dicts."""

import pickle

from pyvmm import FlatBoot, Vcpu, VcpuExit, Vmm, VmmConfig

# mov dx, 0x500; mov al, [0x2000]; out dx, al; mov al, 0; out 0xf4, al
GUEST = bytes.fromhex("ba0005 a00020 ee b000 e6f4")


def record(number: int) -> list[VcpuExit]:
    """The exits of a run in which the guest finds this number in its memory."""
    exits: list[VcpuExit] = []

    def note(vcpu: Vcpu, exit: VcpuExit) -> None:
        exits.append(exit)

    with Vmm(VmmConfig(boot=FlatBoot(GUEST))) as vmm:
        vmm.memory.write(0x2000, bytes([number]))
        vmm.on_exit("any", note)
        vmm.run(timeout=10)
    return exits


seven, again, eight = record(7), record(7), record(8)
print(seven == again, seven == eight)  # True False
print([number for number, pair in enumerate(zip(seven, eight, strict=True)) if pair[0] != pair[1]])  # [0]
print(pickle.loads(pickle.dumps(seven)) == seven)  # True
print(seven[0].as_dict())  # {'type': 'IoOut', 'port': 1280, 'size': 1, 'data': b'\x07'}

"""A disk over memory-mapped registers: sector at 0, buffer address at 8; a write of 1 at 16 reads the sector."""

from pyvmm import FlatBoot, Vmm, VmmConfig

BASE, SECTOR = 0xD000_0000, 512


class Disk:
    def __init__(self, vmm: Vmm, image: bytes) -> None:
        self.memory, self.image = vmm.memory, image
        self.registers = {0: 0, 8: 0}

    def read(self, offset: int, size: int) -> int:
        return len(self.image) // SECTOR if offset == 24 else self.registers.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 16:
            start = self.registers[0] * SECTOR
            self.memory.write(self.registers[8], self.image[start : start + SECTOR])
        else:
            self.registers[offset] = value


GUEST = bytes.fromhex(
    "bb000000d0"  #            mov ebx, 0xd0000000
    "c70302000000"  #          mov dword [rbx], 2: the sector
    "c7430800200000"  #        mov dword [rbx + 8], 0x2000: the buffer
    "c6431001"  #              mov byte [rbx + 16], 1: read it
    "8a0425002000 00e6f4"  #   mov al, [0x2000]; out 0xf4, al
)

with Vmm(VmmConfig(boot=FlatBoot(GUEST, mode="long64"))) as vmm:
    vmm.add_mmio_device(BASE, 4096, Disk(vmm, b"".join(bytes([n]) * SECTOR for n in b"zero")))
    print(vmm.run(), vmm.memory.read(0x2000, 4))  # code 114 (vCPU 0) b'rrrr'

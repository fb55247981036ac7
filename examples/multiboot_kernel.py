"""A multiboot kernel in C, examples/guest/kernel.c, with a module, and a sensor that is a Python object.

It needs gcc.
"""

import subprocess
import tempfile
from pathlib import Path

from pyvmm import BootModule, KernelBoot, MemoryConfig, Vmm, VmmConfig

FLAGS = ["-m32", "-O1", "-ffreestanding", "-nostdlib", "-static", "-no-pie", "-fno-pie"]
FLAGS += ["-Wl,--build-id=none", "-Wl,-Ttext=0x100000"]
SOURCE = Path(__file__).parent / "guest" / "kernel.c"


class Sensor:
    """Port 0x300 selects a channel, port 0x304 has its value."""

    def __init__(self) -> None:
        self.channel = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.channel = value

    def read(self, offset: int, size: int) -> int:
        return 20 + self.channel


with tempfile.TemporaryDirectory() as folder:
    kernel, names = Path(folder, "kernel"), Path(folder, "names")
    subprocess.run(["gcc", *FLAGS, SOURCE, "-o", kernel], check=True)
    names.write_text("kitchen\ncellar\n")
    boot = KernelBoot(kernel, cmdline="Temperatures\n", modules=[BootModule(names, cmdline="the channels' names")])
    with Vmm(VmmConfig(boot=boot, memory=MemoryConfig(size_mib=4))) as vmm:
        vmm.add_pio_device(0x300, 8, Sensor())
        exit = vmm.run()
        lines = vmm.serial.take_output().decode().splitlines()

print(exit)  # code 0 (vCPU 0)
print(lines[1])  # kitchen: 20
print(lines[2])  # cellar: 21

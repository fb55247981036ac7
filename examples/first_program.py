"""A guest of four instructions: it prints a byte and ends with a code."""

from pyvmm import FlatBoot, SerialConfig, Vmm, VmmConfig

code = (
    b"\xba\xf8\x03"  # mov dx, 0x3f8: the serial port
    b"\xb0\x21\xee"  # mov al, '!'; out dx, al
    b"\xb0\x2a\xe6\xf4"  # mov al, 42; out 0xf4, al: the exit port
)
console: list[bytes] = []

config = VmmConfig(boot=FlatBoot(code), serial=SerialConfig(output=console.append))
with Vmm(config) as vmm:
    exit = vmm.run(timeout=10)

print(exit, b"".join(console))  # code 42 (vCPU 0) b'!'

"""Talk to a guest over its console: expect, sendline, and run_until for a snapshot at the prompt."""

import re

from pyvmm import FlatBoot, Vmm, VmmConfig

# Prints "> ", then echoes each byte that it receives. Real mode.
GUEST = (
    b"\xba\xf8\x03\xb0\x3e\xee\xb0\x20\xee"  # mov dx, 0x3f8; print '>' and ' '
    b"\xba\xfd\x03\xec\xa8\x01\x74\xf8"  # poll: mov dx, 0x3fd; in al, dx; test al, 1; jz poll
    b"\xba\xf8\x03\xec\xee\xeb\xf1"  # mov dx, 0x3f8; in al, dx; out dx, al; jmp poll
)

with Vmm(VmmConfig(boot=FlatBoot(GUEST, address=0x1000, mode="real16"))) as vmm:
    vmm.run_until("> ", timeout=10)
    ready = vmm.snapshot()
    vmm.serial.sendline("uptime 42 s")
    found = vmm.serial.expect(re.compile(r"uptime (\d+)"), timeout=10)
    print(found.index, found.matched)  # 0 uptime 42

with ready.fork() as fork:  # it waits at the prompt
    fork.serial.sendline("hello from a fork")
    print(repr(fork.serial.expect("fork", timeout=10).before))  # 'hello from a '
    print(repr(fork.console.matched))  # '> hello from a fork'

"""A snapshot fuzzer: thousands of resets a second find the input that crashes a guest's parser."""

import os
import random
import sys
import time

from pyvmm import ExitReason, FlatBoot, MemoryConfig, Vmm, VmmConfig

INPUT = 0x5000
PARSER = (  # 64-bit code; the exit code is the number of input bytes that the parser accepted
    b"\x31\xc9"  #                                       xor ecx, ecx
    b"\x8a\x81\x00\x50\x00\x00"  #                 next: mov al, [rcx + 0x5000]
    b"\x3a\x81\x2c\x00\x01\x00"  #                       cmp al, [rcx + 0x1002c], the word below
    b"\x75\x15\xff\xc1\x83\xf9\x04\x75\xeb"  #           jne done; inc ecx; cmp ecx, 4; jne next
    b"\x48\xb8\x00\x00\x00\x00\x00\x80\xff\xff\x88\x08"  # the bug: it writes where nothing is mapped
    b"\xeb\x00\x88\xc8\xe6\xf4\xf4\xf4\xf4"  #     done: mov al, cl; out 0xf4, al
    b"VMM!"
)
random.seed(os.environ.get("SEED", "pyvmm"))
best, reached, executions, start = bytes(8), 0, 0, time.monotonic()
with Vmm(VmmConfig(boot=FlatBoot(PARSER, address=0x10000, mode="long64"), memory=MemoryConfig(size_mib=2))) as vmm:
    snapshot = vmm.snapshot()
    while True:
        tried = bytearray(best)
        for _ in range(random.choice((1, 1, 2))):
            tried[random.randrange(8)] = random.randrange(256)
        vmm.memory.write(INPUT, tried)
        exit = vmm.run_here(timeout=10)
        executions += 1
        if exit.reason is ExitReason.SHUTDOWN:
            break
        if exit.code is not None and exit.code > reached:
            best, reached = bytes(tried), exit.code
        if executions % 500 == 0:
            rate = executions / (time.monotonic() - start)
            print(f"\r{executions} executions, {rate:.0f} a second, best {best[:4]!r}", end="", file=sys.stderr)
        vmm.reset(snapshot)
print(bytes(tried[:4]))  # b'VMM!'

"""The guest asks for a name and greets it: it calls two Python functions with parts of its memory.

The source of the guest is examples/guest/ask.s; examples/guest also has it in C.
"""

from pyvmm import FlatBoot, Vmm, VmmConfig

GUEST = bytes.fromhex(
    "ba76700000 488d05a4000000 4889055d000000 488d05a2000000 4889055f000000 48890580000000"
    "488d0521000000 ef 8b0522000000 890568000000 488d0545000000 ef 8b0542000000 e6f4 0f1f4000"
    "01000000ffffffff 0000000000000000 0200000000000000"
    "020000000c000000 0000000000000000 0300000020000000 0000000000000000"
    "02000000ffffffff 0000000000000000 0100000000000000 0200000000000000 0000000000000000"
    "57686f2061726520796f753f"
) + bytes(32)

with Vmm(VmmConfig(boot=FlatBoot(GUEST, address=0x10_0000, mode="user64"))) as vmm:

    @vmm.hostcall(1)
    def ask(prompt: bytes, answer: memoryview) -> bytes:
        print("asked", prompt.decode())  # asked Who are you?
        return b"a guest"

    @vmm.hostcall(2)
    def say(name: bytes) -> None:
        print("hello", name.decode())  # hello a guest

    print(vmm.run().code)  # 0

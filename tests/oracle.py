"""A guest that counts in many places at once. If its counts continue exactly, it was not restarted."""

from __future__ import annotations

import struct
from typing import Any

from guests import exit_with, flat
from pyvmm import Snapshot, Vmm, VmRunState

DEADLINE_S = 60
NONCE_AT = 0x5000
NONCE = 0x1234_5678
STEPS = 200

# 64 bits, ring 3, native. From a nonce that the host leaves in memory it counts in five places at
# once, each step printed: EBX, memory, XMM7, the serial port's scratch register, and R15 backwards.
ORACLE = (
    b"\x8b\x1c\x25\x00\x50\x00\x00"  #  mov ebx, [0x5000]
    b"\x41\xbf" + struct.pack("<I", STEPS) +  #  mov r15d, STEPS
    b"\x66\x0f\x6e\xfb"  #              movd xmm7, ebx
    b"\xb8\x01\x00\x00\x00"  #          mov eax, 1
    b"\x66\x0f\x6e\xf0"  #              movd xmm6, eax
    b"\x89\x1c\x25\x00\x30\x00\x00"  #  mov [0x3000], ebx
    b"\x66\xba\xff\x03\x88\xd8\xee"  #  mov dx, 0x3ff; mov al, bl; out dx, al
    # back:
    b"\xff\xc3"  #                      inc ebx
    b"\xff\x04\x25\x00\x30\x00\x00"  #  inc dword [0x3000]
    b"\x66\x0f\xfe\xfe"  #              paddd xmm7, xmm6
    b"\x66\xba\xff\x03\xec\xfe\xc0\xee"  #  mov dx, 0x3ff; in al, dx; inc al; out dx, al
    b"\x66\xba\xf8\x03\xee"  #          mov dx, 0x3f8; out dx, al
    b"\x88\xd8\xee"  #                  mov al, bl; out dx, al
    b"\x8a\x04\x25\x00\x30\x00\x00\xee"  #  mov al, [0x3000]; out dx, al
    b"\x66\x0f\x7e\xf8\xee"  #          movd eax, xmm7; out dx, al
    b"\x41\xff\xcf"  #                  dec r15d
    b"\x44\x88\xf8\xee"  #              mov al, r15b; out dx, al
    b"\x45\x85\xff"  #                  test r15d, r15d
    b"\x75\xca"  #                      jnz back
) + exit_with(9)  # fmt: skip


def counted(nonce: int) -> bytes:
    """What the oracle prints in all."""
    steps = range(1, STEPS + 1)
    return bytes(b & 0xFF for n in steps for b in (*[nonce + n] * 4, STEPS - n))


def oracle(nonce: int = NONCE, **rest: Any) -> Vmm:
    vmm = Vmm(flat(ORACLE, "user64", address=0x10000, size_mib=2, **rest))
    vmm.memory.write(NONCE_AT, struct.pack("<I", nonce))
    return vmm


def finish(vmm: Vmm) -> bytes:
    """Run to the end; what was printed in all."""
    assert vmm.run(DEADLINE_S).code == 9
    return vmm.serial.take_output()


def while_it_runs(vmm: Vmm, count: int) -> list[Snapshot]:
    """Take up to this many snapshots, and at least one, of a guest that has not ended."""
    snapshots: list[Snapshot] = []
    while len(snapshots) < count:
        snapshot = vmm.snapshot()
        if vmm.state is not VmRunState.RUNNING:
            break
        snapshots.append(snapshot)
    assert snapshots
    return snapshots

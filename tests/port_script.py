"""A guest that executes a list of port accesses: registers as a guest sees them, one machine for a whole sequence."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from guests import flat
from pyvmm import ExitReason, Vmm

if TYPE_CHECKING:
    from collections.abc import Sequence

DEADLINE_S = 60.0
SCRIPT, RESULTS = 0x2000, 0xA000
MAX_STEPS = (RESULTS - SCRIPT) // 4 - 1

# Each step is a port, 0 for a write or 1 for a read, and the value. What is read goes to
# RESULTS. Real mode.
INTERPRETER = (
    b"\xbe\x00\x20"  #     mov si, SCRIPT
    b"\xbf\x00\xa0"  #     mov di, RESULTS
    b"\xad\x89\xc2"  #     next: lodsw; mov dx, ax
    b"\xad"  #             lodsw: AL is the kind, AH the value
    b"\x3c\x01"  #         cmp al, 1
    b"\x77\x0b\x74\x05"  # ja over; je read
    b"\x88\xe0\xee"  #     mov al, ah; out dx, al
    b"\xeb\xf1"  #         jmp next
    b"\xec\xaa\xeb\xed"  # read: in al, dx; stosb; jmp next
    b"\xb0\x00\xe6\xf4"  # over: mov al, 0; out 0xf4, al
    b"\xeb\xdd"  #         jmp back to the first instruction, for the next run
)

Step = tuple[int, int | None]


def read(port: int) -> Step:
    """Read a byte from a port."""
    return (port, None)


def write(port: int, value: int) -> Step:
    """Write a byte to a port."""
    return (port, value)


def machine(steps: Sequence[Step], **config: Any) -> Vmm:
    """A machine that takes these steps and exits with 0. The next run takes them again, or others."""
    vmm = Vmm(flat(INTERPRETER, **config))
    load(vmm, steps)
    return vmm


def load(vmm: Vmm, steps: Sequence[Step]) -> None:
    """Have the next run take these steps."""
    assert len(steps) <= MAX_STEPS
    records = [struct.pack("<HBB", port, value is None, value or 0) for port, value in steps]
    vmm.memory.write(SCRIPT, b"".join(records) + struct.pack("<HBB", 0, 2, 0))


def run(vmm: Vmm, steps: Sequence[Step]) -> list[int]:
    """Run such a machine, and return what it has read."""
    exit = vmm.run(DEADLINE_S)
    assert (exit.reason, exit.code) == (ExitReason.CODE, 0), str(exit)
    return list(vmm.memory.read(RESULTS, sum(value is None for _, value in steps)))


def run_other(vmm: Vmm, steps: Sequence[Step]) -> list[int]:
    """Have such a machine take other steps after it has run, and return what it reads."""
    vmm.reset(vmm.snapshot())  # its guest has ended, and continues
    load(vmm, steps)
    return run(vmm, steps)


def answers(*steps: Step, **config: Any) -> list[int]:
    """What a guest reads that takes these steps."""
    with machine(steps, **config) as vmm:
        return run(vmm, steps)

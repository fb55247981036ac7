"""A private copy of QEMU 7.2 whose TCG takes a busy TSS for a TSS.

A monitor has to give a vCPU a busy TSS (type 11), as in a running processor. QEMU 7.2 accepts only
an available TSS (type 9). Guests then have no I/O bitmap, and an interrupt from ring 3 aborts QEMU.
Both functions mask the type before they compare it, so removing the busy bit (bit 1) from the mask
fixes them. Two bytes change, each in the only place of the program that looks like the function. A
program with no such place, or with several, is refused.
"""

from __future__ import annotations

import re
from pathlib import Path

VERSION = "1:7.2+dfsg-"
# The function, what the compiler made of its comparison, and the mask: as it is and as it should
# be.
PLACES = [
    # TEST AH, 0x80; JE; SHR EAX, 8; AND EAX, mask; CMP EAX, 9; JNE
    ("helper_check_io", rb"\xf6\xc4\x80\x0f\x84.{4}\xc1\xe8\x08\x83\xe0(.)\x83\xf8\x09\x0f\x85", 0x0F, 0x0D),
    # SHR EAX, 8; MOV R12, RDX; MOV EDX, ECX; MOV ECX, EAX; AND ECX, mask; CMP ECX, 1; JNE
    ("get_ss_esp_from_tss", rb"\xc1\xe8\x08\x49\x89\xd4\x89\xca\x89\xc1\x83\xe1(.)\x83\xf9\x01\x0f\x85", 0x07, 0x05),
]


class UnknownQemuError(Exception):
    """A QEMU that does not look like the known one, and stays as it is."""


def accept_busy_tss(program: Path, version: str) -> None:
    """Change the program in place."""
    if not version.startswith(VERSION):
        raise UnknownQemuError(
            f"QEMU {version} is not the one that is known ({VERSION}*): see scripts/hardware/qemu.py"
        )
    data = bytearray(program.read_bytes())
    for function, pattern, old, new in PLACES:
        found = list(re.finditer(pattern, data, re.DOTALL))
        if len(found) != 1:
            raise UnknownQemuError(f"QEMU {version} has {len(found)} places that look like {function}")
        at = found[0].start(1)
        if data[at] != old:
            raise UnknownQemuError(f"QEMU {version} has the mask {data[at]:#x} in {function}, not {old:#x}")
        data[at] = new
    program.write_bytes(data)

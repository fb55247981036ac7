"""Tiny guests as commented machine code. Real mode runs at 0x1000 unless a test says otherwise."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any, Literal

from pyvmm import FlatBoot, MemoryConfig, VmmConfig

Mode = Literal["real16", "protected32", "long64", "user64"]

HALT = b"\xf4"  # hlt
SPIN = b"\xeb\xfe"  # jmp $
WRITE_FOREVER = b"\xba\x80\x00\xee\xeb\xfd"  # mov dx, 0x80; out dx, al; jmp back


def exit_with(code: int) -> bytes:
    """Write the exit port, in any mode."""
    return bytes([0xB0, code, 0xE6, 0xF4])  # mov al, code; out 0xf4, al


def out(port: int, value: int) -> bytes:
    """Write a byte to a port, in real mode."""
    return b"\xba" + struct.pack("<H", port) + bytes([0xB0, value, 0xEE])  # mov dx, port; mov al, value; out dx, al


def read_in(port: int) -> bytes:
    """Read a byte from a port into AL, in real mode."""
    return b"\xba" + struct.pack("<H", port) + b"\xec"  # mov dx, port; in al, dx


def print_text(text: bytes) -> bytes:
    """Print over COM1, in real mode."""
    return b"\xba\xf8\x03" + b"".join(bytes([0xB0, byte, 0xEE]) for byte in text)


def echo_until(last: int) -> bytes:
    """Send back each byte received on COM1, up to and with the last, in real mode; then exit with 0."""
    return (
        b"\xba\xfd\x03"  # poll: mov dx, 0x3fd
        b"\xec"  #              in al, dx
        b"\xa8\x01"  #          test al, 1
        b"\x74\xf8"  #          jz poll
        b"\xba\xf8\x03"  #      mov dx, 0x3f8
        b"\xec"  #              in al, dx
        b"\xee"  #              out dx, al
        b"\x3c" + bytes([last]) + b"\x75\xef"  # cmp al, last; jne poll
    ) + exit_with(0)


COUNT_IN_MEMORY = (
    b"\xff\x06\x00\x20"  # inc word [0x2000]
    b"\xeb\xfa"  #         jmp back
)

PRINT_FOR_EVER = (
    b"\xba\xf8\x03"  # mov dx, 0x3f8
    b"\xb0\x78"  #     mov al, 'x'
    b"\xee"  #         out dx, al
    b"\xeb\xfd"  #     jmp back
)

# Ring 0, 64 bits: what KVM refuses, and what no table answers.
FWAIT_FOREVER = b"\x9b\xeb\xfd"  # fwait; jmp back: an emulation failure where ring 0 is emulated
TRIPLE_FAULT = (
    b"\x48\xb8"
    + struct.pack("<Q", 0xFFFF_8000_0000_0000)  # mov rax, an address that nothing maps
    + b"\x88\x00"  # mov [rax], al: a page fault without an IDT
)


@functools.cache
def host_features() -> frozenset[str]:
    """What the host's processor can do, by the names in /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next(line for line in lines if line.startswith("flags")).split(":")[1].split())


def needs_processor(*features: str) -> None:
    """Skip where the host's processor cannot execute what a test has it execute."""
    if missing := set(features) - host_features():
        import pytest  # which takes longer than most of the programs that import these guests

        pytest.skip(f"the processor has no {', '.join(sorted(missing))}")


def keeps_fault_state(fault: str | None) -> bool:
    """Whether a triple fault's text shows the vCPU as it was: kvm-amd resets it, and then the text says so."""
    assert fault is not None
    assert fault.startswith("triple fault\n")
    is_lost = "are lost" in fault
    assert is_lost == ("rip 0x000000000000fff0" in fault)
    return not is_lost


# Every vCPU adds itself to a counter at 0x3000 and leaves its number at 0x4000 + 8 * number; the
# one that finds the counter at `vcpus` exits with it. 64 bits, RDI holds the number.
def count_vcpus(vcpus: int) -> bytes:
    """Have all vCPUs meet; 64 bits, either ring."""
    return (
        b"\x89\xf8"  #                              mov eax, edi
        b"\x89\x3c\xc5\x00\x40\x00\x00"  #          mov [rax*8 + 0x4000], edi
        b"\xb8\x01\x00\x00\x00"  #                  mov eax, 1
        b"\xf0\x0f\xc1\x04\x25\x00\x30\x00\x00"  #  lock xadd [0x3000], eax
        b"\x83\xf8"
        + bytes([vcpus - 1])  #       cmp eax, vcpus - 1
        + b"\x75\x04"  #                              jne wait
        + exit_with(vcpus)
        + b"\xf3\x90\xeb\xfc"  #                    wait: pause; jmp wait
    )


def flat(code: bytes, mode: Mode = "real16", *, address: int = 0x1000, size_mib: int = 1, **rest: Any) -> VmmConfig:
    """A machine that runs the code."""
    boot = FlatBoot(code, address=address, mode=mode)
    return VmmConfig(boot=boot, memory=MemoryConfig(size_mib=size_mib), **rest)


OUT_FOR_EVER = (
    b"\xba\x00\x05"  # mov dx, 0x500
    b"\xee"  #         out dx, al
    b"\xeb\xfd"  #     jmp back
)


def elf(address: int, code: bytes) -> bytes:
    """A 64-bit ELF file of one segment, which starts at its first byte."""
    header = struct.pack("<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 2, 62, 1, address, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 120, address, address, len(code), len(code), 4096) + code

"""Guests of random accesses: any port, address, width, repeat count and hostcall block. Nothing breaks or grows."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import time

import pytest
from guests import exit_with, flat
from held import held
from pyvmm import ExitReason, HostcallError, StateError, Stop, Vmm
from pyvmm.hostcalls import PORT

pytestmark = pytest.mark.kvm

SECONDS = float(os.environ.get("PYVMM_STRESS_S", "2"))
# A guest that has overwritten its own code may spin.
RUN_TIMEOUT_S = 1
MAX_RUNS = 100
ACCESSES = 40
ENDS = {ExitReason.CODE, ExitReason.HALT, ExitReason.RESET, ExitReason.STOPPED, ExitReason.TIMEOUT}


def word(value: int) -> bytes:
    return struct.pack("<H", value & 0xFFFF)


def access(choice: random.Random) -> bytes:
    """One access, in real mode, with ES = 0 and DS = 0 or the last segment of the first MiB."""
    port = choice.choice([choice.randrange(1 << 16), choice.randrange(0x500, 0x520), PORT, 0x3F8, 0x70, 0xFFFF])
    point = b"\xba" + word(port)
    prefix = choice.choice([b"", b"\x66"])
    repeated = (
        b"\xb9" + word(choice.choice([0, 1, 7, 300, 5000])) + choice.choice([b"\xfc", b"\xfd"])
        + b"\xbe" + word(choice.randrange(1 << 16)) + b"\xbf" + word(choice.randrange(0x4000, 0xF000))
    )  # fmt: skip
    segment = b"\xb8" + choice.choice([word(0), word(0xFFFF)]) + b"\x8e\xd8"  # mov ax, segment; mov ds, ax
    away = word(choice.randrange(0x10, 0xFFF0))
    return choice.choice(
        [
            point + b"\xb0" + bytes([choice.randrange(256)]) + prefix + choice.choice([b"\xee", b"\xef"]),
            point + prefix + choice.choice([b"\xec", b"\xed"]),
            point + repeated + b"\xf3" + prefix + choice.choice([b"\x6e", b"\x6f"]),
            point + repeated + b"\xf3" + prefix + choice.choice([b"\x6c", b"\x6d"]),
            segment + prefix + b"\xa1" + away,  # mov (e)ax, [away]
            segment + prefix + b"\xa3" + away if segment[1:3] != b"\0\0" else b"\x90",
            call(choice),
        ]
    )


def call(choice: random.Random) -> bytes:
    """Put a random block to 0xf000 and call it."""
    numbers = [0, 1, 2, 3, 6, 7, 0xFFFF, 0xFFFF_FFFF, choice.randrange(1 << 32)]
    words = b"".join(
        b"\x66\xc7\x06" + word(0xF000 + 4 * n) + struct.pack("<I", choice.choice(numbers))
        for n in range(choice.randrange(1, 30))
    )
    where = choice.choice([0xF000, 0xF000, choice.randrange(1 << 32), (1 << 20) - 10])
    return (
        b"\x31\xc0\x8e\xd8" + words  # xor ax, ax; mov ds, ax
        + b"\xba" + word(PORT) + b"\x66\xb8" + struct.pack("<I", where) + b"\x66\xef"
    )  # fmt: skip


class Device:
    """Answers anything; now and then it does something drastic."""

    def __init__(self, choice: random.Random, vmm: Vmm) -> None:
        self.choice, self.vmm = choice, vmm

    def drastic(self) -> Stop | None:
        match self.choice.randrange(60):
            case 0:
                raise LookupError
            case 1:
                return Stop(1)
            case 2:
                with contextlib.suppress(StateError):  # the run is ending
                    self.vmm.pause()
                    self.vmm.resume()
            case 3:
                self.vmm.stop()
        return None

    def read(self, _offset: int, size: int) -> int | Stop:
        return self.drastic() or self.choice.randrange(1 << 8 * size)

    def write(self, _offset: int, size: int, value: int) -> Stop | None:
        assert value < 1 << 8 * size
        return self.drastic()


class Strings(Device):
    def read_many(self, _offset: int, size: int, count: int) -> bytes | Stop:
        return self.drastic() or bytes(size * count)

    def write_many(self, _offset: int, size: int, data: bytes) -> Stop | None:
        assert len(data) % size == 0
        return self.drastic()


def life(choice: random.Random) -> None:
    """One guest to its end, or as far as it is let."""
    code = b"".join(access(choice) for _ in range(ACCESSES)) + exit_with(1)
    with Vmm(flat(code)) as vmm:
        vmm.add_pio_device(0x500, 8, Device(choice, vmm))
        vmm.add_pio_device(0x508, 8, Strings(choice, vmm))
        vmm.add_mmio_device(0x10_0000, 0x8000, Device(choice, vmm))
        vmm.hostcall(lambda *arguments: sum(map(len, (a for a in arguments if not isinstance(a, int)))))

        @vmm.hostcall
        def refuses(*_arguments: object) -> None:
            raise HostcallError(choice.randrange(100))

        if choice.randrange(2):
            vmm.on_exit("io", lambda _vcpu, _exit: None)
        for _ in range(MAX_RUNS):
            try:
                exit = vmm.run(RUN_TIMEOUT_S)
            except LookupError:
                continue
            assert exit.reason in ENDS or exit.is_fault, exit
            if exit.reason is not ExitReason.STOPPED:
                return


@pytest.mark.timeout(max(120, 20 * SECONDS))
def test_guests_of_random_accesses_break_nothing() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    for number in range(5):
        life(random.Random(seed + number))
    before, lives = held(), 5
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        life(random.Random(seed + lives))
        lives += 1
    after = held()
    assert (after.descriptors, after.threads) == (before.descriptors, before.threads)
    assert after.resident_kib <= before.resident_kib + 8192 + lives // 10

"""The real-time clock: a time that the guest sets, the size of memory, and its interrupts.

Covers src/devices/rtc_timer.rs.
"""

from __future__ import annotations

import pytest
from guests import exit_with, flat
from port_script import machine, read, run, write
from pyvmm import Vmm

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0

READ_YEAR = b"\xb0\x09\xe6\x70\xe4\x71\xe6\xf4"  # mov al, 9; out 0x70, al; in al, 0x71; out 0xf4, al
SET_YEAR = b"\xb0\x09\xe6\x70\xb0\x55\xe6\x71"  # mov al, 9; out 0x70, al; mov al, 0x55; out 0x71, al


def test_a_time_that_the_guest_sets_is_kept_by_snapshots() -> None:
    with Vmm(flat(READ_YEAR + SET_YEAR + READ_YEAR + READ_YEAR)) as vmm:
        years = vmm.run(DEADLINE_S).code
        before = vmm.snapshot()
        assert years != 0x55, "the host's time, in a year that is not this test's"
        for _ in range(2):
            vmm.reset(before)
            assert vmm.run(DEADLINE_S).code == 0x55
        after = vmm.snapshot()
        with after.fork() as fork:
            assert fork.run(DEADLINE_S).code == 0x55
        with before.fork() as fork:
            assert fork.run(DEADLINE_S).code == 0x55


def cell(index: int) -> list[tuple[int, int | None]]:
    """Read a cell."""
    return [write(0x70, index), read(0x71)]


def test_firmware_finds_the_size_of_memory_and_a_valid_checksum() -> None:
    steps = [step for index in range(0x10, 0x60) for step in cell(index)]
    with machine(steps, size_mib=20) as vmm:
        found = dict(zip(range(0x10, 0x60), run(vmm, steps), strict=True))
    words = [found[index] | found[index + 1] << 8 for index in (0x15, 0x17, 0x30, 0x34)]
    assert words == [640, 19 * 1024, 19 * 1024, 4 * 16]
    assert [found[index] for index in (0x5B, 0x5C, 0x5D, 0x5F)] == [0, 0, 0, 0]
    assert found[0x2E] << 8 | found[0x2F] == sum(found[index] for index in range(0x10, 0x2E))


# Read status C, store it at 0x3004, and count the interrupts of IRQ 8 at 0x3000. Real mode,
# through the PICs.
HANDLER = (
    b"\x50\xb0\x0c\xe6\x70\xe4\x71\xa2\x04\x30"  # push ax; mov al, 12; out 0x70, al; in al, 0x71; mov [0x3004], al
    b"\xff\x06\x00\x30"  #             inc word [0x3000]
    b"\xb0\x20\xe6\xa0\xe6\x20\x58\xcf"  # mov al, 0x20; out 0xa0, al; out 0x20, al; pop ax; iret
)
SET_UP = (
    b"\xfa\x31\xc0\x8e\xd8\x8e\xd0\xbc\x00\x70"  # cli; xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7000
    b"\xc7\x06\xc0\x01\x00\x28\xc7\x06\xc2\x01\x00\x00"  # the vector of IRQ 8, 0x70, is 0:0x2800
    b"\xb0\x11\xe6\x20\xb0\x08\xe6\x21\xb0\x04\xe6\x21\xb0\x01\xe6\x21"  # the PIC: vectors from 8
    b"\xb0\x11\xe6\xa0\xb0\x70\xe6\xa1\xb0\x02\xe6\xa1\xb0\x01\xe6\xa1"  # the second: from 0x70
    b"\xb0\xfb\xe6\x21\xb0\xfe\xe6\xa1"  # only the second, and its IRQ 8
)


def set_in_code(index: int, value: int) -> bytes:
    """Set a cell, in real mode."""
    return bytes([0xB0, index, 0xE6, 0x70, 0xB0, value, 0xE6, 0x71])


def interrupted(count: int, cells: list[tuple[int, int]]) -> bytes:
    """Set cells, and halt until there were so many interrupts."""
    wait = b"\xfb\xf4\xfa\x83\x3e\x00\x30" + bytes([count]) + b"\x72\xf6"  # sti; hlt; cli; cmp word [0x3000], count; jb
    return SET_UP + b"".join(set_in_code(*one) for one in cells) + wait + exit_with(0)


@pytest.mark.parametrize(
    ("cells", "count", "flag"),
    [
        ([(0x0A, 0x2F), (0x0B, 0x42)], 3, 0x40),
        ([(0x0A, 0x26), (0x0B, 0x42)], 20, 0x40),
        ([(0x01, 0xFF), (0x03, 0xC0), (0x05, 0xFF), (0x0B, 0x22)], 2, 0x20),
        ([(0x0B, 0x12)], 2, 0x10),
    ],
    ids=["periodic, 2 Hz", "periodic, 1,024 Hz", "an alarm each second", "the end of each update"],
)
def test_interrupts_on_line_8(cells: list[tuple[int, int]], count: int, flag: int) -> None:
    with Vmm(flat(interrupted(count, cells), irqchip=True)) as vmm:
        vmm.memory.write(0x2800, HANDLER)
        assert vmm.run(DEADLINE_S).code == 0
        assert vmm.memory.read_u16(0x3000) == count
        assert vmm.memory.read(0x3004, 1)[0] & (0x80 | flag) == 0x80 | flag


def test_an_alarm_goes_off_once_at_its_time_also_in_a_fork() -> None:
    # The guest's own time: 12:34:58, then the alarm at 12:35:00.
    time, alarm = [(0x00, 0x58), (0x02, 0x34), (0x04, 0x12)], [(0x01, 0), (0x03, 0x35), (0x05, 0x12)]
    cells = [(0x0B, 0x82), *time, *alarm, (0x0B, 0x22)]
    code = SET_UP + b"".join(set_in_code(*one) for one in cells) + exit_with(7) + b"\xfb\xf4\xfa" + exit_with(0)
    with Vmm(flat(code, irqchip=True)) as vmm:
        vmm.memory.write(0x2800, HANDLER)
        assert vmm.run(DEADLINE_S).code == 7
        snapshot = vmm.snapshot()
        vmm.reset(snapshot)
        with snapshot.fork() as fork:
            for either in (vmm, fork):
                assert either.run(DEADLINE_S).code == 0
                assert either.memory.read_u16(0x3000) == 1
                assert either.memory.read(0x3004, 1)[0] & 0xA0 == 0xA0


@pytest.mark.parametrize("binary", [False, True])
def test_an_alarm_is_seen_without_interrupts(binary: bool) -> None:
    last = (59, 59, 23) if binary else (0x59, 0x59, 0x23)
    mode = 0x06 if binary else 0x02
    cells = [(0x0B, 0x80 | mode), *zip((0, 2, 4), last, strict=True), (1, 0), (3, 0), (5, 0), (0x0B, mode)]
    code = b"".join(set_in_code(*one) for one in cells) + (
        b"\xb0\x0c\xe6\x70"  #             mov al, 0x0c; out 0x70, al
        b"\xe4\x71\xa8\x20\x74\xfa"  #     wait: in al, 0x71; test al, 0x20; jz wait
        b"\xb0\x04\xe6\x70\xe4\x71\xe6\xf4"  # the hour: mov al, 4; out 0x70, al; in al, 0x71; out 0xf4, al
    )
    with Vmm(flat(code)) as vmm:
        assert vmm.run(DEADLINE_S).code == 0, "midnight"

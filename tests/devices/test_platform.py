"""The built-in devices as a guest sees them: keyboard controller, exit port, clock, and unanswered accesses.

Covers src/py/unanswered.rs.
"""

from __future__ import annotations

import pytest
from guests import (
    HALT,
    exit_with,
    flat,
    out,
    read_in,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from port_script import answers, machine, read, run, run_other, write
from pyvmm import (
    ExitReason,
    Unanswered,
    Vmm,
)

pytestmark = pytest.mark.kvm
ASKS_KEYBOARD_CONTROLLER = (
    b"\xe6\x64"  #         out 0x64, al: the command
    b"\xb9\x64\x00"  #     mov cx, 100
    b"\xe4\x64\xa8\x01"  # in al, 0x64; test al, 1
    b"\x75\x06"  #         jnz there
    b"\xe2\xf8" + exit_with(0xEE) + b"\xe4\x60\xe6\xf4"  #         loop back  # there: in al, 0x60; out 0xf4, al
)


@pytest.mark.parametrize(
    ("command", "answer"),
    [(0x20, 0x64), (0xAA, 0x55), (0xAB, 0), (0xA9, 1), (0xD0, 0xCF), (0xAE, 0xEE)],
    ids=["command byte", "self-test", "first port", "no second port", "output port", "one without an answer"],
)
def test_keyboard_controller_answers_its_commands(command: int, answer: int) -> None:
    with Vmm(flat(bytes([0xB0, command]) + ASKS_KEYBOARD_CONTROLLER)) as vmm:
        assert vmm.run(60).code == answer


PROBE = [
    write(0x64, 0xAA), read(0x64), read(0x60),  # self-test
    write(0x64, 0xAB), read(0x60),  # the first port works
    write(0x60, 0xFF), read(0x60), read(0x60),  # reset: acknowledged, and passed
    write(0x60, 0xF2), read(0x60), read(0x60), read(0x60),  # which keyboard, translated
    write(0x60, 0xED), read(0x60), write(0x60, 7), read(0x60),  # the lights
    write(0x60, 0xF0), read(0x60), write(0x60, 0), read(0x60), read(0x60),  # the scan code set, translated
    write(0x64, 0xD4), write(0x60, 0xFF), read(0x64), read(0x60),  # no mouse
]  # fmt: skip
PROBED = [0x1D, 0x55, 0, 0xFA, 0xAA, 0xFA, 0xAB, 0x41, 0xFA, 0xFA, 0xFA, 0xFA, 0x41, 0x75, 0xFE]


def test_keyboard_answers_a_probe() -> None:
    assert answers(*PROBE) == PROBED


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0x60, 0x61, 0x62, 0x64, 0x70, 0x71]), st.none() | st.integers(0, 255)).filter(
            # not those that reset the machine
            lambda step: step[0] != 0x64 or step[1] is None or (step[1] < 0xF0 and step[1] != 0xD1)
        ),
        max_size=60,
    )
)
def test_no_accesses_upset_the_devices_and_a_fork_goes_on(steps: list[tuple[int, int | None]]) -> None:
    look = [read(0x64), read(0x60), read(0x60), read(0x70), write(0x64, 0x20), read(0x60), read(0x71)]
    with machine(steps) as vmm:
        run(vmm, steps)
        with vmm.snapshot().fork() as fork:
            ours, theirs = run_other(vmm, look), run_other(fork, look)
            assert ours[:-1] == theirs[:-1], "the last one may be the time"


def test_port_61_without_a_pit_lets_a_guest_go_on() -> None:
    code = (
        b"\xb0\x01\xe6\x61"  #         mov al, 1; out 0x61, al: open the gate of timer 2
        b"\xe4\x61\xa8\x20\x74\xfa"  # wait: in al, 0x61; test al, 0x20; jz wait
        b"\xe4\x61\xa8\x10\x74\xfa"  # the refresh toggle
        b"\xe4\x61\xa8\x10\x75\xfa" + exit_with(1)
    )
    with Vmm(flat(code)) as vmm:
        assert vmm.run(60).code == 1


def test_keyboard_controller_is_in_snapshots() -> None:
    code = out(0x64, 0x60) + out(0x60, 0x03) + HALT + bytes([0xB0, 0x20]) + ASKS_KEYBOARD_CONTROLLER
    with Vmm(flat(code)) as vmm:
        assert vmm.run(60).reason is ExitReason.HALT
        with vmm.snapshot().fork() as fork:
            assert fork.run(60).code == 0x23, "what was written; the second port, which is not there, stays off"


def test_keyboard_controller_resets() -> None:
    with Vmm(flat(out(0x64, 0xFE))) as vmm:
        assert vmm.run(60).reason is ExitReason.RESET


def test_exit_code_has_the_width_that_was_written() -> None:
    code = b"\x66\xb8\x78\x56\x34\x12\xba\xf4\x00\x66\xef"  # mov eax, 0x12345678; mov dx, 0xf4; out dx, eax
    with Vmm(flat(code)) as vmm:
        assert vmm.run(60).code == 0x12345678


def test_exit_port_can_be_elsewhere_or_nowhere() -> None:
    with Vmm(flat(out(0x500, 7), exit_port=0x500)) as vmm:
        assert vmm.run(60).code == 7
    with Vmm(flat(exit_with(7) + HALT, exit_port=None)) as vmm:
        assert vmm.run(60).reason is ExitReason.HALT
        assert vmm.unanswered == [Unanswered("pio", 0xF4, 0, 1)]


def test_clock_tells_the_century() -> None:
    code = b"\xb0\x32\xe6\x70\xe4\x71\xe6\xf4"  # mov al, 0x32; out 0x70, al; in al, 0x71; out 0xf4, al
    with Vmm(flat(code)) as vmm:
        assert vmm.run(60).code == 0x20, "BCD"


def test_unanswered_accesses_are_counted() -> None:
    code = read_in(0x80) + read_in(0x80) + out(0x81, 1) + exit_with(0)
    with Vmm(flat(code)) as vmm:
        vmm.run(60)
        assert vmm.unanswered == [Unanswered("pio", 0x80, 2, 0), Unanswered("pio", 0x81, 0, 1)]


def test_unanswered_mmio_reads_all_one_bits() -> None:
    code = b"\xb8\x00\x00\x00\xd0\x8a\x00\xe6\xf4"  # mov eax, 0xd0000000; mov al, [rax]; out 0xf4, al
    with Vmm(flat(code, "long64")) as vmm:
        assert vmm.run(60).code == 0xFF
        assert vmm.unanswered == [Unanswered("mmio", 0xD0000000, 1, 0)]

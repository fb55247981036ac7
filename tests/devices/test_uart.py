"""The registers of the 16550A as a guest sees them, compared with a model of the data sheet.

Covers src/devices/uart.rs, src/devices/uart_receiver.rs, src/devices/line.rs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
from guests import exit_with, flat, out
from hypothesis import given, settings
from hypothesis import strategies as st
from port_script import answers, machine, read, run, write
from pyvmm import Vmm

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
COM1 = 0x3F8
RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(COM1, COM1 + 8)
FCR, DLL, DLM = IIR, RBR, IER
EXAMPLES = 1000 if os.environ.get("PYVMM_STRESS_S") else 50


@dataclass
class Model:
    """A 16550A in loop-back mode or without input, after its data sheet. Transmission takes no time."""

    ier: int = 0
    fcr: int = 0
    lcr: int = 3
    mcr: int = 8
    lines: int = 0xB0
    deltas: int = 0
    scratch: int = 0
    divisor: list[int] = field(default_factory=lambda: [12, 0])
    fifo: list[int] = field(default_factory=list)
    overrun: bool = False
    thr_pending: bool = False

    def cause(self) -> int:
        trigger = {0: 1, 1: 4, 2: 8, 3: 14}[self.fcr >> 6] if self.fcr & 1 else 1
        if self.ier & 4 and self.overrun:
            return 6
        if self.ier & 1 and self.fifo:
            return 4 if len(self.fifo) >= trigger else 0xC
        if self.ier & 2 and self.thr_pending:
            return 2
        return 0 if self.ier & 8 and self.deltas else 1

    def read(self, port: int) -> int:
        if self.lcr & 0x80 and port in (DLL, DLM):
            return self.divisor[port - DLL]
        match port:
            case 0x3F8:
                return self.fifo.pop(0) if self.fifo else 0
            case 0x3FA:
                cause = self.cause()
                self.thr_pending &= cause != 2
                return cause | (0xC0 if self.fcr & 1 else 0)
            case 0x3FD:
                status = 0x60 | bool(self.fifo) | self.overrun << 1
                self.overrun = False
                return status
            case 0x3FE:
                status, self.deltas = self.lines | self.deltas, 0
                return status
        return {IER: self.ier, LCR: self.lcr, MCR: self.mcr, SCR: self.scratch}[port]

    def write(self, port: int, value: int) -> None:
        if self.lcr & 0x80 and port in (DLL, DLM):
            self.divisor[port - DLL] = value
            return
        match port:
            case 0x3F8:
                self.thr_pending = True
                if self.mcr & 0x10:
                    self.loop_back(value)
            case 0x3F9:
                if (self.ier ^ value) & 2:
                    self.thr_pending = bool(value & 2)
                self.ier = value & 0xF
            case 0x3FA:
                self.control_fifo(value if value & 1 else 0)
            case 0x3FB:
                self.lcr = value
            case 0x3FC:
                self.mcr = value & 0x1F
                self.set_lines()
            case 0x3FF:
                self.scratch = value

    def loop_back(self, value: int) -> None:
        if len(self.fifo) < (16 if self.fcr & 1 else 1):
            self.fifo.append(value)
            return
        self.overrun = True
        if not self.fcr & 1:
            self.fifo = [value]

    def control_fifo(self, value: int) -> None:
        switches = (value ^ self.fcr) & 1
        if switches or value & 2:
            self.fifo = []
        if switches or value & 4:
            self.thr_pending = True
        self.fcr = value & 0xC1

    def set_lines(self) -> None:
        m = self.mcr
        looped = (m & 2) << 3 | (m & 1) << 5 | (m & 4) << 4 | (m & 8) << 4
        before, self.lines = self.lines, looped if m & 0x10 else 0xB0
        changed = before ^ self.lines
        self.deltas |= (changed & ~(0x40 & self.lines)) >> 4


STEP = st.one_of(
    st.tuples(st.sampled_from([RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR]), st.none() | st.integers(0, 255)),
    st.tuples(st.just(RBR), st.integers(0, 255)),
    st.tuples(st.just(MCR), st.just(0x1B)),
    st.tuples(st.just(LCR), st.just(3)),
    st.tuples(st.just(FCR), st.sampled_from([1, 0x41, 0xC7, 3, 5, 0xC2, 0])),
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(STEP, max_size=200))
def test_any_accesses_give_what_the_data_sheet_says(steps: list[tuple[int, int | None]]) -> None:
    model, expected = Model(), []
    for port, value in steps:
        if value is None:
            expected.append(model.read(port))
        else:
            model.write(port, value)
    assert answers(*steps) == expected


@pytest.mark.parametrize(
    ("fcr", "status"),
    [(7, 0x60), (3, 0x60), (1, 0x60), (2, 0x61), (0, 0x61)],
    ids=["clears both", "clears the receiver", "switches the FIFOs", "not without the enable bit", "changes nothing"],
)
def test_fifo_control_empties_the_receiver(fcr: int, status: int) -> None:
    steps = [read(LSR), write(FCR, fcr), read(LSR)]
    with machine(steps) as vmm:
        vmm.serial.send(b"x")
        assert run(vmm, steps) == [0x61, status]


def test_linux_finds_a_16550a() -> None:
    """What Linux's 8250 driver does to tell the kinds of UARTs apart."""
    assert answers(
        write(IER, 0), read(IER), write(IER, 0xF), read(IER), write(IER, 0),
        write(MCR, 0x1A), read(MSR), write(MCR, 8),
        write(LCR, 0xBF), read(IIR), write(LCR, 0), write(FCR, 1), read(IIR), write(FCR, 0), read(IIR),
        write(SCR, 0x5A), read(SCR), write(SCR, 0xA5), read(SCR),
        write(LCR, 0x80), write(DLL, 1), write(DLM, 0), read(DLL), read(DLM), write(LCR, 3), read(IER),
        write(IER, 2), read(IIR), write(IER, 0), write(IER, 2), read(IIR), read(IIR),
    ) == [0, 0xF, 0x92, 1, 0xC1, 1, 0x5A, 0xA5, 1, 0, 0, 2, 2, 1]  # fmt: skip


def test_a_break_is_a_zero_with_its_error() -> None:
    steps = [write(FCR, 1)] + [read(LSR), read(LSR), read(RBR)] * 3
    with machine(steps) as vmm:
        vmm.serial.send(b"a")
        vmm.serial.send_break()
        vmm.serial.send(b"b")
        # The switch of the FIFOs loses the byte that the UART held. The rest comes with the next
        # access.
        assert run(vmm, steps) == [0x60, 0xF1, 0, 0x61, 0x61, ord("b"), 0x60, 0x60, 0]


# Count the interrupts of IRQ 4 at 0x3000, and store IIR at 0x3004. Real mode, through the PIC.
HANDLER = (
    b"\x50\x52"  #                         push ax; push dx
    b"\xff\x06\x00\x30"  #                 inc word [0x3000]
    b"\xba\xfa\x03\xec\xa2\x04\x30"  #     mov dx, 0x3fa; in al, dx; mov [0x3004], al
    b"\xb0\x20\xe6\x20\x5a\x58\xcf"  #     mov al, 0x20; out 0x20, al; pop dx; pop ax; iret
)
SET_UP = (
    b"\xfa\x31\xc0\x8e\xd8\x8e\xd0\xbc\x00\x70"  # cli; xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7000
    b"\xc7\x06\x30\x00\x00\x20\xc7\x06\x32\x00\x00\x00"  # the vector of IRQ 4 is 0:0x2000
    b"\xb0\x11\xe6\x20\xb0\x08\xe6\x21\xb0\x04\xe6\x21\xb0\x01\xe6\x21"  # the PIC: vectors from 8
    b"\xb0\xef\xe6\x21"  # only IRQ 4
)
WAIT = b"\xfb\xb9\x10\x27\xe2\xfe\xfa" + exit_with(0)  # sti; mov cx, 10000; loop $; cli


@pytest.mark.parametrize(("mcr", "interrupts"), [(8, 1), (0, 0), (3, 0), (0xB, 1)])
def test_out2_connects_the_interrupt_line(mcr: int, interrupts: int) -> None:
    code = SET_UP + out(0x3FC, mcr) + out(0x3F9, 2) + WAIT
    with Vmm(flat(code, irqchip=True)) as vmm:
        vmm.memory.write(0x2000, HANDLER)
        assert vmm.run(DEADLINE_S).code == 0
        assert vmm.memory.read_u16(0x3000) == interrupts
        assert not interrupts or vmm.memory.read(0x3004, 1) == b"\x02", "the transmitter is empty"


def test_the_line_is_connected_at_the_start() -> None:
    code = SET_UP + out(0x3F9, 2) + WAIT
    with Vmm(flat(code, irqchip=True)) as vmm:
        vmm.memory.write(0x2000, HANDLER)
        assert vmm.run(DEADLINE_S).code == 0
        assert vmm.memory.read_u16(0x3000) == 1

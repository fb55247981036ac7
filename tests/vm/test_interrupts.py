"""Interrupt lines, messages, NMIs, and eventfds in the kernel: a device's two halves.

Covers src/devices/line.rs, src/py/vmm/interrupts.rs, src/py/vmm/eventfds.rs.
"""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any

import pytest
from guests import HALT, SPIN, exit_with, flat
from pyvmm import ConfigError, EventFd, EventOps, Events, ExitReason, KvmError, StateError, Vmm

pytestmark = pytest.mark.kvm

DEADLINE_S = 60
LINE = 5
READY, COUNT = 0x10, 0x12


def out(port: int, value: int) -> bytes:
    return bytes([0xB0, value, 0xE6, port])  # mov al, value; out port, al


# Real mode: program the first PIC for vectors from 8, point its vector 5 to the handler, say ready,
# and wait.
SET_UP = (
    out(0x20, 0x11) + out(0x21, 8) + out(0x21, 4) + out(0x21, 1) + out(0x21, 0)
    + b"\xc7\x06\x34\x00\x00\x11"  # mov word [0x34], 0x1100
    + b"\xc7\x06\x36\x00\x00\x00"  # mov word [0x36], 0
    + b"\xfb"  #                     sti
    + out(READY, 0)
    + b"\xf4\xeb\xfd"  #             hlt; jmp -3
)  # fmt: skip
# At 0x1100: end the interrupt, count it, tell.
HANDLER = (
    out(0x20, 0x20)
    + b"\xfe\x06\x00\x20"  # inc byte [0x2000]
    + b"\xa0\x00\x20"  #     mov al, [0x2000]
    + bytes([0xE6, COUNT])  # out COUNT, al
    + b"\xcf"  #             iret
)
CODE = SET_UP + b"\x90" * (0x100 - len(SET_UP)) + HANDLER


class Told:
    """What the guest says by its two ports."""

    def __init__(self, vmm: Vmm, wanted: int) -> None:
        self.vmm = vmm
        self.wanted = wanted
        self.ready = threading.Event()
        self.counts: list[int] = []
        self.counted = threading.Condition()
        vmm.add_pio_device(READY, 1, self)
        vmm.add_pio_device(COUNT, 1, Counted(self))

    def has(self, count: int) -> bool:
        return len(self.counts) >= count

    def write(self, _offset: int, _size: int, _value: int) -> None:
        self.ready.set()


class Counted:
    def __init__(self, told: Told) -> None:
        self.told = told

    def write(self, _offset: int, _size: int, value: int) -> None:
        with self.told.counted:
            self.told.counts.append(value)
            self.told.counted.notify_all()
        if value == self.told.wanted:
            self.told.vmm.stop()


def machine(wanted: int) -> tuple[Vmm, Told]:
    vmm = Vmm(flat(CODE, irqchip=True))
    return vmm, Told(vmm, wanted)


def test_a_line_is_pulsed_from_another_thread() -> None:
    vmm, told = machine(3)
    with vmm:

        def work() -> None:
            assert told.ready.wait(DEADLINE_S)
            line = vmm.irq(LINE)
            for count in (1, 2, 3):
                line.pulse()
                with told.counted:
                    assert told.counted.wait_for(partial(told.has, count), DEADLINE_S)

        thread = threading.Thread(target=work)
        thread.start()
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
        thread.join(DEADLINE_S)
        assert told.counts == [1, 2, 3]
        assert repr(vmm.irq(LINE)) == "IrqLine(5)"
        assert vmm.irq(LINE).line == LINE


def test_a_line_is_raised_and_lowered_from_a_callback() -> None:
    vmm, told = machine(2)

    class Again:
        def write(self, _offset: int, _size: int, value: int) -> None:
            told.counts.append(value)
            line.lower()
            if value == 2:
                vmm.stop()
            else:
                line.raise_()

    with vmm:
        line = vmm.irq(LINE)
        vmm.remove_pio_device(COUNT)
        vmm.add_pio_device(COUNT, 1, Again())
        vmm.remove_pio_device(READY)
        vmm.add_pio_device(READY, 1, type("Ready", (), {"write": lambda *_: line.raise_()})())
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
        assert told.counts == [1, 2]


def test_an_eventfd_pulses_a_line_in_the_kernel() -> None:
    vmm, told = machine(1)
    with vmm, EventFd() as event:
        vmm.add_irqfd(event, LINE)
        vmm.remove_pio_device(READY)
        vmm.add_pio_device(READY, 1, type("Ready", (), {"write": lambda *_: event.write(1)})())
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
        assert told.counts == [1]
        with pytest.raises(KvmError):
            vmm.add_irqfd(event, LINE)
        vmm.remove_irqfd(event, LINE)
        vmm.add_irqfd(event, LINE)


def test_a_message_reaches_the_vector_it_names() -> None:
    vmm, told = machine(1)
    taken: list[bool] = []
    with vmm:
        vmm.vcpus[0].lapic.svr = 0x1FF  # switched on
        vmm.memory.write(0x21 * 4, b"\x00\x11\x00\x00")  # vector 0x21 leads to the handler
        vmm.remove_pio_device(READY)
        ready = type("Ready", (), {"write": lambda *_: taken.append(vmm.msi(0xFEE0_0000, 0x21))})
        vmm.add_pio_device(READY, 1, ready())
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
    assert taken == [True]
    assert told.counts == [1]


@pytest.mark.parametrize("irqchip", [True, False])
def test_a_non_maskable_interrupt_comes_from_another_thread(irqchip: bool) -> None:
    # Its vector 2 leads to the exit.
    code = b"\xc7\x06\x08\x00\x00\x11\xc7\x06\x0a\x00\x00\x00" + out(READY, 0) + SPIN
    started = threading.Event()

    class Ready:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            started.set()

    with Vmm(flat(code, irqchip=irqchip)) as vmm:
        vmm.memory.write(0x1100, exit_with(2))
        vmm.add_pio_device(READY, 1, Ready())

        def work() -> None:
            assert started.wait(DEADLINE_S)
            vmm.nmi()

        thread = threading.Thread(target=work)
        thread.start()
        assert vmm.run(DEADLINE_S).code == 2
        thread.join(DEADLINE_S)
        with pytest.raises(ConfigError, match="no vCPU 7"):
            vmm.nmi(7)


def test_a_non_maskable_interrupt_comes_from_the_vcpus_own_callback() -> None:
    code = b"\xc7\x06\x08\x00\x00\x11\xc7\x06\x0a\x00\x00\x00" + out(READY, 0) + SPIN
    with Vmm(flat(code)) as vmm:
        vmm.memory.write(0x1100, exit_with(2))
        vmm.add_pio_device(READY, 1, type("Ready", (), {"write": lambda *_: vmm.nmi()})())
        assert vmm.run(DEADLINE_S).code == 2


def test_without_an_interrupt_controller_there_are_no_lines() -> None:
    with Vmm(flat(HALT)) as vmm, EventFd() as event:
        for call in (lambda: vmm.irq(4), lambda: vmm.msi(0xFEE0_0000, 1), lambda: vmm.add_irqfd(event, 1)):
            with pytest.raises(StateError, match="irqchip=True"):
                call()


def test_lines_that_there_are_not_are_refused() -> None:
    with Vmm(flat(HALT, irqchip=True)) as vmm:
        with pytest.raises(ConfigError, match="0 to 23"):
            vmm.irq(24)
        for number in (-1, 1 << 32, "x", None):
            with pytest.raises((TypeError, OverflowError)):
                vmm.irq(number)  # type: ignore[arg-type]
        line = vmm.irq(1)
    with pytest.raises(StateError, match="closed"):
        line.pulse()


class Doorbell:
    """A subscriber: the half of a device that lives in the loop."""

    def __init__(self, vmm: Vmm, event: EventFd, rings: int) -> None:
        self.vmm, self.event, self.left = vmm, event, rings

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.event))

    def process(self, _events: Events, _ops: EventOps) -> None:
        self.left -= self.event.read()
        if self.left == 0:
            self.vmm.stop()


def test_a_write_rings_a_subscriber_without_an_exit() -> None:
    exits: list[object] = []
    # out 0x30, al three times, then spin
    with Vmm(flat(out(0x30, 1) * 3 + SPIN)) as vmm, EventFd() as event:
        vmm.on_exit("io", lambda _vcpu, exit: exits.append(exit))
        vmm.add_ioeventfd(0x30, event, pio=True)
        vmm.add_subscriber(Doorbell(vmm, event, 3))
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
    assert exits == []


@pytest.mark.parametrize(
    ("length", "instruction"), [(1, b"\x88\x03"), (2, b"\x66\x89\x03"), (4, b"\x89\x03"), (8, b"\x48\x89\x03")]
)
def test_datamatch_counts_one_value_of_one_width(length: int, instruction: bytes) -> None:
    # 64 bits: mov ebx, 0xd0000000; mov eax, 7; mov [rbx], (r/e)ax; mov eax, 8; the same; exit
    write = b"\xb8\x07\0\0\0" + instruction + b"\xb8\x08\0\0\0" + instruction
    with Vmm(flat(b"\xbb\x00\x00\x00\xd0" + write + exit_with(1), "long64")) as vmm, EventFd() as event:
        vmm.add_ioeventfd(0xD000_0000, event, length=length, datamatch=7)
        assert vmm.run(DEADLINE_S).code == 1
        assert event.read() == 1
        assert [(row.address, row.writes) for row in vmm.unanswered] == [(0xD000_0000, 1)], "the other value"


def test_an_eventfd_is_taken_back() -> None:
    with Vmm(flat(out(0x30, 1) + exit_with(1))) as vmm, EventFd() as event:
        vmm.add_ioeventfd(0x30, event, pio=True)
        with pytest.raises(KvmError):
            vmm.add_ioeventfd(0x30, event, pio=True)
        vmm.remove_ioeventfd(0x30, event, pio=True)
        with pytest.raises(KvmError):
            vmm.remove_ioeventfd(0x30, event, pio=True)
        assert vmm.run(DEADLINE_S).code == 1
        with pytest.raises(BlockingIOError):
            event.read()


@pytest.mark.parametrize(
    "arguments",
    [
        {"address": 0x1_0000, "pio": True},
        {"address": 0x30, "length": 8, "datamatch": 1, "pio": True},
        {"address": 0x30, "length": 3, "datamatch": 1},
        {"address": 0x30, "length": 1, "datamatch": 256},
        {"address": 0x30, "datamatch": 1},
        {"address": 0x30, "length": 1},
    ],
    ids=str,
)
def test_writes_that_there_are_not_are_refused(arguments: dict[str, Any]) -> None:
    with Vmm(flat(HALT)) as vmm, EventFd() as event:
        address = arguments.pop("address")
        with pytest.raises(ConfigError):
            vmm.add_ioeventfd(address, event, **arguments)


def test_closed_eventfds_and_machines_are_refused() -> None:
    event = EventFd()
    vmm = Vmm(flat(HALT))
    event.close()
    with pytest.raises(ValueError, match="closed"):
        vmm.add_ioeventfd(0x30, event, pio=True)
    vmm.close()
    with EventFd() as open_event, pytest.raises(StateError):
        vmm.add_ioeventfd(0x30, open_event, pio=True)


def test_asyncio_code_is_a_devices_back_half() -> None:
    """The doorbell rings a coroutine, which answers in memory and by an interrupt."""
    vmm, told = machine(1)

    class Back:
        def __init__(self, event: EventFd) -> None:
            self.event = event

        def init(self, ops: EventOps) -> None:
            ops.add(Events(self.event, drain=True))  # read before the coroutine is scheduled: it is called once

        async def process(self, events: Events, _ops: EventOps) -> None:
            assert events.count == 1
            await asyncio.sleep(0)
            vmm.irq(LINE).pulse()

    async def run() -> None:
        with EventFd() as event:
            vmm.remove_pio_device(READY)
            vmm.add_ioeventfd(READY, event, pio=True)
            vmm.add_subscriber(Back(event))
            async with vmm:
                exit = await vmm.run_async(DEADLINE_S)
                assert exit.reason is ExitReason.STOPPED

    asyncio.run(run())
    assert told.counts == [1]

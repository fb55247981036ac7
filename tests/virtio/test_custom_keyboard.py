"""A keyboard in Python, driven by a flat guest and by Linux's own driver. Covers examples/virtio_keyboard.py."""

from __future__ import annotations

import re
import struct
import threading

import pytest
from pyvmm import Vmm
from virtio_driver import BUFFERS, Driver, machine, readable, writable
from virtio_linux import booted, config, running

from examples.virtio_keyboard import Keyboard

kvm = pytest.mark.kvm


@kvm
def test_a_keyboard_answers_what_the_driver_selects() -> None:
    keyboard = Keyboard()
    with Vmm(machine(virtio=[keyboard])) as vmm:
        driver = Driver(vmm)
        driver.write(0x100, 0x0001)
        size = driver.read(0x100) >> 16 & 0xFF
        name = b"".join(driver.read(0x108 + at).to_bytes(4, "little") for at in range(0, size, 4))
        assert name[:size] == b"pyvmm keyboard"
        driver.write(0x100, 0x0111)
        assert (driver.read(0x100), driver.read(0x108)) == (0x50111, 0xC3FF0000)
        driver.write(0x100, 0x0211)
        assert driver.read(0x100) == 0x0211
        driver.start(queues=2)
        keyboard.type("p")
        events = []
        for _ in range(4):
            assert driver.exchange(0, writable(BUFFERS, 8)) == 8
            events.append(struct.unpack("<HHI", vmm.memory.read(BUFFERS, 8)))
        assert events == [(1, 25, 1), (0, 0, 0), (1, 25, 0), (0, 0, 0)]
        assert driver.exchange(1, readable(BUFFERS, 8)) == 0


@pytest.mark.linux
@pytest.mark.timeout(600)
def test_linux_reads_a_key_also_in_a_fork() -> None:
    with Vmm(config(virtio=[Keyboard()])) as vmm:
        booted(vmm)
        snapshot = vmm.snapshot()
    keyboard, ends = Keyboard(), threading.Event()

    def press() -> None:
        # Nothing is kept for a program that has not opened the file yet.
        while not ends.wait(0.05):
            keyboard.type("a")

    presser = threading.Thread(target=press)
    with running(snapshot.fork(virtio={"virtio0": keyboard})) as guest:
        guest.type("dump /dev/input/event0 24")
        presser.start()
        try:
            output = guest.end()
        finally:
            ends.set()
            presser.join()
        # struct input_event: 16 bytes of time, then type, code and value.
        assert re.search(r"01001e000[01]000000", output), output

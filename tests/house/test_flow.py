"""The flow of one run, hop by hop: the list in the crate's documentation, as a guest goes through it."""

from __future__ import annotations

import threading

import pytest
from guests import exit_with, flat, out
from pyvmm import EventFd, EventOps, Events, ExitReason, SerialConfig, Vmm, VmRunState

pytestmark = pytest.mark.kvm


def test_a_guest_goes_through_every_hop_in_order() -> None:
    hops: list[str] = []
    main = threading.get_ident()

    class Subscriber:
        """Kicked off by the console's callable: from the device to the loop to Python and back to the loop."""

        def __init__(self) -> None:
            self.fd = EventFd()

        def init(self, ops: EventOps) -> None:
            hops.append("init")
            ops.add(Events(self.fd))

        def process(self, events: Events, ops: EventOps) -> None:
            assert threading.get_ident() == main
            hops.append(f"subscriber while {vmm.state}")
            self.fd.read()

    def console(piece: bytes) -> None:
        assert threading.get_ident() == main
        hops.append(f"device's output {piece!r}")
        subscriber.fd.write()
        # The guest waits for this byte before it goes on to its exit.
        vmm.serial.send(b"y")

    class Device:
        """In Python, on the vCPU's thread."""

        def write(self, offset: int, size: int, value: int) -> None:
            assert threading.get_ident() != main
            hops.append(f"Python device {value}")

    class Bell:
        """The guest's ioeventfd; the guest waits for it."""

        def init(self, ops: EventOps) -> None:
            ops.add(Events(bell))

        def process(self, events: Events, ops: EventOps) -> None:
            hops.append(f"ioeventfd {bell.read()}")
            vmm.serial.send(b"z")

    # Print "x" on the built-in port, wait for input, write a Python port, ring, wait for input,
    # write a port nobody answers, write the exit port.
    wait = b"\xba\xfd\x03\xec\xa8\x01\x74\xf8\xba\xf8\x03\xec"
    code = out(0x3F8, ord("x")) + wait + out(0x500, 7) + out(0x30, 0) + wait + out(0x80, 0) + exit_with(5)
    subscriber, bell = Subscriber(), EventFd()
    with Vmm(flat(code, serial=SerialConfig(output=console))) as vmm:
        vmm.add_subscriber(subscriber)
        vmm.add_pio_device(0x500, 1, Device())
        vmm.add_ioeventfd(0x30, bell, pio=True)
        vmm.add_subscriber(Bell())
        assert vmm.exit_handler.keep_running()
        exit = vmm.run(60)
        assert vmm.state is VmRunState.EXITING
        hops += [f"unanswered {count.address:#x}" for count in vmm.unanswered if count.address is not None]
    hops.append(str(exit))
    (subscribed,) = (hop for hop in hops if hop.startswith("subscriber while"))
    hops.remove(subscribed)
    assert hops[:2] == ["init", "device's output b'x'"]
    assert hops[2:] == ["Python device 7", "ioeventfd 1", "unanswered 0x80", "code 5 (vCPU 0)"]
    assert exit.reason is ExitReason.CODE

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

    # Print "x" on the built-in port, wait for input, write a port nobody answers, write the exit port.
    code = out(0x3F8, ord("x")) + b"\xba\xfd\x03\xec\xa8\x01\x74\xf8" + out(0x80, 0) + exit_with(5)
    subscriber = Subscriber()
    with Vmm(flat(code, serial=SerialConfig(output=console))) as vmm:
        vmm.add_subscriber(subscriber)
        assert vmm.exit_handler.keep_running()
        exit = vmm.run(60)
        assert vmm.state is VmRunState.EXITING
        hops += [f"unanswered {count.address:#x}" for count in vmm.unanswered if count.address is not None]
    hops.append(str(exit))
    assert hops[:2] == ["init", "device's output b'x'"]
    assert hops[2].startswith("subscriber while")
    assert hops[3:] == ["unanswered 0x80", "code 5 (vCPU 0)"]
    assert exit.reason is ExitReason.CODE

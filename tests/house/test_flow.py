"""The flow of one run, hop by hop, as the crate's documentation lists it, and docs/architecture.md's pictures.

The pictures are compared with the hops that a build with debug assertions records: `make checked`.

Covers src/hop.rs, src/py/hop.rs.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import pytest
from conftest import ROOT
from guests import exit_with, flat, out
from pyvmm import EventFd, EventManager, EventOps, Events, ExitReason, SerialConfig, Trace, Vmm, VmRunState

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm


# Long because the guest's code, what answers it and the order of the hops are read together.
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
        # The guest waits for this byte before its exit.
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


class Hop(NamedTuple):
    """A function that a flow enters."""

    file: str
    function: str

    @property
    def room(self) -> str:
        return self.file.split("/")[1].removesuffix(".rs")


Record = Callable[[bool], list[tuple[str | None, Hop]]]


def pictures() -> list[list[list[Hop]]]:
    """The flows of docs/architecture.md, each in the calls that a blank line separates."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    blocks = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    calls = [[re.findall(r"(src/\S+\.rs) (\w+)", call) for call in block.split("\n\n")] for block in blocks]
    return [[[Hop(*hop) for hop in call] for call in flow] for flow in calls]


@pytest.fixture
def record() -> Iterator[Record]:
    """Begin to record hops, or end it: thread and hop of each since the last call."""
    recorder = getattr(Trace, "_record_hops", None)
    if recorder is None:
        pytest.skip("hops are recorded by builds with debug assertions: make checked")
    yield lambda on: [(thread, Hop(file, function)) for thread, file, function in recorder(on)]
    recorder(False)


def through(hops: list[Hop], last: Hop) -> list[Hop]:
    """As far as the second time of this one."""
    return hops[: hops.index(last, 1) + 1]


def without(hops: list[Hop], *functions: str) -> list[Hop]:
    return [hop for hop in hops if hop.function not in functions]


def test_each_flow_enters_a_room_once() -> None:
    flows = pictures()
    assert [len(flow) for flow in flows] == [1, 1, 3]
    for call in itertools.chain(*flows):
        rooms = [room for room, _ in itertools.groupby(call, lambda hop: hop.room)]
        # A flow may end where it began.
        assert len(set(rooms)) == len(rooms) - (rooms[0] == rooms[-1])


def test_the_pictures_have_every_hop_of_the_code_and_no_other() -> None:
    function = r"\bfn (\w+)(?:(?!\bfn ).)*?\{\s*hop!\(\);"
    sources = [file for file in (ROOT / "src").rglob("*.rs") if file.name != "hop.rs"]
    marked = {
        Hop(str(file.relative_to(ROOT)), name)
        for file in sources
        for name in re.findall(function, file.read_text(), re.DOTALL)
    }
    assert marked == {hop for flow in pictures() for call in flow for hop in call}
    assert sum(file.read_text().count("hop!();") for file in sources) == len(marked)


def test_a_port_write_makes_the_hops_of_the_picture(record: Record) -> None:
    class Device:
        def write(self, offset: int, size: int, value: int) -> None:
            if value == 1:
                record(True)

    with Vmm(flat(out(0x500, 1) + out(0x500, 2) + exit_with(0))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        vmm.run(60)
    hops = [hop for thread, hop in record(False) if thread == "vcpu_0"]
    assert [through(hops, hops[0])] == pictures()[0]


def test_an_event_makes_the_hops_of_the_picture(record: Record) -> None:
    class Subscriber:
        def __init__(self) -> None:
            self.fd = EventFd()

        def init(self, ops: EventOps) -> None:
            ops.add(Events(self.fd))

        def process(self, events: Events, ops: EventOps) -> None:
            self.fd.read()

    manager, subscriber = EventManager(), Subscriber()
    manager.add_subscriber(subscriber)
    record(True)
    for _ in range(2):
        subscriber.fd.write()
        assert manager.run() == 1
    hops = [hop for _, hop in record(False)]
    assert [through(hops, hops[0])] == pictures()[1]


def test_a_snapshot_and_its_fork_make_the_hops_of_the_picture(record: Record) -> None:
    with Vmm(flat(exit_with(5))) as vmm:
        record(True)
        snapshot = vmm.snapshot()
        taken = [hop for _, hop in record(True)]
        fork = snapshot.fork()
        forked = [hop for _, hop in record(True)]
        assert fork.run(60).code == 5
        ran = record(False)
        fork.close()
    assert [taken, forked] == pictures()[2][:2]
    run = pictures()[2][2]
    # The loop turns beside the vCPU's thread.
    caller = [hop for thread, hop in ran if thread != "vcpu_0"]
    vcpu = [hop for thread, hop in ran if thread == "vcpu_0"]
    if vcpu:
        skipped = "start_vcpus" if "begin_here" in [hop.function for hop in caller] else "begin_here"
        assert [hop for hop in caller if hop.room == "vmm"] + vcpu[:3] == without(run, skipped)
    else:
        assert caller[:4] == without(run, "start_vcpus", "serve")

"""Traces: `Vmm.trace` and the file that it writes, in the trace-event format.

Covers src/event/recorded.rs, src/py/recorded.rs.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from guests import SPIN, count_vcpus, exit_with, flat, out, print_text, read_in
from hypothesis import given, settings
from hypothesis import strategies as st
from pyvmm import (
    CpuConfig,
    EventFd,
    EventManager,
    EventOps,
    Events,
    SerialConfig,
    StateError,
    StreamError,
    Vmm,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.kvm

CATEGORIES = {"guest", "exit", "device", "event", "callback"}
WRITE_FOR_EVER = b"\xba\x80\x00\xee\xeb\xfd"  # mov dx, 0x80; out dx, al; jmp back


class Hop(NamedTuple):
    """A complete event; times in nanoseconds."""

    track: str
    category: str
    name: str
    start: int
    end: int
    parent: Hop | None
    values: dict[str, Any]


def hops(path: Path) -> list[Hop]:
    """The file, checked against the format: every event whole, children inside their parents on the same track."""
    events = json.loads(path.read_text())
    assert isinstance(events, list)
    named = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert [event["args"] for event in events if event["name"] == "process_name"] == [{"name": "pyvmm"}]
    assert len(set(named.values())) == len(named)
    tracks: dict[int, list[dict[str, Any]]] = {track: [] for track in named}
    for event in events:
        assert event["pid"] == os.getpid()
        if event["ph"] == "M":
            continue
        assert event["ph"] == "X"
        assert event["cat"] in CATEGORIES
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        tracks[event["tid"]].append(event)
    return sorted(
        (hop for track, on_it in tracks.items() for hop in nested(named[track], on_it)), key=lambda hop: hop.start
    )


def nested(track: str, events: list[dict[str, Any]]) -> list[Hop]:
    """The events of one track with their parents."""
    found: list[Hop] = []
    open_ones: list[Hop] = []
    times = [(round(1000 * e["ts"]), round(1000 * e["ts"]) + round(1000 * e["dur"]), e) for e in events]
    for start, end, event in sorted(times, key=lambda one: (one[0], -one[1])):
        while open_ones and open_ones[-1].end <= start:
            open_ones.pop()
        parent = open_ones[-1] if open_ones else None
        assert parent is None or end <= parent.end, f"{event} is not inside {parent}"
        hop = Hop(track, event["cat"], event["name"], start, end, parent, event.get("args", {}))
        found.append(hop)
        open_ones.append(hop)
    return found


def of(all_hops: list[Hop], category: str) -> list[Hop]:
    return [hop for hop in all_hops if hop.category == category]


class Bell:
    """Half a device on the vCPU's thread, half in the loop."""

    def __init__(self) -> None:
        self.fd = EventFd()

    def write(self, offset: int, size: int, value: int) -> None:
        self.fd.write()

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd))

    def process(self, events: Events, ops: EventOps) -> None:
        self.fd.read()
        vmm = self.vmm
        vmm.stop()

    vmm: Vmm


def test_a_guests_hops_are_there_in_order_and_nested(tmp_path: Path) -> None:
    path, bell = tmp_path / "trace.json", Bell()
    with Vmm(flat(out(0x510, 1) + SPIN)) as vmm:
        bell.vmm = vmm
        vmm.add_pio_device(0x510, 1, bell)
        vmm.add_subscriber(bell)
        with vmm.trace(path) as trace:
            assert trace.path == path
            assert str(vmm.run(60)) == "stopped"
    all_hops = hops(path)
    on_vcpu = [hop for hop in all_hops if hop.track == "vcpu_0"]
    assert [(hop.category, hop.name) for hop in on_vcpu] == [
        ("guest", "guest"),
        ("exit", "io write 0x510"),
        ("device", "Bell"),
        ("callback", "Bell.write"),
        ("guest", "guest"),
        ("exit", "interrupted"),
    ]
    guest, exit, device, write, _, _ = on_vcpu
    assert guest.end == exit.start
    assert (exit.parent, device.parent, write.parent) == (None, exit, device)
    assert device.values == {"bus": "pio", "access": "write", "address": "0x510", "size": 1}
    (process,) = (hop for hop in of(all_hops, "callback") if hop.track == "loop")
    event = process.parent
    assert event is not None
    assert (process.name, event.category, event.name) == ("Bell.process", "event", f"fd {bell.fd.fileno()}")
    assert event.values["fd"] == bell.fd.fileno()
    assert exit.start < device.start < write.start < event.start <= process.start


def test_built_in_devices_and_their_events_are_there(tmp_path: Path) -> None:
    path, printed = tmp_path / "trace.json", list[bytes]()
    code = print_text(b"x") + read_in(0x70) + out(0x80, 0) + exit_with(0)
    with Vmm(flat(code, serial=SerialConfig(output=printed.append))) as vmm, vmm.trace(path):
        vmm.run(60)
    all_hops = hops(path)
    devices = [(hop.name, hop.values["access"], hop.values["address"]) for hop in of(all_hops, "device")]
    assert devices == [("Serial", "write", "0x3f8"), ("Rtc", "read", "0x70"), ("DebugExit", "write", "0xf4")]
    nobodys = next(hop for hop in of(all_hops, "exit") if hop.values.get("address") == "0x80")
    assert all(hop.parent is not nobodys for hop in all_hops), "no device answers"
    assert [hop.name for hop in of(all_hops, "callback")] == ["Writer.process"]
    assert len(of(all_hops, "event")) == 2, "the console's and the exit handler's"


def test_hooks_and_functions_of_the_loop_are_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def look(vcpu: object, exit: object) -> None:
        vmm.event_manager.remote_endpoint().fire(call)

    def call(manager: EventManager) -> None:
        manager.call_later(0, later)

    def later() -> None:
        vmm.stop()

    with Vmm(flat(out(0x510, 1) + SPIN)) as vmm:
        vmm.on_exit("io", look)
        with vmm.trace(path):
            vmm.run(60)
    callbacks = of(hops(path), "callback")
    assert [hop.name.rsplit(".", 1)[-1] for hop in callbacks] == ["look", "call", "later"]
    assert [hop.parent.category if hop.parent else None for hop in callbacks] == ["exit", None, None]


@settings(max_examples=20)
@given(name=st.text() | st.text(st.characters(categories=["Cs"]), min_size=1))
def test_any_name_is_written_as_it_is(name: str, tmp_path: Path) -> None:
    def hook(vcpu: object, exit: object) -> None:
        pass

    hook.__qualname__ = name
    path = tmp_path / "trace.json"
    with Vmm(flat(exit_with(0))) as vmm, vmm.trace(path):
        vmm.on_exit("io", hook)
        vmm.run(60)
    (callback,) = of(hops(path), "callback")
    has_surrogates = any("\ud800" <= character <= "\udfff" for character in name)
    assert callback.name == ("callback" if has_surrogates else name)


def test_a_name_that_cannot_be_asked_for_does_not_harm_the_run(tmp_path: Path) -> None:
    class Hook:
        def __call__(self, vcpu: object, exit: object) -> None:
            pass

        def __getattr__(self, name: str) -> object:
            raise KeyError(name)

    path = tmp_path / "trace.json"
    with Vmm(flat(exit_with(0))) as vmm, vmm.trace(path):
        vmm.on_exit("io", Hook())
        assert vmm.run(60).code == 0
    (callback,) = of(hops(path), "callback")
    assert callback.name == "callback"


def test_every_exit_of_many_is_written(tmp_path: Path) -> None:
    code = (
        b"\xb9\xd0\x07"  # mov cx, 2000
        b"\xe6\x80"  #     out 0x80, al
        b"\xe2\xfc"  #     loop back
    ) + exit_with(0)
    path = tmp_path / "trace.json"
    with Vmm(flat(code)) as vmm, vmm.stats as stats, vmm.trace(path):
        vmm.run(60)
    exits = of(hops(path), "exit")
    assert len(exits) == 2001 == stats.vcpus[0].exits
    inside = sum(hop.end - hop.start for hop in of(hops(path), "guest"))
    assert abs(1e-9 * inside - stats.vcpus[0].guest_s) < 1e-3


def test_each_vcpu_has_its_track(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    code = b"\xe6\x80" + count_vcpus(2)  # out 0x80, al
    with Vmm(flat(code, "long64", cpu=CpuConfig(vcpus=2))) as vmm, vmm.trace(path):
        vmm.run(60)
    tracks = {hop.track for hop in of(hops(path), "exit")}
    assert tracks == {"vcpu_0", "vcpu_1"}


def test_an_exception_leaves_a_whole_file(tmp_path: Path) -> None:
    class Raises:
        def write(self, offset: int, size: int, value: int) -> None:
            raise KeyError("on purpose")

    path = tmp_path / "trace.json"
    with Vmm(flat(out(0x510, 1) + SPIN)) as vmm:
        vmm.add_pio_device(0x510, 1, Raises())
        with pytest.raises(KeyError, match="on purpose"), vmm.trace(path):
            vmm.run(60)
    (callback,) = of(hops(path), "callback")
    assert callback.name.endswith("Raises.write")


def test_a_part_of_a_run_is_traced(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Vmm(flat(WRITE_FOR_EVER)) as vmm:
        vmm.start()
        with vmm.trace(path):
            before = vmm.memory.size
            while path.stat().st_size < 200_000:  # it is written while the guest runs
                assert vmm.wait(0.01) is None
        assert before
        whole = path.read_bytes()
        vmm.pause()
        vmm.resume()
        vmm.stop()
        vmm.wait()
        assert path.read_bytes() == whole, "nothing comes behind the end"
    assert len(of(hops(path), "exit")) > 500


def test_a_path_that_cannot_be_written_is_told_before_the_run(tmp_path: Path) -> None:
    with Vmm(flat(exit_with(0))) as vmm:
        for path, number in [(tmp_path / "no" / "trace.json", errno.ENOENT), (tmp_path, errno.EISDIR)]:
            with pytest.raises(StreamError) as caught, vmm.trace(path):
                pytest.fail("entered")
            assert caught.value.errno == number
            assert caught.value.at == str(path)
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(StreamError, match="this is a pipe"), vmm.trace(tmp_path / "pipe"):
            pytest.fail("entered")
        wrong: Any = 3
        with pytest.raises(TypeError):
            vmm.trace(wrong)
        with vmm.trace(tmp_path / "trace.json"):
            assert vmm.run(60).code == 0


def test_a_full_disk_is_told_at_the_end_and_does_not_harm_the_run() -> None:
    with Vmm(flat(exit_with(5))) as vmm:
        with pytest.raises(StreamError) as caught, vmm.trace("/dev/full"):
            exit = vmm.run(60)
        assert exit.code == 5
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(StateError, match="ended") as state, vmm.trace("/dev/full"):
            vmm.run()
        assert "the trace is not complete" in "".join(state.value.__notes__)


def test_a_disk_that_fills_up_leaves_whole_events(tmp_path: Path) -> None:
    """The limit of a file's size stands for the disk."""
    import resource
    import signal

    path = tmp_path / "trace.json"
    code = b"\xb9\xd0\x07\xe6\x80\xe2\xfc" + exit_with(0)  # as above: 2,000 exits
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with Vmm(flat(code)) as vmm:
            with pytest.raises(StreamError) as caught, vmm.trace(path):
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
                assert vmm.run(60).code == 0
            assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert 0 < len(of(hops(path), "exit")) < 2001


def test_one_trace_of_a_machine_at_a_time(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    with Vmm(flat(exit_with(0))) as vmm, Vmm(flat(exit_with(1))) as other:
        with vmm.trace(first) as trace:
            for again in (vmm.trace(second), trace):
                with pytest.raises(StateError, match="one trace at a time"), again:
                    pytest.fail("entered")
            with other.trace(second):
                assert other.run(60).code == 1
            assert vmm.run(60).code == 0
        assert len(of(hops(first), "exit")) == 1
        assert len(of(hops(second), "exit")) == 1
        with trace:
            pass
        assert of(hops(first), "exit") == [], "written anew"
    with pytest.raises(StateError, match="closed"), vmm.trace(first):
        pytest.fail("entered")


def test_a_trace_may_outlive_its_machine(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    vmm = Vmm(flat(exit_with(0)))
    with vmm.trace(path):
        vmm.run(60)
        vmm.close()
        del vmm
    assert len(of(hops(path), "exit")) == 1


def test_a_trace_that_nobody_ends_ends_with_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    manager = EventManager()
    vmm = Vmm(flat(exit_with(0)), event_manager=manager)
    vmm.trace(path).__enter__()
    vmm.run(60)
    del vmm
    assert len(of(hops(path), "exit")) == 1


def test_machines_in_one_loop_have_traces_of_their_own(tmp_path: Path) -> None:
    manager, bell = EventManager(), Bell()
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    with (
        Vmm(flat(out(0x510, 1) + SPIN), event_manager=manager) as one,
        Vmm(flat(SPIN), event_manager=manager) as two,
    ):
        bell.vmm = one
        one.add_pio_device(0x510, 1, bell)
        manager.add_subscriber(bell)
        with one.trace(paths[0]), two.trace(paths[1]):
            two.start()
            one.run(60)
            two.stop()
            two.wait(60)
    for path in paths:
        assert "Bell.process" in [hop.name for hop in of(hops(path), "callback") if hop.track == "loop"]
    assert of(hops(paths[1]), "device") == []


def test_a_loop_that_is_turned_by_itself_is_traced_on_each_thread(tmp_path: Path) -> None:
    path, manager = tmp_path / "trace.json", EventManager()
    with Vmm(flat(exit_with(0)), event_manager=manager) as vmm, vmm.trace(path):
        seen: list[int] = []

        def ring() -> None:
            seen.append(threading.get_ident())
            manager.stop()

        for _ in range(2):
            manager.call_later(0, ring)
            thread = threading.Thread(target=manager.run_forever)
            thread.start()
            thread.join(60)
    callbacks = of(hops(path), "callback")
    assert len(callbacks) == len(seen) == 2
    assert callbacks[0].track == "loop"
    assert callbacks[1].track.startswith("loop ")


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    class Forks:
        child = -1

        def write(self, offset: int, size: int, value: int) -> None:
            self.child = os.fork()
            if self.child == 0:
                refused = 0
                try:
                    with vmm.trace(path):
                        pass
                except StateError:
                    refused = 1
                trace.__exit__(None, None, None)
                os._exit(refused)

    device = Forks()
    with Vmm(flat(out(0x510, 1) + exit_with(0))) as vmm:
        vmm.add_pio_device(0x510, 1, device)
        with vmm.trace(path) as trace:
            assert vmm.run(60).code == 0
            assert os.waitstatus_to_exitcode(os.waitpid(device.child, 0)[1]) == 1
            child = os.fork()
            if child == 0:
                trace.__exit__(None, None, None)
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert [hop.name for hop in of(hops(path), "exit")] == ["io write 0x510", "io write 0xf4"]


def test_a_callback_may_begin_and_end_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    class Device:
        def write(self, offset: int, size: int, value: int) -> None:
            if value:
                trace.__enter__()
            else:
                trace.__exit__(None, None, None)

    with Vmm(flat(out(0x510, 1) + out(0x80, 1) + out(0x510, 0) + exit_with(0))) as vmm:
        trace = vmm.trace(path)
        vmm.add_pio_device(0x510, 1, Device())
        assert vmm.run(60).code == 0
    assert [hop.name for hop in of(hops(path), "exit")] == ["io write 0x80"]


@pytest.mark.parametrize("close", [Vmm.close, Vmm.stop], ids=["close", "stop"])
def test_traces_begin_and_end_while_others_stop_the_machine(close: Callable[[Vmm], None], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for _ in range(20):
        with Vmm(flat(WRITE_FOR_EVER)) as vmm:
            vmm.start()
            thread = threading.Thread(target=close, args=(vmm,))
            with vmm.trace(path):
                thread.start()
            thread.join(60)
            assert not thread.is_alive()
        hops(path)


def test_counters_and_traces_come_and_go_from_several_threads(tmp_path: Path) -> None:
    code = b"\xe6\x80\xeb\xfc"  # out 0x80, al; jmp back
    begun: list[int] = []

    def watch(number: int) -> None:
        for _ in range(30):
            with vmm.stats:
                try:
                    with vmm.trace(tmp_path / f"{number}.json"):
                        begun.append(number)
                except StateError:
                    assert vmm.stats.vcpus

    with Vmm(flat(code, "long64", cpu=CpuConfig(vcpus=2))) as vmm:
        vmm.start()
        threads = [threading.Thread(target=watch, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                assert vmm.wait(0.01) is None
        vmm.stop()
        assert str(vmm.wait(60)) == "stopped"
    for number in set(begun):
        hops(tmp_path / f"{number}.json")
    assert begun

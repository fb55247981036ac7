"""Traces: which hops a file has, in order and nested, whatever they are called.

Covers src/event/recorded.rs, src/py/recorded.rs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from guests import SPIN, WRITE_FOREVER, count_vcpus, exit_with, flat, out, print_text, read_in
from hypothesis import given, settings
from hypothesis import strategies as st
from pyvmm import (
    CpuConfig,
    EventManager,
    SerialConfig,
    Vmm,
)
from traces import Bell, hops, of

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.kvm


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
    assert devices == [("COM1", "write", "0x3f8"), ("RTC", "read", "0x70"), ("exit port", "write", "0xf4")]
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
    with Vmm(flat(WRITE_FOREVER)) as vmm:
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

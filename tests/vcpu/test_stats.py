"""Counters of exits and of the vCPUs' time: `Vmm.stats`."""

from __future__ import annotations

import os
import struct
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from guests import HALT, SPIN, WRITE_FOREVER, count_vcpus, exit_with, flat, out, print_text, read_in
from hypothesis import given, settings
from hypothesis import strategies as st
from pyvmm import CpuConfig, ExitCount, ExitKind, Rng, StateError, Stats, VcpuTime, VirtioCount, Vmm
from pyvmm.stats import MAX_ROWS, html, tables
from rich.console import Console
from threads import all_at_once
from virtio_driver import BUFFERS, Driver, machine, writable

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm


def counts(stats: Stats) -> dict[tuple[str, str | None, int | None], int]:
    return {(row.kind, row.access, row.address): row.exits for row in stats.exits}


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline


def test_exits_are_counted_by_kind_direction_and_address() -> None:
    code = out(0x500, 1) * 3 + read_in(0x501) * 2 + HALT
    with Vmm(flat(code)) as vmm, vmm.stats as stats:
        assert str(vmm.run(60)) == "halt (vCPU 0)"
    assert counts(stats) == {("io", "write", 0x500): 3, ("io", "read", 0x501): 2, ("hlt", None, None): 1}
    (row,) = (row for row in stats.exits if row.kind == ExitKind.HLT)
    assert row == ExitCount(0, "hlt", None, None, 1, row.seconds)


def test_accesses_to_addresses_without_memory_are_counted() -> None:
    code = (
        b"\xb8\x00\x00\x00\xd0"  # mov eax, 0xd0000000
        b"\x8b\x18"  #             mov ebx, [eax]
        b"\x89\x18\x89\x18"  #     mov [eax], ebx; twice
    ) + exit_with(0)
    with Vmm(flat(code, "protected32")) as vmm, vmm.stats:
        vmm.run(60)
        found = counts(vmm.stats)
    assert (found["mmio", "read", 0xD000_0000], found["mmio", "write", 0xD000_0000]) == (1, 2)


PORTS = st.integers(0x500, 0x503)


@settings(max_examples=25)
@given(st.lists(st.tuples(PORTS, st.booleans()), max_size=40))
def test_counts_are_those_of_the_accesses(accesses: list[tuple[int, bool]]) -> None:
    code = b"".join(out(port, 0) if is_write else read_in(port) for port, is_write in accesses)
    with Vmm(flat(code + exit_with(0))) as vmm, vmm.stats as stats:
        assert vmm.run(60).code == 0
    expected = Counter(("io", "write" if is_write else "read", port) for port, is_write in accesses)
    assert counts(stats) == {**expected, ("io", "write", 0xF4): 1}
    assert stats.vcpus[0].exits == len(accesses) + 1
    assert stats.exits == sorted(stats.exits, key=lambda row: -row.exits)


def test_time_in_a_device_is_time_outside() -> None:
    class Slow:
        took = 0.0

        def read(self, offset: int, size: int) -> int:
            start = time.perf_counter()
            while (took := time.perf_counter() - start) < 0.02:
                pass
            self.took += took
            return 0

    device = Slow()
    with Vmm(flat(read_in(0x500) * 2 + exit_with(0))) as vmm, vmm.stats as stats:
        vmm.add_pio_device(0x500, 1, device)
        vmm.run(60)
    (vcpu,) = stats.vcpus
    (row,) = (row for row in stats.exits if row.address == 0x500)
    assert vcpu.host_s >= row.seconds >= device.took
    assert vcpu.guest_s > 0


def test_time_inside_grows_while_the_guest_stays_there() -> None:
    with Vmm(flat(SPIN, "user64")) as vmm:
        vmm.stats.enable()
        vmm.start()
        wait_until(lambda: vmm.stats.vcpus[0].guest_s > 0.01)
        assert vmm.stats.vcpus[0].exits == 0
        vmm.stats.disable()
        before = vmm.stats.vcpus
        assert vmm.stats.vcpus == before
        vmm.stop()
        vmm.wait()
        assert vmm.stats.vcpus == before


def test_each_vcpu_has_its_own() -> None:
    code = b"\xe6\x80" + count_vcpus(2)  # out 0x80, al
    with Vmm(flat(code, "long64", cpu=CpuConfig(vcpus=2))) as vmm, vmm.stats as stats:
        assert vmm.run(60).code == 2
    assert sorted(row.vcpu for row in stats.exits if row.address == 0x80) == [0, 1]
    assert [time.vcpu for time in stats.vcpus] == [0, 1]


def test_places_are_bounded() -> None:
    code = (
        b"\xba\x00\x10"  # mov dx, 0x1000
        b"\xee"  #         out dx, al
        b"\x42"  #         inc dx
        b"\x81\xfa\x00\x20"  # cmp dx, 0x2000
        b"\x75\xf8"  #     jne back
    ) + exit_with(0)
    with Vmm(flat(code)) as vmm, vmm.stats as stats:
        assert vmm.run(60).code == 0
    assert len(stats.exits) == 1024 + 1
    assert stats.exits[0][:5] == (0, "other", None, None, 0x1000 - 1024 + 1)
    assert stats.vcpus[0].exits == 0x1000 + 1


def test_counting_begins_and_ends_while_the_guest_runs() -> None:
    with Vmm(flat(WRITE_FOREVER)) as vmm:
        vmm.start()
        assert not vmm.stats.enabled
        assert vmm.stats.exits == []
        with vmm.stats as stats:
            assert stats.enabled
            wait_until(lambda: bool(stats.exits))
        before = stats.exits
        vmm.pause()
        vmm.resume()
        assert stats.exits == before
        stats.reset()
        assert stats.exits == []
        assert stats.vcpus == [VcpuTime(0, 0, 0.0, 0.0)]
        stats.enable()
        stats.enable()
        wait_until(lambda: bool(vmm.stats.exits))
        vmm.stop()
        vmm.wait()


def test_a_callback_may_count() -> None:
    class Device:
        def write(self, offset: int, size: int, value: int) -> None:
            if value:
                vmm.stats.enable()
            else:
                vmm.stats.disable()

    with Vmm(flat(out(0x501, 1) + out(0x500, 1) + out(0x502, 1) + out(0x500, 0) + exit_with(0))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        vmm.run(60)
        assert counts(vmm.stats) == {("io", "write", 0x502): 1}, "the exit that ends it is not answered yet"


def test_counters_are_read_while_they_count() -> None:
    with Vmm(flat(WRITE_FOREVER)) as vmm, vmm.stats as stats:
        vmm.start()
        failures: list[str] = []

        def read() -> None:
            last = (0, 0.0)
            for _ in range(300):
                now = (stats.vcpus[0].exits, stats.vcpus[0].guest_s)
                if now[0] < last[0] or now[1] < last[1]:
                    failures.append(f"{now} after {last}")
                last = now
                _ = stats.exits

        all_at_once(*[read] * 3)
        vmm.stop()
        vmm.wait()
    assert not failures


def test_counts_are_there_after_an_exception_and_after_close() -> None:
    class Raises:
        def write(self, offset: int, size: int, value: int) -> None:
            raise KeyError("on purpose")

    with Vmm(flat(out(0x500, 1) + SPIN)) as vmm:
        vmm.add_pio_device(0x500, 1, Raises())
        with pytest.raises(KeyError, match="on purpose"), vmm.stats:
            vmm.run(60)
        assert not vmm.stats.enabled
    stats = vmm.stats
    assert counts(stats)["io", "write", 0x500] == 1
    del vmm
    assert counts(stats)["io", "write", 0x500] == 1
    with pytest.raises(StateError, match="closed"):
        stats.enable()


def test_a_forked_child_is_refused() -> None:
    with Vmm(flat(exit_with(0))) as vmm, vmm.stats as stats:
        vmm.run(60)
        calls = [
            lambda: stats.exits,
            lambda: stats.vcpus,
            lambda: stats.virtio,
            stats.reset,
            stats.enable,
            stats.disable,
        ]
        child = os.fork()
        if child == 0:
            refused = 0
            for call in calls:
                try:
                    call()
                except StateError:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(calls)
        assert stats.exits


def test_counters_show_themselves_in_a_notebook_and_on_a_terminal() -> None:
    ports = b"".join(out(port, 0) for port in range(0x500, 0x500 + MAX_ROWS + 5))
    with Vmm(flat(print_text(b"<hi>") + ports + exit_with(0))) as vmm, vmm.stats as stats:
        assert repr(stats) == "Stats(enabled, 0 exits)"
        vmm.run(60)
    assert repr(stats) == f"Stats(disabled, {4 + MAX_ROWS + 5 + 1} exits)"
    shown = stats._repr_html_()
    assert shown == html(stats)
    assert "<td>0x3f8</td><td>4</td>" in shown
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(tables(stats))
    text = console.export_text()
    assert "seconds inside" in text
    assert "0x3f8" in text
    assert "and 7 more" in text
    console.file.close()


def test_virtio_devices_have_a_table_of_their_own() -> None:
    with Vmm(machine(rng=Rng())) as vmm, vmm.stats as stats:
        driver = Driver(vmm)
        driver.start()
        driver.exchange(0, writable(BUFFERS, 2000))
        (count,) = stats.virtio
        assert count == VirtioCount("rng", count.notifications, 1, 1, 1, 0, 2000)
    with Vmm(flat(exit_with(0))) as vmm:
        assert vmm.stats.virtio == []
        assert "notifications" not in vmm.stats._repr_html_()
    assert "<th>notifications</th>" in stats._repr_html_()
    assert "<td>2,000</td>" in stats._repr_html_()
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(tables(stats))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["rng", str(count.notifications), "1", "1", "1", "0", "2,000"] in rows
    console.file.close()


def test_a_repeated_access_counts_at_its_port() -> None:
    code = (
        b"\xba\x00\x05"  # mov dx, 0x500
        b"\xbe\x00\x10"  # mov si, 0x1000
        b"\xb9" + struct.pack("<H", 64) + b"\xf3\x6e"  # mov cx, 64; rep outsb
    ) + exit_with(0)
    with Vmm(flat(code)) as vmm, vmm.stats as stats:
        vmm.run(60)
    places = {(row.kind, row.access, row.address) for row in stats.exits}
    assert places == {("io", "write", 0x500), ("io", "write", 0xF4)}

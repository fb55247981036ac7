"""A thousand create-run-close cycles leave descriptors, threads, mappings and resident memory flat."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from alone import alone
from guests import SPIN, exit_with, flat, out
from held import held
from pyvmm import (
    BootError,
    EventFd,
    EventManager,
    EventOps,
    Events,
    ExitReason,
    FlatBoot,
    KvmVm,
    VcpuExit,
    Vmm,
    VmmConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable

CYCLES = 1000


def stays_flat(cycle: Callable[[], object], cycles: int) -> None:
    """After the first fifty, which fill what is made once a process."""
    for _ in range(50):
        cycle()
    before = held()
    for _ in range(cycles):
        cycle()
    after = held()
    assert (after.descriptors, after.threads) == (before.descriptors, before.threads)
    assert after.mappings <= before.mappings + 8, "the allocator's own"
    assert after.resident_kib <= before.resident_kib + 2048, "less than two KiB a cycle"


class Stays:
    def __init__(self) -> None:
        self.fd = EventFd(1)

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd))

    def process(self, events: Events, ops: EventOps) -> None:
        self.fd.read()


@pytest.mark.kvm
@alone
def test_machines_with_python_devices_and_hooks_leave_nothing() -> None:
    class Device:
        def __init__(self, vmm: Vmm) -> None:
            self.vmm, self.memory = vmm, vmm.memory

        def write(self, _offset: int, _size: int, _value: int) -> None:
            self.memory.read(0, 16)

    def cycle() -> None:
        vmm = Vmm(flat(out(0x500, 1) + exit_with(1)))
        vmm.add_pio_device(0x500, 1, Device(vmm))
        vmm.on_exit("io", lambda _vcpu, _exit: vmm.state and None)
        vmm.hostcall(lambda: vmm)
        assert vmm.run(60).code == 1

    stays_flat(cycle, CYCLES)


@pytest.mark.kvm
@alone
def test_machines_leave_nothing() -> None:
    def cycle() -> None:
        with Vmm(flat(exit_with(1))) as vmm:
            vmm.add_subscriber(Stays())
            assert vmm.run(60).reason is ExitReason.CODE

    stays_flat(cycle, CYCLES)


@pytest.mark.kvm
@alone
def test_machines_that_are_never_closed_leave_nothing() -> None:
    class Handler:
        def __init__(self) -> None:
            self.kicked = threading.Event()

        def kick(self) -> None:
            self.kicked.set()

    def cycle() -> None:
        Vmm(flat(exit_with(1))).run(60)
        handler = Handler()
        vm = KvmVm(flat(exit_with(1)), handler)
        vm.run()
        handler.kicked.wait(60)

    stays_flat(cycle, CYCLES)


@pytest.mark.kvm
@alone
def test_bare_machines_views_and_kicks_leave_nothing() -> None:
    def cycle() -> None:
        with KvmVm() as vm:
            vm.memory.add(0x1000, 0x1000)
            slot = vm.memory.add(0x2000, 0x1000)
            vm.memory.write(0x1000, exit_with(1))
            view = vm.memory.view(0x2000, 16)
            vm.memory.remove(slot)
            view[0] = 1
            vcpu = vm.create_vcpu()
            vcpu.sregs.cs.update(base=0, selector=0)
            vcpu.regs.update(rip=0x1000, rflags=2)
            assert isinstance(vcpu.run_once(), VcpuExit.IoOut)
            vcpu.kick()

    stays_flat(cycle, CYCLES)


@pytest.mark.kvm
@alone
def test_pauses_leave_nothing() -> None:
    def cycle() -> None:
        with Vmm(flat(SPIN)) as vmm:
            vmm.start()
            vmm.pause()
            assert vmm.vcpus[0].regs.rip
            vmm.resume()
            vmm.stop()
            vmm.wait()

    stays_flat(cycle, CYCLES)


@pytest.mark.kvm
@alone
def test_traces_and_counters_leave_nothing(tmp_path: Path) -> None:
    def cycle() -> None:
        with Vmm(flat(exit_with(1))) as vmm:
            vmm.add_subscriber(Stays())
            with vmm.stats, vmm.trace(tmp_path / "trace.json"):
                assert vmm.run(60).reason is ExitReason.CODE

    stays_flat(cycle, CYCLES)


@alone
def test_event_managers_leave_nothing() -> None:
    def cycle() -> None:
        manager = EventManager()
        id = manager.add_subscriber(Stays())
        assert manager.run() == 1
        manager.remove_subscriber(id)

    stays_flat(cycle, CYCLES)


@pytest.mark.kvm
@alone
def test_machines_that_cannot_be_built_leave_nothing() -> None:
    def cycle() -> None:
        with pytest.raises(BootError):
            Vmm(VmmConfig(boot=FlatBoot(b"\xf4" * 2, address=0x7FFFFFF, mode="long64")))

    stays_flat(cycle, CYCLES)

"""The objects of a machine's parts: the same each time, and alive as long as somebody holds one."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING

import pytest
from guests import HALT, exit_with, flat, out
from held import is_collected
from pyvmm import CpuConfig, ExitReason, GuestMemory, KvmVm, Serial, Vcpu, Vmm, VmmConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm


@pytest.fixture(params=["Vmm", "KvmVm"])
def machine(request: pytest.FixtureRequest) -> Iterator[Vmm | KvmVm]:
    config = flat(HALT)
    config = VmmConfig(boot=config.boot, memory=config.memory, cpu=CpuConfig(vcpus=2))
    with Vmm(config) if request.param == "Vmm" else KvmVm(config) as made:
        yield made


def test_parts_are_the_same_objects_each_time(machine: Vmm | KvmVm) -> None:
    first, second = machine.vcpus, machine.vcpus
    assert len(first) == 2
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert first[0] is not first[1]
    assert machine.memory is machine.memory
    if isinstance(machine, Vmm):
        assert machine.stats is machine.stats
    assert machine.serial is machine.serial


def test_parts_are_the_same_objects_to_all_threads(machine: Vmm | KvmVm) -> None:
    held: list[tuple[GuestMemory, Serial, tuple[Vcpu, ...]]] = []
    barrier = threading.Barrier(4)

    def ask() -> None:
        barrier.wait(60)
        for _ in range(50):
            held.append((machine.memory, machine.serial, machine.vcpus))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(held) == 200
    memory, serial, vcpus = held[0]
    assert all(m is memory and s is serial and v[1] is vcpus[1] for m, s, v in held)


@pytest.mark.parametrize("part", ["memory", "serial", "vcpu"])
@pytest.mark.parametrize("cls", [Vmm, KvmVm])
def test_a_part_keeps_its_machine_and_goes_with_it_at_once(cls: type[Vmm | KvmVm], part: str) -> None:
    def take(machine: Vmm | KvmVm) -> GuestMemory | Serial | Vcpu:
        return machine.vcpus[0] if part == "vcpu" else getattr(machine, part)

    gc.disable()  # with a cycle only the collector would find the machine
    try:
        machine = cls(flat(HALT))
        alive = weakref.ref(machine)
        held = take(machine)
        del machine
        again = alive()
        assert again is not None
        assert take(again) is held
        assert again.memory.read_u8(0x1000) == HALT[0]
        del held, again
        assert alive() is None
    finally:
        gc.enable()


def test_a_created_vcpu_is_the_one_of_vcpus() -> None:
    with KvmVm() as vm:
        vcpu = vm.create_vcpu(3)
        assert vm.vcpus == (vcpu,)
        assert vm.vcpus[0] is vcpu


def test_a_hook_is_given_the_vcpu_of_vcpus() -> None:
    seen: list[bool] = []
    with Vmm(flat(out(0x500, 1) + exit_with(1))) as vmm:
        vcpu = vmm.vcpus[0]
        vmm.on_exit("io", lambda given, _exit: seen.append(given is vcpu))
        assert vmm.run(60).reason is ExitReason.CODE
    assert seen
    assert all(seen)


def test_a_machine_in_the_cycle_of_its_part_is_collected() -> None:
    class Device:
        def __init__(self, vmm: Vmm) -> None:
            self.parts = (vmm.memory, vmm.serial, vmm.vcpus)

        def write(self, _offset: int, _size: int, _value: int) -> None: ...

    vmm = Vmm(flat(HALT))
    vmm.add_pio_device(0x500, 1, Device(vmm))
    alive = weakref.ref(vmm)
    del vmm
    assert alive() is not None
    assert is_collected(alive)

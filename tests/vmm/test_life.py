"""The life of a machine: paused, resumed and held from several threads and from its own callbacks at once.

Covers src/py/vmm/loop_objects.rs, src/py/vmm/event_loop.rs, src/vmm/runner.rs.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from entangled import CALLS, DEADLINE_S, OUT_FOR_EVER, within
from guests import SPIN, exit_with, flat
from held import is_collected
from pyvmm import CpuConfig, KvmVm, StateError, Stop, Vmm, VmRunState

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = pytest.mark.kvm
# 64 bits, ring 3: vCPU 0 ends by the exit port, the others spin.
FIRST_ENDS = b"\x85\xff\x75\x04" + exit_with(3) + SPIN
PARTS: dict[str, Callable[[Vmm], Any]] = {
    "memory": lambda vmm: vmm.memory,
    "vcpu": lambda vmm: vmm.vcpus[0],
    "registers": lambda vmm: vmm.vcpus[0].regs,
    "serial": lambda vmm: vmm.serial,
    "stats": lambda vmm: vmm.stats,
}


def test_two_callbacks_that_shut_their_machine_down_do_not_wait_for_each_other() -> None:
    """Each would join the other's thread."""
    both = threading.Barrier(2)

    class Both:
        def write(self, _offset: int, _size: int, _value: int) -> Stop:
            both.wait(DEADLINE_S)
            vmm.close()
            return Stop(1)

    code = b"\x66\xba\x00\x05\xee" + SPIN
    with Vmm(flat(code, "user64", address=0x10000, size_mib=2, cpu=CpuConfig(vcpus=2))) as vmm:
        vmm.add_pio_device(0x500, 1, Both())
        vmm.start()
        within(lambda: vmm.wait(DEADLINE_S))
        assert vmm.state is VmRunState.CLOSED


@pytest.mark.parametrize("kind", ["Vmm", "KvmVm"])
def test_resume_after_the_end_says_so_while_another_vcpu_spins(kind: str) -> None:
    config = flat(FIRST_ENDS, "user64", address=0x10000, size_mib=2, cpu=CpuConfig(vcpus=2))
    vm: Vmm | KvmVm
    if kind == "Vmm":
        vm = Vmm(config)
        vm.start()
    else:
        vm = KvmVm(config)
        vm.run()
    with vm:
        while vm.state is not VmRunState.EXITING:
            pass
        error = within(vm.resume)
        assert isinstance(error, StateError)
        assert error.hint is not None
        assert "reset()" in error.hint


def test_a_wait_after_the_end_says_so() -> None:
    with Vmm(flat(exit_with(3))) as vmm:
        assert vmm.run(DEADLINE_S).code == 3
        for call in (vmm.wait, vmm.run, vmm.resume):
            with pytest.raises(StateError, match="guest has ended") as info:
                call()
            assert "reset()" in str(info.value.hint)


@pytest.mark.parametrize("kind", ["Vmm", "KvmVm"])
def test_pause_beside_resume_returns(kind: str) -> None:
    vm: Vmm | KvmVm
    if kind == "Vmm":
        vm = Vmm(flat(SPIN))
        vm.start()
    else:
        vm = KvmVm(flat(SPIN))
        vm.run()

    def often(call: Callable[[], Any]) -> bool:
        for _ in range(2000):
            call()
        return True

    with vm:
        resumer = threading.Thread(target=within, args=(lambda: often(vm.resume),), daemon=True)
        resumer.start()
        assert within(lambda: often(vm.pause)) is True
        resumer.join(DEADLINE_S)
        assert not resumer.is_alive()


@pytest.mark.parametrize("name", ["nmi", "snapshot"])
def test_a_pause_is_not_undone_by_who_holds_the_machine_for_a_moment(name: str) -> None:
    over = threading.Event()
    with Vmm(flat(SPIN + b"\xcf")) as vmm:
        vmm.memory.write(8, (0x1002).to_bytes(4, "little"))  # vector 2: an iret
        vmm.start()

        def hold() -> None:
            while not over.is_set():
                CALLS[name](vmm)

        holder = threading.Thread(target=hold, daemon=True)
        holder.start()
        try:
            for _ in range(300):
                vmm.pause()
                for _ in range(20):
                    assert vmm.state is VmRunState.PAUSED
                    assert vmm.vcpus[0].regs.rip > 0
                vmm.resume()
        finally:
            over.set()
        holder.join(DEADLINE_S)
        assert not holder.is_alive()


def test_a_hold_does_not_end_a_wait_for_the_machine() -> None:
    """`KvmVm.wait` returns when the machine no longer runs; a snapshot or an NMI of a running one is no such end."""
    with Vmm(flat(SPIN)) as vmm:
        vmm.start()
        for _ in range(20):
            vmm.snapshot()
            assert vmm.state is VmRunState.RUNNING


def test_a_device_that_has_stopped_the_run_is_not_called_again_by_a_hold() -> None:
    class Stops:
        writes = 0

        def write(self, _offset: int, _size: int, _value: int) -> Stop:
            self.writes += 1
            return Stop(self.writes)

        def save(self) -> bytes:
            return b""

        def restore(self, _state: bytes) -> None:
            pass

    device = Stops()
    with Vmm(flat(OUT_FOR_EVER)) as vmm:
        vmm.add_pio_device(0x500, 1, device)
        vmm.start()
        while device.writes == 0:
            pass
        for _ in range(20):
            vmm.snapshot()
        exit = vmm.wait(DEADLINE_S)
        assert exit is not None
        assert (exit.value, device.writes) == (1, 1)


def test_an_event_manager_stays_usable_after_its_machine_is_closed() -> None:
    called: list[int] = []
    with Vmm(flat(exit_with(0))) as vmm:
        manager = vmm.event_manager
    manager.call_later(0, lambda: called.append(1))
    manager.run_with_timeout(60_000)
    assert called == [1]


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_keeps_its_machine_and_lets_it_go(part: Callable[[Vmm], Any]) -> None:
    vmm = Vmm(flat(exit_with(0)))
    machine = weakref.ref(vmm)
    held = part(vmm)
    del vmm
    gc.collect()
    kept = machine()
    assert kept is not None
    assert kept.state is VmRunState.CREATED
    del kept, held
    assert is_collected(machine)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_machine_whose_callbacks_hold_its_parts_is_collected(part: Callable[[Vmm], Any]) -> None:
    class Device:
        def read(self, offset: int, size: int) -> int:
            return 0

    vmm = Vmm(flat(exit_with(0)))
    device: Any = Device()
    device.part = part(vmm)
    vmm.add_pio_device(0x500, 1, device)
    vmm.on_exit("hlt", functools.partial(lambda part, vcpu, exit: None, part(vmm)))
    machine = weakref.ref(vmm)
    del vmm, device
    assert is_collected(machine)

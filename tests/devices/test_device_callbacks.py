"""What a device's callback can do with its machine: access its vCPU, pause, stop, close, start threads, fork."""

from __future__ import annotations

import os
import threading

import pytest
from guests import COUNT_IN_MEMORY, exit_with, flat, out, read_in
from python_devices import Log
from pyvmm import CpuConfig, ExitReason, StateError, Vmm, VmRunState

pytestmark = pytest.mark.kvm
DEADLINE_S = 60


def test_devices_come_and_go_from_their_own_callbacks() -> None:
    class Once:
        def write(self, _offset: int, _size: int, value: int) -> None:
            vmm.remove_pio_device(0x500)
            vmm.add_pio_device(0x500, 1, rest)

    rest = Log()
    with Vmm(flat(out(0x500, 1) + out(0x500, 2) + out(0x500, 3) + exit_with(1))) as vmm:
        vmm.add_pio_device(0x500, 1, Once())
        assert vmm.run(DEADLINE_S).code == 1
    assert rest.accesses == [("write", 0, 1, 2), ("write", 0, 1, 3)]


def test_a_callback_sees_and_changes_its_own_vcpu() -> None:
    class Device:
        def write(self, _offset: int, _size: int, value: int) -> None:
            (vcpu,) = vmm.vcpus
            seen.append(vcpu.regs.rbx & 0xFFFF)
            vcpu.regs.rbx = 0x1234
            assert vcpu.regs.rbx == 0x1234

        def read(self, _offset: int, _size: int) -> int:
            (vcpu,) = vmm.vcpus
            seen.append(vcpu.regs.rip)
            vcpu.regs.update(rcx=0x77, rip=0x1100)
            return 5

    seen: list[int] = []
    # mov bx, 0xabcd; out; mov cx, bx at 0x1100 only if the jump was made
    code = b"\xbb\xcd\xab" + out(0x500, 1) + read_in(0x500) + exit_with(1)
    with Vmm(flat(code)) as vmm:
        vmm.memory.write(0x1100, exit_with(2))
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).code == 2, "RIP was changed behind the instruction"
        regs = vmm.vcpus[0].regs
        assert seen == [0xABCD, 0x1000 + code.index(b"\xec")]
        assert (regs.rbx, regs.rcx) == (0x1234, 0x77)


def test_another_thread_does_not_see_the_vcpu_of_a_callback_unless_the_machine_is_paused() -> None:
    def look() -> None:
        try:
            results.append(vmm.vcpus[0].regs.rip)
        except StateError as error:
            results.append(error)

    class Device:
        def write(self, _offset: int, _size: int, value: int) -> None:
            if value == 2:
                vmm.pause()
            thread = threading.Thread(target=look)
            thread.start()
            thread.join(DEADLINE_S)
            if value == 2:
                vmm.resume()

    results: list[object] = []
    with Vmm(flat(out(0x500, 1) + out(0x500, 2) + exit_with(1))) as vmm:
        assert vmm.vcpus
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).code == 1
    assert isinstance(results[0], StateError)
    assert "pause" in str(results[0])
    assert isinstance(results[1], int)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_devices_may_pause_resume_stop_and_kick_the_machine(vcpus: int) -> None:
    """Two vCPUs pause each other from their callbacks at the same time: neither waits for the other's callback."""

    class Device:
        def __init__(self) -> None:
            self.left = 200
            self.lock = threading.Lock()

        def write(self, _offset: int, _size: int, _value: int) -> None:
            try:
                vmm.pause()
                vmm.resume()
            except StateError:
                assert self.left <= 0, "the run is ending"
            with self.lock:
                self.left -= 1
                if self.left == 0:
                    vmm.exit_handler.kick()

    code = b"\x66\xba\x00\x05\xee\xeb\xfd"  # mov dx, 0x500; out dx, al; jmp -3
    with Vmm(flat(code, "user64", cpu=CpuConfig(vcpus=vcpus), size_mib=2)) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED


def test_a_device_that_calls_run_gets_an_error_and_the_run_continues() -> None:
    class Device:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            for call in (vmm.run, vmm.start, vmm.wait):
                with pytest.raises(StateError):
                    call()

    with Vmm(flat(out(0x500, 1) + exit_with(4))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).code == 4


def test_a_device_that_closes_the_machine_closes_it_when_the_run_ends() -> None:
    class Device:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            vmm.close()
            states.append(vmm.state)

    states: list[VmRunState] = []
    vmm = Vmm(flat(out(0x500, 1) + COUNT_IN_MEMORY))
    vmm.add_pio_device(0x500, 1, Device())
    assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
    assert states == [VmRunState.RUNNING]
    assert vmm.state is VmRunState.CLOSED


def test_a_device_may_start_threads_that_use_the_machine() -> None:
    class Device:
        def write(self, _offset: int, _size: int, value: int) -> None:
            def work() -> None:
                vmm.memory.write_u8(0x2000, value)
                vmm.stop()

            thread = threading.Thread(target=work)
            thread.start()
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

    with Vmm(flat(out(0x500, 9) + COUNT_IN_MEMORY)) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
        assert vmm.memory.read_u8(0x2000) >= 9


def test_the_loop_turns_while_a_device_takes_its_time() -> None:
    """The device waits for a timer of the loop: on one thread that would never end."""
    ticked = threading.Event()

    class Device:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            vmm.event_manager.call_later(0.001, ticked.set)
            assert ticked.wait(DEADLINE_S)

    with Vmm(flat(out(0x500, 1) + exit_with(5))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).code == 5


@pytest.mark.parametrize(("leaves", "status"), [(None, 0), (ValueError("in the child"), 1), (SystemExit(5), 5)])
def test_a_forked_child_that_leaves_its_callback_ends_and_harms_nothing(
    leaves: BaseException | None, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    children: list[int] = []

    class Forks:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            child = os.fork()
            if child == 0 and leaves is not None:
                raise leaves
            children.append(child)

    with Vmm(flat(out(0x500, 1) + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 1, Forks())
        assert vmm.run(DEADLINE_S).code == 3
    (child,) = children
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert ("in the child" in capfd.readouterr().err) == (status == 1)

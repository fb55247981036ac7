"""`run_here`: what `run` does, on the caller's thread alone.

Covers src/vmm/run_here.rs, src/vcpu/run_here.rs, src/vcpu/tick.rs, src/vcpu/ticked.rs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from guests import exit_with, flat, print_text
from pyvmm import (
    CpuConfig,
    EventFd,
    EventManager,
    ExitReason,
    SerialConfig,
    StateError,
    Stop,
    Vmm,
    VmRunState,
)
from threads import vcpu_threads

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
SPIN = b"\xeb\xfe"
OUT_FOR_EVER = b"\xba\x00\x05\xb0\x78\xee\xeb\xfd"  # mov dx, 0x500; mov al, 'x'; back: out dx, al; jmp back
TRIPLE_FAULT = b"\x0f\x01\x1e\x00\x00\xcc"  # lidt [0]; int3


class Calls:
    """A device that calls a function and ends the run when it returns something."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def write(self, offset: int, size: int, value: int) -> Any:
        return self.call()

    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        pass


def with_device(call: Callable[[], Any]) -> Vmm:
    vmm = Vmm(flat(OUT_FOR_EVER))
    vmm.add_pio_device(0x500, 1, Calls(call))
    return vmm


def test_a_guest_ends_as_in_run() -> None:
    for code in (exit_with(3), print_text(b"hello") + exit_with(0)):
        with Vmm(flat(code)) as here, Vmm(flat(code)) as there:
            exit = here.run_here(DEADLINE_S)
            assert exit == there.run(DEADLINE_S)
            assert exit.reason is ExitReason.CODE
            assert here.serial.take_output() == there.serial.take_output()
            assert repr(here.vcpus[0].regs) == repr(there.vcpus[0].regs)
            assert here.state is VmRunState.EXITING
            with pytest.raises(StateError, match="its guest has ended"):
                here.run_here()


def test_no_thread_is_started() -> None:
    seen: list[list[str]] = []

    def look() -> Stop:
        seen.append(vcpu_threads())
        return Stop(threading.get_ident())

    with with_device(look) as vmm:
        assert vmm.run_here(DEADLINE_S).value == threading.get_ident()
    assert seen == [[]]


def test_a_time_limit_ends_it_and_either_run_continues() -> None:
    counted = b"\x66\xff\x06\x00\x20\xeb\xf9"  # inc dword [0x2000]; jmp
    with Vmm(flat(counted)) as vmm:
        last = count = 0
        for run in (vmm.run_here, vmm.run, vmm.run_here, vmm.run):
            # A kernel before 6.13 may need longer to move the vCPU to another thread.
            while count == last:
                assert run(0.02).reason is ExitReason.TIMEOUT
                assert vmm.state is VmRunState.PAUSED
                count = vmm.memory.read_u32(0x2000)
            last = count


def test_a_time_limit_of_zero_runs_nothing() -> None:
    with with_device(lambda: Stop(1)) as vmm:
        assert vmm.run_here(0).reason is ExitReason.TIMEOUT


def test_stop_from_another_thread_ends_it() -> None:
    with Vmm(flat(SPIN)) as vmm, ThreadPoolExecutor() as others:
        running = others.submit(lambda: vmm.run_here(DEADLINE_S))
        while vmm.state is not VmRunState.RUNNING:
            time.sleep(0.001)
        with pytest.raises(StateError, match="already running"):
            vmm.run_here()
        vmm.stop()
        assert running.result().reason is ExitReason.STOPPED


def test_a_stop_from_before_ends_it_at_once() -> None:
    with with_device(lambda: Stop(1)) as vmm:
        vmm.stop()
        exit = vmm.run_here(DEADLINE_S)
        assert (exit.reason, exit.value) == (ExitReason.STOPPED, None)


def test_stop_in_a_callback_ends_it() -> None:
    def stop() -> None:
        vmm.stop()

    with with_device(stop) as vmm:
        assert vmm.run_here(DEADLINE_S).reason is ExitReason.STOPPED


@pytest.mark.parametrize("run", ["run", "run_here"])
def test_a_stop_of_a_callback_during_which_the_machine_is_paused_is_not_lost(run: str) -> None:
    calls: list[int] = []

    def stop() -> Stop | None:
        calls.append(1)
        if len(calls) > 1:
            return Stop("later")
        with ThreadPoolExecutor() as others:
            others.submit(vmm.pause, DEADLINE_S).result(DEADLINE_S)
        resuming.submit(resume)
        return Stop("here")

    def resume() -> None:
        """When the instruction is complete: the callback has returned. The run may be over by then."""
        with suppress(StateError):
            while vmm.vcpus[0].regs.rip != 0x1006:
                time.sleep(0.001)
            vmm.resume()

    with ThreadPoolExecutor() as resuming, with_device(stop) as vmm:
        assert getattr(vmm, run)(DEADLINE_S).value == "here"
        assert len(calls) == 1


def test_what_a_callback_raises_comes_out_with_its_place() -> None:
    def fail() -> None:
        raise LookupError("no")

    with with_device(fail) as vmm:
        with pytest.raises(LookupError, match="no") as raised:
            vmm.run_here(DEADLINE_S)
        assert "vCPU 0, guest RIP" in raised.value.__notes__[0]
        assert vmm.state is VmRunState.PAUSED


def test_it_can_be_paused_looked_at_and_snapshotted_from_another_thread() -> None:
    with Vmm(flat(SPIN)) as vmm:

        def work() -> None:
            while vmm.state is not VmRunState.RUNNING:
                time.sleep(0.001)
            for _ in range(20):
                vmm.pause()
                assert vmm.vcpus[0].regs.rip == 0x1000
                vmm.resume()
                vmm.reset(vmm.snapshot())
            vmm.stop()

        with ThreadPoolExecutor() as others:
            worked = others.submit(work)
            assert vmm.run_here(DEADLINE_S).reason is ExitReason.STOPPED
            worked.result()


def test_a_subscriber_may_pause_and_snapshot_the_machine() -> None:
    with Vmm(flat(SPIN)) as vmm:
        ready = EventFd()

        def pause(count: int) -> None:
            vmm.pause()
            assert vmm.vcpus[0].regs.rip == 0x1000
            vmm.snapshot()
            vmm.resume()
            vmm.stop()

        vmm.event_manager.on(ready, drain=True)(pause)
        ready.write(1)
        assert vmm.run_here(DEADLINE_S).reason is ExitReason.STOPPED
        ready.close()


def test_events_are_dispatched_beside_a_guest_that_never_exits() -> None:
    with Vmm(flat(SPIN)) as vmm:
        made: list[float] = []

        def made_it() -> None:
            made.append(time.monotonic())
            if len(made) == 3:
                vmm.stop()
            else:
                vmm.event_manager.call_later(0.01, made_it)

        vmm.event_manager.call_later(0.01, made_it)
        assert vmm.run_here(DEADLINE_S).reason is ExitReason.STOPPED
        assert len(made) == 3


def test_what_a_subscriber_raises_ends_it() -> None:
    with Vmm(flat(SPIN)) as vmm:

        def fail() -> None:
            raise LookupError("no")

        vmm.event_manager.call_later(0.01, fail)
        with pytest.raises(LookupError, match="no"):
            vmm.run_here(DEADLINE_S)
        assert vmm.run_here(0.01).reason is ExitReason.TIMEOUT


def test_a_full_console_is_written_by_the_same_thread() -> None:
    text = bytes(range(256)) * 1024
    # mov dx, 0x3f8; mov bx, 64; back: xor si, si; mov cx, 4096; rep outsb; dec bx; jnz back; exit
    code = b"\xba\xf8\x03\xbb\x40\x00" + b"\x31\xf6\xb9\x00\x10\xf3\x6e\x4b\x75\xf6" + exit_with(0)
    got = bytearray()

    class Slow:
        def write(self, piece: bytes) -> int:
            got.extend(piece[:1000])
            return min(len(piece), 1000)

    with Vmm(flat(code, serial=SerialConfig(output=Slow()))) as vmm:
        vmm.memory.write(0, b"\0" * 64)
        assert vmm.run_here(DEADLINE_S).reason is ExitReason.CODE
    assert len(got) == len(text)


def test_several_vcpus_are_refused() -> None:
    with Vmm(flat(SPIN, cpu=CpuConfig(vcpus=2))) as vmm:
        with pytest.raises(StateError, match="one thread runs one vCPU, and the machine has 2; use run"):
            vmm.run_here(DEADLINE_S)
        assert vmm.state is VmRunState.CREATED
        assert vmm.run(0.01).reason is ExitReason.TIMEOUT


def test_a_callback_may_run_another_machine_here() -> None:
    def inner() -> Stop:
        with Vmm(flat(SPIN)) as other:
            assert other.run_here(0.02).reason is ExitReason.TIMEOUT
        with Vmm(flat(exit_with(7))) as other:
            code = other.run_here(DEADLINE_S).code
        with pytest.raises(StateError, match="the machine is already running"):
            vmm.run_here()
        return Stop(code)

    with with_device(inner) as vmm:
        vmm.event_manager.call_later(0.001, lambda: None)
        assert vmm.run_here(DEADLINE_S).value == 7


def test_close_in_a_callback_takes_effect_at_its_end() -> None:
    def close() -> Stop:
        vmm.close()
        assert vmm.state is VmRunState.RUNNING
        return Stop(1)

    vmm = with_device(close)
    assert vmm.run_here(DEADLINE_S).reason is ExitReason.STOPPED
    assert vmm.state is VmRunState.CLOSED


def test_close_from_another_thread_ends_it() -> None:
    with Vmm(flat(SPIN)) as vmm:
        threading.Timer(0.02, vmm.close).start()
        assert vmm.run_here(DEADLINE_S).reason is ExitReason.STOPPED
    assert vmm.state is VmRunState.CLOSED


def test_hooks_see_the_registers_and_may_change_them() -> None:
    with Vmm(flat(OUT_FOR_EVER)) as vmm:

        def hook(vcpu: Any, exit: Any) -> Stop:
            vcpu.regs.rax = 0x1234
            return Stop(vcpu.regs.rdx)

        vmm.on_exit("io", hook)
        assert vmm.run_here(DEADLINE_S).value == 0x500
        assert vmm.vcpus[0].regs.rax == 0x1234


def test_reset_and_run_again_many_times() -> None:
    with Vmm(flat(exit_with(9))) as vmm:
        before = vmm.snapshot()
        for _ in range(300):
            assert vmm.run_here(DEADLINE_S).code == 9
            vmm.reset(before)
        assert vcpu_threads() == []


def test_threads_of_a_shared_loop_run_their_machines_here() -> None:
    manager = EventManager()
    machines = [Vmm(flat(exit_with(number)), event_manager=manager) for number in range(4)]
    with ThreadPoolExecutor() as others:
        codes = [exit.code for exit in others.map(lambda vmm: vmm.run_here(DEADLINE_S), machines)]
    assert codes == [0, 1, 2, 3]
    for vmm in machines:
        vmm.close()


def test_a_handler_of_the_program_still_gets_its_signal() -> None:
    got: list[int] = []
    former = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        with Vmm(flat(SPIN)) as vmm:
            threading.Timer(0.02, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
            threading.Timer(0.2, vmm.stop).start()
            assert vmm.run_here(DEADLINE_S).reason is ExitReason.STOPPED
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert got == [signal.SIGUSR1]


def test_timers_do_not_pile_up() -> None:
    def run() -> None:
        with Vmm(flat(SPIN)) as vmm:
            assert vmm.run_here(0.001).reason is ExitReason.TIMEOUT

    def timers() -> int:
        return Path("/proc/self/timers").read_text().count("ID:")

    run()
    before = timers()
    for _ in range(50):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    give_up = time.monotonic() + DEADLINE_S
    while timers() > before:  # a thread that has been joined may not be quite gone
        assert time.monotonic() < give_up
        time.sleep(0.01)

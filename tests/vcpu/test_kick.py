"""The kick: none is lost, none cancels a later run, and the program keeps its signals.

Covers src/vcpu/signal.rs.
"""

from __future__ import annotations

import random
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from functools import partial

import pytest
from guests import exit_with, flat
from pyvmm import (
    ConfigError,
    ExitReason,
    FlatBoot,
    KvmVm,
    StateError,
    Stop,
    VcpuExit,
    Vmm,
    VmmConfig,
    kick_signal,
    set_kick_signal,
)
from threads import all_at_once

pytestmark = pytest.mark.kvm

# Counts in RBX without end: inc rbx; jmp -5
COUNT = bytes.fromhex("48ffc3 ebfb")
THREADS = 4
KICKS = 25_000


def test_kicks_at_random_moments_from_four_threads_are_all_seen() -> None:
    """A pause returns when the vCPU is out, so a lost kick hangs. A stale kick would stop the guest again."""
    with KvmVm(VmmConfig(boot=FlatBoot(COUNT, address=0x1000, mode="user64"))) as vm:
        (vcpu,) = vm.vcpus
        vm.run()
        paused = [0] * THREADS

        def work(number: int) -> None:
            moments = random.Random(number)
            for _ in range(KICKS):
                for _ in range(moments.randrange(50)):
                    pass
                vm.pause()
                paused[number] += 1
                vm.resume()

        all_at_once(*(partial(work, number) for number in range(THREADS)), deadline=600)
        assert paused == [KICKS] * THREADS
        vm.pause()
        before = vcpu.regs.rbx
        while vcpu.regs.rbx == before:  # never ends if a kick has cancelled the later runs
            vm.resume()
            vm.pause()


def test_each_kick_brings_one_run_back() -> None:
    """Two threads: one enters the guest as often as the other kicks."""
    with KvmVm() as vm:
        vm.memory.add(0x1000, 0x1000)
        vm.memory.write(0x1000, bytes.fromhex("ebfe"))
        vcpu = vm.create_vcpu()
        vcpu.sregs.cs.update(base=0, selector=0)
        vcpu.regs.update(rip=0x1000, rflags=2)
        came_back = threading.Semaphore(0)

        def work() -> None:
            for _ in range(KICKS):
                vcpu.kick()
                assert came_back.acquire(timeout=60)

        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(KICKS):
            assert isinstance(vcpu.run_once(), VcpuExit.Interrupted)
            came_back.release()
        thread.join(60)
        assert not thread.is_alive()


def test_the_signal_is_one_of_the_programs_choice_and_known() -> None:
    used = kick_signal()
    assert signal.SIGRTMIN <= used <= signal.SIGRTMAX
    set_kick_signal(used)
    with pytest.raises(StateError, match="another signal already"):
        set_kick_signal(used + 1)


@pytest.mark.parametrize("wrong", [0, -1, signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, 32, 65, 10**6])
def test_signals_that_cannot_kick_are_refused(wrong: int) -> None:
    with pytest.raises(ConfigError, match="kick_signal"):
        set_kick_signal(wrong)


@pytest.mark.parametrize("wrong", [1.5, "SIGUSR1", None, 2**31])
def test_what_is_no_signal_is_refused(wrong: object) -> None:
    with pytest.raises((TypeError, OverflowError)):
        set_kick_signal(wrong)  # type: ignore[arg-type]


def program(text: str) -> str:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(text)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_signal_that_the_program_uses_is_left_alone() -> None:
    printed = program("""
        import signal
        signal.signal(signal.SIGRTMIN, lambda *_: print("the program's"))
        import pyvmm
        assert pyvmm.kick_signal() == signal.SIGRTMIN + 1
        with pyvmm.Vmm(pyvmm.VmmConfig(boot=pyvmm.FlatBoot(bytes.fromhex("ebfe")))) as vmm:
            print(vmm.run(0.05))
        signal.raise_signal(signal.SIGRTMIN)
    """)
    assert printed == "timeout\nthe program's\n"


def test_a_chosen_signal_still_reaches_its_previous_handler() -> None:
    printed = program("""
        import signal
        signal.signal(signal.SIGUSR1, lambda *_: print("the program's"))
        import pyvmm
        pyvmm.set_kick_signal(signal.SIGUSR1)
        with pyvmm.Vmm(pyvmm.VmmConfig(boot=pyvmm.FlatBoot(bytes.fromhex("ebfe")))) as vmm:
            print(vmm.run(0.05))
            signal.raise_signal(signal.SIGUSR1)
            print(vmm.run(0.05))
    """)
    assert printed == "timeout\nthe program's\ntimeout\n"


@pytest.mark.parametrize("at", [1, 10, 1024, 1025, 2500])
def test_a_repeated_access_is_completed_for_so_many_steps_and_no_more(at: int) -> None:
    """A vCPU is kicked in the middle of REP OUTS: its registers show the progress of the instruction."""
    count = 5000
    code = (
        b"\xba\x00\x05\xbe\x00\x20"  # mov dx, 0x500; mov si, 0x2000
        b"\xb9" + struct.pack("<H", count) + b"\xf3\x6e"  # mov cx, count; rep outsb
    )
    got = bytearray()

    class Device:
        def write(self, offset: int, size: int, value: int) -> Stop | None:
            got.append(value)
            return Stop() if len(got) == at else None

    data = random.Random(at).randbytes(count)
    with Vmm(flat(code + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        vmm.memory.write(0x2000, data)
        assert vmm.run(60).reason is ExitReason.STOPPED
        regs = vmm.vcpus[0].regs
        assert at <= len(got) <= at + 1024
        assert regs.rip == 0x1000 + len(code) - 2
        assert (regs.rcx, regs.rsi) == (count - len(got), 0x2000 + len(got))
        assert vmm.run(60).code == 3
    assert got == data

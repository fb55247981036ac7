"""Any calls from any threads and callbacks, in any order: each returns or raises a typed error; `close` ends it all.

The scenario runs in a process of its own, which shows every thread's stack if a call hangs. Two
seconds in CI; PYVMM_STRESS_S sets another time, thirty under `make stress`. PYVMM_STRESS_SEED
repeats the seed that a failure shows.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

SECONDS = float(os.environ.get("PYVMM_STRESS_S", "2"))
SEED = int(os.environ.get("PYVMM_STRESS_SEED", str(random.SystemRandom().getrandbits(32))))

COMMON = """
import faulthandler, random, sys, threading, time
from guests import flat
from pyvmm import CpuConfig, KvmVm, VcpuExit, Vmm, VmmError
from threads import vcpu_threads

SEED, SECONDS, VCPUS = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
DEADLINE = 60
# Counts in BX, writes and reads port 0x500 each time, and writes it 64 times with one instruction.
LOOP = b"\\x43\\xba\\x00\\x05\\xee\\xec\\xbe\\x00\\x20\\xb9\\x40\\x00\\xf3\\x6e\\xeb\\xf0"
END = time.monotonic() + SECONDS
failures = []

class Refused(Exception):
    pass

def attempt(call):
    try:
        return call()
    except (VmmError, Refused):
        pass

def several(count, life, seed):
    def work(number):
        chance = random.Random(seed * 1000 + number)
        try:
            life(chance)
        except BaseException as error:
            failures.append(error)
            raise
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

def no_worker_is_left():
    give_up = time.monotonic() + DEADLINE
    while vcpu_threads():
        assert time.monotonic() < give_up, vcpu_threads()
        time.sleep(0.001)
"""

MACHINE = """
class Machine:
    def __init__(self, seed):
        self.chance, self.lock, self.still = random.Random(seed), threading.Lock(), 0
        self.vmm = Vmm(flat(LOOP, irqchip=True, cpu=CpuConfig(vcpus=VCPUS)))
        self.vmm.add_pio_device(0x500, 4, self)
        self.kept = None
        while self.kept is None:
            self.kept = attempt(self.vmm.snapshot)
        self.vmm.on_exit("io", self.hook)
        self.vmm.on_answer("any", self.answered)

    def read(self, offset, size):
        self.in_callback()
        return 1

    def write(self, offset, size, value):
        pass

    def quiesce(self):
        if self.chance.random() < 0.05:
            raise Refused
        with self.lock:
            self.still += 1
        if self.chance.random() < 0.1:
            time.sleep(self.chance.random() * 0.003)

    def resume(self):
        with self.lock:
            self.still -= 1
            if self.still < 0:
                failures.append("a device was resumed that was not quiesced")

    def save(self):
        return b""

    def restore(self, state):
        pass

    def hook(self, vcpu, exit):
        self.in_callback()

    def answered(self, vcpu, exit, answer):
        is_read = isinstance(exit, VcpuExit.IoIn)
        if (answer.by, answer.value if is_read else 1) != ("device", 1):
            failures.append((exit, answer))
        self.in_callback()

    def answers(self):
        try:
            self.vmm.off_answer("any", self.answered)
        except ValueError:  # another thread has
            self.vmm.on_answer("any", self.answered)

    def in_callback(self):
        if self.chance.random() < 0.05:
            attempt(self.chance.choice(self.from_callbacks()))
        # Some outlive the run, or the wait of the thread that pauses or snapshots.
        if self.chance.random() < 0.01:
            time.sleep(self.chance.random() * 0.1)

    def limit(self):
        return self.chance.choice([0, 0.0005, 0.005, None])

    def keep(self):
        self.kept = self.vmm.snapshot()

    def slots(self):
        memory = self.vmm.memory
        memory.remove(memory.add(0x4000_0000, 0x1000))

    def registers(self):
        vcpu = self.vmm.vcpus[0]
        vcpu.regs.rbx = vcpu.regs.rbx + 1

    def from_callbacks(self):
        vmm = self.vmm
        return [vmm.stop, vmm.pause, vmm.resume, vmm.nmi, lambda: vmm.state, lambda: vmm.irq(5).pulse(), self.slots,
            self.answers, self.registers, vmm.snapshot, lambda: vmm.reset(self.kept), lambda: vmm.run(0.01), vmm.start,
            lambda: vmm.wait(0.01), lambda: repr(vmm), lambda: vmm.pause(self.limit()),
            lambda: vmm.snapshot(self.limit()), lambda: vmm.reset(self.kept, self.limit()), lambda: vmm.run_here(0.01)]

    def life(self, chance):
        often = [lambda: self.vmm.run(chance.random() * 0.01), lambda: self.vmm.wait(0.01), self.vmm.start]
        calls = often * 4 + self.from_callbacks() + [self.keep]
        for _ in range(chance.randrange(5, 40)):
            attempt(chance.choice(calls))
        if chance.random() < 0.3:
            attempt(self.vmm.close)

seed = SEED
while time.monotonic() < END and not failures:
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    machine = Machine(seed)
    several(3, machine.life, seed)
    machine.vmm.close()
    assert machine.vmm.state == "closed"
    assert machine.still == 0, (seed, "a device was not resumed")
    no_worker_is_left()
    seed += 1
assert not failures, (seed, failures)
"""

# Runs, snapshots and resets, each in a thread of its own, while the guest repeats an access.
BESIDE = """
class Sink:
    def write(self, offset, size, value):
        pass

    def save(self):
        return b""

    def restore(self, state):
        pass

def loop(call):
    while time.monotonic() < END:
        try:
            call()
        except VmmError as error:
            if "its guest is running" in str(error):
                failures.append(error)

faulthandler.dump_traceback_later(SECONDS + DEADLINE, exit=True)
# cld; mov si, 0x2000; mov cx, 0xfff; mov dx, 0x500; rep outsb; jmp back
REPEAT = b"\\xfc\\xbe\\x00\\x20\\xb9\\xff\\x0f\\xba\\x00\\x05\\xf3\\x6e\\xeb\\xf4"
with Vmm(flat(REPEAT, cpu=CpuConfig(vcpus=VCPUS))) as vmm:
    vmm.add_pio_device(0x500, 1, Sink())
    kept, chance = vmm.snapshot(), random.Random(SEED)
    runs = [vmm.run, vmm.run_here] if VCPUS == 1 else [vmm.run]
    calls = [
        lambda: chance.choice(runs)(chance.random() * 0.003),
        lambda: vmm.snapshot(chance.choice([0.0005, None])),
        lambda: vmm.reset(kept, chance.choice([0.0005, None])),
    ]
    threads = [threading.Thread(target=loop, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
assert not failures, failures
"""

BY_HAND = """
def life_of(vm):
    vcpus = vm.vcpus
    def registers(vcpu):
        vcpu.regs.rbx = vcpu.regs.rbx + 1
    def life(chance):
        vcpu = chance.choice(vcpus)
        calls = [vcpu.run_once, vcpu.run_once, vcpu.kick, lambda: registers(vcpu), vm.run, vm.pause, vm.resume,
            lambda: vm.wait(0.01), vm.shutdown, lambda: vm.state, lambda: vm.exit, lambda: repr(vm),
            lambda: vcpu.answer(b"\\0")]
        for _ in range(chance.randrange(5, 40)):
            attempt(chance.choice(calls))
        if chance.random() < 0.3:
            vm.close()
    return life

seed = SEED
while time.monotonic() < END and not failures:
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    vm = KvmVm(flat(LOOP, cpu=CpuConfig(vcpus=VCPUS)))
    several(3, life_of(vm), seed)
    vm.close()
    assert vm.state == "closed"
    no_worker_is_left()
    seed += 1
assert not failures, (seed, failures)
"""


def survives(scenario: str, vcpus: int) -> None:
    arguments = [sys.executable, "-c", COMMON + scenario, str(SEED), str(SECONDS), str(vcpus)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=SECONDS + 180, check=False
    )
    assert done.returncode == 0, f"PYVMM_STRESS_SEED={SEED}, {vcpus} vCPUs\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("vcpus", [1, 3])
def test_a_machine_survives_any_calls(vcpus: int) -> None:
    survives(MACHINE, vcpus)


@pytest.mark.parametrize("vcpus", [1, 3])
def test_a_bare_machine_survives_any_calls(vcpus: int) -> None:
    survives(BY_HAND, vcpus)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_runs_survive_snapshots_and_resets_beside_them(vcpus: int) -> None:
    survives(BESIDE, vcpus)

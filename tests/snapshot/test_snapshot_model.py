"""Machines and snapshots in any order, against a model; and from several threads at once."""

from __future__ import annotations

import random
import struct
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from guests import flat
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from pyvmm import Snapshot, Vmm, VmmError, VmRunState

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
TARGET, COUNT, SCRATCH = 0x2000, 0x2004, 0x40000
T = TypeVar("T")

# Real mode: prints the low byte of each number up to that at 0x2000, and counts it at 0x2004. A run
# may end between any two instructions: what is counted has been printed.
COUNTER = (
    b"\xa1\x00\x20"  #          back: mov ax, [0x2000]
    b"\x3b\x06\x04\x20"  #      cmp ax, [0x2004]
    b"\x74\xf7"  #              je back
    b"\xa0\x04\x20"  #          mov al, [0x2004]
    b"\xfe\xc0"  #              inc al
    b"\xba\xf8\x03\xee"  #      mov dx, 0x3f8; out dx, al
    b"\xff\x06\x04\x20"  #      inc word [0x2004]
    b"\xeb\xe8"  #              jmp back
)


class Model:
    """What a machine or a snapshot is to hold."""

    def __init__(self, count: int = 0, printed: bytes = b"", scratch: dict[int, int] | None = None) -> None:
        self.count = count
        self.printed = printed
        self.scratch = dict(scratch or {})

    def copy(self) -> Model:
        return Model(self.count, self.printed, self.scratch)


def check(vmm: Vmm, model: Model) -> None:
    assert struct.unpack("<H", vmm.memory.read(COUNT, 2))[0] == model.count
    for page, value in model.scratch.items():
        assert vmm.memory.read(SCRATCH + page * 4096, 1) == bytes([value]), page


def advance(vmm: Vmm, by: int, count: int) -> None:
    vmm.memory.write(TARGET, struct.pack("<H", count + by))
    while struct.unpack("<H", vmm.memory.read(COUNT, 2))[0] != count + by:
        vmm.run(0.002)


class Machines(RuleBasedStateMachine):
    machines: Bundle[tuple[Vmm, Model]] = Bundle("machines")
    snapshots: Bundle[tuple[Snapshot, Model]] = Bundle("snapshots")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="pyvmm-test-")
        # Each step is made by another thread.
        self.pools = [ThreadPoolExecutor(1) for _ in range(3)]
        self.turn = 0
        self.alive: list[tuple[Vmm, Model]] = []

    def elsewhere(self, function: Callable[..., T], *arguments: Any) -> T:
        self.turn += 1
        return self.pools[self.turn % 3].submit(function, *arguments).result(DEADLINE_S)

    def keep(self, vmm: Vmm, model: Model) -> tuple[Vmm, Model]:
        self.alive.append((vmm, model))
        return vmm, model

    @rule(target=machines)
    def create(self) -> tuple[Vmm, Model]:
        return self.keep(self.elsewhere(Vmm, flat(COUNTER, size_mib=1)), Model())

    @rule(machine=machines, by=st.integers(1, 40))
    def count(self, machine: tuple[Vmm, Model], by: int) -> None:
        vmm, model = machine
        self.elsewhere(advance, vmm, by, model.count)
        model.printed += bytes(n & 0xFF for n in range(model.count + 1, model.count + by + 1))
        model.count += by

    @rule(machine=machines, page=st.integers(0, 7), value=st.integers(0, 255))
    def poke(self, machine: tuple[Vmm, Model], page: int, value: int) -> None:
        vmm, model = machine
        self.elsewhere(vmm.memory.write, SCRATCH + page * 4096, bytes([value]))
        model.scratch[page] = value

    @rule(machine=machines)
    def take_output(self, machine: tuple[Vmm, Model]) -> None:
        vmm, model = machine
        assert self.elsewhere(vmm.serial.take_output) == model.printed
        model.printed = b""

    @rule(target=snapshots, machine=machines, running=st.booleans(), paused=st.booleans())
    def snapshot(self, machine: tuple[Vmm, Model], running: bool, paused: bool) -> tuple[Snapshot, Model]:
        """Of a stopped machine, a spinning one, or one that is paused while it spins."""
        vmm, model = machine
        if running:
            self.elsewhere(vmm.start)
            if paused:
                self.elsewhere(vmm.pause)
        taken = self.elsewhere(vmm.snapshot)
        if running:
            assert vmm.state is (VmRunState.PAUSED if paused else VmRunState.RUNNING)
            vmm.stop()
            self.elsewhere(vmm.wait, DEADLINE_S)
        return taken, model.copy()

    @rule(target=machines, snapshot=snapshots)
    def fork(self, snapshot: tuple[Snapshot, Model]) -> tuple[Vmm, Model]:
        return self.keep(self.elsewhere(snapshot[0].fork), snapshot[1].copy())

    @rule(machine=machines, snapshot=snapshots, running=st.booleans())
    def reset(self, machine: tuple[Vmm, Model], snapshot: tuple[Snapshot, Model], running: bool) -> None:
        vmm, model = machine
        if running:
            self.elsewhere(vmm.start)
        self.elsewhere(vmm.reset, snapshot[0])
        if running:
            vmm.stop()
            self.elsewhere(vmm.wait, DEADLINE_S)
        model.__dict__.update(snapshot[1].copy().__dict__)

    @rule(target=snapshots, snapshot=snapshots, copy=st.booleans())
    def save_and_load(self, snapshot: tuple[Snapshot, Model], copy: bool) -> tuple[Snapshot, Model]:
        path = Path(self.directory.name) / f"{self.turn}.snapshot"
        self.elsewhere(snapshot[0].save, path)
        return self.elsewhere(lambda: Snapshot.load(path, copy=copy)), snapshot[1]

    @rule(target=snapshots, base=snapshots, snapshot=snapshots)
    def save_against_a_base(
        self, base: tuple[Snapshot, Model], snapshot: tuple[Snapshot, Model]
    ) -> tuple[Snapshot, Model]:
        path = Path(self.directory.name) / f"{self.turn}.diff"
        self.elsewhere(snapshot[0].save, path, base[0])
        return self.elsewhere(Snapshot.load, path, base[0]), snapshot[1]

    @rule(target=snapshots, snapshot=consumes(snapshots))
    def flatten(self, snapshot: tuple[Snapshot, Model]) -> tuple[Snapshot, Model]:
        flattened = self.elsewhere(snapshot[0].flatten)
        assert flattened.mappings == 1
        return flattened, snapshot[1]

    @rule(target=machines, machine=consumes(machines))
    def close(self, machine: tuple[Vmm, Model]) -> Any:
        self.elsewhere(machine[0].close)
        self.alive.remove(machine)
        assert machine[0].state is VmRunState.CLOSED
        return multiple()

    @invariant()
    def every_machine_holds_what_it_should(self) -> None:
        for vmm, model in self.alive:
            check(vmm, model)

    def teardown(self) -> None:
        for vmm, model in self.alive:
            assert vmm.serial.take_output() == model.printed
            vmm.close()
        for pool in self.pools:
            pool.shutdown()
        self.directory.cleanup()


TestMachines = Machines.TestCase
TestMachines.settings = settings(max_examples=60, stateful_step_count=30)


@pytest.mark.parametrize("seed", range(3))
def test_several_threads_at_once_get_a_machine_or_an_error(seed: int) -> None:
    """Nothing hangs, nothing but our errors is raised, and what comes out of it counts on."""
    with Vmm(flat(COUNTER, size_mib=1)) as first:
        snapshots = [first.snapshot()]
    machines = [snapshots[0].fork() for _ in range(3)]
    unexpected: list[BaseException] = []

    def work(number: int) -> None:
        chance = random.Random(seed * 100 + number)
        try:
            for _ in range(40):
                vmm, snapshot = chance.choice(machines), chance.choice(snapshots)
                act: Callable[[], Any] = chance.choice((
                    lambda vmm=vmm: snapshots.append(vmm.snapshot()),
                    lambda vmm=vmm, snapshot=snapshot: vmm.reset(snapshot),
                    lambda vmm=vmm: vmm.run(0.001),
                    vmm.pause,
                    vmm.resume,
                    lambda snapshot=snapshot: snapshot.fork().close(),
                    lambda vmm=vmm: vmm.memory.write(TARGET, b"\xff"),
                ))  # fmt: skip
                with suppress(VmmError):
                    act()
        except BaseException as error:
            unexpected.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert unexpected == []
    for vmm in machines:
        with suppress(VmmError):
            vmm.resume()
        vmm.reset(snapshots[0])
        check(vmm, Model())
        advance(vmm, 5, 0)
        assert vmm.serial.take_output() == bytes(range(1, 6))
        vmm.close()

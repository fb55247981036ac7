"""Subclasses of `Vmm`: arguments, attributes, methods, and calls before the initialization.

Covers src/py/vmm/create.rs, src/py/vmm/object.rs.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import weakref

import pytest
from alone import alone
from guests import HALT, exit_with, flat
from held import is_collected
from pyvmm import ConfigError, EventManager, Exit, ExitReason, StateError, Vmm, VmmConfig

pytestmark = pytest.mark.kvm


class Machine(Vmm):
    def __init__(self, code: int, *, label: str, manager: EventManager | None = None) -> None:
        self.label = label
        self.closed = 0
        super().__init__(flat(exit_with(code)), event_manager=manager)

    def run(self, timeout: float | None = 60) -> Exit:
        return super().run(timeout)._replace(value=self.label)

    def close(self) -> None:
        self.closed += 1
        super().close()


def test_a_subclass_has_arguments_attributes_and_methods_of_its_own() -> None:
    with Machine(3, label="mine") as machine:
        assert isinstance(machine, Vmm)
        assert repr(machine) == 'Machine(state="created")'
        exit = machine.run()
        assert (exit.reason, exit.code, exit.value) == (ExitReason.CODE, 3, "mine")
        assert machine.vcpus[0] is machine.vcpus[0]
    assert machine.closed == 1
    with pytest.raises(StateError, match="closed"):
        machine.run()


def test_a_subclass_runs_in_asyncio_and_in_a_shared_loop() -> None:
    async def main() -> Exit:
        async with Machine(4, label="async") as machine:
            return await machine.run_async(60)

    assert asyncio.run(main()).code == 4
    manager = EventManager()
    with Machine(5, label="shared", manager=manager) as machine:
        assert machine.event_manager is manager
        assert machine.run().code == 5


def test_a_fork_of_a_subclass_is_a_plain_machine() -> None:
    with Machine(3, label="mine") as machine:
        snapshot = machine.snapshot()
        with snapshot.fork() as fork:
            assert type(fork) is Vmm
            assert fork.run(60).code == 3
        forks = snapshot.fork_many(2)
        assert [type(fork) for fork in forks] == [Vmm, Vmm]
        for fork in forks:
            fork.close()
        assert snapshot.map(lambda vmm, _: type(vmm), [None]) == [Vmm]
        machine.reset(snapshot)
        assert machine.run().code == 3


def test_before_it_is_made_every_use_is_refused_with_what_to_do() -> None:
    class Early(Vmm):
        def __init__(self) -> None:
            assert repr(self) == "Early(unreachable)"
            self.close()
            for use in (self.run, self.start, self.snapshot, self.stop, lambda: self.irq(0)):
                with pytest.raises(StateError, match="it is not initialized") as raised:
                    use()
                assert raised.value.hint is not None
                assert "super().__init__()" in raised.value.hint
            for name in ("vcpus", "memory", "serial", "state", "config", "stats", "fixups", "unanswered"):
                with pytest.raises(StateError, match="it is not initialized"):
                    getattr(self, name)
            super().__init__(flat(HALT))

    with Early() as vmm:
        assert vmm.state == "created"
    with pytest.raises(StateError, match="it is not initialized"):
        Vmm.__new__(Vmm).run()


def test_a_machine_is_made_once_and_a_failure_can_be_tried_again() -> None:
    vmm = Vmm.__new__(Vmm)
    with pytest.raises(ConfigError):
        vmm.__init__(1)  # type: ignore[misc]
    vmm.__init__(flat(exit_with(7)))  # type: ignore[misc]
    with vmm:
        with pytest.raises(StateError, match="already initialized"):
            vmm.__init__(flat(exit_with(8)))  # type: ignore[misc]
        assert vmm.run(60).code == 7


def test_wrong_arguments_are_refused_as_before() -> None:
    for arguments, named in (((VmmConfig(), None), {}), ((), {"label": 1}), ((), {"event_manager": 1})):
        with pytest.raises(TypeError):
            Vmm(*arguments, **named)  # type: ignore[arg-type]
    assert str(inspect.signature(Vmm)) == "(config=None, *, event_manager=None)"
    assert list(inspect.signature(Machine).parameters) == ["code", "label", "manager"]


def test_a_subclass_in_a_cycle_is_collected_with_its_class() -> None:
    class Local(Vmm):
        def __init__(self) -> None:
            super().__init__(flat(HALT))
            self.me = self
            self.hook = self.on_exit("io", self.see)
            self.parts = (self.memory, self.vcpus, self.serial)

        def see(self, _vcpu: object, _exit: object) -> None: ...

    machine, cls = weakref.ref(Local()), weakref.ref(Local)
    del Local
    assert is_collected(machine)
    assert cls() is None


@alone
def test_a_dropped_subclass_is_closed_at_once() -> None:
    gc.disable()
    before = len(os.listdir("/proc/self/fd"))
    machine = Machine(1, label="x")
    assert len(os.listdir("/proc/self/fd")) > before
    del machine
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_forked_child_cannot_make_the_machine_of_its_parent() -> None:
    vmm = Vmm.__new__(Vmm)
    pid = os.fork()
    if pid == 0:
        try:
            vmm.__init__(flat(HALT))  # type: ignore[misc]
        except StateError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0

"""`KvmVm`: the machine without an event loop.

Covers src/vm/life.rs, src/vm/kvm_vm.rs, src/vm/start.rs,
src/py/machine.rs, src/py/kick_handler.rs.
"""

from __future__ import annotations

import threading
import weakref

import pytest
from guests import COUNT_IN_MEMORY, HALT, SPIN, exit_with, flat, print_text
from held import is_collected
from pyvmm import (
    ConfigError,
    EventManager,
    ExitReason,
    KvmVm,
    SerialConfig,
    StateError,
    VmRunState,
    WrappedExitHandler,
)

pytestmark = pytest.mark.kvm


class Handler:
    """Remembers on which thread it was kicked."""

    def __init__(self) -> None:
        self.kicked = threading.Event()
        self.threads: list[str] = []

    def kick(self) -> None:
        with open("/proc/thread-self/comm") as name:
            self.threads.append(name.read().strip())
        self.kicked.set()


def test_python_object_is_the_exit_handler() -> None:
    handler = Handler()
    with KvmVm(flat(print_text(b"hi") + exit_with(5)), handler) as vm:
        assert vm.state is VmRunState.CREATED
        vm.run()
        assert handler.kicked.wait(60)
        exit = vm.wait(60)
        assert exit is not None
        assert (exit.reason, exit.code, vm.exit) == (ExitReason.CODE, 5, exit)
        assert vm.state is VmRunState.EXITING
        assert vm.serial.take_output() == b"hi"
    assert handler.threads == ["vcpu_0"]
    assert vm.state is VmRunState.CLOSED


def test_wrapped_exit_handler_ends_ones_own_loop() -> None:
    handler = WrappedExitHandler()
    manager = EventManager()
    manager.add_subscriber(handler)
    with KvmVm(flat(exit_with(5)), handler) as vm:
        vm.run()
        while handler.keep_running():
            manager.run()
        vm.shutdown()
        exit = vm.exit
    assert exit is not None
    assert exit.code == 5


def test_run_starts_at_the_address_it_is_given() -> None:
    with KvmVm(flat(exit_with(1) + exit_with(2)), Handler()) as vm:
        assert vm.entry == 0x1000
        vm.run(0x1004)
        exit = vm.wait(60)
    assert exit is not None
    assert exit.code == 2


def test_shutdown_leaves_a_machine_that_can_continue() -> None:
    with KvmVm(flat(COUNT_IN_MEMORY), Handler()) as vm:
        vm.run()
        with pytest.raises(StateError, match="running already"):
            vm.run()
        vm.shutdown()
        assert vm.state is VmRunState.PAUSED
        assert vm.exit is None
        vm.memory.write(0x1000, exit_with(9))
        vm.run()
        exit = vm.wait(60)
        assert exit is not None
        assert exit.code == 9
        with pytest.raises(StateError, match="guest has ended"):
            vm.run()
    with pytest.raises(StateError, match="closed"):
        vm.run()


def test_wait_returns_none_when_the_time_passes() -> None:
    with KvmVm(flat(SPIN), Handler()) as vm:
        vm.run()
        assert vm.wait(0.01) is None


def test_exception_in_kick_comes_out_of_wait() -> None:
    class Fails:
        def kick(self) -> None:
            raise LookupError("on purpose")

    with KvmVm(flat(exit_with(1)), Fails()) as vm:
        vm.run()
        with pytest.raises(LookupError, match="on purpose"):
            while vm.wait(1) is None:
                pass
        assert vm.wait(60) == vm.exit


def test_what_has_no_kick_is_refused() -> None:
    with pytest.raises(TypeError, match=r"an exit handler needs kick\(\)"):
        KvmVm(flat(HALT), object())  # type: ignore[arg-type]


def test_streams_need_a_vmm() -> None:
    with pytest.raises(ConfigError, match=r"^serial: "):
        KvmVm(flat(HALT, serial=SerialConfig(output=1)), Handler())


def test_machine_in_a_cycle_with_its_handler_is_collected_while_it_runs() -> None:
    class Owner(Handler):
        vm: KvmVm

    owner = Owner()
    owner.vm = KvmVm(flat(SPIN), owner)
    owner.vm.run()
    alive = weakref.ref(owner.vm)
    del owner
    assert is_collected(alive)

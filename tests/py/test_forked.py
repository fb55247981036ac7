"""A forked child: every call on what its parent made is refused at once, whatever any thread of the parent does.

Covers src/py/owned.rs.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import members
import pytest
import pyvmm
from children import end_in
from guests import COUNT_IN_MEMORY, OUT_FOR_EVER, SPIN, exit_with, flat
from members import Device, Subscriber
from pyvmm import EventFd, EventManager, Events, KvmVm, StateError, TimerFd, Vmm, VmmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
STRESS_S = float(os.environ.get("PYVMM_STRESS_S", "2"))


class Parent:
    """Two machines, a bare one and a loop that other threads use, and an object of every class that belongs to them."""

    def __init__(self) -> None:
        self.vmm = Vmm(flat(OUT_FOR_EVER))
        self.vmm.add_pio_device(0x500, 4, Device())
        self.other = Vmm(flat(SPIN, irqchip=True))
        self.bare = KvmVm(flat(COUNT_IN_MEMORY))
        self.manager = EventManager()
        self.id = self.manager.add_subscriber(Subscriber())
        self.snapshot = self.vmm.snapshot()
        (vcpu,) = self.vmm.vcpus
        self.slot = self.vmm.memory.slots[0]
        self.ops = self.manager.event_ops(self.id)
        self.objects: list[Any] = [
            self.vmm, self.other, self.bare, self.manager, self.snapshot, self.vmm.memory, self.bare.memory,
            self.vmm.serial, self.bare.serial, vcpu, vcpu.regs, vcpu.sregs, vcpu.sregs.cs, vcpu.sregs.gdt, vcpu.msrs,
            self.bare.vcpus[0], self.vmm.stats, self.vmm.trace("/dev/null"), self.other.irq(5), self.vmm.event_manager,
            self.vmm.exit_handler, self.vmm.exit_handler.handler, self.manager.remote_endpoint(), self.ops, self.id,
            self.slot, EventFd(), TimerFd(),
        ]  # fmt: skip
        self.ending = threading.Event()
        works = [
            self.pause, self.run, self.look, self.run_other, self.run_bare, self.turn, self.kick, self.make_machines,
        ]  # fmt: skip
        self.threads = [threading.Thread(target=self.again, args=(work,), daemon=True) for work in works]

    def pause(self) -> None:
        self.vmm.pause()
        self.vmm.resume()

    def run(self) -> None:
        self.vmm.run(0.05)

    def look(self) -> None:
        self.vmm.snapshot()
        _ = self.vmm.stats.exits, self.vmm.serial.take_output(), self.vmm.unanswered

    def run_other(self) -> None:
        self.other.run(0.01)
        _ = self.other.vcpus[0].regs.rip, self.other.memory.read(0, 16)

    def run_bare(self) -> None:
        self.bare.run()
        self.bare.wait(0.001)
        self.bare.shutdown()

    def turn(self) -> None:
        self.manager.run_with_timeout(10)

    def kick(self) -> None:
        self.manager.remote_endpoint().kick()
        self.manager.stop()

    def make_machines(self) -> None:
        with self.snapshot.fork(setup=lambda fork: fork.add_pio_device(0x500, 4, Device())) as fork:
            fork.run(0.001)
            fork.reset(self.snapshot)
        with Vmm(flat(SPIN)) as vmm:
            vmm.run(0)

    def again(self, work: Callable[[], object]) -> None:
        while not self.ending.is_set():
            with contextlib.suppress(VmmError):
                work()


@pytest.fixture
def parent() -> Iterator[Parent]:
    parent = Parent()
    for thread in parent.threads:
        thread.start()
    yield parent
    parent.ending.set()
    for thread in parent.threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "the parent hangs"
    parent.bare.close()
    parent.vmm.close()
    parent.other.close()


def in_child(work: Callable[[], object]) -> str:
    """Do the work in a forked child with a time limit, and return its output."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        end_in(DEADLINE_S // 2)
        try:
            said = work()
            os.write(writer, str(said).encode())
            os._exit(0)
        except BaseException as error:  # a child must not return into pytest
            os.write(writer, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as said:
        text = said.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the child ended with {status}: {text}"
    return text


# What a child may do: what is its own, and what reports nothing.
HARMLESS = {
    "close", "clone", "handler", "remote_endpoint", "config", "event_manager", "exit_handler", "closed", "fd", "number",
    "start", "shared", "read_only", "line", "id", "entry", "path",
    # Views whose own members are walked.
    "cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt", "gdt", "idt",
}  # fmt: skip
SHARED = (EventFd, TimerFd, pyvmm.Snapshot, pyvmm.SubscriberId, pyvmm.MemorySlot)


def use(parent: Parent, thing: Any, name: str) -> object:
    """Call a method, or read a property."""
    own = {"snapshot": parent.snapshot, "slot": parent.slot, "id": parent.id, "ops": parent.ops}
    return members.use(thing, name, **own)


def walk(parent: Parent) -> str:
    """Use every member of every object; those that neither refused nor are harmless."""
    wrong = []
    for thing in parent.objects:
        for name in members.of(thing):
            where = f"{type(thing).__name__}.{name}"
            try:
                use(parent, thing, name)
            except StateError as error:
                if "fork" not in str(error) and not isinstance(thing, SHARED):
                    wrong.append(f"{where}: {error}")
            except BaseException as error:  # told below
                if not isinstance(thing, SHARED):
                    wrong.append(f"{where} raised {type(error).__name__}: {error}")
            else:
                if not (isinstance(thing, SHARED) or name in HARMLESS or name.startswith("__")):
                    wrong.append(f"{where} answered")
    return "\n".join(wrong)


def test_every_call_of_every_object_is_refused_beside_threads_that_use_them(parent: Parent) -> None:
    end = time.monotonic() + STRESS_S
    while time.monotonic() < end:
        told = in_child(lambda: walk(parent))
        assert not told, told


def test_what_the_parent_made_is_dropped_and_collected_beside_threads_that_use_it(parent: Parent) -> None:
    def drop() -> None:
        for thing in parent.objects:
            with contextlib.suppress(StateError):  # registers show themselves by their values
                repr(thing)
            getattr(thing, "close", lambda: None)()
        parent.__dict__.clear()
        gc.collect()

    end = time.monotonic() + STRESS_S
    while time.monotonic() < end:
        in_child(drop)


def test_child_makes_its_own_beside_threads_of_the_parent(parent: Parent) -> None:
    def make() -> None:
        with Vmm(flat(exit_with(3))) as vmm:
            assert vmm.run(DEADLINE_S).code == 3
            snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            fork.reset(snapshot)
        with parent.snapshot.fork(setup=lambda fork: fork.add_pio_device(0x500, 4, Device())) as fork:
            fork.run(0)
            fork.reset(parent.snapshot)
        manager = EventManager()
        manager.call_later(0, manager.stop)
        manager.run_forever()

    end = time.monotonic() + STRESS_S
    while time.monotonic() < end:
        in_child(make)


def test_interpreter_of_a_child_ends_beside_threads_of_the_parent(parent: Parent) -> None:
    end = time.monotonic() + STRESS_S
    while time.monotonic() < end:
        child = os.fork()
        if child == 0:
            # As the main thread's end does, without pytest.
            end_in(DEADLINE_S // 2)
            atexit._run_exitfuncs()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_process_of_multiprocessing_and_a_function_before_exec_work_beside_threads(parent: Parent) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        process = context.Process(target=walk, args=(parent,))
        process.start()
        process.join(DEADLINE_S)
        assert process.exitcode == 0
        command = [sys.executable, "-c", ""]
        subprocess.run(command, preexec_fn=gc.collect, check=True, timeout=DEADLINE_S)


class Forks:
    """Forks in each kind of callback, and records the result of the child's call."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        self.child = 0
        self.reader, self.writer = os.pipe()

    def __call__(self, *_: object) -> None:
        self.say("parent" if os.getpid() == self.parent else "child")
        if not self.child and os.getpid() == self.parent:
            self.child = os.fork()
            if self.child == 0:
                end_in(DEADLINE_S // 2)

    def say(self, text: str) -> None:
        os.write(self.writer, f"{text} ".encode())

    def told(self, call: Callable[[], object]) -> list[str]:
        """What the call did in the parent and in the child, which ends here."""
        try:
            call()
        except StateError:
            if os.getpid() == self.parent:
                raise
            self.say("StateError")
        except BaseException as error:  # told below
            self.say(type(error).__name__)
        if os.getpid() != self.parent:
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        os.close(self.writer)
        with open(self.reader) as said:
            return [*said.read().split(), str(status)]


def test_child_of_a_fork_in_a_callback_gets_no_more_of_the_batch() -> None:
    forks, manager = Forks(), EventManager()
    bells = [EventFd(1) for _ in range(3)]
    for bell in bells:
        manager.on(bell)(forks)
    manager.remote_endpoint().fire(forks)
    said = forks.told(manager.run)
    assert sorted(said) == ["0", "StateError", "parent", "parent", "parent", "parent"]


def test_child_of_a_fork_in_a_fired_call_makes_no_other() -> None:
    forks, manager = Forks(), EventManager()
    manager.remote_endpoint().fire(forks)
    manager.remote_endpoint().fire(forks)
    said = forks.told(lambda: manager.run_with_timeout(0))
    assert sorted(said) == ["0", "StateError", "parent", "parent"]


def test_exception_of_a_child_comes_out_of_its_run() -> None:
    manager, bell, parent = EventManager(), EventFd(1), os.getpid()
    children: list[int] = []

    def leave(event: Events) -> None:
        bell.read()
        children.append(os.fork())
        if os.getpid() != parent:
            sys.exit(5)

    manager.on(bell)(leave)
    try:
        manager.run()
    except SystemExit as error:
        os._exit(int(str(error.code)))
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 5


@pytest.mark.parametrize("how", ["run", "wait"])
def test_child_of_a_fork_in_a_callback_of_a_run_leaves_the_machine_to_its_parent(how: str) -> None:
    forks = Forks()
    with Vmm(flat(SPIN)) as vmm:
        bell = EventFd(1)

        def ring(event: Events) -> None:
            bell.read()
            forks()

        vmm.event_manager.on(bell)(ring)
        vmm.event_manager.call_later(0.1, vmm.stop)
        if how == "wait":
            vmm.start()
        said = forks.told(getattr(vmm, how))
        assert sorted(said) == ["0", "StateError", "parent"]
        assert vmm.run(0).reason is pyvmm.ExitReason.TIMEOUT


@pytest.mark.parametrize("where", ["write", "hook", "answer", "save", "restore", "progress"])
def test_child_of_a_fork_in_the_midst_of_native_work_ends_where_it_returns(where: str, tmp_path: Path) -> None:
    forks = Forks()

    class Forking(Device):
        def write(self, offset: int, size: int, value: int) -> None:
            if where == "write":
                forks()

        def save(self) -> bytes:
            if where == "save":
                forks()
            return b""

        def restore(self, state: bytes) -> None:
            if where == "restore":
                forks()

    with Vmm(flat(OUT_FOR_EVER)) as vmm:
        vmm.add_pio_device(0x500, 4, Forking())
        if where == "hook":
            vmm.on_exit("io", forks)
        if where == "answer":
            vmm.on_answer("io", forks)

        def work() -> None:
            vmm.run(0.05)
            while where in {"write", "hook", "answer"} and not forks.child:  # the host was busy
                vmm.run(0.05)
            snapshot = vmm.snapshot()
            vmm.reset(snapshot)
            snapshot.save(tmp_path / "snapshot", progress=forks if where == "progress" else None)

        said = forks.told(work)
    assert said[-1] == "0"
    assert "child" not in said
    assert "StateError" not in said

"""What is closed says so in one way, whatever is called on it: `ClosedError`, "the machine is closed"."""

from __future__ import annotations

import contextlib
import inspect
import threading
from typing import TYPE_CHECKING, Any

import members
import pytest
from guests import COUNT_IN_MEMORY, SPIN, flat
from pyvmm import (
    ClosedError,
    ConfigError,
    EventFd,
    Events,
    EventSet,
    ForkExecutor,
    KvmVm,
    PlatformConfig,
    StateError,
    TimerFd,
    Vmm,
)
from pyvmm.exceptions import VmmError

if TYPE_CHECKING:
    from collections.abc import Callable

kvm = pytest.mark.kvm
PARTS = ["memory", "serial", "vcpu", "regs", "sregs", "segment", "fpu", "msrs", "lapic", "irq", "trace", "screen"]

# What a closed machine still does, by class: what is its own object's, and what undoes.
ALWAYS = {"__enter__", "__exit__", "__repr__", "__hash__", "close"}
STILL: dict[str, set[str]] = {
    "Vmm": {
        "config", "state", "memory", "serial", "stats", "trace", "stop", "unanswered", "fixups", "run_async", "on_exit",
        "off_exit", "on_answer", "off_answer", "hostcall", "console", "run_until_async",
        "screen", "serials",
    },
    "KvmVm": {"state", "entry", "memory", "serial", "unanswered", "fixups"},
    "Serial": {"expect_async", "take_output", "input_waiting", "input_wanted", "fileno"},
    "Screen": {"cursor", "expect_async"},
    "Vcpu": {"id"},
    "IrqLine": {"line"},
    "Trace": {"path"},
    "EventFd": {"closed"},
    "TimerFd": {"closed"},
}  # fmt: skip
# Views whose own members are walked.
VIEWS = {
    "regs", "sregs", "fpu", "xcrs", "debugregs", "events", "lapic", "msrs", "cs", "ds", "es", "fs", "gs", "ss", "tr",
    "ldt", "gdt", "idt", "st", "xmm", "ymm",
}  # fmt: skip


def parts_of(vmm: Vmm) -> dict[str, Any]:
    """An object of every class that belongs to a machine."""
    vcpu = vmm.vcpus[0]
    found = [
        vmm.memory, vmm.serial, vcpu, vcpu.regs, vcpu.sregs, vcpu.sregs.cs, vcpu.fpu, vcpu.msrs, vcpu.lapic,
        vmm.irq(5), vmm.trace("/dev/null"), vmm.screen,
    ]  # fmt: skip
    return dict(zip(PARTS, found, strict=True))


@pytest.fixture(scope="module")
def closed() -> dict[str, Any]:
    """One of each class, closed, and what calls on them are given."""
    with (
        Vmm(flat(SPIN, irqchip=True, platform=PlatformConfig(screen=True))) as vmm,
        KvmVm(flat(COUNT_IN_MEMORY)) as bare,
        EventFd() as fd,
        TimerFd() as timer,
    ):
        things: dict[str, Any] = {"Vmm": vmm, "KvmVm": bare, "EventFd": fd, "TimerFd": timer, **parts_of(vmm)}
        things |= {"bare memory": bare.memory, "bare serial": bare.serial, "bare vcpu": bare.vcpus[0]}
        id = vmm.add_subscriber(members.Subscriber())
        arguments = {"snapshot": vmm.snapshot(), "slot": vmm.memory.slots[0], "id": id}
    things["arguments"] = arguments
    return things


def what(thing: Any) -> str:
    return type(thing).__name__ if isinstance(thing, EventFd | TimerFd) else "machine"


@kvm
@pytest.mark.parametrize(
    "name", ["Vmm", "KvmVm", "EventFd", "TimerFd", *PARTS, "bare memory", "bare serial", "bare vcpu"]
)
def test_every_call_on_what_is_closed_says_so(closed: dict[str, Any], name: str) -> None:
    thing = closed[name]
    wrong = []
    for member in members.of(thing):
        if member in VIEWS | ALWAYS | STILL.get(type(thing).__name__, set()):
            continue
        try:
            members.use(thing, member, **closed["arguments"])
        except ClosedError as error:
            if (str(error), error.at) != (f"the {what(thing)} is closed", what(thing)):
                wrong.append(f"{member}: {error}, at {error.at}")
        except Exception as error:  # reported below
            wrong.append(f"{member} raised {type(error).__name__}: {error}")
        else:
            wrong.append(f"{member} answered")
    assert not wrong


# What a look at the class does not reach: setters, registers' operators, later steps.
LATER: dict[str, Callable[[dict[str, Any]], object]] = {
    "set a register": lambda o: setattr(o["regs"], "rax", 1),
    "set the processor's state": lambda o: setattr(o["vcpu"], "mp_state", 0),
    "set cpuid": lambda o: setattr(o["vcpu"], "cpuid", ()),
    "log dirty pages": lambda o: setattr(o["memory"], "log_dirty", True),
    "read an MSR": lambda o: o["msrs"][0x10],
    "enter a trace": lambda o: o["trace"].__enter__(),
    "count": lambda o: o["Vmm"].stats.enable(),
    "decorate a hook": lambda o: o["Vmm"].on_exit("io")(print),
    "decorate a hostcall": lambda o: o["Vmm"].hostcall(7)(print),
    "run in asyncio": lambda o: o["Vmm"].run_async().send(None),
    "expect in asyncio": lambda o: o["serial"].expect_async("x").send(None),
    "run up to a text in asyncio": lambda o: o["Vmm"].run_until_async("x").send(None),
    "memory through the machine": lambda o: o["Vmm"].memory.read(0, 1),
    "memory through a bare machine": lambda o: o["KvmVm"].memory.read(0, 1),
    "input through the machine": lambda o: o["Vmm"].serial.send(b"x"),
}


@kvm
@pytest.mark.parametrize("call", LATER)
def test_what_reaches_a_closed_machine_later_says_so(closed: dict[str, Any], call: str) -> None:
    with pytest.raises(ClosedError, match=r"\Athe machine is closed\Z"):
        LATER[call](closed)


@kvm
def test_a_device_of_a_closed_machine_is_not_found_missing() -> None:
    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x500, 4, members.Device())
    with pytest.raises(ClosedError):
        vmm.remove_pio_device(0x500)


class Restorable:
    def read(self, offset: int, size: int) -> int:
        return 0

    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        pass


@kvm
@pytest.mark.parametrize("call", ["reset", "remove_pio_device"])
def test_a_device_that_close_takes_away_meanwhile_is_not_found_missing(call: str) -> None:
    """In some of these the call has found the machine open, and then no device."""
    for _ in range(100):
        vmm = Vmm(flat(SPIN))
        vmm.add_pio_device(0x500, 1, Restorable())
        snapshot = vmm.snapshot()
        closing = threading.Thread(target=vmm.close)
        closing.start()
        with contextlib.suppress(ClosedError):
            while True:
                if call == "reset":
                    vmm.reset(snapshot)
                else:
                    vmm.remove_pio_device(0x500)
                    vmm.add_pio_device(0x500, 1, Restorable())
        closing.join()


@kvm
def test_last_output_of_a_closed_machine_can_be_taken() -> None:
    with Vmm() as vmm:
        vmm.run(60)
    assert vmm.serial.take_output()


@pytest.mark.parametrize("source", [EventFd, TimerFd])
def test_closed_source_is_refused(source: type[EventFd | TimerFd]) -> None:
    thing = source()
    thing.close()
    with pytest.raises(ClosedError, match=f"the {source.__name__} is closed"):
        aiter(thing)
    # An argument is a value that cannot be used.
    with pytest.raises(ConfigError, match="closed"):
        Events(thing, EventSet.IN)


@kvm
@pytest.mark.parametrize("end", ["shutdown", "kill"])
def test_pool_that_was_shut_down_takes_no_job(end: str) -> None:
    with Vmm(flat(SPIN)) as vmm:
        snapshot = vmm.snapshot()
    with ForkExecutor(snapshot, 1) as pool:
        getattr(pool, end)()
        with pytest.raises(ClosedError, match="the executor is closed"):
            pool.submit(print)


@kvm
def test_a_kept_snapshot_and_loop_outlive_their_machine() -> None:
    with Vmm(flat(COUNT_IN_MEMORY)) as vmm:
        snapshot, manager, handler = vmm.snapshot(), vmm.event_manager, vmm.exit_handler
    with snapshot.fork() as fork:
        assert fork.state == "created"
    manager.run_with_timeout(0)
    handler.kick()


def test_a_closed_error_is_what_a_state_and_a_closed_file_raise() -> None:
    assert issubclass(ClosedError, StateError)
    assert issubclass(ClosedError, ValueError)
    assert issubclass(ClosedError, VmmError)
    assert inspect.getdoc(ClosedError)

"""What is said to a program that gives the wrong thing: a typed error that names the place, and what it may be.

Covers src/py/items.rs, src/py/config_boot.rs and src/py/config_part.rs.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import pyvmm
from conftest import TESTS
from guests import COUNT_IN_MEMORY, HALT, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from pyvmm import (
    BootModule,
    ConfigError,
    CpuConfig,
    EventFd,
    EventManager,
    Events,
    ExitReason,
    FirmwareBoot,
    FlatBoot,
    KernelBoot,
    LinuxBoot,
    MemoryConfig,
    SerialConfig,
    StateError,
    TimerFd,
    Vmm,
    VmmConfig,
    VmmError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pyvmm import Snapshot

kvm = pytest.mark.kvm

# A configuration built in Python with one wrong value, and what the error says.
WRONG: list[tuple[Callable[[Any], VmmConfig], Any, str]] = [
    (lambda v: VmmConfig(memory=v), 128, "memory: expected a MemoryConfig, not 128"),
    (lambda v: VmmConfig(memory=v), None, "memory: expected a MemoryConfig, not None"),
    (lambda v: VmmConfig(cpu=v), 2, "cpu: expected a CpuConfig, not 2"),
    (lambda v: VmmConfig(serial=v), "out.txt", "serial: expected a SerialConfig, not 'out.txt'"),
    (
        lambda v: VmmConfig(boot=v),
        b"\xf4",
        "boot: expected an EmbeddedBoot, FlatBoot, ElfBoot, LinuxBoot, KernelBoot or FirmwareBoot, not b'\\xf4'",
    ),
    (lambda v: VmmConfig(exit_port=v), 0x10000, "exit_port: expected a port from 0 to 0xfffc, or None, not 65536"),
    (lambda v: VmmConfig(exit_port=v), -1, "exit_port: expected a port from 0 to 0xfffc, or None, not -1"),
    (lambda v: VmmConfig(irqchip=v), "yes", "irqchip: expected True, False or None, not 'yes'"),
    (
        lambda v: VmmConfig(memory=MemoryConfig(size_mib=v)),
        1.5,
        "memory.size_mib: expected a number of MiB from 1 to 8388607",
    ),
    (
        lambda v: VmmConfig(memory=MemoryConfig(size_mib=v)),
        10**30,
        "memory.size_mib: expected a number of MiB from 1 to 8388607",
    ),
    (lambda v: VmmConfig(cpu=CpuConfig(vcpus=v)), "2", "cpu.vcpus: expected a number from 1 to 4096, not '2'"),
    (lambda v: VmmConfig(cpu=CpuConfig(hide=v)), "avx2", 'cpu.hide: expected a sequence of names, as in ["avx2"]'),
    (lambda v: VmmConfig(cpu=CpuConfig(expose=v)), [1], 'cpu.expose: expected a sequence of names, as in ["avx2"]'),
    (lambda v: VmmConfig(cpu=CpuConfig(template=v)), "intel", "cpu.template: 'intel' is not one of auto, host"),
    (
        lambda v: VmmConfig(cpu=CpuConfig(template=v)),
        3,
        "cpu.template: expected one of auto, host, software-kvm, v2, v3, v4, or a .toml or .json file, not 3",
    ),
    (lambda v: VmmConfig(cpu=CpuConfig(fixups=v)), 1, "cpu.fixups: expected True or False, not 1"),
    (lambda v: VmmConfig(boot=FlatBoot(v)), "\xf4", "boot.code: expected bytes, not 'ô'"),
    (lambda v: VmmConfig(boot=FlatBoot(HALT, address=v)), -1, "boot.address: expected an address from 0 to 2^64 - 1"),
    (
        lambda v: VmmConfig(boot=FlatBoot(HALT, entry=v)),
        2**64,
        "boot.entry: expected an address from 0 to 2^64 - 1, or None",
    ),
    (
        lambda v: VmmConfig(boot=FlatBoot(HALT, mode=v)),
        None,
        "boot.mode: expected one of real16, protected32, long64, user64",
    ),
    (lambda v: VmmConfig(boot=LinuxBoot(v)), 3, "boot.kernel: expected a path, not 3"),
    (lambda v: VmmConfig(boot=LinuxBoot("/k", cmdline=v)), b"quiet", "boot.cmdline: expected a str, not b'quiet'"),
    (lambda v: VmmConfig(boot=LinuxBoot("/k", protocol=v)), "efi", "boot.protocol: 'efi' is not one of auto, 64-bit"),
    (
        lambda v: VmmConfig(boot=KernelBoot("/k", protocol=v)),
        "32-bit",
        "boot.protocol: '32-bit' is not one of auto",
    ),
    (
        lambda v: VmmConfig(boot=KernelBoot("/k", modules=v)),
        "/m",
        "boot.modules: expected a sequence of paths",
    ),
    (lambda v: VmmConfig(boot=KernelBoot("/k", modules=v)), [3], "boot.modules: expected paths or BootModules, not 3"),
    (
        lambda v: VmmConfig(boot=KernelBoot("/k", modules=[BootModule("/m"), BootModule("/m", cmdline=v)])),
        "a\0b",
        "boot.modules[1].cmdline: a zero byte would end it",
    ),
    (lambda v: VmmConfig(boot=FirmwareBoot(v)), b"rom", "boot.path: expected a path, not b'rom'"),
    (lambda v: VmmConfig(serial=SerialConfig(input_eof=v)), "x", "serial.input_eof: expected bytes, not 'x'"),
    (lambda v: VmmConfig(serial=SerialConfig(output=v)), object(), "serial.output: expected a path, a file descriptor"),
]


@pytest.mark.parametrize(("build", "value", "message"), WRONG)
def test_wrong_value_of_a_configuration_is_named_with_what_it_may_be(
    build: Callable[[Any], VmmConfig], value: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Vmm(build(value))
    assert str(caught.value).startswith(message)


def test_what_is_no_configuration_is_named() -> None:
    with pytest.raises(ConfigError, match=r"config: expected a VmmConfig, not 'vm\.toml'"):
        Vmm("vm.toml")  # type: ignore[arg-type]


@kvm
def test_names_are_any_sequence() -> None:
    with Vmm(flat(HALT, cpu=CpuConfig(hide=["avx2"], expose=("avx",)))) as vmm:
        assert vmm.run(60).reason is ExitReason.HALT


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('boot = {type = "vmlinux"}', "boot.type: Invalid value 'vmlinux'; one of embedded, flat, elf, linux"),
        ('boot = {type = "flat", mode = "real"}', "one of real16, protected32, long64, user64"),
        ('cpu = {template = "intel"}', "one of auto, host, software-kvm"),
    ],
)
def test_value_in_a_file_is_refused_with_the_choices(toml: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VmmConfig.from_toml(toml)
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("vm.toml", "memory = ["), ("vm.json", '{"memory":')])
def test_syntax_error_names_the_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        VmmConfig.from_file(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")


@kvm
def test_a_guest_that_has_ended_can_be_reset() -> None:
    with Vmm(flat(HALT)) as vmm:
        vmm.run(60)
        for call in vmm.run, vmm.start, vmm.wait:
            with pytest.raises(StateError, match=r"guest has ended.*reset\(\)"):
                call()


def classes() -> Iterator[type]:
    for name in pyvmm.__all__:
        found = getattr(pyvmm, name)
        if inspect.isclass(found) and found.__module__.startswith("pyvmm"):
            yield found


def test_every_public_member_has_a_docstring() -> None:
    for kind in classes():
        fields = ("__struct_fields__", "_fields", "__dataclass_fields__")
        described = {name for of_kind in fields for name in getattr(kind, of_kind, ())}
        for name, member in vars(kind).items():
            if name.startswith("_") or name in described or isinstance(member, int | str):
                continue
            if inspect.isclass(member) or type(member) is kind:
                continue  # variants, and the values of an enum
            assert inspect.getdoc(getattr(member, "__func__", member)), f"{kind.__name__}.{name}"


def test_listing_has_what_is_public_and_nothing_else() -> None:
    assert [name for name in dir(pyvmm) if not name.startswith("__")] == sorted(pyvmm.__all__)


# Every public function and class, called with what it does not expect.

ODD = st.one_of(
    st.none(), st.booleans(), st.text(max_size=4), st.binary(max_size=4), st.lists(st.integers(), max_size=2),
    st.sampled_from([-1, 2**31, 2**32, 2**63, 2**64, 10**40, math.nan, math.inf, -math.inf, 1e300, "\udc80", object()]),
    st.builds(EventFd), st.builds(EventManager), st.builds(object),
)  # fmt: skip
# What waits for something that may not come, and what can be called once a process.
LEFT_OUT = {"set_kick_signal", "call_blocking", "wait", "map", "fork_many", "expect", "expect_async"}


def is_left_out(name: str) -> bool:
    """Also what runs a guest or a loop without a limit, whatever comes to be called so."""
    runs = name.startswith("run") and name != "run_async"
    return runs or name.startswith("_") or name in LEFT_OUT


TYPED = (TypeError, ValueError, OverflowError, VmmError, BlockingIOError, OSError, AttributeError, LookupError)


@contextlib.contextmanager
def objects() -> Iterator[list[Any]]:
    """One of each class that has methods."""
    with Vmm(flat(COUNT_IN_MEMORY)) as vmm, Vmm(flat(COUNT_IN_MEMORY)) as other:
        manager = EventManager()
        snapshot: Snapshot = other.snapshot()
        yield [
            vmm, vmm.memory, vmm.serial, vmm.vcpus[0], vmm.stats, vmm.exit_handler, manager, snapshot,
            manager.remote_endpoint(), EventFd(), TimerFd(), pyvmm.Kvm(), Events(EventFd().fileno()),
        ]  # fmt: skip


@kvm
@settings(max_examples=150)
@given(data=st.data())
def test_wrong_types_and_values_get_a_typed_error(data: st.DataObject) -> None:
    with objects() as all_objects:
        thing = data.draw(st.sampled_from(all_objects))
        names = [n for n in dir(type(thing)) if not is_left_out(n)]
        name = data.draw(st.sampled_from(names))
        if not callable(inspect.getattr_static(type(thing), name)):
            return
        arguments = data.draw(st.lists(ODD, max_size=3))
        with contextlib.suppress(*TYPED):
            result = getattr(thing, name)(*arguments)
            if inspect.iscoroutine(result):
                result.close()


@settings(max_examples=150)
@given(data=st.data())
def test_constructors_refuse_with_a_typed_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([EventFd, TimerFd, Events, MemoryConfig, CpuConfig, VmmConfig, Vmm, pyvmm.KvmVm]))
    with contextlib.suppress(*TYPED):
        made: Any = kind(*data.draw(st.lists(ODD, min_size=1, max_size=3)))
        getattr(made, "close", lambda: None)()


@pytest.mark.parametrize("fd", [-1, 2**31 - 1, 2**40])
def test_descriptor_that_is_not_open_is_refused_by_number(fd: int) -> None:
    manager = EventManager()
    with pytest.raises((VmmError, ValueError, OverflowError, TypeError)):
        manager.on(fd)(print)
    with pytest.raises(ConfigError, match=r"serial\.output"):
        Vmm(VmmConfig(serial=SerialConfig(output=fd)))


@pytest.mark.parametrize("source", [True, False])
def test_bool_is_no_descriptor(source: bool) -> None:
    for watch in (lambda: EventManager().on(source)(print), lambda: Events(source, pyvmm.EventSet.IN)):
        with pytest.raises(ConfigError, match=f"{source} is not a file descriptor, but a bool"):
            watch()
    with pytest.raises(ConfigError, match=r"serial\.output: expected a stream, not"):
        Vmm(VmmConfig(serial=SerialConfig(output=source)))


def test_closed_descriptor_is_named() -> None:
    manager = EventManager()
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with pytest.raises(pyvmm.EventError, match=f"file descriptor {reader} is not open"):
        manager.on(reader)(print)


# Each call reads a sequence or bytes, of an object that claims to be longer than any memory.
CLAIMS = """
import collections.abc, sys
sys.path[:0] = [{tests!r}]
from guests import flat, read_in
from pyvmm import *

class Claims(collections.abc.Sequence):
    def __len__(self):
        return 2**62
    def __getitem__(self, index):
        raise IndexError

class Endless(Claims):
    def __getitem__(self, index):
        return 1

class Number(int):
    def to_bytes(self, *arguments):
        return Claims()

class Device:
    def read(self, offset, size):
        return Claims()

vmm = Vmm(flat(read_in(0x500)))
vmm.add_pio_device(0x500, 1, Device())
vcpu = vmm.vcpus[0]
bare = KvmVm(flat(read_in(0x500)))
bare.vcpus[0].run_once()
{call}
"""


@kvm
@pytest.mark.parametrize(
    ("call", "outcome"),
    [
        ("vcpu.debug(breakpoints=Claims())", ""),
        ("vcpu.debug(breakpoints=Endless())", "ValueError: more than 65536 elements"),
        ("vcpu.debug(breakpoints='12')", "TypeError: expected a sequence, not str"),
        ("vcpu.cpuid = Endless()", "ValueError: more than 65536 elements"),
        ("vcpu.cpuid = [1]", "TypeError: expected a CpuidEntry, not int"),
        ("vmm.on_exit('msr', print, msrs=Claims())", ""),
        ("vmm.on_exit('msr', print, msrs=Endless())", "ValueError: more than 65536 elements"),
        ("Vmm(VmmConfig(cpu=CpuConfig(hide=Claims())))", ""),
        ("Vmm(VmmConfig(cpu=CpuConfig(expose=Endless())))", "ConfigError: cpu.expose: expected a sequence of names"),
        ("vmm.memory.find(Claims())", "'Claims' object"),
        ("bare.vcpus[0].answer(Claims())", "TypeError: 'Claims' object"),
        ("bare.vcpus[0].answer(Number(1))", "TypeError: 'Claims' object"),
        ("vmm.run(60)", "TypeError: a read must return an int or bytes, not Claims"),
        (
            "ForkExecutor(Vmm(flat(read_in(0x500))).snapshot(), 2**62)",
            "ValueError: workers: 4611686018427387904 is not a number from 1 to 4096",
        ),
        ("ForkExecutor(vmm)", "TypeError: snapshot: expected a Snapshot, not Vmm"),
    ],
)
def test_an_object_that_claims_to_be_long_gets_an_exception_or_is_empty(call: str, outcome: str) -> None:
    program = CLAIMS.format(tests=str(TESTS), call=call)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == (1 if outcome else 0), done.stderr[-2000:]
    assert outcome in done.stderr

"""Invalid values for every call that inspects a machine: a typed error, and nothing changes."""

from __future__ import annotations

import contextlib
import ctypes
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import Kvm, KvmVm, Vcpu, VmmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.kvm
EXPECTED = (TypeError, ValueError, OverflowError, BufferError, IndexError, KeyError, AttributeError, VmmError, OSError)
SIZE = 0x4000

NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, SIZE - 1, SIZE, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70, -(2**64)]),
    st.integers(),
    st.booleans(),
)
OBJECTS = st.one_of(
    NUMBERS,
    st.sampled_from([math.nan, math.inf, -0.0, None, ..., object(), int, ctypes.c_uint8, ctypes.Structure, [], {}, 1j]),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.lists(st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def machine() -> Iterator[tuple[KvmVm, Vcpu]]:
    with KvmVm() as vm:
        vm.memory.add(0, SIZE)
        yield vm, vm.create_vcpu()


def state(vm: KvmVm, vcpu: Vcpu) -> tuple[object, ...]:
    registers = [repr(part) for part in (vcpu.regs, vcpu.sregs, vcpu.debugregs, vcpu.events, vcpu.xcrs, vcpu.fpu)]
    return vm.memory.read(0, SIZE), vm.memory.slots, vm.state, vcpu.id, *registers


LOOKS = ("read", "view", "find", "overlay", "read_u8", "read_u16", "read_u32", "read_u64", "readinto")
CHANGES = ("write", "fill", "write_u8", "write_u16", "write_u32", "write_u64", "add", "remove")


@given(st.sampled_from(LOOKS), st.lists(OBJECTS, max_size=4))
def test_looks_into_memory_change_nothing(machine: tuple[KvmVm, Vcpu], name: str, arguments: list[Any]) -> None:
    before = state(*machine)
    try:
        getattr(machine[0].memory, name)(*arguments)
    except EXPECTED as error:
        assert str(error) or isinstance(error, BufferError)
    assert state(*machine) == before


@given(st.sampled_from(CHANGES), st.lists(OBJECTS, max_size=4))
def test_a_refused_change_of_memory_changes_nothing(
    machine: tuple[KvmVm, Vcpu], name: str, arguments: list[Any]
) -> None:
    before = state(*machine)
    try:
        getattr(machine[0].memory, name)(*arguments)
    except EXPECTED:
        assert state(*machine) == before
    else:
        vm, _ = machine
        for slot in vm.memory.slots:
            if slot.start >= SIZE:
                vm.memory.remove(slot)
        assert [slot.size for slot in vm.memory.slots] == [SIZE]


@given(st.sampled_from(["regs", "sregs", "debugregs", "events", "xcrs", "fpu", "lapic"]), st.data(), OBJECTS)
def test_a_refused_register_changes_nothing(
    machine: tuple[KvmVm, Vcpu], part: str, data: st.DataObject, value: Any
) -> None:
    vm, vcpu = machine
    view = getattr(vcpu, part)
    name = data.draw(st.sampled_from([*view._names, "nonsense"]))
    before = state(vm, vcpu)
    for change in (lambda: setattr(view, name, value), lambda: view.update(**{name: value})):
        try:
            change()
        except EXPECTED:
            assert state(vm, vcpu) == before
        before = state(vm, vcpu)


OTHERS: list[Callable[[KvmVm, Vcpu, Any], object]] = [
    lambda vm, vcpu, value: vcpu.msrs[value],
    lambda vm, vcpu, value: vcpu.fpu.xmm[value],
    lambda vm, vcpu, value: vcpu.fpu.st.__setitem__(0, value),
    lambda vm, vcpu, value: vcpu.fpu.ymm.__setitem__(value, 0),
    lambda vm, vcpu, value: vcpu.translate(value),
    lambda vm, vcpu, value: vcpu.answer(value),
    lambda vm, vcpu, value: setattr(vcpu, "mp_state", value),
    lambda vm, vcpu, value: setattr(vcpu, "id", value),
    lambda vm, vcpu, value: vm.memory.read(0, 1, vcpu=value),
    lambda vm, vcpu, value: vm.memory.add(SIZE, source=str(value)),  # type: ignore[arg-type]
    lambda vm, vcpu, value: vm.wait(value if isinstance(value, str) else math.nan),  # type: ignore[arg-type]
    lambda vm, vcpu, value: Kvm().check_extension(value),
    lambda vm, vcpu, value: KvmVm(value) if value is not None else None,
    lambda vm, vcpu, value: KvmVm(None, value) if value is not None else None,
]


@given(st.sampled_from(OTHERS), OBJECTS)
def test_other_calls_take_anything_without_harm(
    machine: tuple[KvmVm, Vcpu], call: Callable[[KvmVm, Vcpu, Any], object], value: Any
) -> None:
    vm, vcpu = machine
    with contextlib.suppress(*EXPECTED):
        call(vm, vcpu, value)
    assert vm.state == "created"
    assert vm.memory.size == SIZE

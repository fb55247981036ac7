"""Exits as values: compared, hashed, pickled, copied and shown as dicts.

Covers src/py/vcpu_exit.rs.
"""

from __future__ import annotations

import copy
import operator
import pickle
from unittest import mock

import pytest
from pyvmm import Exit, ExitReason, FlatBoot, KvmVm, VcpuExit, VmmConfig

REGISTERS = {"rax": 1, "rip": 0x1000}


def of_each_kind() -> list[VcpuExit]:
    return [
        VcpuExit.IoIn(0x3F8, 1, 2),
        VcpuExit.IoOut(0x3F8, 1, b"a"),
        VcpuExit.MmioRead(0x3F8, 1),
        VcpuExit.MmioWrite(0x3F8, b"a"),
        VcpuExit.Rdmsr(0x10, "filter"),
        VcpuExit.Wrmsr(0x10, 2**64 - 1, "filter"),
        VcpuExit.Hlt(),
        VcpuExit.Shutdown(),
        VcpuExit.Interrupted(),
        VcpuExit.IrqWindowOpen(),
        VcpuExit.FailEntry(1, 2),
        VcpuExit.InternalError(1, b"\x0f", (1, 2), None, dict(REGISTERS)),
        VcpuExit.Debug(3, 1, 2, 3),
        VcpuExit.SystemEvent(1, (2,)),
        VcpuExit.MemoryFault(0, 1, 2),
        VcpuExit.Unknown(99),
    ]


def test_an_exit_equals_only_one_of_its_kind_and_values() -> None:
    exits, again = of_each_kind(), of_each_kind()
    for at, exit in enumerate(exits):
        assert [index for index, other in enumerate(again) if exit == other] == [at]
        assert hash(exit) == hash(again[at])
        assert exit == mock.ANY
        assert exit not in (None, tuple(exit.as_dict().values()))
    assert len({*exits, *again}) == len(exits)
    assert VcpuExit.IoIn(1, 1, 1) != VcpuExit.IoIn(1, 1, 2)
    assert VcpuExit.InternalError(1, b"", (), None, {}) != VcpuExit.InternalError(1, b"", (), None, REGISTERS)


def test_an_exit_without_fields_is_no_empty_sequence() -> None:
    for exit in of_each_kind():
        assert exit, "an empty sequence would be false"
        assert not hasattr(exit, "__len__")


def test_the_hash_of_an_exit_does_not_follow_its_registers() -> None:
    exit = VcpuExit.InternalError(1, b"", (), None, dict(REGISTERS))
    before = hash(exit)
    exit.registers["rax"] = 5
    assert hash(exit) == before


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_exits_are_pickled(protocol: int) -> None:
    for exit in of_each_kind():
        loaded = pickle.loads(pickle.dumps(exit, protocol))
        assert (type(loaded), loaded) == (type(exit), exit)


def test_exits_are_copied() -> None:
    for exit in of_each_kind():
        assert copy.copy(exit) == copy.deepcopy(exit) == exit
    exit = VcpuExit.InternalError(1, b"", (), None, dict(REGISTERS))
    copy.deepcopy(exit).registers.clear()
    assert exit.registers == REGISTERS


def test_an_exit_has_a_dict_form() -> None:
    assert VcpuExit.IoIn(0x3F8, 1, 2).as_dict() == {"type": "IoIn", "port": 0x3F8, "size": 1, "count": 2}
    # The kind of a system event is a field, beside the type of the exit.
    assert VcpuExit.SystemEvent(1, (2,)).as_dict() == {"type": "SystemEvent", "kind": 1, "data": (2,)}
    assert VcpuExit.Hlt().as_dict() == {"type": "Hlt"}
    for exit in of_each_kind():
        fields = exit.as_dict()
        assert getattr(VcpuExit, fields.pop("type"))(**fields) == exit


def test_the_dict_form_is_the_callers_own() -> None:
    exit = VcpuExit.InternalError(1, b"", (), None, dict(REGISTERS))
    exit.as_dict()["registers"].clear()
    assert exit.registers == REGISTERS


def test_an_exit_of_a_guest_equals_one_that_is_made() -> None:
    code = bytes.fromhex("b041 e680 f4")  # mov al, 'A'; out 0x80, al; hlt
    with KvmVm(VmmConfig(boot=FlatBoot(code))) as vm:
        assert vm.vcpus[0].run_once() == VcpuExit.IoOut(0x80, 1, b"A")
        assert vm.vcpus[0].run_once() == VcpuExit.Hlt()


def test_the_end_of_a_run_equals_only_another_end() -> None:
    exit = Exit(ExitReason.CODE, 7, 0)
    assert exit == Exit(ExitReason.CODE, 7, 0)
    assert hash(exit) == hash(Exit(ExitReason.CODE, 7, 0))
    assert exit != Exit(ExitReason.CODE, 8, 0)
    # On either side, and with the operator that is not the negation of the other.
    plain = tuple(exit)
    assert not exit == plain  # noqa: SIM201
    assert not plain == exit  # noqa: SIM201
    assert exit != plain
    assert plain != exit
    assert exit == mock.ANY
    assert exit != "code"
    assert pickle.loads(pickle.dumps(exit)) == exit


def test_the_end_of_a_run_is_ordered_with_other_ends_only() -> None:
    low, same, high = (Exit(ExitReason.CODE, code, 0) for code in (7, 7, 8))
    assert (low < high, low <= same, high > low, same >= low) == (True, True, True, True)
    assert (high < low, high <= low, low > high, low >= high) == (False, False, False, False)
    for compare in operator.lt, operator.le, operator.gt, operator.ge:
        for other in tuple(high), (), None, "code", 5:
            for pair in (low, other), (other, low):
                with pytest.raises(TypeError, match="compares with another Exit"):
                    compare(*pair)

"""What a type checker says of exit hooks: each kind's exits are known, and what a hook of it may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checker import check
from conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

HEAD = """
from typing import assert_type
from pyvmm import Answer, AnsweredBy, ExitKind, Vcpu, VcpuExit, Vmm

Io = VcpuExit.IoIn | VcpuExit.IoOut

def takes_io(vcpu: Vcpu, exit: Io) -> int: ...
def takes_out(vcpu: Vcpu, exit: VcpuExit.IoOut) -> None: ...
def takes_any(vcpu: Vcpu, exit: VcpuExit) -> None: ...
def takes_number(vcpu: Vcpu, exit: int) -> None: ...
def takes_nothing() -> None: ...
def io_answer(vcpu: Vcpu, exit: Io, answer: Answer) -> None: ...
def any_answer(vcpu: Vcpu, exit: VcpuExit, answer: Answer) -> None: ...

def check(vmm: Vmm, kind: str, vcpu: Vcpu, io: Io) -> None:
"""

# Lines that a checker accepts, with what it knows of their values.
RIGHT = """
    assert_type(vmm.on_exit("io", takes_io)(vcpu=vcpu, exit=io), int)
    vmm.on_exit(ExitKind.IO, takes_any)(vcpu=vcpu, exit=VcpuExit.Hlt())
    vmm.on_exit("msr", takes_any, msrs=[1])
    vmm.on_exit(kind, takes_any)
    vmm.off_exit("io", takes_io)
    vmm.off_exit(kind, takes_out)
    @vmm.on_exit("mmio")
    def mmio(vcpu: Vcpu, exit: VcpuExit.MmioRead | VcpuExit.MmioWrite) -> None:
        assert_type(exit.address, int)
    @vmm.on_exit("msr", msrs=[0x10])
    def msr(vcpu: Vcpu, exit: VcpuExit.Rdmsr | VcpuExit.Wrmsr) -> int:
        return exit.index
    assert_type(msr(vcpu, VcpuExit.Rdmsr(1, "filter")), int)
    vmm.on_answer("io", io_answer)
    vmm.on_answer(kind, any_answer)
    vmm.off_answer("io", io_answer)
    @vmm.on_answer("mmio")
    def answered(vcpu: Vcpu, exit: VcpuExit.MmioRead | VcpuExit.MmioWrite, answer: Answer) -> None:
        assert_type(exit.address, int)
        assert_type(answer.by, AnsweredBy)
        assert_type(answer.data, bytes | None)
        assert_type(answer.value, int | None)
    @vmm.on_exit(ExitKind.INTERNAL_ERROR)
    def failed(vcpu: Vcpu, exit: VcpuExit.InternalError) -> None:
        assert_type(exit.registers, dict[str, int])
"""

WRONG = [
    'vmm.on_exit("io", takes_out)',
    'vmm.on_exit("mmio", takes_io)',
    "vmm.on_exit(ExitKind.HLT, takes_io)",
    'vmm.on_exit("io", takes_number)',
    "vmm.on_exit(kind, takes_io)",
    'vmm.on_exit("io")(takes_out)',
    'vmm.on_exit("io", takes_io, msrs=[1])',
    'vmm.on_exit("io", takes_nothing)',
    'vmm.off_exit("io", takes_nothing)',
    "vmm.on_exit(5, takes_any)",
    'vmm.on_answer("mmio", io_answer)',
    'vmm.on_answer("io", takes_io)',
    "vmm.on_answer(kind, io_answer)",
    'vmm.off_answer("io", takes_io)',
]


def test_checker_knows_the_exits_of_each_kind(tmp_path: Path) -> None:
    check(HEAD + RIGHT, WRONG, tmp_path)


def test_no_hook_is_of_any_type() -> None:
    stub = (ROOT / "python" / "pyvmm" / "_pyvmm.pyi").read_text()
    hooks = [line for line in stub.splitlines() if "on_exit(" in line or "off_exit(" in line or 'Hook"' in line]
    assert len(hooks) > 20
    assert [line for line in hooks if "Any" in line] == []

"""Memory backed by files and memfds: shared with others, read-only, and refused if it does not fit."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING, Any

import pytest
from pyvmm import GuestMemoryError, KvmVm, VcpuExit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


pytestmark = pytest.mark.kvm
PLACE = 0x4000_0000


def test_two_machines_and_the_host_see_one_page() -> None:
    """Inc byte [0x8000]; hlt, in two machines over one memfd."""
    fd = os.memfd_create("shared", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 0x2000)
    machines = []
    for _ in range(2):
        vm = KvmVm()
        vm.memory.add(0x1000, 0x1000)
        vm.memory.write(0x1000, bytes.fromhex("fe060080 f4"))
        slot = vm.memory.add(0x8000, source=fd, offset=0x1000)
        assert (slot.size, slot.shared, slot.read_only) == (0x1000, True, False)
        vcpu = vm.create_vcpu()
        vcpu.sregs.cs.update(base=0, selector=0)
        vcpu.regs.update(rip=0x1000, rflags=2)
        assert isinstance(vcpu.run_once(), VcpuExit.Hlt)
        machines.append(vm)
    assert os.pread(fd, 1, 0x1000) == b"\2"
    with mmap.mmap(fd, 0x2000) as host:
        host[0x1001] = 9
    assert [vm.memory.read_u8(0x8001) for vm in machines] == [9, 9]
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)  # it would take the pages from under the guests
    for vm in machines:
        vm.close()
    os.close(fd)


def test_guest_cannot_write_read_only_memory(tmp_path: Path) -> None:
    """Mov al, [0x8000]; mov [0x8001], al; hlt."""
    file = tmp_path / "rom"
    file.write_bytes(b"R" + bytes(4095))
    with KvmVm() as vm, file.open("rb") as rom:
        memory = vm.memory
        memory.add(0x1000, 0x1000)
        memory.write(0x1000, bytes.fromhex("a00080 a20180 f4"))
        with pytest.raises(GuestMemoryError, match="reading only"):
            memory.add(0x8000, source=rom)
        memory.add(0x8000, source=rom, read_only=True)
        vcpu = vm.create_vcpu()
        vcpu.sregs.cs.update(base=0, selector=0)
        vcpu.regs.update(rip=0x1000, rflags=2)
        exit = vcpu.run_once()
        assert isinstance(exit, VcpuExit.MmioWrite)
        assert (exit.address, exit.data) == (0x8001, b"R")
        changes: list[tuple[Callable[[int, Any], None], Any]]
        changes = [(memory.write, b"x"), (memory.fill, 1), (memory.write_u8, 1), (memory.write_u64, 1)]
        for change, argument in changes:
            with pytest.raises(GuestMemoryError, match="reading only"):
                change(0x8000, argument)
        assert memory.view(0x8000, 1).readonly
        with pytest.raises(GuestMemoryError):
            memory.write(0x7FFF, b"xy")
    assert file.read_bytes()[:2] == b"R\0"


def test_files_that_cannot_be_memory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x")
    with KvmVm() as vm, (tmp_path / "short").open("r+b") as short, open(os.devnull, "r+b") as null:
        wrong: list[dict[str, Any]] = [
            {"size": 0x2000},
            {"offset": 1},
            {"offset": 0x1000},
            {"offset": 2**63},
            {"size": 1},
        ]
        for arguments in wrong:
            with pytest.raises(GuestMemoryError):
                vm.memory.add(0, source=short, **arguments)
        with pytest.raises(GuestMemoryError):
            vm.memory.add(0, source=null)
        with pytest.raises((ValueError, TypeError)):
            vm.memory.add(0, source=-1)
        with pytest.raises((OSError, GuestMemoryError)):
            vm.memory.add(0, 0x1000, source=10**6)
        assert vm.memory.slots == ()


@pytest.mark.parametrize("offset", [1, 4095, 4097, 2**63, 2**64 - 4096])
def test_an_offset_that_cannot_be_is_refused_and_the_file_left_as_it_was(offset: int) -> None:
    fd = os.memfd_create("source", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)
    with KvmVm() as vm, pytest.raises(GuestMemoryError, match="offset"):
        vm.memory.add(PLACE, source=fd, offset=offset)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == 0
    os.close(fd)

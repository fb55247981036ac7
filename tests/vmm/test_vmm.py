"""The machine as a user sees it: boot in each mode, run, end, again.

Covers src/py/errors.rs, src/py/exit.rs, src/vmm/machine.rs, src/vmm/parts.rs, src/vmm/run.rs,
python/pyvmm/exceptions.py, python/pyvmm/exits.py.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

import pytest
import pyvmm
from guests import (
    COUNT_IN_MEMORY,
    HALT,
    SPIN,
    Mode,
    count_vcpus,
    elf,
    exit_with,
    flat,
    print_text,
)
from pyvmm import (
    ConfigError,
    CpuConfig,
    ExitReason,
    FlatBoot,
    MemoryConfig,
    StateError,
    Vmm,
    VmmConfig,
    VmRunState,
)
from threads import thread_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


pytestmark = pytest.mark.kvm


@pytest.mark.parametrize("mode", ["real16", "protected32", "long64", "user64"])
def test_each_mode_runs_to_the_exit_port(mode: Mode) -> None:
    with Vmm(flat(exit_with(42), mode)) as vmm:
        exit = vmm.run(60)
    assert (exit.reason, exit.code, exit.vcpu, exit.fault) == (ExitReason.CODE, 42, 0, None)


def test_ring_3_is_ring_3_and_64_bits_wide() -> None:
    code = (
        b"\x66\x8c\xc8"  #         mov ax, cs
        b"\x83\xe0\x03"  #         and eax, 3: the privilege level
        b"\x48\xc7\xc1\xff\xff\xff\xff"  # mov rcx, -1
        b"\x48\xc1\xe9\x3c"  #     shr rcx, 60: 15 where registers have 64 bits
        b"\xc1\xe1\x04\x09\xc8"  # shl ecx, 4; or eax, ecx
        b"\xe6\xf4"  #             out 0xf4, al
    )
    with Vmm(flat(code, "user64")) as vmm:
        assert vmm.run(60).code == 0xF3


def test_halt_ends_the_run() -> None:
    with Vmm(flat(HALT)) as vmm:
        exit = vmm.run(60)
    assert (exit.reason, exit.code, exit.vcpu) == (ExitReason.HALT, None, 0)


def test_without_a_config_the_embedded_guest_runs() -> None:
    with Vmm() as vmm:
        vmm.serial.send(b"hello\n\n")
        exit = vmm.run(60)
        text = vmm.serial.take_output()
    assert (exit.reason, exit.code) == (ExitReason.CODE, 0)
    assert b"Hello from a guest of pyvmm" in text
    assert b"You typed: hello" in text
    assert text.endswith(b"Goodbye.\r\n")


def test_embedded_guest_ends_where_its_exit_port_is_or_by_a_reset() -> None:
    with Vmm(VmmConfig(exit_port=0x600)) as vmm:
        assert vmm.run(60).reason is ExitReason.CODE
    with Vmm(VmmConfig(exit_port=None)) as vmm:
        assert vmm.run(60).reason is ExitReason.RESET


@pytest.mark.parametrize("mode", ["long64", "user64"])
def test_every_vcpu_starts_with_its_number(mode: Mode) -> None:
    vcpus = 4
    with Vmm(flat(count_vcpus(vcpus), mode, address=0x10000, cpu=CpuConfig(vcpus=vcpus))) as vmm:
        exit = vmm.run(60)
        numbers = struct.unpack("<4Q", vmm.memory.read(0x4000, 32))
    assert (exit.reason, exit.code) == (ExitReason.CODE, vcpus)
    assert numbers == (0, 1, 2, 3)


def test_vcpu_threads_carry_their_names() -> None:
    names: set[str] = set()

    class Look:
        def __init__(self) -> None:
            self.fd = pyvmm.EventFd(1)

        def init(self, ops: pyvmm.EventOps) -> None:
            ops.add(pyvmm.Events(self.fd))

        def process(self, events: pyvmm.Events, ops: pyvmm.EventOps) -> None:
            names.update(thread_names())
            if {"vcpu_0", "vcpu_1"} <= names:
                vmm.stop()

    with Vmm(flat(SPIN, cpu=CpuConfig(vcpus=2))) as vmm:
        vmm.add_subscriber(Look())
        vmm.run(60)
    assert {"vcpu_0", "vcpu_1"} <= names


def test_init_and_sipi_wake_a_waiting_vcpu_of_linux(make: Callable[[VmmConfig], Vmm], tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(waking_kernel())
    vmm = make(VmmConfig(boot=pyvmm.LinuxBoot(kernel), cpu=CpuConfig(vcpus=2), memory=MemoryConfig(size_mib=8)))
    exit = vmm.run(60)
    assert (exit.reason, exit.code, exit.vcpu) == (ExitReason.CODE, 33, 1), exit


def store(at: int, value: int) -> bytes:
    """Mov eax, at; mov dword [rax], value."""
    return b"\xb8" + struct.pack("<I", at) + b"\xc7\x00" + struct.pack("<I", value)


def waking_kernel() -> bytes:
    """An ELF that copies a real-mode trampoline to 0x8000 and wakes processor 1 there."""
    trampoline = exit_with(33)
    lapic_command = (0xFEE00310, 0xFEE00300)
    code = (
        b"\xc7\x04\x25\x00\x80\x00\x00"
        + trampoline  #  mov dword [0x8000], trampoline
        + store(0xFEE000F0, 0x1FF)  #                    enable the local APIC
        + store(lapic_command[0], 1 << 24)  #            to processor 1:
        + store(lapic_command[1], 0x4500)  #             INIT
        + store(lapic_command[0], 1 << 24)
        + store(lapic_command[1], 0x4608)  #             SIPI, to 0x8000
        + b"\xf3\x90\xeb\xfc"  #                         wait
    )
    return elf(0x100000, code)


def test_ten_machines_at_once_and_a_hundred_in_a_row() -> None:
    machines = [Vmm(flat(exit_with(n))) for n in range(10)]
    codes: list[int | None] = [None] * 10

    def run(n: int) -> None:
        codes[n] = machines[n].run(60).code

    threads = [threading.Thread(target=run, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == list(range(10))
    for vmm in machines:
        vmm.close()
    for n in range(100):
        with Vmm(flat(exit_with(n))) as vmm:
            assert vmm.run(60).code == n


def test_memory_beyond_3_gib_is_there_on_both_sides_of_the_gap() -> None:
    code = (
        b"\x48\xb8"
        + struct.pack("<Q", (4 << 30) + 0x1000)  # mov rax, 4 GiB + 0x1000
        + b"\x8a\x00"  # mov al, [rax]
        + b"\xe6\xf4"  # out 0xf4, al
    )
    config = flat(code, "long64", size_mib=3 * 1024 + 64)
    with Vmm(config) as vmm:
        assert vmm.memory.ranges == [(0, 3 << 30), (4 << 30, 64 << 20)]
        vmm.memory.write((4 << 30) + 0x1000, b"\x5a")
        exit = vmm.run(60)
    assert exit.code == 0x5A


def test_timeout_leaves_a_machine_that_can_continue() -> None:
    with Vmm(flat(COUNT_IN_MEMORY)) as vmm:
        assert vmm.state is VmRunState.CREATED
        exit = vmm.run(0.01)
        assert (exit.reason, exit.vcpu, vmm.state) == (ExitReason.TIMEOUT, None, VmRunState.PAUSED)
        first = vmm.memory.read(0x2000, 2)
        vmm.memory.write(0x1000, exit_with(9))
        assert vmm.memory.read(0x2000, 2) == first, "a stopped guest does not run"
        assert vmm.run(60).code == 9


def test_a_guest_that_ended_cannot_run_again_but_can_be_read() -> None:
    with Vmm(flat(exit_with(1))) as vmm:
        vmm.run(60)
        assert vmm.state is VmRunState.EXITING
        with pytest.raises(StateError, match="its guest has ended"):
            vmm.run(60)
        assert vmm.memory.read(0x1000, 4) == exit_with(1)
    with pytest.raises(StateError, match="closed"):
        vmm.run(60)
    assert vmm.state is VmRunState.CLOSED


def test_close_is_idempotent_and_ends_memory() -> None:
    vmm = Vmm(flat(HALT))
    memory = vmm.memory
    vmm.close()
    vmm.close()
    with pytest.raises(StateError, match="closed"):
        memory.read(0, 1)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (VmmConfig(memory=MemoryConfig(size_mib=0)), "memory.size_mib"),
        (VmmConfig(memory=MemoryConfig(size_mib=2**23 - 1)), "memory.size_mib"),
        (VmmConfig(memory=MemoryConfig(size_mib=2**70)), "memory.size_mib"),
        (VmmConfig(memory=MemoryConfig(size_mib="1")), "memory.size_mib"),  # type: ignore[arg-type]
        (VmmConfig(cpu=CpuConfig(vcpus=0)), "cpu.vcpus"),
        (VmmConfig(cpu=CpuConfig(vcpus=4097)), "cpu.vcpus"),
        (VmmConfig(cpu=CpuConfig(hide=("nonsense",))), "cpu.hide"),
        (VmmConfig(cpu=CpuConfig(expose=("nonsense",))), "cpu.expose"),
        (VmmConfig(cpu=CpuConfig(hide=("avx",), expose=("avx",))), "cpu.expose"),
        (VmmConfig(cpu=CpuConfig(template="x")), "cpu.template"),
        (VmmConfig(exit_port=0x3F8), "exit_port"),
        (VmmConfig(exit_port=-1), "exit_port"),
        (VmmConfig(pit=True), "pit"),
        (VmmConfig(boot=None), "boot"),  # type: ignore[arg-type]
        (VmmConfig(boot=FlatBoot(b"\xf4", mode="vm86")), "boot.mode"),  # type: ignore[arg-type]
        (VmmConfig(boot=FlatBoot(b"\xf4", address=1 << 40)), "boot.address"),
        (VmmConfig(boot=FlatBoot(b"\xf4", entry=1 << 40)), "boot.entry"),
        (VmmConfig(boot=FlatBoot(b"\xf4", path="x")), "boot.path"),
        (VmmConfig(serial=pyvmm.SerialConfig(output=3.5)), "serial.output"),
        (VmmConfig(serial=pyvmm.SerialConfig(output=99999)), "serial.output"),
        (VmmConfig(serial=pyvmm.SerialConfig(input="/no/such/file")), "serial.input"),
    ],
)
def test_bad_values_are_named_by_their_key(config: VmmConfig, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: ") as raised:
        Vmm(config)
    assert raised.value.at == key


def test_what_is_no_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a VmmConfig, not \{\}"):
        Vmm({})  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [-1.0, float("nan")])
def test_bad_timeout_is_refused(timeout: float, make: Callable[[VmmConfig], Vmm]) -> None:
    with pytest.raises(ValueError, match="timeout"):
        make(flat(HALT)).run(timeout)


def test_infinite_timeout_is_no_timeout(make: Callable[[VmmConfig], Vmm]) -> None:
    assert make(flat(HALT)).run(float("inf")).reason is ExitReason.HALT


def test_print_is_kept_for_the_host(make: Callable[[VmmConfig], Vmm]) -> None:
    vmm = make(flat(print_text(b"hello") + exit_with(0)))
    vmm.run(60)
    assert vmm.serial.take_output() == b"hello"

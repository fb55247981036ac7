"""The machine as a user sees it: boot in each mode, run, end, again.

Covers src/py/errors.rs, src/py/exit.rs, src/vmm/machine.rs, src/vmm/parts.rs, src/vmm/run.rs,
python/pyvmm/exceptions.py, python/pyvmm/exits.py.
"""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    out,
    print_text,
    read_in,
)
from pyvmm import (
    ConfigError,
    CpuConfig,
    ExitReason,
    FlatBoot,
    Kvm,
    KvmError,
    MemoryConfig,
    StateError,
    Unanswered,
    Vmm,
    VmmConfig,
    VmRunState,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm

Make = "Callable[[VmmConfig], Vmm]"


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


ASKS_KEYBOARD_CONTROLLER = (
    b"\xe6\x64"  #         out 0x64, al: the command
    b"\xb9\x64\x00"  #     mov cx, 100
    b"\xe4\x64\xa8\x01"  # in al, 0x64; test al, 1
    b"\x75\x06"  #         jnz there
    b"\xe2\xf8" + exit_with(0xEE) + b"\xe4\x60\xe6\xf4"  #         loop back  # there: in al, 0x60; out 0xf4, al
)


@pytest.mark.parametrize(
    ("command", "answer"),
    [(0x20, 0x64), (0xAA, 0x55), (0xAB, 0), (0xA9, 1), (0xD0, 0xCF), (0xAE, 0xEE)],
    ids=["command byte", "self-test", "first port", "no second port", "output port", "one without an answer"],
)
def test_keyboard_controller_answers_its_commands(command: int, answer: int) -> None:
    with Vmm(flat(bytes([0xB0, command]) + ASKS_KEYBOARD_CONTROLLER)) as vmm:
        assert vmm.run(60).code == answer


def test_keyboard_controller_is_in_snapshots() -> None:
    code = out(0x64, 0x60) + out(0x60, 0x03) + HALT + bytes([0xB0, 0x20]) + ASKS_KEYBOARD_CONTROLLER
    with Vmm(flat(code)) as vmm:
        assert vmm.run(60).reason is ExitReason.HALT
        with vmm.snapshot().fork() as fork:
            assert fork.run(60).code == 0x23, "what was written; the second port, which is not there, stays off"


def test_keyboard_controller_resets() -> None:
    with Vmm(flat(out(0x64, 0xFE))) as vmm:
        assert vmm.run(60).reason is ExitReason.RESET


def test_exit_code_has_the_width_that_was_written() -> None:
    code = b"\x66\xb8\x78\x56\x34\x12\xba\xf4\x00\x66\xef"  # mov eax, 0x12345678; mov dx, 0xf4; out dx, eax
    with Vmm(flat(code)) as vmm:
        assert vmm.run(60).code == 0x12345678


def test_exit_port_can_be_elsewhere_or_nowhere() -> None:
    with Vmm(flat(out(0x500, 7), exit_port=0x500)) as vmm:
        assert vmm.run(60).code == 7
    with Vmm(flat(exit_with(7) + HALT, exit_port=None)) as vmm:
        assert vmm.run(60).reason is ExitReason.HALT
        assert vmm.unanswered == [Unanswered("pio", 0xF4, 0, 1)]


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


def test_clock_tells_the_century() -> None:
    code = b"\xb0\x32\xe6\x70\xe4\x71\xe6\xf4"  # mov al, 0x32; out 0x70, al; in al, 0x71; out 0xf4, al
    with Vmm(flat(code)) as vmm:
        assert vmm.run(60).code == 0x20, "BCD"


def test_what_nobody_answers_is_counted() -> None:
    code = read_in(0x80) + read_in(0x80) + out(0x81, 1) + exit_with(0)
    with Vmm(flat(code)) as vmm:
        vmm.run(60)
        assert vmm.unanswered == [Unanswered("pio", 0x80, 2, 0), Unanswered("pio", 0x81, 0, 1)]


def test_mmio_nobody_answers_reads_ones() -> None:
    code = b"\xb8\x00\x00\x00\xd0\x8a\x00\xe6\xf4"  # mov eax, 0xd0000000; mov al, [rax]; out 0xf4, al
    with Vmm(flat(code, "long64")) as vmm:
        assert vmm.run(60).code == 0xFF
        assert vmm.unanswered == [Unanswered("mmio", 0xD0000000, 1, 0)]


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
            names.update(task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm"))
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


def test_timeout_leaves_a_machine_that_goes_on() -> None:
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
        (VmmConfig(cpu=CpuConfig(vcpus=255)), "cpu.vcpus"),
        (VmmConfig(cpu=CpuConfig(hide=("nonsense",))), "cpu.hide"),
        (VmmConfig(cpu=CpuConfig(expose=("nonsense",))), "cpu.expose"),
        (VmmConfig(cpu=CpuConfig(hide=("avx",), expose=("avx",))), "cpu.expose"),
        (VmmConfig(cpu=CpuConfig(template="x")), "cpu.template"),  # type: ignore[arg-type]
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
    with pytest.raises(ConfigError, match=r"a VmmConfig is needed, not \{\}"):
        Vmm({})  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [-1.0, float("nan")])
def test_bad_timeout_is_refused(timeout: float, make: Callable[[VmmConfig], Vmm]) -> None:
    with pytest.raises(ValueError, match="timeout"):
        make(flat(HALT)).run(timeout)


def test_infinite_timeout_is_no_timeout(make: Callable[[VmmConfig], Vmm]) -> None:
    assert make(flat(HALT)).run(float("inf")).reason is ExitReason.HALT


def test_hidden_feature_is_not_seen_by_the_guest() -> None:
    code = (
        b"\xb8\x01\x00\x00\x00"  # mov eax, 1
        b"\x0f\xa2"  #             cpuid
        b"\xc1\xe9\x0d\x83\xe1\x01"  # shr ecx, 13; and ecx, 1: cx16
        b"\x88\xc8\xe6\xf4"  #     mov al, cl; out 0xf4, al
    )
    seen = []
    for cpu in [CpuConfig(), CpuConfig(hide=("cx16",))]:
        with Vmm(flat(code, "long64", cpu=cpu)) as vmm:
            seen.append(vmm.run(60).code)
    assert seen == [1, 0]


def has_feature(vmm: Vmm, function: int, register: str, bit: int) -> bool:
    return any(getattr(leaf, register) >> bit & 1 for leaf in vmm.vcpus[0].cpuid if leaf.function == function)


@pytest.mark.parametrize("template", ["auto", "host", "software-kvm"])
def test_hardware_virtualization_is_offered_to_no_guest_that_was_not_promised_it(template: Any) -> None:
    with Vmm(flat(HALT, cpu=CpuConfig(template=template))) as vmm:
        assert not has_feature(vmm, 1, "ecx", 5), "vmx"
        assert not has_feature(vmm, 0x8000_0001, "ecx", 2), "svm"


def test_a_guest_that_is_a_hypervisor_has_no_snapshot() -> None:
    """Its own guests' state would be lost."""
    with Vmm(flat(HALT, "long64", cpu=CpuConfig(expose=("svm",)))) as vmm:
        (vcpu,) = vmm.vcpus
        vmm.snapshot()
        try:
            vcpu.sregs.efer |= 1 << 12  # SVME
        except KvmError:
            pytest.skip("this KVM has no nesting of SVM")
        with pytest.raises(StateError, match="hardware virtualization switched on"):
            vmm.snapshot()
        vcpu.sregs.efer &= ~(1 << 12)
        with vmm.snapshot().fork() as fork:
            assert fork.run(60).reason is ExitReason.HALT


def test_hypercalls_that_a_kvm_in_software_does_not_answer_are_hidden() -> None:
    unanswered = 1 << 7 | 1 << 11 | 1 << 13  # PV_UNHALT, PV_SEND_IPI, PV_SCHED_YIELD
    with Vmm(flat(HALT, cpu=CpuConfig(vcpus=2, template="software-kvm"))) as vmm:
        for vcpu in vmm.vcpus:
            (features,) = (leaf.eax for leaf in vcpu.cpuid if leaf.function == 0x4000_0001)
            assert not features & unanswered
    with Vmm(flat(HALT, cpu=CpuConfig(template="host"))) as vmm:
        (features,) = (leaf.eax for leaf in vmm.vcpus[0].cpuid if leaf.function == 0x4000_0001)
        (supported,) = (leaf.eax for leaf in Kvm().supported_cpuid if leaf.function == 0x4000_0001)
        assert features & unanswered == supported & unanswered


def test_exposed_feature_is_seen_by_the_guest() -> None:
    """The bit of vmx, which no template offers: mov eax, 1; cpuid; shr ecx, 5; and ecx, 1; exit."""
    code = bytes.fromhex("b801000000 0fa2 c1e905 83e101 88c8 e6f4")
    with Vmm(flat(code, "long64", cpu=CpuConfig(template="software-kvm", expose=("popcnt",)))) as vmm:
        popcnt = [entry.ecx >> 23 & 1 for entry in vmm.vcpus[0].cpuid if entry.function == 1]
        assert popcnt == [1]
    with Vmm(flat(code, "long64", cpu=CpuConfig(hide=("vmx",)))) as vmm:
        assert vmm.run(60).code == 0
    with Vmm(flat(code, "long64", cpu=CpuConfig(expose=("vmx",)))) as vmm:
        assert vmm.run(60).code == 1


def test_print_is_kept_for_the_host(make: Callable[[VmmConfig], Vmm]) -> None:
    vmm = make(flat(print_text(b"hello") + exit_with(0)))
    vmm.run(60)
    assert vmm.serial.take_output() == b"hello"


def test_many_machines_share_one_loop_and_end_each_alone() -> None:
    manager = pyvmm.EventManager()
    machines = [Vmm(flat(exit_with(n)), event_manager=manager) for n in range(20)]
    spinning = Vmm(flat(SPIN), event_manager=manager)
    assert all(vmm.event_manager is manager for vmm in machines)
    codes: dict[int, int | None] = {}

    def run(n: int) -> None:
        codes[n] = machines[n].run(60).code

    threads = [threading.Thread(target=run, args=(n,)) for n in range(20)]
    spinner = threading.Thread(target=spinning.run)
    for thread in (spinner, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    assert codes == {n: n for n in range(20)}
    assert spinner.is_alive(), "the end of others is not its end"
    spinning.stop()
    spinner.join(60)
    for vmm in (spinning, *machines):
        vmm.close()
    assert manager.run_with_timeout(0) == 0


def test_machine_leaves_a_shared_loop_when_it_is_closed_or_dropped() -> None:
    manager = pyvmm.EventManager()
    out: list[bytes] = []
    config = flat(print_text(b"hi") + exit_with(1), serial=pyvmm.SerialConfig(output=out.append))
    with Vmm(config, event_manager=manager) as vmm:
        vmm.run(60)
    assert b"".join(out) == b"hi"
    assert repr(manager) == "EventManager(subscribers=0)"
    dropped = Vmm(flat(exit_with(1)), event_manager=manager)
    handler = dropped.exit_handler
    del dropped
    handler.kick()
    assert manager.run_with_timeout(0) == 0


def test_loop_that_waits_already_can_be_shared() -> None:
    """The machine's run may take the kick that the other run waits for."""
    manager = pyvmm.EventManager()
    forever = threading.Thread(target=manager.run_forever)
    forever.start()
    manager.remote_endpoint().call_blocking(lambda _: None)
    with Vmm(flat(SPIN), event_manager=manager) as spinning:
        run = threading.Thread(target=spinning.run)
        run.start()
        with Vmm(flat(exit_with(7)), event_manager=manager) as vmm:
            assert vmm.run(60).code == 7
        manager.stop()
        forever.join(60)
        assert not forever.is_alive()
        spinning.stop()
        run.join(60)
        assert not run.is_alive()


def test_kick_that_another_loop_takes_ends_the_run_too() -> None:
    with Vmm(flat(SPIN)) as vmm:
        other = pyvmm.EventManager()
        other.add_subscriber(vmm.exit_handler)
        thief = threading.Thread(target=other.run_forever)
        thief.start()
        for _ in range(20):
            kicker = threading.Thread(target=vmm.exit_handler.kick)
            kicker.start()
            assert vmm.run(60).reason is ExitReason.STOPPED
            kicker.join()
        other.stop()
        thief.join(60)
        assert not thief.is_alive()

"""Python objects as devices: every width on both buses, string instructions, at any time, and misbehaving.

Covers src/py/device.rs, src/py/vmm_devices.rs, src/py/pending_outcome.rs, src/vcpu/access.rs.
"""

from __future__ import annotations

import gc
import os
import struct
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from guests import COUNT_IN_MEMORY, HALT, exit_with, flat, keeps_fault_state, out, read_in
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import ConfigError, CpuConfig, EventManager, Exit, ExitReason, StateError, Stop, Vcpu, Vmm, VmRunState

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm

DEADLINE_S = 60


class Log:
    """Remembers its accesses; reads give ascending bytes."""

    def __init__(self) -> None:
        self.accesses: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size))
        return int.from_bytes(bytes(range(0x41, 0x41 + size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size, value))


def test_ports_of_each_width_reach_a_device() -> None:
    device = Log()
    # 16 bits: in al, dx; out dx, al; in ax, dx; out dx, ax; in eax, dx; out dx, eax
    code = b"\xba\x04\x05" + b"\xec\xee" + b"\xed\xef" + b"\x66\xed\x66\xef" + exit_with(1)
    with Vmm(flat(code)) as vmm:
        vmm.add_pio_device(0x500, 8, device)
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.CODE, 1, 0)
    assert device.accesses == [
        ("read", 4, 1),
        ("write", 4, 1, 0x41),
        ("read", 4, 2),
        ("write", 4, 2, 0x4241),
        ("read", 4, 4),
        ("write", 4, 4, 0x44434241),
    ]


def test_addresses_of_each_width_reach_a_device() -> None:
    device = Log()
    # 64 bits: mov rbx, 0xd0000010; then a load and a store of each width
    code = (
        b"\x48\xbb" + struct.pack("<Q", 0xD000_0010) +
        b"\x8a\x03\x88\x03"  #          mov al, [rbx]; mov [rbx], al
        b"\x66\x8b\x03\x66\x89\x03"  #  mov ax, [rbx]; mov [rbx], ax
        b"\x8b\x03\x89\x03"  #          mov eax, [rbx]; mov [rbx], eax
        b"\x48\x8b\x03\x48\x89\x03"  #  mov rax, [rbx]; mov [rbx], rax
    ) + exit_with(1)  # fmt: skip
    with Vmm(flat(code, "long64")) as vmm:
        vmm.add_mmio_device(0xD000_0000, 0x1000, device)
        assert vmm.run(DEADLINE_S).code == 1
    assert device.accesses == [
        access
        for size in (1, 2, 4, 8)
        for access in (
            ("read", 0x10, size),
            ("write", 0x10, size, int.from_bytes(bytes(range(0x41, 0x41 + size)), "little")),
        )
    ]


def test_bytes_are_as_good_as_a_number() -> None:
    class Device:
        def read(self, _offset: int, size: int) -> bytes:
            return b"abcd"[:size]

    with Vmm(flat(b"\xba\x00\x05\x66\xed" + exit_with(1))) as vmm:
        vmm.add_pio_device(0x500, 4, Device())
        vmm.run(DEADLINE_S)
        assert vmm.vcpus[0].regs.rax & 0xFFFFFF00 == int.from_bytes(b"\0bcd", "little")


def test_a_half_that_is_missing_reads_as_ones_and_drops_writes() -> None:
    class Reads:
        def read(self, _offset: int, _size: int) -> int:
            return 7

    class Writes:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            pass

    code = out(0x500, 1) + read_in(0x500) + b"\x88\xc4" + read_in(0x501) + exit_with(1)  # mov ah, al
    with Vmm(flat(code)) as vmm:
        vmm.add_pio_device(0x500, 1, Reads())
        vmm.add_pio_device(0x501, 1, Writes())
        vmm.on_exit("io", lambda vcpu, exit: seen.append(vcpu.regs.rax & 0xFFFF) if exit.port == 0xF4 else None)
        seen: list[int] = []
        assert vmm.run(DEADLINE_S).code == 1
        assert seen == [0x0701], "AL is the exit code by then"
        assert vmm.unanswered == []


class Strings(Log):
    def read_many(self, offset: int, size: int, count: int) -> bytes:
        self.accesses.append(("read_many", offset, size, count))
        return bytes(range(size * count))

    def write_many(self, offset: int, size: int, data: bytes) -> None:
        self.accesses.append(("write_many", offset, size, data))


# 16 bits: from 0x2000 to port 0x500, then from port 0x500 to 0x3000, so many elements. OUTS is 6e
# or 6f, INS 6c or 6d.
def repeat(outs: bytes, ins: bytes, count: int, source: int = 0x2000) -> bytes:
    """Both string instructions with a count."""
    return (
        b"\xba\x00\x05" +  #                               mov dx, 0x500
        b"\xbe" + struct.pack("<H", source) +  #           mov si, source
        b"\xb9" + struct.pack("<H", count) + outs +  #     mov cx, count; rep outs
        b"\xbf\x00\x30" +  #                               mov di, 0x3000
        b"\xb9" + struct.pack("<H", count) + ins  #        mov cx, count; rep ins
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "size", "outs", "ins"), [(b"", 1, 0x6E, 0x6C), (b"", 2, 0x6F, 0x6D), (b"\x66", 4, 0x6F, 0x6D)]
)
def test_string_instructions_are_one_call(prefix: bytes, size: int, outs: int, ins: int) -> None:
    device = Strings()
    data = bytes(range(100, 100 + 5 * size))
    code = repeat(b"\xf3" + prefix + bytes([outs]), b"\xf3" + prefix + bytes([ins]), 5) + exit_with(1)
    with Vmm(flat(code)) as vmm:
        vmm.memory.write(0x2000, data)
        vmm.add_pio_device(0x500, 4, device)
        assert vmm.run(DEADLINE_S).code == 1
        assert vmm.memory.read(0x3000, 5 * size) == bytes(range(5 * size))
        regs = vmm.vcpus[0].regs
        assert (regs.rcx, regs.rsi, regs.rdi) == (0, 0x2000 + 5 * size, 0x3000 + 5 * size)
    assert device.accesses == [("write_many", 0, size, data), ("read_many", 0, size, 5)]


def test_string_instructions_are_single_accesses_for_a_device_that_knows_no_others() -> None:
    device = Log()
    with Vmm(flat(repeat(b"\xf3\x6e", b"\xf3\x6c", 3) + exit_with(1))) as vmm:
        vmm.memory.write(0x2000, b"abc")
        vmm.add_pio_device(0x500, 4, device)
        assert vmm.run(DEADLINE_S).code == 1
        assert vmm.memory.read(0x3000, 4) == b"AAA\0"
    assert device.accesses == [("write", 0, 1, byte) for byte in b"abc"] + [("read", 0, 1)] * 3


def test_a_string_over_a_page_loses_nothing() -> None:
    device = Strings()
    data = bytes(range(256)) * 20
    with Vmm(flat(repeat(b"\xf3\x6e", b"", len(data), 0x2FF0) + exit_with(1))) as vmm:
        vmm.memory.write(0x2FF0, data)
        vmm.add_pio_device(0x500, 4, device)
        assert vmm.run(DEADLINE_S).code == 1
    pieces = [access[3] if access[0] == "write_many" else bytes([access[3]]) for access in device.accesses]  # type: ignore[list-item]
    assert b"".join(pieces) == data  # type: ignore[arg-type]
    assert len(pieces) < 10


def test_a_string_does_not_reach_into_a_page_that_the_guests_ring_may_not_read() -> None:
    device = Strings()
    # mov esi, 0x1fffff; mov ecx, 16; mov dx, 0x500; rep outsb
    code = bytes.fromhex("beffff1f00 b910000000 66ba0005 f36e") + exit_with(1)
    with Vmm(flat(code, "user64", size_mib=8)) as vmm:
        vmm.add_pio_device(0x500, 4, device)
        table = vmm.vcpus[0].sregs.cr3
        for _ in range(2):  # down to the directory of 2 MiB pages
            table = vmm.memory.read_u64(table) & 0xFFFF_F000
        vmm.memory.write_u64(table + 8, 0x20_0083)  # from 2 MiB on for the supervisor alone
        vmm.memory.write(0x1F_FFFF, b"Asecret")
        exit = vmm.run(DEADLINE_S)
        assert exit.reason is ExitReason.SHUTDOWN, "a page fault without an IDT"
        if keeps_fault_state(exit.fault):
            assert (vmm.vcpus[0].regs.rcx, vmm.vcpus[0].regs.rsi) == (15, 0x20_0000)
    assert device.accesses == [("write", 0, 1, ord("A"))]


def test_a_string_downwards_comes_in_the_guests_order() -> None:
    device = Strings()
    code = b"\xfd" + repeat(b"\xf3\x6f", b"", 3, 0x2004) + exit_with(1)  # std
    with Vmm(flat(code)) as vmm:
        vmm.memory.write(0x2000, b"aabbcc")
        vmm.add_pio_device(0x500, 4, device)
        assert vmm.run(DEADLINE_S).code == 1
        assert vmm.vcpus[0].regs.rsi & 0xFFFF == 0x1FFE
    assert device.accesses == [("write_many", 0, 2, b"ccbbaa")]


def test_an_exception_comes_out_of_run_with_the_guests_address_and_the_guest_goes_on() -> None:
    class Device:
        def write(self, _offset: int, _size: int, value: int) -> None:
            raise LookupError(value)

    with Vmm(flat(out(0x502, 9) + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 4, Device())
        with pytest.raises(LookupError) as raised:
            vmm.run(DEADLINE_S)
        (note,) = raised.value.__notes__
        assert "in write() at port 0x502, offset 0x2 of the device, vCPU 0, guest RIP 0x100" in note
        assert raised.traceback[-1].name == "write"
        assert vmm.state is VmRunState.PAUSED
        assert vmm.run(DEADLINE_S).code == 3


def test_even_a_keyboard_interrupt_of_a_device_comes_out() -> None:
    class Device:
        def read(self, _offset: int, _size: int) -> int:
            raise KeyboardInterrupt

    with Vmm(flat(read_in(0x500) + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        with pytest.raises(KeyboardInterrupt):
            vmm.run(DEADLINE_S)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (None, TypeError, "int or bytes"),
        ("x", TypeError, "int or bytes"),
        (1.0, TypeError, "int or bytes"),
        (256, OverflowError, "8 bits"),
        (-1, OverflowError, "8 bits"),
        (1 << 64, OverflowError, "8 bits"),
        (b"", ValueError, "1 bytes, not 0"),
        (b"ab", ValueError, "1 bytes, not 2"),
    ],
    ids=repr,
)
def test_a_read_that_answers_nonsense_is_an_error_of_the_run(value: Any, error: type[Exception], text: str) -> None:
    class Device:
        def read(self, _offset: int, _size: int) -> Any:
            return value

    with Vmm(flat(read_in(0x500) + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        with pytest.raises(error, match=text):
            vmm.run(DEADLINE_S)
        assert vmm.run(DEADLINE_S).code == 3


def test_a_device_that_takes_other_arguments_is_an_error_of_the_run() -> None:
    class Device:
        def read(self) -> int:
            return 0

    with Vmm(flat(read_in(0x500) + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="argument"):
            vmm.run(DEADLINE_S)


@pytest.mark.parametrize("half", ["read", "write"])
def test_a_device_ends_the_run_with_a_value(half: str) -> None:
    class Device:
        def read(self, _offset: int, _size: int) -> Stop:
            return Stop(("read", self))

        def write(self, _offset: int, _size: int, value: int) -> Stop:
            return Stop(("write", self))

    device = Device()
    access = read_in(0x500) if half == "read" else out(0x500, 1)
    with Vmm(flat(access + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 1, device)
        exit = vmm.run(DEADLINE_S)
        assert exit == Exit(ExitReason.STOPPED, vcpu=0, value=(half, device))
        assert vmm.run(DEADLINE_S).code == 3


def test_the_run_ends_within_a_repeated_access() -> None:
    class Device:
        def __init__(self) -> None:
            self.written = b""

        def write(self, _offset: int, _size: int, value: int) -> Stop | None:
            self.written += bytes([value])
            return Stop(value) if value == ord("b") else None

    device = Device()
    with Vmm(flat(repeat(b"\xf3\x6e", b"", 3) + exit_with(3))) as vmm:
        vmm.memory.write(0x2000, b"abc")
        vmm.add_pio_device(0x500, 1, device)
        assert vmm.run(DEADLINE_S).value == ord("b")
        assert vmm.run(DEADLINE_S).code == 3
    assert device.written == b"abc"


@pytest.mark.parametrize(
    ("base", "length", "text"),
    [
        (0x3F8, 1, "overlaps COM1, 0x3f8 to 0x3ff"),
        (0x3F0, 9, "overlaps"),
        (0xFFFF, 2, "0 to 0xffff"),
        (0x1_0000, 1, "0 to 0xffff"),
        (0x500, 0, "0 addresses"),
        ((1 << 64) - 1, 1, "0 to 0xffff"),
    ],
)
def test_ports_that_cannot_be_had_are_refused(base: int, length: int, text: str) -> None:
    with Vmm(flat(HALT)) as vmm:
        with pytest.raises(ConfigError, match=text) as refused:
            vmm.add_pio_device(base, length, Log())
        assert refused.value.at == f"{base:#x}"


def test_addresses_that_cannot_be_had_are_refused() -> None:
    with Vmm(flat(HALT, size_mib=2)) as vmm:
        for base, length in ((0, 1), (0x1F_FFFF, 2), (0x1000, 1 << 40)):
            with pytest.raises(ConfigError, match="memory"):
                vmm.add_mmio_device(base, length, Log())
        with pytest.raises(ConfigError):
            vmm.add_mmio_device((1 << 64) - 1, 2, Log())
        vmm.add_mmio_device(0x20_0000, 1, Log())
    with Vmm(flat(HALT, irqchip=True)) as vmm:
        with pytest.raises(ConfigError, match="the local APICs"):
            vmm.add_mmio_device(0xFEE0_0000, 8, Log())
        with pytest.raises(ConfigError, match="PIC of KVM"):
            vmm.add_pio_device(0x20, 1, Log())


@pytest.mark.parametrize("arguments", [(-1, 1), (1 << 64, 1), (0x500, -1), ("x", 1), (1.5, 1), (None, 1)], ids=repr)
def test_arguments_of_the_wrong_type_are_refused(arguments: tuple[Any, Any]) -> None:
    with Vmm(flat(HALT)) as vmm, pytest.raises((TypeError, OverflowError)):
        vmm.add_pio_device(*arguments, Log())


@pytest.mark.parametrize(
    "device", [None, 7, object(), type("Device", (), {"read": 7})()], ids=["None", "int", "object", "no method"]
)
def test_objects_that_are_no_devices_are_refused(device: Any) -> None:
    with Vmm(flat(HALT)) as vmm, pytest.raises(TypeError, match="device"):
        vmm.add_pio_device(0x500, 1, device)


def test_a_closed_machine_takes_no_devices() -> None:
    vmm = Vmm(flat(HALT))
    vmm.add_pio_device(0x500, 1, Log())
    vmm.close()
    with pytest.raises(StateError, match="closed"):
        vmm.add_pio_device(0x501, 1, Log())


def test_a_device_is_removed_and_given_back() -> None:
    device = Log()
    with Vmm(flat(out(0x500, 1) + exit_with(1))) as vmm:
        vmm.add_pio_device(0x500, 2, device)
        with pytest.raises(ConfigError, match="no device"):
            vmm.remove_pio_device(0x501)
        with pytest.raises(ConfigError, match="no device"):
            vmm.remove_mmio_device(0x500)
        assert vmm.remove_pio_device(0x500) is device
        with pytest.raises(ConfigError, match="no device"):
            vmm.remove_pio_device(0x3F8)
        vmm.run(DEADLINE_S)
        assert [count.address for count in vmm.unanswered] == [0x500]
    assert device.accesses == []


def test_devices_come_and_go_from_their_own_callbacks() -> None:
    class Once:
        def write(self, _offset: int, _size: int, value: int) -> None:
            vmm.remove_pio_device(0x500)
            vmm.add_pio_device(0x500, 1, rest)

    rest = Log()
    with Vmm(flat(out(0x500, 1) + out(0x500, 2) + out(0x500, 3) + exit_with(1))) as vmm:
        vmm.add_pio_device(0x500, 1, Once())
        assert vmm.run(DEADLINE_S).code == 1
    assert rest.accesses == [("write", 0, 1, 2), ("write", 0, 1, 3)]


def test_devices_come_and_go_from_other_threads_while_the_guest_uses_them() -> None:
    device = Log()
    device.accesses = []
    code = b"\xba\x00\x05\xee\xeb\xfd"  # mov dx, 0x500; out dx, al; jmp -3
    with Vmm(flat(code)) as vmm:
        vmm.start()
        for _ in range(200):
            vmm.add_pio_device(0x500, 1, device)
            vmm.remove_pio_device(0x500)
        vmm.add_pio_device(0x500, 1, device)
        before = len(device.accesses)
        while len(device.accesses) == before:
            assert vmm.wait(0.001) is None
        vmm.stop()
        assert vmm.wait(DEADLINE_S).reason is ExitReason.STOPPED  # type: ignore[union-attr]


def test_a_callback_sees_and_changes_its_own_vcpu() -> None:
    class Device:
        def write(self, _offset: int, _size: int, value: int) -> None:
            (vcpu,) = vmm.vcpus
            seen.append(vcpu.regs.rbx & 0xFFFF)
            vcpu.regs.rbx = 0x1234
            assert vcpu.regs.rbx == 0x1234

        def read(self, _offset: int, _size: int) -> int:
            (vcpu,) = vmm.vcpus
            seen.append(vcpu.regs.rip)
            vcpu.regs.update(rcx=0x77, rip=0x1100)
            return 5

    seen: list[int] = []
    # mov bx, 0xabcd; out; mov cx, bx at 0x1100 only if the jump was made
    code = b"\xbb\xcd\xab" + out(0x500, 1) + read_in(0x500) + exit_with(1)
    with Vmm(flat(code)) as vmm:
        vmm.memory.write(0x1100, exit_with(2))
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).code == 2, "RIP was changed behind the instruction"
        regs = vmm.vcpus[0].regs
        assert seen == [0xABCD, 0x1000 + code.index(b"\xec")]
        assert (regs.rbx, regs.rcx) == (0x1234, 0x77)


def test_another_thread_does_not_see_the_vcpu_of_a_callback_unless_the_machine_is_paused() -> None:
    def look() -> None:
        try:
            results.append(vmm.vcpus[0].regs.rip)
        except StateError as error:
            results.append(error)

    class Device:
        def write(self, _offset: int, _size: int, value: int) -> None:
            if value == 2:
                vmm.pause()
            thread = threading.Thread(target=look)
            thread.start()
            thread.join(DEADLINE_S)
            if value == 2:
                vmm.resume()

    results: list[object] = []
    with Vmm(flat(out(0x500, 1) + out(0x500, 2) + exit_with(1))) as vmm:
        assert vmm.vcpus
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).code == 1
    assert isinstance(results[0], StateError)
    assert "pause" in str(results[0])
    assert isinstance(results[1], int)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_devices_may_pause_resume_stop_and_kick_the_machine(vcpus: int) -> None:
    """Two vCPUs pause each other from their callbacks at the same time: neither waits for the other's callback."""

    class Device:
        def __init__(self) -> None:
            self.left = 200
            self.lock = threading.Lock()

        def write(self, _offset: int, _size: int, _value: int) -> None:
            try:
                vmm.pause()
                vmm.resume()
            except StateError:
                assert self.left <= 0, "the run is ending"
            with self.lock:
                self.left -= 1
                if self.left == 0:
                    vmm.exit_handler.kick()

    code = b"\x66\xba\x00\x05\xee\xeb\xfd"  # mov dx, 0x500; out dx, al; jmp -3
    with Vmm(flat(code, "user64", cpu=CpuConfig(vcpus=vcpus), size_mib=2)) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED


def test_a_device_that_calls_run_gets_an_error_and_the_run_goes_on() -> None:
    class Device:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            for call in (vmm.run, vmm.start, vmm.wait):
                with pytest.raises(StateError):
                    call()

    with Vmm(flat(out(0x500, 1) + exit_with(4))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).code == 4


def test_a_device_that_closes_the_machine_closes_it_when_the_run_ends() -> None:
    class Device:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            vmm.close()
            states.append(vmm.state)

    states: list[VmRunState] = []
    vmm = Vmm(flat(out(0x500, 1) + COUNT_IN_MEMORY))
    vmm.add_pio_device(0x500, 1, Device())
    assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
    assert states == [VmRunState.RUNNING]
    assert vmm.state is VmRunState.CLOSED


def test_a_device_may_start_threads_that_use_the_machine() -> None:
    class Device:
        def write(self, _offset: int, _size: int, value: int) -> None:
            def work() -> None:
                vmm.memory.write_u8(0x2000, value)
                vmm.stop()

            thread = threading.Thread(target=work)
            thread.start()
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

    with Vmm(flat(out(0x500, 9) + COUNT_IN_MEMORY)) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
        assert vmm.memory.read_u8(0x2000) >= 9


def test_the_loop_turns_while_a_device_takes_its_time() -> None:
    """The device waits for a timer of the loop: on one thread that would never end."""
    ticked = threading.Event()

    class Device:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            vmm.event_manager.call_later(0.001, ticked.set)
            assert ticked.wait(DEADLINE_S)

    with Vmm(flat(out(0x500, 1) + exit_with(5))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        assert vmm.run(DEADLINE_S).code == 5


def test_of_two_exceptions_one_comes_out_and_notes_the_other() -> None:
    barrier = threading.Barrier(2)

    class Device:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            barrier.wait(DEADLINE_S)
            raise RuntimeError("from a device")

    code = b"\x66\xba\x00\x05\xee\xeb\xfd"
    with Vmm(flat(code, "user64", cpu=CpuConfig(vcpus=2), size_mib=2)) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        with pytest.raises(RuntimeError, match="from a device") as raised:
            vmm.run(DEADLINE_S)
        notes = "\n".join(raised.value.__notes__)
        assert "another callback raised RuntimeError" in notes


def test_of_an_exception_and_a_stop_the_stop_does_not_come_out_of_a_later_run() -> None:
    both = threading.Barrier(2)

    class Ends:
        def write(self, offset: int, _size: int, _value: int) -> Stop:
            both.wait(DEADLINE_S)
            if offset == 0:
                raise ValueError("mine")
            return Stop("stale")

    # 64 bits: mov edx, 0x500; add edx, edi; out dx, al; spin
    code = bytes.fromhex("ba00050000 01fa ee ebfe")
    with Vmm(flat(code, "long64", cpu=CpuConfig(vcpus=2))) as vmm:
        vmm.add_pio_device(0x500, 2, Ends())
        with pytest.raises(ValueError, match="mine"):
            vmm.run(DEADLINE_S)
        vmm.stop()
        assert vmm.run(DEADLINE_S) == Exit(ExitReason.STOPPED)


def is_at_rest(vcpu: Vcpu) -> bool:
    """Whether its registers can be read."""
    try:
        return vcpu.regs.rip > 0
    except StateError:
        return False


def test_a_run_that_is_refused_leaves_the_exception_to_the_one_in_progress() -> None:
    class Raises:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            raise ValueError("mine")

    with Vmm(flat(out(0x500, 1) + HALT), event_manager=EventManager()) as vmm:
        vmm.add_pio_device(0x500, 1, Raises())
        (vcpu,) = vmm.vcpus
        vmm.start()
        while not is_at_rest(vcpu):
            pass
        with pytest.raises(StateError, match="started"):
            vmm.run()
        with pytest.raises(ValueError, match="mine"):
            vmm.wait(DEADLINE_S)


def test_what_a_device_raised_and_nobody_waited_for_is_told_at_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    called = threading.Event()

    class Raises:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            called.set()
            raise ValueError("mine")

    with Vmm(flat(out(0x500, 1) + HALT)) as vmm:
        vmm.add_pio_device(0x500, 1, Raises())
        vmm.start()
        assert called.wait(DEADLINE_S)
    assert [repr(error) for error in told] == ["ValueError('mine')"]


@pytest.mark.parametrize(("leaves", "status"), [(None, 0), (ValueError("in the child"), 1), (SystemExit(5), 5)])
def test_a_forked_child_that_leaves_its_callback_ends_and_harms_nothing(
    leaves: BaseException | None, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    children: list[int] = []

    class Forks:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            child = os.fork()
            if child == 0 and leaves is not None:
                raise leaves
            children.append(child)

    with Vmm(flat(out(0x500, 1) + exit_with(3))) as vmm:
        vmm.add_pio_device(0x500, 1, Forks())
        assert vmm.run(DEADLINE_S).code == 3
    (child,) = children
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert ("in the child" in capfd.readouterr().err) == (status == 1)


def test_a_started_machine_raises_what_a_device_raised_when_it_is_waited_for() -> None:
    class Device:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            raise LookupError

    with Vmm(flat(out(0x500, 1) + exit_with(5))) as vmm:
        vmm.add_pio_device(0x500, 1, Device())
        vmm.start()
        with pytest.raises(LookupError):
            vmm.wait(DEADLINE_S)
        assert vmm.run(DEADLINE_S).code == 5


def test_machines_in_cycles_with_their_devices_are_collected() -> None:
    class Device:
        def __init__(self, vmm: Vmm) -> None:
            self.vmm = vmm
            self.memory = vmm.memory

        def write(self, _offset: int, _size: int, _value: int) -> None:
            pass

    def cycle() -> tuple[weakref.ref[Vmm], weakref.ref[Device]]:
        vmm = Vmm(flat(out(0x500, 1) + exit_with(5)))
        device = Device(vmm)
        vmm.add_pio_device(0x500, 1, device)
        assert vmm.run(DEADLINE_S).code == 5
        return weakref.ref(vmm), weakref.ref(device)

    references = cycle()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_device_that_holds_the_memory_goes_with_the_machine() -> None:
    """The memory holds the machine, the machine its device, and the device the memory: nobody else holds them."""

    class Device:
        def __init__(self, vmm: Vmm) -> None:
            self.memory = vmm.memory

        def write(self, _offset: int, _size: int, _value: int) -> None:
            pass

    vmm = Vmm(flat(HALT))
    device = Device(vmm)
    vmm.add_pio_device(0x500, 1, device)
    memory, gone = vmm.memory, weakref.ref(device)
    del vmm, device
    gc.collect()
    assert memory.read(0x1000, 1) == HALT, "whoever holds the memory has the machine too"
    del memory
    gc.collect()
    assert gone() is None


Accesses = st.lists(
    st.tuples(st.sampled_from([0x500, 0x503, 0x507, 0x508]), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)),
    max_size=12,
)


@given(Accesses)
def test_any_writes_arrive_whole_and_in_order(accesses: list[tuple[int, int, int]]) -> None:
    widths: dict[int, Callable[[int], bytes]] = {1: lambda _: b"\xee", 2: lambda _: b"\xef", 4: lambda _: b"\x66\xef"}
    code = b"".join(
        b"\xba" + struct.pack("<H", port) + b"\x66\xb8" + struct.pack("<I", value) + widths[size](value)
        for port, size, value in accesses
    )
    device = Log()
    with Vmm(flat(code + exit_with(1))) as vmm:
        vmm.add_pio_device(0x500, 8, device)
        assert vmm.run(DEADLINE_S).code == 1
    expected = [
        ("write", port - 0x500, size, value & ((1 << 8 * size) - 1))
        for port, size, value in accesses
        if port + size <= 0x508
    ]
    assert device.accesses == expected

"""Calls from the guest to Python functions, by a block in its memory: right, wrong and hostile."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from conftest import ROOT
from guests import HALT, exit_with, flat
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import ExitReason, FlatBoot, HostcallError, HostcallStatus, StateError, Stop, Vmm, VmmConfig
from pyvmm.hostcalls import PORT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.kvm

DEADLINE_S = 60
BLOCK = 0x8000
UNSIGNED, SIGNED, BYTES, BUFFER = range(4)


def call_at(address: int) -> bytes:
    """Write the block's address to the port, in real mode."""
    return b"\xba" + struct.pack("<H", PORT) + b"\x66\xb8" + struct.pack("<I", address) + b"\x66\xef"


def block(number: int, *arguments: tuple[int, int, int], count: int | None = None) -> bytes:
    head = struct.pack("<IIqII", number, 0xFFFF_FFFF, -1, len(arguments) if count is None else count, 0)
    return head + b"".join(struct.pack("<IIQ", kind, length, value) for kind, length, value in arguments)


def answer(vmm: Vmm, address: int = BLOCK) -> tuple[HostcallStatus, int]:
    status, result = struct.unpack("<Iq", vmm.memory.read(address + 4, 12))
    return HostcallStatus(status), result


def machine(data: bytes, code: bytes = call_at(BLOCK) + exit_with(1)) -> Vmm:
    vmm = Vmm(flat(code))
    vmm.memory.write(BLOCK, data)
    return vmm


def test_a_function_gets_numbers_and_bytes_and_gives_a_number() -> None:
    text = (BYTES, 5, 0x9000)
    with machine(block(3, (UNSIGNED, 0, (1 << 64) - 2), (SIGNED, 0, (1 << 64) - 2), text)) as vmm:
        vmm.memory.write(0x9000, b"hello")

        @vmm.hostcall(3)
        def function(*arguments: object) -> int:
            seen.extend(arguments)
            return -7

        seen: list[object] = []
        assert vmm.run(DEADLINE_S).code == 1
        assert seen == [(1 << 64) - 2, -2, b"hello"]
        assert answer(vmm) == (HostcallStatus.OK, -7)


@pytest.mark.parametrize(
    ("returned", "result"), [(None, 0), (0, 0), (5, 5), (True, 1), (-(1 << 63), -(1 << 63)), ((1 << 64) - 1, -1)]
)
def test_results_have_64_bits(returned: int | None, result: int) -> None:
    with machine(block(0)) as vmm:
        vmm.hostcall(lambda: returned)
        assert vmm.run(DEADLINE_S).code == 1
        assert answer(vmm) == (HostcallStatus.OK, result)


def test_a_buffer_is_the_guests_memory() -> None:
    with machine(block(0, (BUFFER, 16, 0x9000))) as vmm:

        @vmm.hostcall
        def function(buffer: memoryview) -> int:
            assert buffer.nbytes == 16
            buffer[:3] = b"abc"
            return 3

        assert vmm.run(DEADLINE_S).code == 1
        assert vmm.memory.read(0x9000, 4) == b"abc\0"


def test_bytes_are_returned_into_the_last_buffer() -> None:
    with machine(block(0, (BYTES, 3, 0x9100), (BUFFER, 8, 0x9000))) as vmm:
        vmm.memory.write(0x9100, b"abc")
        vmm.hostcall(lambda text, _buffer: text.upper())
        assert vmm.run(DEADLINE_S).code == 1
        assert answer(vmm) == (HostcallStatus.OK, 3)
        assert vmm.memory.read(0x9000, 4) == b"ABC\0"


def test_functions_without_a_number_get_the_next() -> None:
    with Vmm(flat(HALT)) as vmm:
        vmm.hostcall(1)(len)
        assert vmm.hostcall(print) is print
        vmm.hostcall(repr)
        from pyvmm.hostcalls import Hostcalls

        port = vmm._pio_device(PORT)
        assert isinstance(port, Hostcalls)
        assert port.functions == {0: print, 1: len, 2: repr}


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (block(9), HostcallStatus.NO_SUCH_FUNCTION),
        (block(0, count=7), HostcallStatus.BAD_ARGUMENT),
        (block(0, count=0xFFFF_FFFF), HostcallStatus.BAD_ARGUMENT),
        (block(0, (4, 0, 0)), HostcallStatus.BAD_ARGUMENT),
        (block(0, (BYTES, 1, 1 << 20)), HostcallStatus.BAD_MEMORY),
        (block(0, (BYTES, 0xFFFF_FFFF, 0)), HostcallStatus.BAD_MEMORY),
        (block(0, (BYTES, 2, (1 << 64) - 1)), HostcallStatus.BAD_MEMORY),
        (block(0, (BUFFER, 0xFFFF_FFFF, 0)), HostcallStatus.BAD_MEMORY),
        (block(0, (BUFFER, 1, (1 << 64) - 1)), HostcallStatus.BAD_MEMORY),
    ],
    ids=["function", "count", "counts", "kind", "end", "length", "wrap", "buffer", "buffer wraps"],
)
def test_errors_of_the_guest_have_a_status(data: bytes, status: HostcallStatus) -> None:
    with machine(data) as vmm:
        vmm.hostcall(lambda *_: called.append(1))
        called: list[int] = []
        assert vmm.run(DEADLINE_S).code == 1
        assert answer(vmm)[0] is status
        assert called == []


@pytest.mark.parametrize("address", [(1 << 20) - 23, 1 << 20, 0xFFFF_FFFF])
def test_a_block_outside_memory_is_reported_by_the_port(address: int) -> None:
    code = call_at(address) + b"\x66\xed" + b"\x66\xa3\x00\x90" + exit_with(1)  # in eax, dx; mov [0x9000], eax
    with machine(b"", code) as vmm:
        vmm.hostcall(lambda: None)
        assert vmm.run(DEADLINE_S).code == 1
        assert vmm.memory.read_u32(0x9000) == HostcallStatus.BAD_BLOCK


def test_a_block_whose_arguments_are_outside_memory_is_reported_by_the_port() -> None:
    address = (1 << 20) - 24
    code = call_at(address) + b"\x66\xed" + b"\x66\xa3\x00\x90" + exit_with(1)
    with machine(b"", code) as vmm:
        vmm.memory.write(address, block(0, count=1))
        vmm.hostcall(lambda: None)
        assert vmm.run(DEADLINE_S).code == 1
        assert vmm.memory.read_u32(0x9000) == HostcallStatus.BAD_BLOCK


@pytest.mark.parametrize("arguments", [[], [(BUFFER, 2, 0x9000)], [(BYTES, 8, 0x9000)]])
def test_bytes_without_room_are_refused(arguments: Sequence[tuple[int, int, int]]) -> None:
    with machine(block(0, *arguments)) as vmm:
        vmm.hostcall(lambda *_: b"abc")
        assert vmm.run(DEADLINE_S).code == 1
        assert answer(vmm)[0] is HostcallStatus.BAD_RESULT


def test_an_error_for_the_guest_is_reported_and_the_run_continues() -> None:
    with machine(block(0)) as vmm:

        @vmm.hostcall
        def function() -> None:
            raise HostcallError(-13)

        assert vmm.run(DEADLINE_S).code == 1
        assert answer(vmm) == (HostcallStatus.FAILED, -13)


@pytest.mark.parametrize(
    ("returned", "error"),
    [("x", TypeError), (1.5, TypeError), ([], TypeError), (1 << 64, OverflowError), (-(1 << 63) - 1, OverflowError)],
)
def test_a_function_that_returns_nonsense_ends_the_run(returned: Any, error: type[Exception]) -> None:
    with machine(block(0)) as vmm:
        vmm.hostcall(lambda: returned)
        with pytest.raises(error, match="hostcall"):
            vmm.run(DEADLINE_S)


def test_any_other_exception_ends_the_run() -> None:
    with machine(block(0)) as vmm:
        vmm.hostcall(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            vmm.run(DEADLINE_S)
        assert vmm.run(DEADLINE_S).code == 1


def test_a_function_ends_the_run_with_a_value() -> None:
    with machine(block(0)) as vmm:
        vmm.hostcall(lambda: Stop("done"))
        exit = vmm.run(DEADLINE_S)
        assert (exit.reason, exit.value) == (ExitReason.STOPPED, "done")
        assert answer(vmm) == (HostcallStatus.OK, 0)


def test_bad_numbers_and_functions_are_refused() -> None:
    with Vmm(flat(HALT)) as vmm:
        vmm.hostcall(5)(print)
        with pytest.raises(ValueError, match="already registered"):
            vmm.hostcall(5)(print)
        for number in (-1, 1 << 32):
            with pytest.raises(ValueError, match="32 bits"):
                vmm.hostcall(number)(print)
        for wrong in ("x", 1.5, b""):
            with pytest.raises(TypeError, match="int"):
                vmm.hostcall(wrong)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="function"):
            vmm.hostcall(6)(7)  # type: ignore[type-var]
    with pytest.raises(StateError, match="closed"):
        vmm.hostcall(7)(print)


def test_the_ports_of_another_device_are_left_alone() -> None:
    with Vmm(flat(HALT)) as vmm:
        vmm.add_pio_device(PORT, 4, type("Device", (), {"read": lambda *_: 0})())
        with pytest.raises(ValueError, match="another device"):
            vmm.hostcall(print)


Argument = st.tuples(
    st.integers(0, 5),
    st.sampled_from([0, 1, 8, 0xFFFF, 0xFFFF_FFFF]),
    st.integers(0, 2**64 - 1) | st.integers(0, 1 << 21),
)
# The answer does not overwrite the guest's code.
Address = st.integers(0, 0xFE0) | st.integers(0x1020, 2**32 - 1) | st.just(BLOCK)


@given(st.binary(max_size=24) | st.tuples(st.integers(0, 2), st.lists(Argument, max_size=7)), Address)
def test_any_block_is_answered_and_harms_nothing(
    data: bytes | tuple[int, list[tuple[int, int, int]]], address: int
) -> None:
    raw = data if isinstance(data, bytes) else block(data[0], *data[1])
    with machine(raw, call_at(address) + exit_with(1)) as vmm:
        vmm.hostcall(lambda *_: 1)
        assert vmm.run(DEADLINE_S).code == 1


def built(source: str, directory: Path) -> bytes:
    """The bytes of a guest in examples/guest."""
    binary, flags = directory / "guest.bin", ["-O1", "-nostdlib", "-ffreestanding", "-static", "-fno-pie", "-no-pie"]
    place = ["-Wl,--build-id=none,-Ttext=0x100000,-N,-e,0x100000,--no-warnings"]
    path = ROOT / "examples" / "guest" / source
    subprocess.run(["cc", *flags, *place, "-o", directory / "guest.elf", path], check=True, capture_output=True)
    subprocess.run(["objcopy", "-O", "binary", directory / "guest.elf", binary], check=True)
    return binary.read_bytes()


@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("objcopy")), reason="no C compiler")
@pytest.mark.parametrize("source", ["ask.c", "ask.s"])
def test_the_guests_in_the_examples_call(source: str, tmp_path: Path) -> None:
    code = built(source, tmp_path)
    said: list[bytes] = []
    with Vmm(VmmConfig(boot=FlatBoot(code, address=0x10_0000, mode="user64"))) as vmm:
        vmm.hostcall(1)(lambda prompt, _answer: prompt[::-1])
        vmm.hostcall(2)(said.append)
        assert vmm.run(DEADLINE_S).code == 0
    assert said == [b"Who are you?"[::-1]]
    if source == "ask.s":
        example = (ROOT / "examples" / "hostcall.py").read_text()
        digits = re.sub(r'[\s"]', "", example[example.index("fromhex(") + 8 : example.index(") + bytes(32)")])
        assert code.startswith(bytes.fromhex(digits))

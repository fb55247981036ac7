"""Guest memory by address: bounds, types, and no surprise in size."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import pytest
from guests import HALT, flat
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import GuestMemory, GuestMemoryError, Vmm

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm
SIZE = 1 << 20


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    with Vmm(flat(HALT)) as vmm:
        yield vmm.memory


def test_what_is_written_is_read(memory: GuestMemory) -> None:
    for data in (b"bytes", bytearray(b"more"), memoryview(b"view"), array("B", [1, 2])):
        memory.write(0x2000, data)
        assert memory.read(0x2000, len(data)) == bytes(data)
    assert (memory.size, memory.ranges) == (SIZE, [(0, SIZE)])


@pytest.mark.parametrize(
    ("address", "length"),
    [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (0, 2**63), (2**64 - 1, 2**64 - 1), (SIZE, 0)],
)
def test_range_outside_is_refused(memory: GuestMemory, address: int, length: int) -> None:
    with pytest.raises(GuestMemoryError, match="not all in guest memory"):
        memory.read(address, length)


def test_write_over_the_end_writes_nothing(memory: GuestMemory) -> None:
    memory.write(SIZE - 1, b"\0")
    with pytest.raises(GuestMemoryError):
        memory.write(SIZE - 1, b"ab")
    assert memory.read(SIZE - 1, 1) == b"\0"


@pytest.mark.parametrize(
    ("address", "length", "error"),
    [
        (-1, 1, OverflowError),
        (0, -1, OverflowError),
        (2**64, 1, OverflowError),
        (0.5, 1, TypeError),
        ("0", 1, TypeError),
    ],
)
def test_wrong_numbers_are_refused(
    memory: GuestMemory, address: object, length: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        memory.read(address, length)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", ["text", 5, None, memoryview(b"abcd")[::2]])
def test_wrong_data_is_refused(memory: GuestMemory, data: object) -> None:
    with pytest.raises((TypeError, ValueError, BufferError)):
        memory.write(0, data)  # type: ignore[arg-type]


@given(st.integers(0, SIZE + 16), st.binary(max_size=64))
def test_memory_agrees_with_a_bytearray(memory: GuestMemory, address: int, data: bytes) -> None:
    model = bytearray(memory.read(0, SIZE))
    try:
        memory.write(address, data)
    except GuestMemoryError:
        assert address + max(len(data), 1) > SIZE
    else:
        model[address : address + len(data)] = data
    assert memory.read(0, SIZE) == bytes(model)

"""Devices in Python, as `Vmm.add_pio_device` and `add_mmio_device` take them, and what the buses tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pyvmm.exits import Stop


@runtime_checkable
class ReadableDevice(Protocol):
    """A device that the guest reads. A device without this half reads as ones."""

    def read(self, offset: int, size: int, /) -> int | bytes | Stop:
        """Say what the guest reads.

        On the thread of the vCPU. An exception ends the run and comes out of it, with the guest's address in a note.

        Args:
            offset: counts from the start of the device's range.
            size: bytes of the access: 1, 2 or 4; memory-mapped also 8, and less where an access is split.

        Returns:
            A number of so many bytes, or the bytes; or a `Stop`, which ends the run.
        """


@runtime_checkable
class WritableDevice(Protocol):
    """A device that the guest writes. Writes to a device without this half are dropped."""

    def write(self, offset: int, size: int, value: int, /) -> object:
        """Take what the guest wrote: a little-endian number of `size` bytes. A `Stop` that it returns ends the run."""


Device = ReadableDevice | WritableDevice
"""Either half, or both. Two more methods are called where they are there, for string instructions:

`read_many(offset, size, count) -> bytes` answers `REP INS` in one call a page of guest memory, of 1,024 elements at
most, `write_many(offset, size, data)` takes `REP OUTS` in one call a page. Without them each element is a call of
`read` or `write`.

`save() -> bytes` and `restore(state)` make it part of snapshots: called on the thread that takes one, forks or resets,
while the guest is at rest. Without them `Vmm.snapshot` refuses and names the device.
"""


class Unanswered(NamedTuple):
    """How often an address that no device answers was read and written.

    Reads gave all ones, writes were dropped. The bus is "pio" or "mmio"; "other", with no address, sums up
    what came beyond the first 1,024 addresses.
    """

    bus: str
    address: int | None
    reads: int
    writes: int


class Resource(NamedTuple):
    """A range of a machine's addresses, ports or interrupt lines, and what uses it: see `Vmm.resources`."""

    kind: Literal["memory", "mmio", "pio", "gsi"]
    """Guest-physical addresses with memory or of a device, ports, or lines of the interrupt controllers."""
    start: int
    """The first address, port or line."""
    length: int
    """How many addresses, ports or lines."""
    name: str
    """What uses it: "memory", a built-in device, a class of Python's, "irqfd", "ioeventfd", or what of KVM."""
    shared: bool
    """Other uses may overlap it: eventfds share lines and addresses with devices."""

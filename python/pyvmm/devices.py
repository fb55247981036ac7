"""The protocol of Python devices for `Vmm.add_pio_device` and `add_mmio_device`, and reports of the buses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pyvmm.exits import Stop


@runtime_checkable
class ReadableDevice(Protocol):
    """A device that the guest can read. Reads of a device without this method return all one bits."""

    def read(self, offset: int, size: int, /) -> int | bytes | Stop:
        """Return what the guest reads.

        Called on the thread of the vCPU. An exception ends the run and comes out of it, with the
        guest's address in a note.

        Args:
            offset: the offset from the start of the device's range.
            size: the size of the access in bytes: 1, 2 or 4; memory-mapped also 8, and other sizes
                if an access is split.

        Returns:
            A number of `size` bytes, or the bytes; or a `Stop`, which ends the run.
        """


@runtime_checkable
class WritableDevice(Protocol):
    """A device that the guest can write. Writes to a device without this method are dropped."""

    def write(self, offset: int, size: int, value: int, /) -> object:
        """Handle a write of the guest: a little-endian number of `size` bytes. Returning a `Stop` ends the run."""


Device = ReadableDevice | WritableDevice
"""A device has one of these methods, or both. Further methods are optional.

For string instructions: `read_many(offset, size, count) -> bytes` answers `REP INS` in one call for each page of guest
memory, with at most 1,024 elements. `write_many(offset, size, data)` handles `REP OUTS` in one call for each page.
Without them, `read` or `write` is called for each element.

For snapshots: `save() -> bytes` and `restore(state)`, called on the thread that takes a snapshot, forks or resets,
while the guest is stopped. Without them, `Vmm.snapshot` fails and names the device.
"""


class Unanswered(NamedTuple):
    """The number of reads and writes of an address that no device answers.

    Reads returned all one bits, and writes were dropped. The bus is "pio" or "mmio". "other", with
    no address, sums up all addresses after the first 1,024.
    """

    bus: str
    address: int | None
    reads: int
    writes: int


class Resource(NamedTuple):
    """A range of a machine's addresses, ports or interrupt lines, and its owner: see `Vmm.resources`."""

    kind: Literal["memory", "mmio", "pio", "gsi"]
    """Memory, addresses of a device, ports, or lines of the interrupt controllers."""
    start: int
    """The first address, port or line."""
    length: int
    """The number of addresses, ports or lines."""
    name: str
    """The owner: "memory", a built-in device, a Python class, "irqfd", "ioeventfd", or a part of KVM."""
    shared: bool
    """Whether other ranges may overlap it: eventfds share lines and addresses with devices."""

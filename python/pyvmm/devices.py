"""What the buses tell of their accesses."""

from __future__ import annotations

from typing import NamedTuple


class Unanswered(NamedTuple):
    """How often an address that no device answers was read and written.

    Reads gave all ones, writes were dropped. The bus is "pio" or "mmio"; "other", with no address, sums up
    what came beyond the first 1,024 addresses.
    """

    bus: str
    address: int | None
    reads: int
    writes: int

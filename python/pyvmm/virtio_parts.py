"""The configuration of virtio devices that have nothing behind them. docs/virtio.md describes all devices."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from pyvmm.config_parts import Part


class Rng(Part, frozen=True, kw_only=True):
    """The virtio entropy device.

    Attributes:
        seed: a number from 0 to 2**64 - 1 for tests that must repeat: the guest gets the same bytes
            in each run. They are not random to anybody who knows the seed. None means the random
            numbers of the host's kernel.
    """

    seed: Annotated[int, Meta(ge=0, extra_json_schema={"maximum": 2**64 - 1})] | None = None

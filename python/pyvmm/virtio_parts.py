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


class Balloon(Part, frozen=True, kw_only=True):
    """The virtio memory balloon, by which a guest gives memory back to the host.

    Attributes:
        target_mib: how much memory the guest is to give at first, in MiB. `Vmm.balloon.target_mib`
            changes it.
        deflate_on_oom: a guest that runs out of memory takes pages back from the balloon.
        reporting: the guest reports free pages, and the host gets their memory back.
        statistics_s: how often the guest sends statistics for `Vmm.balloon.statistics`, in seconds
            from 0.01 to 1,000,000; None means never.
    """

    target_mib: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    deflate_on_oom: bool = True
    reporting: bool = True
    statistics_s: Annotated[float, Meta(ge=0.01, le=1_000_000)] | None = None

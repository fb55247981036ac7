"""The options of the command line for virtio devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pyvmm import keyvalue
from pyvmm.virtio_parts import Rng

if TYPE_CHECKING:
    from pyvmm.config import VmmConfig

OPTIONS = (
    click.option(
        "--rng", is_flag=False, flag_value="", metavar="[seed=N]", help="Add an entropy device, also one that repeats."
    ),
)
# The names of the options' arguments.
NAMES = ("rng",)


def with_devices(base: VmmConfig, options: dict[str, Any]) -> VmmConfig:
    """The configuration with the devices of the options."""
    changes: dict[str, Any] = {}
    if (rng := options["rng"]) is not None:
        changes["rng"] = Rng(seed=int(keyvalue.parse("rng", rng, {"seed": int})["seed"])) if rng else Rng()
    return base.replace(**changes) if changes else base

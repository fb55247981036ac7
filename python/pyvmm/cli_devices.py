"""The options of the command line for virtio devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pyvmm import disks, keyvalue, shares
from pyvmm.exceptions import ConfigError
from pyvmm.nets import option
from pyvmm.virtio_parts import Balloon, ConsolePort, Rng, VirtioConsole
from pyvmm.vsock_parts import Vsock

if TYPE_CHECKING:
    from pyvmm.config import VmmConfig

OPTIONS = (
    click.option("--console", metavar="PATH", help="Add a virtio console, for programs that connect to this socket."),
    click.option(
        "--disk",
        multiple=True,
        metavar="PATH[,ro][,overlay[=FILE]][,format=F][,serial=S]",
        help="Add a disk. With overlay, the file is not changed.",
    ),
    click.option(
        "--net",
        multiple=True,
        metavar="BACKEND[,mac=MAC][,mtu=N]",
        help="Add a network device: user, tap:NAME, or stream: or datagram: with PATH or HOST:PORT.",
    ),
    click.option(
        "--rng", is_flag=False, flag_value="", metavar="[seed=N]", help="Add an entropy device, also one that repeats."
    ),
    click.option(
        "--balloon",
        is_flag=False,
        flag_value="",
        metavar="[target_mib=N]",
        help="Add a memory balloon, which takes N MiB from the guest.",
    ),
    click.option(
        "--share",
        multiple=True,
        metavar="HOST:TAG[:ro][:owner=UID.GID]",
        help="Share a directory: mount -t 9p -o trans=virtio TAG /mnt.",
    ),
    click.option(
        "--vsock",
        metavar="CID[,uds=PATH]",
        help="Add a socket device; programs connect to the guest by the unix socket PATH.",
    ),
)
# The names of the options' arguments.
NAMES = ("disk", "net", "console", "rng", "balloon", "share", "vsock")


def with_devices(base: VmmConfig, options: dict[str, Any]) -> VmmConfig:
    """The configuration with the devices of the options."""
    changes: dict[str, Any] = {}
    if options.get("disk"):
        try:
            changes["disks"] = (*base.disks, *map(disks.parsed, options["disk"]))
        except ValueError as error:
            raise ConfigError(f"disk: {error}", at="disk") from None
    if (console := options.get("console")) is not None:
        changes["console"] = VirtioConsole(ports=(ConsolePort("console0", console),))
    if options.get("net"):
        try:
            changes["nets"] = (*base.nets, *map(option, options["net"]))
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--net") from None
    if (rng := options.get("rng")) is not None:
        changes["rng"] = Rng(seed=int(keyvalue.parse("rng", rng, {"seed": int})["seed"])) if rng else Rng()
    if (balloon := options.get("balloon")) is not None:
        found = keyvalue.parse("balloon", balloon, {"target_mib": int}) if balloon else {}
        changes["balloon"] = Balloon(target_mib=int(found.get("target_mib", 0)))
    if options.get("share"):
        changes["shares"] = (*base.shares, *shares.parsed(options["share"]))
    if (vsock := options.get("vsock")) is not None:
        found = keyvalue.parse("vsock", f"cid={vsock}", {"cid": int, "uds": str})
        changes["vsock"] = Vsock(cid=int(found["cid"]), uds_path=str(found["uds"]) if "uds" in found else None)
    return base.replace(**changes) if changes else base

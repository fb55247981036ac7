"""A machine in a process of its own, which a test kills: a copy of a snapshot's Linux with a disk.

``python killed_machine.py SNAPSHOT DISK COMMAND...`` types the commands and prints the console.
"""

from __future__ import annotations

import sys

from pyvmm import Disk, SerialConfig, Snapshot


def main(snapshot: str, disk: str, *commands: str) -> None:
    """Run it until the process is killed."""
    serial = SerialConfig(output=sys.stdout.buffer)
    with Snapshot.load(snapshot).fork(virtio={"disk0": Disk(disk)}, serial=serial) as vmm:
        for command in commands:
            vmm.serial.sendline(command)
        vmm.run()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The configuration of the virtio socket device. docs/vsock.md describes it."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from pyvmm.config_parts import FilePath, Part


class Vsock(Part, frozen=True, kw_only=True):
    """The virtio socket device: stream sockets between the guest and the program.

    Attributes:
        cid: the guest's address, from 3 to 2**32 - 2. The host's is 2. Machines do not see each
            other, and may have the same.
        uds_path: where programs connect to the guest, as with Firecracker: a unix socket that
            expects "CONNECT PORT" and a newline. The guest's connection to port P of the host goes
            to `uds_path` with "_P" behind it, unless the program listens on P. At most 96 bytes.
    """

    cid: Annotated[int, Meta(ge=3, le=2**32 - 2)] = 3
    uds_path: FilePath | None = None

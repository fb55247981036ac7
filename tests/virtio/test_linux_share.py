"""Linux mounts a directory of the host: both sides write, also in a fork."""

from __future__ import annotations

import pytest
from virtio_linux import Ready, forked, said, sum_of

pytestmark = [pytest.mark.linux, pytest.mark.timeout(900)]
MOUNT = "mount 9p host /mnt trans=virtio,version=9p2000.L,msize=262144"
SIZE = 1 << 20


def test_both_sides_see_what_the_other_writes(linux_ready: Ready) -> None:
    with forked(linux_ready.snapshot) as guest:
        guest(MOUNT)
        (linux_ready.share / "of-the-host").write_bytes(b"from the host")
        assert guest("cat /mnt/of-the-host").strip() == "from the host"
        written = said(guest(f"write /mnt/of-the-guest {SIZE}"), "written")
        assert written.size == SIZE
        assert sum_of((linux_ready.share / "of-the-guest").read_bytes()) == written
        guest.stop()
        second = guest.vmm.snapshot()
    with forked(second) as guest:
        assert said(guest(f"sum /mnt/of-the-guest {2 * SIZE}"), "read") == written
        guest("put /mnt/of-the-fork hello")
        assert (linux_ready.share / "of-the-fork").read_text() == "hello"
        guest("remove /mnt/of-the-guest")
        names = {path.name for path in linux_ready.share.iterdir()}
        assert names == {"of-the-host", "of-the-fork"}
        assert names < set(guest("ls /mnt").split())

"""Linux and this process exchange bytes by vsock, with checksums; also in a fork."""

from __future__ import annotations

import pytest
from virtio_linux import MOVED, STATUS, Guest, Ready, forked, said, sum_of

pytestmark = [pytest.mark.linux, pytest.mark.timeout(900)]
PORT = 52


def both_ways(guest: Guest, data: bytes) -> None:
    """The guest receives, and then sends."""
    vsock = guest.vmm.vsock
    guest.type(f"receive vsock::{PORT} {len(data)}")
    guest.expect("listening")
    with vsock.connect(PORT) as stream:
        stream.sendall(data)
        assert said(guest.end(), "received") == sum_of(data)
    with vsock.listen(PORT) as listener:
        guest.type(f"send vsock:2:{PORT} {len(data)}")
        stream, _ = listener.accept()
        with stream:
            got = bytearray()
            while piece := stream.recv(1 << 20):
                got += piece
    assert said(guest.end(), "sent") == sum_of(bytes(got))
    assert len(got) == len(data)


def test_bytes_arrive_in_both_directions(linux_ready: Ready) -> None:
    with forked(linux_ready.snapshot) as guest:
        both_ways(guest, bytes(range(256)) * (MOVED // 256))


def test_a_fork_is_told_that_its_connections_have_ended(linux_ready: Ready) -> None:
    with forked(linux_ready.snapshot) as guest:
        guest.type(f"echo vsock::{PORT}")
        guest.expect("listening")
        with guest.vmm.vsock.connect(PORT) as stream:
            stream.sendall(b"hello")
            assert stream.recv(5) == b"hello"
            guest.stop()
            second = guest.vmm.snapshot()
            guest.start()
            stream.sendall(b"again")
            assert stream.recv(5) == b"again"
        assert said(guest.end(), "echoed") == sum_of(b"helloagain")
    with forked(second) as guest:
        # Its program's read fails or ends: the connection is the original's.
        guest.expect(STATUS)
        both_ways(guest, b"of the fork" * 100)

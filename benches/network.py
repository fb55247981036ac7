"""Networks inside the process: frames from port to port."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

from pyvmm import Network

from benches.measure import Result, compare

FRAMES = 64_000
BURST = 64
RUNS = 9
FRAME = b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5" + bytes(1500)


def frames(count: int = FRAMES, runs: int = RUNS) -> Iterator[Result]:
    """Frames of 1,514 bytes from a program to another through a network, against a unix socket of datagrams."""

    def ours() -> float:
        net = Network()
        one, other = net.port(), net.port()
        start = time.perf_counter()
        for _ in range(count // BURST):
            for _ in range(BURST):
                one.send(FRAME)
            for _ in range(BURST):
                other.receive()
        return count / (time.perf_counter() - start)

    def theirs() -> float:
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with one, other:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            start = time.perf_counter()
            for _ in range(count // BURST):
                for _ in range(BURST):
                    one.send(FRAME)
                for _ in range(BURST):
                    other.recv(2048)
            return count / (time.perf_counter() - start)

    yield compare("network ports", "frames/s", ours, theirs, "socketpair, datagrams", 1.0, runs)

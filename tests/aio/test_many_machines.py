"""Hundreds of machines, awaited at once by one asyncio loop."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
import time
from pathlib import Path

import pytest
from guests import flat
from pyvmm import Stop, Vmm

pytestmark = pytest.mark.kvm
DEADLINE = 90.0
# How long machines are made for: a slow host makes fewer.
MAKING_S = 10.0


def room_for_machines() -> int:
    """How many of 500 machines this process may have: each has two threads, some descriptors and some memory."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    tasks = [resource.getrlimit(resource.RLIMIT_NPROC)[0], int(Path("/proc/sys/kernel/threads-max").read_text())]
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    for group in (line.removeprefix("0::/") for line in groups if line.startswith("0::/")):
        limit = Path("/sys/fs/cgroup", group, "pids.max")
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            tasks.append(int(text))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    of_tasks = min(limit for limit in tasks if limit != resource.RLIM_INFINITY)
    room = [free // 2 // (4 << 20), of_tasks // 4]
    if descriptors != resource.RLIM_INFINITY:
        room.append((descriptors - 200) // 16)
    return max(1, min(500, *room))


def test_hundreds_of_machines_awaited_at_once_all_make_progress() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    machines: list[Vmm] = []

    class Device:
        def write(self, offset: int, size: int, value: int) -> Stop:
            # Until all are there: none can wait for a thread that another has.
            meeting.wait(DEADLINE)
            return Stop(value)

    async def run(number: int, machine: Vmm) -> tuple[int, object]:
        async with machine:
            return number, (await machine.run_async(DEADLINE)).value

    async def main() -> list[tuple[int, object]]:
        return await asyncio.gather(*(run(number, machine) for number, machine in enumerate(machines)))

    try:
        end, room = time.monotonic() + MAKING_S, room_for_machines()
        while len(machines) < room and (time.monotonic() < end or not machines):
            number = len(machines) % 256
            code = bytes([0xBA, 0x00, 0x05, 0xB0, number, 0xEE, 0xEB, 0xFE])  # mov dx, 0x500; mov al, n; out dx, al
            machines.append(Vmm(flat(code)))
            machines[-1].add_pio_device(0x500, 1, Device())
        meeting = threading.Barrier(len(machines))
        found = asyncio.run(asyncio.wait_for(main(), DEADLINE))
    finally:
        for machine in machines:
            machine.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [(number, number % 256) for number in range(len(machines))]

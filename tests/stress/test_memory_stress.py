"""Guest memory under everything at once: slots swapped, views taken, snapshots, resets, forks, child processes.

The test runs in a process of its own, because a page mapped in the wrong place would kill it.
Two seconds in CI; PYVMM_STRESS_S sets another time, thirty under `make stress`.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from guests import COUNT_IN_MEMORY, flat
from pyvmm import GuestMemoryError, MemorySlot, Snapshot, StateError, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = float(os.environ.get("PYVMM_STRESS_S", "2"))
PLACE = 0x4000_0000
SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 22)
GOLDEN = 0x9000


class Stress:
    """One machine, and what threads do to it until the time is over."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.vmm = Vmm(flat(COUNT_IN_MEMORY))
        self.slot: MemorySlot | None = self.vmm.memory.add(PLACE, SIZES[2])
        self.vmm.memory.write(GOLDEN, b"golden")
        self.snapshots: list[tuple[Snapshot, bytes]] = []
        self.end = time.monotonic() + SECONDS
        self.done: dict[str, int] = {}
        self.failures: list[BaseException] = []
        self.keep()

    def keep(self) -> None:
        """Take a snapshot, and what a fork of it finds."""
        snapshot = self.vmm.snapshot()
        with snapshot.fork() as fork:
            found = fork.memory.read(0, 1 << 20)
        assert found[GOLDEN : GOLDEN + 6] == b"golden"
        self.snapshots = [*self.snapshots[-3:], (snapshot, found)]

    def swap(self) -> None:
        memory, slot = self.vmm.memory, self.slot
        assert slot is not None
        memory.remove(slot)
        self.slot = memory.add(PLACE, self.random.choice(SIZES))

    def view(self) -> None:
        slot = next((slot for slot in self.vmm.memory.slots if slot.start == PLACE), None)
        if slot is None:
            return  # between two swaps
        view = self.vmm.memory.view(PLACE, slot.size)
        for _ in range(20):
            at = self.random.randrange(slot.size)
            view[at] = at & 0xFF
            bytes(view[at : at + 64])

    def copy(self) -> None:
        memory = self.vmm.memory
        length = self.random.randrange(1, 1 << 17)
        memory.write(PLACE, bytes(length))
        # From guest memory to guest memory, with an overlap.
        memory.write(PLACE + 8, memory.view(PLACE, length))
        memory.read(PLACE, length)

    def log(self) -> None:
        memory = self.vmm.memory
        memory.log_dirty = True
        memory.write_u64(PLACE, 1)
        memory.take_dirty()
        memory.log_dirty = False

    def reset(self) -> None:
        snapshot, _ = self.random.choice(self.snapshots)
        self.vmm.reset(snapshot)

    def check(self) -> None:
        snapshot, found = self.random.choice(self.snapshots)
        with snapshot.fork() as fork:
            assert fork.memory.read(0, 1 << 20) == found, "a snapshot has changed"
            fork.run(timeout=0.01)
            fork.reset(snapshot)
            assert fork.memory.read(0, 1 << 20) == found

    def child(self) -> None:
        view = self.vmm.memory.view(GOLDEN, 6)
        if (pid := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                view[:6] = b"child!"
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

    def run(self) -> None:
        self.vmm.run(timeout=0.02)

    def repeat(self, act: Callable[[], None]) -> None:
        name = act.__name__
        self.done[name] = 0
        try:
            while time.monotonic() < self.end:
                # One operation met another.
                with contextlib.suppress(StateError, GuestMemoryError):
                    act()
                    self.done[name] += 1
        except BaseException as error:
            self.failures.append(error)
            raise

    def go(self) -> None:
        acts = [self.swap, self.view, self.copy, self.log, self.reset, self.check, self.child, self.run, self.keep]
        threads = [threading.Thread(target=self.repeat, args=(act,)) for act in acts]
        # Memory of the host's own, which a page in the wrong place would lie over.
        own = [bytearray(b"\xa5" * size) for size in SIZES * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.failures, self.failures
        assert all(block == b"\xa5" * len(block) for block in own), "memory of the host was overwritten"
        assert min(self.done.values()) > 0, self.done
        self.vmm.close()


@pytest.mark.kvm
@pytest.mark.timeout(SECONDS + 300)
def test_slots_views_snapshots_resets_and_forks_at_once() -> None:
    seed = random.randrange(1 << 32)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", __file__, str(seed)]
    ended = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=SECONDS + 240,
        check=False,
    )
    assert ended.returncode == 0, f"seed {seed}: {ended.returncode}\n{ended.stdout}{ended.stderr}"


if __name__ == "__main__":
    stress = Stress(int(sys.argv[1]))
    stress.go()
    print(stress.done)

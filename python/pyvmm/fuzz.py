"""A fuzz target in a virtual machine: each input runs from one snapshot, and a crash is a value.

The guest is a program of `ElfBoot` that includes `pyvmm_fuzz.h` and defines
`LLVMFuzzerTestOneInput`:

    from pyvmm import ElfBoot, VmmConfig
    from pyvmm.fuzz import Target, ready

    with Target(ready(VmmConfig(boot=ElfBoot("parser")))) as target:
        result = target.run(b"input")

docs/fuzzing.md describes the guest's side, and bridges to other fuzzers.
"""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pyvmm.exceptions import GuestMemoryError, StateError
from pyvmm.exits import Exit, ExitReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

    from pyvmm._pyvmm import Snapshot, Vmm
    from pyvmm.config import VmmConfig

INCLUDE = Path(__file__).parent / "include"
"""The folder with pyvmm_fuzz.h, for the compiler's -I."""
FLAGS = (
    *("-static", "-no-pie", "-fno-pie", "-nostdlib", "-ffreestanding", "-fno-stack-protector"),
    *("-fno-delete-null-pointer-checks", f"-I{INCLUDE}"),
)
"""What gcc and clang need to compile and link a program with pyvmm_fuzz.h."""

_VERSION = 1
_READY, _DONE = 0x64657276, 0x656E6476
# struct pyvmm_fuzz: version, input, its size, map, its size, inputs of a batch; count and current;
# start; lengths and results.
_HEAD = struct.Struct("<6Q")
_COUNT, _CURRENT, _START, _LENGTHS = 48, 52, 56, 64
_SINGLE = struct.Struct("<IIQI")
_BATCH = struct.Struct("<IIQ")
# A guest that waits without using the processor's time is given this many times the timeout.
_MAX_WAIT_FACTOR = 20


class Result(NamedTuple):
    """What one input has come to.

    Attributes:
        value: what the guest's function returned; None if it did not return.
        exit: how the run ended.
        coverage: the guest's counters: a view of its memory, valid until the target's next run.
    """

    value: int | None
    exit: Exit
    coverage: memoryview

    @property
    def hang(self) -> bool:
        """Whether the guest exceeded the time limit."""
        return self.exit.reason is ExitReason.TIMEOUT

    @property
    def crash(self) -> bool:
        """Whether the guest failed: `exit` has the exception, the address and the symbol."""
        return self.exit.is_fault or self.exit.reason is ExitReason.HALT


class Batch(NamedTuple):
    """What the inputs of a batch have come to.

    Attributes:
        values: what the guest's function returned for each input; None where it did not return.
        failures: the exit of each input for which it did not return, by the input's number.
        coverage: the guest's counters, of all inputs since the last failure: a view of its memory,
            valid until the target's next run.
    """

    values: list[int | None]
    failures: dict[int, Exit]
    coverage: memoryview


def ready(config: VmmConfig, *, timeout: float = 60.0, setup: Callable[[Vmm], object] | None = None) -> Snapshot:
    """Boot a machine, run it until its program is ready for inputs, and return a snapshot.

    Args:
        config: the machine, with `ElfBoot` and the default exit port.
        timeout: the time that the program may take, in seconds.
        setup: called with the machine before it runs, for devices, hooks and hostcalls.

    Raises:
        StateError: the program ended before it was ready, or was too slow.
    """
    from pyvmm._pyvmm import Vmm

    with Vmm(config) as vmm:
        if setup is not None:
            setup(vmm)
        exit = vmm.run(timeout)
        if exit.code != _READY:
            raise StateError(f"ready: the guest ended before it was ready: {exit}")
        return vmm.snapshot()


class Target:
    """A machine that is reset to a snapshot for each input. For one thread at a time.

    Args:
        snapshot: of a guest that is ready, as `ready` returns it.
        timeout: the time that the guest may take for an input, or for all inputs of a batch. It is
            processor time, so that a busy host makes no hangs.
        setup: called with the machine before it runs, for devices, hooks and hostcalls.

    Raises:
        StateError: the guest is not ready, or was compiled with another version of pyvmm_fuzz.h.

    Attributes:
        vmm: the machine. It can be inspected until the next run.
        coverage: the guest's counters: a view of its memory.
        most: how many inputs the guest takes in one exit.
        capacity: the bytes that it takes in one exit.
    """

    def __init__(
        self, snapshot: Snapshot, *, timeout: float = 1.0, setup: Callable[[Vmm], object] | None = None
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout: {timeout} is not a number of seconds above 0")
        self.snapshot, self.timeout = snapshot, timeout
        self.vmm = snapshot.fork(setup=setup)
        try:
            self._find_shared(self.vmm.vcpus[0].regs.rdi)
        except BaseException:
            self.vmm.close()
            raise
        self._is_fresh = True

    def _find_shared(self, address: int) -> None:
        memory = self.vmm.memory
        try:
            version, self._input, self.capacity, map, map_size, self.most = _HEAD.unpack(
                memory.read(address, _HEAD.size)
            )
            if version != _VERSION or not 0 < self.most <= 1 << 20:
                raise StateError(f"fuzz: the snapshot is of no guest that is ready with pyvmm_fuzz.h {_VERSION}")
            self._shared = memory.view(address, _LENGTHS + 8 * self.most)
            self._buffer = memory.view(self._input, self.capacity)
            self.coverage = memory.view(map, map_size)
        except GuestMemoryError as error:
            raise StateError(f"fuzz: the snapshot is of no guest that is ready: {error}") from None
        self._results = self._shared[_LENGTHS + 4 * self.most :].cast("i")

    def run(self, data: Buffer, /) -> Result:
        """Run the guest with one input, from the snapshot.

        The input ends at the end of the guest's buffer, and the page after it is not mapped: a read
        beyond the input is a crash.

        Raises:
            ValueError: the input is larger than `capacity`.
            StateError: the target is closed.
        """
        if type(data) is not bytes:
            data = bytes(memoryview(data))
        start = self.capacity - len(data)
        if start < 0:
            raise ValueError(f"an input of {len(data)} bytes is larger than the guest's {self.capacity}")
        self._reset()
        self._buffer[start:] = data
        _SINGLE.pack_into(self._shared, _COUNT, 1, 0, self._input + start, len(data))
        exit = self._enter()
        value = self._results[0] if exit.code == _DONE else None
        return Result(value, exit, self.coverage)

    def run_batch(self, inputs: Sequence[bytes], /) -> Batch:
        """Run the guest with many inputs, as many in one exit as it takes.

        The machine is reset for each exit and after each failure, but not between the inputs of one
        exit: the guest's function must not depend on what earlier inputs left behind.

        Raises:
            ValueError: an input is larger than `capacity`.
            StateError: as for `run`.
        """
        values: list[int | None] = []
        failures: dict[int, Exit] = {}
        while len(values) < len(inputs):
            some = inputs[len(values) : len(values) + self.most]
            data = b"".join(some)
            while len(data) > self.capacity:
                if len(some) == 1:
                    raise ValueError(f"an input of {len(data)} bytes is larger than the guest's {self.capacity}")
                some = some[: len(some) // 2]
                data = b"".join(some)
            self._reset()
            self._buffer[: len(data)] = data
            struct.pack_into(f"{len(some)}I", self._shared, _LENGTHS, *map(len, some))
            _BATCH.pack_into(self._shared, _COUNT, len(some), 0, self._input)
            exit = self._enter()
            if exit.code == _DONE:
                values += self._results[: len(some)].tolist()
                continue
            # The guest can overwrite the number.
            done = min(int.from_bytes(self._shared[_CURRENT : _CURRENT + 4], "little"), len(some) - 1)
            values += self._results[:done].tolist()
            failures[len(values)] = exit
            values.append(None)
        return Batch(values, failures, self.coverage)

    def _reset(self) -> None:
        if not self._is_fresh:
            self.vmm.reset(self.snapshot)
        self._is_fresh = False

    def _enter(self) -> Exit:
        began = time.thread_time()
        exit = self.vmm.run_here(self.timeout)
        if exit.reason is ExitReason.TIMEOUT:
            return self._allow_for_host(began)
        return exit

    def _allow_for_host(self, began: float) -> Exit:
        """Continue a guest that has had less than its time, because the host was busy."""
        give_up_at = time.monotonic() + (_MAX_WAIT_FACTOR - 1) * self.timeout
        while True:
            left = self.timeout - (time.thread_time() - began)
            exit = self.vmm.run_here(max(left, 0))
            if exit.reason is not ExitReason.TIMEOUT or left <= 0 or time.monotonic() >= give_up_at:
                return exit

    def close(self) -> None:
        """Close the machine. The views of its memory stay valid."""
        self.vmm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()

"""Snapshots from files, and a pool whose workers are forks. `parallel` has many forks at once."""

from __future__ import annotations

import os
import queue
import threading
import time
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm.exceptions import ClosedError, SnapshotError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TypeAlias

    from pyvmm._pyvmm import Snapshot, Vmm
    from pyvmm.config import VmmConfig

    Entropy: TypeAlias = "Callable[[Vmm], object] | tuple[int, int]"


# Each is a thread.
MAX_WORKERS = 4096


def config_of(
    memory: int, vcpus: int, exit_port: int | None, chips: tuple[bool, bool], fixups: bool, parts: list[str]
) -> VmmConfig:
    """The configuration as far as a snapshot file describes it; the boot is not included."""
    from pyvmm.config import (
        SERIALS,
        CpuConfig,
        FwCfgConfig,
        MemoryConfig,
        PlatformConfig,
        SerialConfig,
        VmmConfig,
    )

    ports = {part: SerialConfig() for part in parts if part in SERIALS}
    platform: dict[str, Any] = {part: True for part in parts if part not in ports}
    if "fw_cfg" in platform:
        platform["fw_cfg"] = FwCfgConfig()
    mib = max(1, memory >> 20)
    config = VmmConfig(
        memory=MemoryConfig(size_mib=mib),
        cpu=CpuConfig(vcpus=vcpus, fixups=fixups),
        exit_port=exit_port,
        irqchip=chips[0],
        pit=chips[1],
        platform=PlatformConfig(**platform),
    )
    return config.replace(**ports)


def unpickled(path: Path, base: Snapshot | None, id: str, force: bool) -> Snapshot:
    """Load a pickled snapshot from its file. Refuse the file if it contains another snapshot by now."""
    from pyvmm._pyvmm import Snapshot

    loaded = Snapshot.load(path, base, force=force)
    if loaded.id != id:
        raise SnapshotError(f"file: {path} no longer contains the snapshot that was pickled", at="file")
    return loaded


class _Job(NamedTuple):
    future: Future[Any]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class ForkExecutor(Executor):
    """A `concurrent.futures` executor whose workers are forks of a snapshot.

    A job is a function that takes a machine in the state of the snapshot, and the arguments of
    `submit`. It may use the machine freely; the next job sees no trace of it. A worker's fork is
    reset for the next job if a reset undoes everything that the job did; otherwise it is closed and
    a new fork is created. The machine and objects obtained from it belong to the job alone. They
    are closed when they are used later.

    If a job takes longer than `timeout` seconds, its machine is closed and its future raises
    TimeoutError. Other jobs are not affected.

    Args:
        snapshot: the state that each job starts from.
        workers: the number of parallel forks, at most 4,096; None means the number of processors.
        timeout: seconds for each job, counted from its start; None means no limit.
        changes: called with a worker's number whenever its fork is created; returns a dict of
            arguments for `Snapshot.fork`. The devices and hooks that `setup` adds are available to
            each job.
        entropy: as for `Snapshot.fork`, written before each job. With None, all jobs draw the same
            random numbers.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        workers: int | None = None,
        *,
        timeout: float | None = None,
        changes: Callable[[int], dict[str, Any]] | None = None,
        entropy: Entropy | None = None,
    ) -> None:
        if not hasattr(snapshot, "fork"):
            raise TypeError(f"snapshot: expected a Snapshot, not {type(snapshot).__name__}")
        count = (os.cpu_count() or 1) if workers is None else workers
        if not 1 <= count <= MAX_WORKERS:
            raise ValueError(f"workers: {count} is not a number from 1 to {MAX_WORKERS}")
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout: {timeout} is not a number of seconds of at least 0")
        self._snapshot = snapshot
        self._changes = changes
        self._entropy = entropy
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_shut = False
        self._time_limit = _TimeLimit(timeout)
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"worker_{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        """Queue a call of `function(vmm, *arguments, **keywords)` on a worker."""
        with self._lock:
            if self._is_shut:
                raise ClosedError("the executor is closed", at="executor")
            job = _Job(Future(), function, arguments, keywords)
            self._jobs.put(job)
            return job.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs and close the forks. `wait` for queued jobs, or cancel those that have not started."""
        with self._lock:
            is_first, self._is_shut = not self._is_shut, True
        if cancel_futures:
            self._cancel()
        if is_first:
            for _ in self._threads:
                self._jobs.put(None)
        if wait:
            for thread in self._threads:
                thread.join()
            self._time_limit.stop()

    def kill(self) -> None:
        """Cancel jobs that have not started, and close the machines of running jobs."""
        with self._lock:
            is_first, self._is_shut = not self._is_shut, True
        self._cancel()
        if is_first:
            for _ in self._threads:
                self._jobs.put(None)
        self._time_limit.close_all()

    def _cancel(self) -> None:
        ends = 0
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                ends += 1
            else:
                job.future.cancel()
        for _ in range(ends):
            self._jobs.put(None)

    def _work(self, number: int) -> None:
        worker = _Worker(self._snapshot, self._arguments, number, self._time_limit.close_soon)
        while (job := self._jobs.get()) is not None:
            if job.future.set_running_or_notify_cancel():
                self._do(job, worker)
            del job
        worker.close()

    def _arguments(self, number: int) -> dict[str, Any]:
        return {"entropy": self._entropy, **(self._changes(number) if self._changes else {})}

    def _do(self, job: _Job, worker: _Worker) -> None:
        try:
            fork = worker.ready()
        except BaseException as error:  # an error of the fork is the result of the job
            job.future.set_exception(error)
            return
        timed = self._time_limit.begin(fork)
        try:
            # Only the job holds this object. If a reference is left after the job, the fork cannot
            # be reused.
            result = job.function(fork._lend(), *job.arguments, **job.keywords)
        except BaseException as error:
            self._put_away(worker, timed)
            job.future.set_exception(_late(self._time_limit.timeout) if timed.is_late else error)
            return
        self._put_away(worker, timed)
        if timed.is_late:
            job.future.set_exception(_late(self._time_limit.timeout))
        else:
            job.future.set_result(result)

    def _put_away(self, worker: _Worker, timed: _TimedUse) -> None:
        if self._time_limit.end(timed):
            worker.take()  # another thread is closing it
        elif timed.vmm._is_running():
            # Close it in another thread: the result is not needed, and a callback that does not
            # return must not delay other jobs.
            self._time_limit.close_soon(worker.take())


class _Worker:
    """A fork that is used by one job after another."""

    def __init__(
        self,
        snapshot: Snapshot,
        arguments: Callable[[int], dict[str, Any]],
        number: int,
        close_soon: Callable[[Vmm], None],
    ) -> None:
        self._snapshot = snapshot
        self._arguments = arguments
        self._number = number
        self._close_soon = close_soon
        self._fork: Vmm | None = None
        self._entropy: Entropy | None = None
        self._reads_input = False

    def ready(self) -> Vmm:
        """Return a machine in the state of the snapshot, to which nothing else has a reference."""
        fork = self.take()
        if fork is not None:
            if self._renew(fork):
                self._fork = fork
                return fork
            if fork._is_running():
                self._close_soon(fork)
            else:
                fork.close()
        arguments = self._arguments(self._number)
        fork = self._snapshot.fork(**arguments)
        fork._accept_changes()
        serial = arguments.get("serial")
        # An input stream cannot be rewound, so each job needs a new fork.
        self._reads_input = serial is not None and serial.input is not None
        self._entropy = arguments["entropy"]
        self._fork = fork
        return fork

    def _renew(self, fork: Vmm) -> bool:
        try:
            if self._reads_input or not fork._renew(self._snapshot):
                return False
            if self._entropy is None:
                return True
            fork._write_entropy(self._entropy)
            # If entropy did something that a reset cannot undo, the next job needs a new fork.
            return fork._is_clean()
        except Exception:  # a new fork may help; otherwise it raises the same exception
            return False

    def take(self) -> Vmm | None:
        """Take the fork out of the worker."""
        fork, self._fork = self._fork, None
        return fork

    def close(self) -> None:
        fork = self.take()
        if fork is not None:
            fork.close()


def _late(timeout: float | None) -> TimeoutError:
    return TimeoutError(f"the job took longer than {timeout} seconds, or the pool was killed")


class _TimedUse:
    """A machine in use, and its deadline."""

    def __init__(self, vmm: Vmm, deadline: float | None) -> None:
        self.vmm = vmm
        self.deadline = deadline
        self.is_late = False


class _TimeLimit:
    """A thread that closes the machines of jobs which exceed their time limit.

    Each machine is closed in its own thread, which waits for running callbacks.
    """

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._changed = threading.Condition(threading.RLock())
        self._uses: dict[int, _TimedUse] = {}
        self._is_over = False
        self._is_killed = False
        self._is_idle = False  # whether there is no deadline to wait for
        self._closing: list[threading.Thread] = []
        self._thread: threading.Thread | None = None
        if timeout is not None:
            self._thread = threading.Thread(target=self._run, name="time-limit", daemon=True)
            self._thread.start()

    def begin(self, vmm: Vmm) -> _TimedUse:
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        timed = _TimedUse(vmm, deadline)
        with self._changed:
            if self._is_killed:
                timed.is_late = True
                self.close_soon(vmm)
            self._uses[id(timed)] = timed
            if deadline is not None and self._is_idle:
                self._changed.notify()  # otherwise the thread already waits for an earlier one
        return timed

    def end(self, timed: _TimedUse) -> bool:
        """Stop watching a machine. Return whether it exceeded its time limit."""
        with self._changed:
            self._uses.pop(id(timed), None)
            return timed.is_late

    def close_all(self) -> None:
        with self._changed:
            self._is_killed = True
            late = list(self._uses.values())
            for timed in late:
                timed.is_late = True
        for timed in late:
            self.close_soon(timed.vmm)

    def close_soon(self, vmm: Vmm | None) -> None:
        """Close a machine in another thread."""
        if vmm is None:
            return
        closing = threading.Thread(target=vmm.close, name="close", daemon=True)
        with self._changed:
            self._closing = [thread for thread in self._closing if thread.is_alive()]
            closing.start()
            self._closing.append(closing)

    def stop(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            closing, self._closing = self._closing, []
        for thread in closing:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._is_over:
                    return
                now = time.monotonic()
                deadlines = [(w.deadline, w) for w in self._uses.values() if w.deadline is not None]
                late = [w for deadline, w in deadlines if deadline <= now and not w.is_late]
                for timed in late:
                    timed.is_late = True
                if not late:
                    left = [deadline - now for deadline, w in deadlines if not w.is_late]
                    self._is_idle = not left
                    self._changed.wait(min(*left, threading.TIMEOUT_MAX) if left else None)
                    self._is_idle = False
                    continue
            for timed in late:
                self.close_soon(timed.vmm)

"""Many forks of a snapshot at once, and a pool of them that computes."""

from __future__ import annotations

import os
import queue
import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm.exceptions import SnapshotError, VmmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from pyvmm._pyvmm import Snapshot, Vmm
    from pyvmm.config import VmmConfig


def config_of(memory: int, vcpus: int, exit_port: int | None, irqchip: bool, pit: bool, fixups: bool) -> VmmConfig:
    """The configuration that can be told from a file: not what the machine was booted with."""
    from pyvmm.config import CpuConfig, MemoryConfig, VmmConfig

    mib = max(1, memory >> 20)
    return VmmConfig(MemoryConfig(mib), CpuConfig(vcpus, fixups=fixups), exit_port=exit_port, irqchip=irqchip, pit=pit)


def unpickled(path: Path, base: Snapshot | None, id: str, force: bool) -> Snapshot:
    """The snapshot that was pickled by its file, and no other that has taken the file's name."""
    from pyvmm._pyvmm import Snapshot

    loaded = Snapshot.load(path, base, force=force)
    if loaded.id != id:
        raise SnapshotError(f"file: {path} holds another snapshot than when this one was pickled", at="file")
    return loaded


def fork_many(snapshot: Snapshot, count: int, changes: Callable[[int], dict[str, Any]] | None) -> list[Vmm]:
    """`Snapshot.fork_many`."""

    def fork(number: int) -> Vmm:
        return snapshot.fork(**(changes(number) if changes else {}))

    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fork") as pool:
        made = [pool.submit(fork, number) for number in range(count)]
    failed = [error for future in made if (error := future.exception()) is not None]
    if failed:
        for future in made:
            if future.exception() is None:
                future.result().close()
        made.clear()  # the traceback would keep them
        raise failed[0]
    return [future.result() for future in made]


def map_inputs(
    snapshot: Snapshot,
    function: Callable[[Vmm, Any], Any],
    inputs: Iterable[Any],
    workers: int | None,
    timeout: float | None,
) -> list[Any]:
    """`Snapshot.map`."""
    pool = ForkExecutor(snapshot, workers, timeout=timeout)
    try:
        futures = [pool.submit(function, value) for value in inputs]
        return [future.result() for future in futures]
    except BaseException:
        pool.kill()
        raise
    finally:
        pool.shutdown()


class _Job(NamedTuple):
    future: Future[Any]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class ForkExecutor(Executor):
    """A `concurrent.futures` executor whose workers are forks of a snapshot.

    A job is a function that is given a machine, which stands at the snapshot, and the arguments of `submit`. It runs
    the machine as it likes; whatever becomes of the guest, the next job finds the snapshot again. A job that takes
    longer than `timeout` seconds gets its machine closed under it and its future a TimeoutError; the others go on.

    Args:
        snapshot: what each job starts from.
        workers: how many forks run at once; None: as many as the host has processors.
        timeout: seconds for each job, counted from its start; None: no limit.
        changes: called with each worker's number for the arguments of its `Snapshot.fork`, as a dict.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        workers: int | None = None,
        *,
        timeout: float | None = None,
        changes: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        count = (os.cpu_count() or 1) if workers is None else workers
        if count < 1:
            raise ValueError(f"workers: {count} is not at least 1")
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout: {timeout} is not a number of seconds from 0")
        self._snapshot = snapshot
        self._changes = changes
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_shut = False
        self._watch = _Watch(timeout)
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"worker_{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        """Have `function(vmm, *arguments, **keywords)` called on a worker."""
        with self._lock:
            if self._is_shut:
                raise RuntimeError("the executor has been shut down")
            job = _Job(Future(), function, arguments, keywords)
            self._jobs.put(job)
            return job.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs; `wait` for those there are, or cancel those that have not begun. The forks are closed."""
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
            self._watch.stop()

    def kill(self) -> None:
        """Cancel what has not begun and close the machines of what has."""
        with self._lock:
            is_first, self._is_shut = not self._is_shut, True
        self._cancel()
        if is_first:
            for _ in self._threads:
                self._jobs.put(None)
        self._watch.close_all()

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
        vmm: Vmm | None = None
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                vmm = self._ready(vmm, number)
                vmm = self._do(job, vmm)
            except BaseException as error:  # what a job raises belongs to its future
                job.future.set_exception(error)
            del job
        if vmm is not None:
            vmm.close()

    def _ready(self, vmm: Vmm | None, number: int) -> Vmm:
        """A machine that stands at the snapshot: the worker's own, if it can be brought back."""
        if vmm is not None:
            try:
                vmm.reset(self._snapshot)
                return vmm
            except VmmError:
                vmm.close()
        return self._snapshot.fork(**(self._changes(number) if self._changes else {}))

    def _do(self, job: _Job, vmm: Vmm) -> Vmm | None:
        """Do the job; the machine, unless it was closed because the time was up."""
        watched = self._watch.begin(vmm)
        try:
            result = job.function(vmm, *job.arguments, **job.keywords)
        except BaseException as error:
            if self._watch.end(watched):
                job.future.set_exception(_late(self._watch.timeout))
                return None
            job.future.set_exception(error)
            return vmm
        if self._watch.end(watched):
            job.future.set_exception(_late(self._watch.timeout))
            return None
        job.future.set_result(result)
        return vmm


def _late(timeout: float | None) -> TimeoutError:
    return TimeoutError(f"the job took longer than {timeout} seconds, or the pool was killed")


class _Watched:
    """A machine at work, and when its time is up."""

    def __init__(self, vmm: Vmm, deadline: float | None) -> None:
        self.vmm = vmm
        self.deadline = deadline
        self.is_late = False


class _Watch:
    """One thread that closes the machines of jobs whose time is up."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._changed = threading.Condition()
        self._watched: dict[int, _Watched] = {}
        self._is_over = False
        self._is_killed = False
        self._is_idle = False  # no deadline lies before it
        self._thread: threading.Thread | None = None
        if timeout is not None:
            self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
            self._thread.start()

    def begin(self, vmm: Vmm) -> _Watched:
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        watched = _Watched(vmm, deadline)
        with self._changed:
            if self._is_killed:
                watched.is_late = True
                vmm.close()
            self._watched[id(watched)] = watched
            if deadline is not None and self._is_idle:
                self._changed.notify()  # else the thread waits for one that is earlier
        return watched

    def end(self, watched: _Watched) -> bool:
        """Whether it was too late."""
        with self._changed:
            self._watched.pop(id(watched), None)
            return watched.is_late

    def close_all(self) -> None:
        with self._changed:
            self._is_killed = True
            late = list(self._watched.values())
            for watched in late:
                watched.is_late = True
        for watched in late:
            watched.vmm.close()

    def stop(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _look(self) -> None:
        while True:
            with self._changed:
                if self._is_over:
                    return
                now = time.monotonic()
                deadlines = [(w.deadline, w) for w in self._watched.values() if w.deadline is not None]
                late = [w for deadline, w in deadlines if deadline <= now and not w.is_late]
                for watched in late:
                    watched.is_late = True
                if not late:
                    left = [deadline - now for deadline, w in deadlines if not w.is_late]
                    self._is_idle = not left
                    self._changed.wait(min(*left, threading.TIMEOUT_MAX) if left else None)
                    self._is_idle = False
                    continue
            for watched in late:
                watched.vmm.close()

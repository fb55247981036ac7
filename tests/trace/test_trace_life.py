"""The life of a trace: begun and ended at any time and from any thread, on a full disk, in shared loops, in a child."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from guests import SPIN, WRITE_FOREVER, exit_with, flat, out
from pyvmm import (
    CpuConfig,
    EventManager,
    StateError,
    StreamError,
    Vmm,
)
from traces import Bell, hops, of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


pytestmark = pytest.mark.kvm


def test_a_path_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    with Vmm(flat(exit_with(0))) as vmm:
        for path, number in [(tmp_path / "no" / "trace.json", errno.ENOENT), (tmp_path, errno.EISDIR)]:
            with pytest.raises(StreamError) as caught, vmm.trace(path):
                pytest.fail("entered")
            assert caught.value.errno == number
            assert caught.value.at == str(path)
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(StreamError, match="this is a pipe"), vmm.trace(tmp_path / "pipe"):
            pytest.fail("entered")
        wrong: Any = 3
        with pytest.raises(TypeError):
            vmm.trace(wrong)
        with vmm.trace(tmp_path / "trace.json"):
            assert vmm.run(60).code == 0


def test_a_full_disk_is_reported_at_the_end_and_does_not_end_the_run() -> None:
    with Vmm(flat(exit_with(5))) as vmm:
        with pytest.raises(StreamError) as caught, vmm.trace("/dev/full"):
            exit = vmm.run(60)
        assert exit.code == 5
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(StateError, match="ended") as state, vmm.trace("/dev/full"):
            vmm.run()
        assert "the trace is not complete" in "".join(state.value.__notes__)


def test_a_disk_that_fills_up_leaves_whole_events(tmp_path: Path) -> None:
    """The limit of a file's size replaces a full disk."""
    import resource
    import signal

    path = tmp_path / "trace.json"
    code = b"\xb9\xd0\x07\xe6\x80\xe2\xfc" + exit_with(0)  # as above: 2,000 exits
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with Vmm(flat(code)) as vmm:
            with pytest.raises(StreamError) as caught, vmm.trace(path):
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
                assert vmm.run(60).code == 0
            assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert 0 < len(of(hops(path), "exit")) < 2001


def test_one_trace_of_a_machine_at_a_time(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    with Vmm(flat(exit_with(0))) as vmm, Vmm(flat(exit_with(1))) as other:
        with vmm.trace(first) as trace:
            for again in (vmm.trace(second), trace):
                with pytest.raises(StateError, match="one trace at a time"), again:
                    pytest.fail("entered")
            with other.trace(second):
                assert other.run(60).code == 1
            assert vmm.run(60).code == 0
        assert len(of(hops(first), "exit")) == 1
        assert len(of(hops(second), "exit")) == 1
        with trace:
            pass
        assert of(hops(first), "exit") == [], "written anew"
    with pytest.raises(StateError, match="closed"), vmm.trace(first):
        pytest.fail("entered")


def test_a_trace_may_outlive_its_machine(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    vmm = Vmm(flat(exit_with(0)))
    with vmm.trace(path):
        vmm.run(60)
        vmm.close()
        del vmm
    assert len(of(hops(path), "exit")) == 1


def test_an_open_trace_ends_with_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    manager = EventManager()
    vmm = Vmm(flat(exit_with(0)), event_manager=manager)
    vmm.trace(path).__enter__()
    vmm.run(60)
    del vmm
    assert len(of(hops(path), "exit")) == 1


def test_machines_in_one_loop_have_traces_of_their_own(tmp_path: Path) -> None:
    manager, bell = EventManager(), Bell()
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    with (
        Vmm(flat(out(0x510, 1) + SPIN), event_manager=manager) as one,
        Vmm(flat(SPIN), event_manager=manager) as two,
    ):
        bell.vmm = one
        one.add_pio_device(0x510, 1, bell)
        manager.add_subscriber(bell)
        with one.trace(paths[0]), two.trace(paths[1]):
            two.start()
            one.run(60)
            two.stop()
            two.wait(60)
    for path in paths:
        assert "Bell.process" in [hop.name for hop in of(hops(path), "callback") if hop.track == "loop"]
    assert of(hops(paths[1]), "device") == []


def test_a_loop_that_is_turned_by_itself_is_traced_on_each_thread(tmp_path: Path) -> None:
    path, manager = tmp_path / "trace.json", EventManager()
    with Vmm(flat(exit_with(0)), event_manager=manager) as vmm, vmm.trace(path):
        seen: list[int] = []

        def ring() -> None:
            seen.append(threading.get_ident())
            manager.stop()

        for _ in range(2):
            manager.call_later(0, ring)
            thread = threading.Thread(target=manager.run_forever)
            thread.start()
            thread.join(60)
    callbacks = of(hops(path), "callback")
    assert len(callbacks) == len(seen) == 2
    assert callbacks[0].track == "loop"
    assert callbacks[1].track.startswith("loop ")


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    class Forks:
        child = -1

        def write(self, offset: int, size: int, value: int) -> None:
            self.child = os.fork()
            if self.child == 0:
                refused = 0
                try:
                    with vmm.trace(path):
                        pass
                except StateError:
                    refused = 1
                trace.__exit__(None, None, None)
                os._exit(refused)

    device = Forks()
    with Vmm(flat(out(0x510, 1) + exit_with(0))) as vmm:
        vmm.add_pio_device(0x510, 1, device)
        with vmm.trace(path) as trace:
            assert vmm.run(60).code == 0
            assert os.waitstatus_to_exitcode(os.waitpid(device.child, 0)[1]) == 1
            child = os.fork()
            if child == 0:
                trace.__exit__(None, None, None)
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert [hop.name for hop in of(hops(path), "exit")] == ["io write 0x510", "io write 0xf4"]


def test_a_callback_may_begin_and_end_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    class Device:
        def write(self, offset: int, size: int, value: int) -> None:
            if value:
                trace.__enter__()
            else:
                trace.__exit__(None, None, None)

    with Vmm(flat(out(0x510, 1) + out(0x80, 1) + out(0x510, 0) + exit_with(0))) as vmm:
        trace = vmm.trace(path)
        vmm.add_pio_device(0x510, 1, Device())
        assert vmm.run(60).code == 0
    assert [hop.name for hop in of(hops(path), "exit")] == ["io write 0x80"]


@pytest.mark.parametrize("close", [Vmm.close, Vmm.stop], ids=["close", "stop"])
def test_traces_begin_and_end_while_others_stop_the_machine(close: Callable[[Vmm], None], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for _ in range(20):
        with Vmm(flat(WRITE_FOREVER)) as vmm:
            vmm.start()
            thread = threading.Thread(target=close, args=(vmm,))
            with vmm.trace(path):
                thread.start()
            thread.join(60)
            assert not thread.is_alive()
        hops(path)


def test_counters_and_traces_come_and_go_from_several_threads(tmp_path: Path) -> None:
    code = b"\xe6\x80\xeb\xfc"  # out 0x80, al; jmp back
    begun: list[int] = []

    def watch(number: int) -> None:
        for _ in range(30):
            with vmm.stats:
                try:
                    with vmm.trace(tmp_path / f"{number}.json"):
                        begun.append(number)
                except StateError:
                    assert vmm.stats.vcpus

    with Vmm(flat(code, "long64", cpu=CpuConfig(vcpus=2))) as vmm:
        vmm.start()
        threads = [threading.Thread(target=watch, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                assert vmm.wait(0.01) is None
        vmm.stop()
        assert str(vmm.wait(60)) == "stopped"
    for number in set(begun):
        hops(tmp_path / f"{number}.json")
    assert begun

"""`pyvmm.fuzz`: inputs, crashes, hangs and coverage of a guest that is reset for each input."""

from __future__ import annotations

import shutil
import threading
import time
from typing import TYPE_CHECKING

import pytest
from fuzz_targets import SOURCE, snapshot_of
from programs import DEADLINE_S
from programs import build as compiled
from pyvmm import ClosedError, ExitReason, FlatBoot, MemoryConfig, Snapshot, StateError, Vmm, VmmConfig
from pyvmm.fuzz import FLAGS, INCLUDE, Batch, Result, Target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kvm
PAGE_FAULT, DIVIDE_ERROR, INVALID_OPCODE = 14, 0, 6


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return snapshot_of(tmp_path_factory.mktemp("guest"), flags=("-fsanitize-coverage=trace-pc",))


@pytest.fixture
def target(snapshot: Snapshot) -> Iterator[Target]:
    with Target(snapshot, timeout=20) as target:
        yield target


def test_run_returns_what_the_guest_returns(target: Target) -> None:
    inputs: list[tuple[bytes | bytearray | memoryview, int]]
    inputs = [(b"abc", 294), (bytearray(b"abc"), 294), (memoryview(b"abc"), 294), (b"", -7)]
    for data, value in inputs:
        result = target.run(data)
        assert isinstance(result, Result)
        assert (result.value, result.crash, result.hang) == (value, False, False)
        assert result.exit.reason is ExitReason.CODE
    assert target.run(memoryview(b"a.b.c.")[::2]).value == 294


def test_every_run_begins_at_the_snapshot(target: Target) -> None:
    assert [target.run(b"c").value for _ in range(3)] == [1, 1, 1]


def test_crash_says_what_where_and_why(target: Target) -> None:
    result = target.run(b"n")
    assert (result.value, result.crash, result.hang) == (None, True, False)
    exit = result.exit
    assert (exit.reason, exit.vector, exit.cr2) == (ExitReason.EXCEPTION, PAGE_FAULT, 16)
    assert exit.symbol == "LLVMFuzzerTestOneInput"
    assert target.vmm.vcpus[0].regs.rip == exit.rip
    assert target.run(b"d").exit.vector == DIVIDE_ERROR
    assert target.run(b"abc").value == 294


def test_read_beyond_the_input_is_a_crash(target: Target) -> None:
    exit = target.run(b"o" * 1000).exit
    assert (exit.vector, exit.cr2) == (PAGE_FAULT, target.vmm.symbols["pyvmm_fuzz_input"] + target.capacity)


def test_hang_is_a_value_and_the_next_input_runs(snapshot: Snapshot) -> None:
    with Target(snapshot, timeout=0.2) as target:
        result = target.run(b"h")
        assert (result.value, result.hang, result.crash) == (None, True, False)
        assert target.run(b"abc").value == 294


def test_time_in_which_the_host_stalls_is_not_the_guests(snapshot: Snapshot) -> None:
    class Slow:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            time.sleep(1)

    with Target(snapshot, timeout=0.4, setup=lambda vmm: vmm.add_pio_device(0x500, 4, Slow())) as target:
        result = target.run(b"p")
        assert (result.value, result.hang) == (4, False)


def test_guest_that_only_waits_is_a_hang_in_the_end(snapshot: Snapshot) -> None:
    class Slow:
        def write(self, _offset: int, _size: int, _value: int) -> None:
            time.sleep(0.05)

    with Target(snapshot, timeout=0.1, setup=lambda vmm: vmm.add_pio_device(0x500, 4, Slow())) as target:
        assert target.run(b"q").hang


def test_guest_that_ends_by_itself_is_neither(target: Target) -> None:
    result = target.run(b"x")
    assert (result.value, result.crash, result.hang, result.exit.code) == (None, False, False, 5)


def test_run_that_another_thread_stops_says_so(target: Target) -> None:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(target.run(b"h")))
    thread.start()
    while thread.is_alive():
        target.vmm.stop()
        thread.join(0.01)
    assert results[0].exit.reason in {ExitReason.STOPPED, ExitReason.TIMEOUT}
    assert results[0].value is None


def test_input_as_large_as_the_buffer_fits_and_a_larger_one_does_not(target: Target) -> None:
    assert target.run(b"\0" * target.capacity).value == 0
    for run in (target.run, lambda data: target.run_batch([b"ab", data])):
        with pytest.raises(ValueError, match="larger"):
            run(b"\0" * (target.capacity + 1))
    assert target.run(b"abc").value == 294


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
def test_batch_has_a_value_for_each_input(count: int, target: Target) -> None:
    inputs = [b"a" * (n % 50) for n in range(count)]
    batch = target.run_batch(inputs)
    assert isinstance(batch, Batch)
    assert batch.values == [97 * len(data) if data else -7 for data in inputs]
    assert batch.failures == {}


def test_batch_says_which_inputs_crash_and_runs_the_others(target: Target) -> None:
    inputs = [b"ab"] * 700
    for n, data in [(0, b"n"), (1, b"d"), (300, b"n"), (699, b"o")]:
        inputs[n] = data
    batch = target.run_batch(inputs)
    assert {n: exit.vector for n, exit in batch.failures.items()} == {
        0: PAGE_FAULT,
        1: DIVIDE_ERROR,
        300: PAGE_FAULT,
    }
    assert [n for n, value in enumerate(batch.values) if value is None] == [0, 1, 300]
    assert batch.values[2] == batch.values[698] == 195


def test_batch_says_which_input_hangs(snapshot: Snapshot) -> None:
    with Target(snapshot, timeout=0.3) as target:
        batch = target.run_batch([b"ab", b"h", b"ab"])
        assert batch.values == [195, None, 195]
        assert batch.failures[1].reason is ExitReason.TIMEOUT


def test_batch_larger_than_the_buffer_takes_several_exits(target: Target) -> None:
    inputs = [b"\1" * (target.capacity // 3)] * 7
    assert target.run_batch(inputs).values == [target.capacity // 3] * 7


def test_inputs_of_one_exit_share_the_guests_state(target: Target) -> None:
    assert target.run_batch([b"c"] * 300).values == [*range(1, 257), *range(1, 45)]


def test_guest_that_overwrites_what_it_shares_fails_alone(target: Target) -> None:
    batch = target.run_batch([b"ab", b"s", b"ab"])
    assert batch.failures
    assert len(batch.values) == 3
    assert target.run(b"abc").value == 294


def test_coverage_is_that_of_the_run(target: Target) -> None:
    seen = {data: bytes(target.run(data).coverage) for data in (b"", b"a", b"c")}
    assert len({*seen.values()}) == 3
    assert all(any(counters) for counters in seen.values())
    assert bytes(target.run(b"a").coverage) == seen[b"a"]
    assert target.run(b"a").coverage is target.coverage


@pytest.mark.parametrize("kind", ["trace-pc-guard", "inline-8bit-counters", "inline-8bit-counters,pc-table"])
def test_clang_has_its_own_counters(kind: str, tmp_path: Path) -> None:
    flags = (f"-fsanitize-coverage={kind}", "-fno-sanitize-link-runtime", "-Wno-unused-command-line-argument")
    with Target(snapshot_of(tmp_path, flags=flags, compiler="clang")) as target:
        seen = {data: bytes(target.run(data).coverage) for data in (b"", b"a", b"c")}
        assert len({*seen.values()}) == 3
        assert all(any(counters) for counters in seen.values())


def test_constructors_and_initialization_run_before_the_guest_is_ready(tmp_path: Path) -> None:
    source = """
    #include "pyvmm_fuzz.h"
    static int value;
    __attribute__((constructor)) static void construct(void) { value = 40; }
    int LLVMFuzzerInitialize(int *argc, char ***argv) { value += 2 + *argc + (*argv)[0]; return 0; }
    int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) { return value++ + (data ? size : 0); }"""
    source = source.replace("(*argv)[0]", "((*argv)[0] != 0)")
    with Target(snapshot_of(tmp_path, source)) as target:
        assert [target.run(b"").value for _ in range(2)] == [42, 42]


def test_heap_of_the_header_is_empty_again_for_each_input(tmp_path: Path) -> None:
    source = """
    #include "pyvmm_fuzz.h"
    static char *kept;
    int LLVMFuzzerInitialize(int *argc, char ***argv)
    {
        (void)argc, (void)argv;
        kept = malloc(100);
        kept[99] = 7;
        return 0;
    }
    int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
    {
        char *copy = malloc(size + 1);
        if (!copy)
            return -1;
        memcpy(copy, data, size);
        copy[size] = 0;
        copy = realloc(copy, 2 * size + 2);
        int *zeros = calloc(10, 4);
        if (calloc((size_t)-1, 16) || malloc((size_t)-1) || malloc(PYVMM_FUZZ_HEAP_SIZE))
            return -2;
        free(zeros);
        if (!strcmp(copy, "abort"))
            abort();
        return strlen(copy) + zeros[9] + kept[99];
    }"""
    with Target(snapshot_of(tmp_path, source)) as target:
        assert target.run(b"hello").value == 12
        assert target.run_batch([b"x" * 1000] * 1500).values == [1007] * 1500
        assert target.run(b"\0" * target.capacity).value == -1
        result = target.run(b"abort")
        assert (result.exit.vector, result.exit.symbol) == (INVALID_OPCODE, "abort")


def test_sizes_of_the_header_can_be_chosen(tmp_path: Path) -> None:
    flags = ("-DPYVMM_FUZZ_INPUT_SIZE=0x2000", "-DPYVMM_FUZZ_MAP_SIZE=512", "-DPYVMM_FUZZ_BATCH=8")
    with Target(snapshot_of(tmp_path, flags=flags)) as target:
        assert (target.capacity, len(target.coverage), target.most) == (0x2000, 512, 8)
        assert target.run_batch([b"ab"] * 20).values == [195] * 20


def test_saved_snapshot_is_a_target(snapshot: Snapshot, tmp_path: Path) -> None:
    snapshot.save(tmp_path / "file")
    with Target(Snapshot.load(tmp_path / "file")) as target:
        assert target.run(b"n").exit.symbol == "LLVMFuzzerTestOneInput"


def test_program_that_is_not_ready_is_refused_with_its_exit(tmp_path: Path) -> None:
    source = "#include <stdint.h>\nvoid _start(void) { *(volatile int *)0 = 1; }"
    with pytest.raises(StateError, match=r"not ready|before it was ready(.|\n)*#PF.*_start"):
        snapshot_of(tmp_path, source)


def test_program_that_takes_too_long_to_be_ready_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="timeout"):
        snapshot_of(tmp_path, 'void _start(void) { for (;;) __asm__ volatile("pause"); }', timeout=0.2)


def test_snapshot_of_another_guest_is_no_target() -> None:
    with Vmm(VmmConfig(boot=FlatBoot(b"\xf4"), memory=MemoryConfig(size_mib=1))) as vmm:
        for _ in range(2):
            with pytest.raises(StateError, match="ready"):
                Target(vmm.snapshot())
            vmm.vcpus[0].regs.rdi = 2**64 - 1


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_timeout_is_above_zero(timeout: float, snapshot: Snapshot) -> None:
    with pytest.raises(ValueError, match="timeout"):
        Target(snapshot, timeout=timeout)


def test_closed_target_says_so_and_keeps_its_coverage(snapshot: Snapshot) -> None:
    target = Target(snapshot)
    coverage = target.run(b"a").coverage
    target.close()
    target.close()
    assert any(coverage)
    with pytest.raises((ClosedError, StateError)):
        target.run(b"a")


def test_setup_runs_before_the_program(tmp_path: Path) -> None:
    seen: list[int] = []

    class Port:
        def write(self, _offset: int, _size: int, value: int) -> None:
            seen.append(value)

        def save(self) -> bytes:
            return b""

        def restore(self, _state: bytes) -> None:
            pass

    def setup(vmm: Vmm) -> None:
        vmm.add_pio_device(0x500, 4, Port())

    source = """
    #include "pyvmm_fuzz.h"
    int LLVMFuzzerInitialize(int *argc, char ***argv) {
        (void)argc, (void)argv; __asm__ volatile("mov $0x500, %%edx; out %0, %%dx" :: "a"(7) : "edx"); return 0; }
    int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) { return data ? size : 0; }"""
    with Target(snapshot_of(tmp_path, source, setup=setup), setup=setup) as target:
        assert target.run(b"abc").value == 3
    assert seen == [7]


def test_header_has_no_warnings(tmp_path: Path) -> None:
    assert (INCLUDE / "pyvmm_fuzz.h").exists()
    for compiler in ("gcc", "clang"):
        if shutil.which(compiler):
            quiet = ("-Wno-array-bounds", "-Wno-unused-command-line-argument")
            compiled(tmp_path, SOURCE, *FLAGS, "-Wall", "-Wextra", "-Werror", *quiet, compiler=compiler)


def test_targets_on_threads_do_not_disturb_each_other(snapshot: Snapshot) -> None:
    found: dict[int, list[int | None]] = {}

    def work(n: int) -> None:
        with Target(snapshot, timeout=DEADLINE_S) as target:
            found[n] = [target.run(b"a" * n).value for _ in range(50)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S * 2)
    assert found == {n: [97 * n] * 50 for n in range(1, 4)}

"""Snapshots, forks and resets, told by guests that count: one that goes on exactly cannot have been started again.

Covers src/py/snapshot/fork.rs, src/py/snapshot/object.rs, src/vm/restore.rs, src/vmm/resets.rs.
"""

from __future__ import annotations

import contextlib
import gc
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from guests import HALT, SPIN, count_vcpus, exit_with, flat, print_text
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import NONCE_AT, ORACLE, counted, finish, oracle
from pyvmm import (
    ConfigError,
    CpuConfig,
    EventManager,
    ExitReason,
    SerialConfig,
    Snapshot,
    StateError,
    Vmm,
    VmmError,
    VmRunState,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
RAM_AT = 0x3000


def while_it_runs(vmm: Vmm, count: int) -> list[Snapshot]:
    """At most so many snapshots, and at least one, of a guest that has not ended."""
    snapshots: list[Snapshot] = []
    while len(snapshots) < count:
        snapshot = vmm.snapshot()
        if vmm.state is not VmRunState.RUNNING:
            break
        snapshots.append(snapshot)
    assert snapshots
    return snapshots


@given(before=st.floats(0, 0.06), after=st.floats(0, 0.06), nonce=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_original_fork_and_reset_go_on_exactly(before: float, after: float, nonce: int) -> None:
    with oracle(nonce) as vmm:
        vmm.run(before) if before else None
        if vmm.state is VmRunState.EXITING:
            return
        snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            vmm.run(after)
            assert finish(fork) == counted(nonce)
        vmm.reset(snapshot)
        assert finish(vmm) == counted(nonce)
        vmm.reset(snapshot)
        assert finish(vmm) == counted(nonce)


def test_snapshot_of_a_running_machine_lets_it_go_on() -> None:
    with oracle() as vmm:
        vmm.start()
        snapshots = while_it_runs(vmm, 20)
        exit = vmm.wait(DEADLINE_S)
        assert exit is not None
        assert exit.code == 9
        assert vmm.serial.take_output() == counted(0x1234_5678)
    for fork in (snapshots[0].fork(), snapshots[-1].fork()):
        with fork:
            assert finish(fork) == counted(0x1234_5678)


def test_snapshots_from_several_threads_at_once_all_succeed() -> None:
    with Vmm(flat(SPIN, "user64", address=0x10000)) as vmm:
        vmm.start()
        with ThreadPoolExecutor(4) as pool:
            taken = list(pool.map(lambda _: vmm.snapshot(), range(100)))
        assert len({snapshot.id for snapshot in taken}) == 100
        assert vmm.state is VmRunState.RUNNING


def test_forked_child_resets_and_snapshots_its_own_machines() -> None:
    with oracle() as vmm:
        vmm.snapshot()
        snapshot = vmm.snapshot()  # the second looks into the page tables
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with snapshot.fork() as fork:
                    fork.memory.write(RAM_AT, b"mine")
                    with fork.snapshot().fork() as later:
                        found = later.memory.read(RAM_AT, 4)
                    status = int((found, fork.reset(snapshot)) != (b"mine", 1))
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0


def test_snapshot_of_a_paused_machine_leaves_it_paused() -> None:
    with Vmm(flat(SPIN)) as vmm:
        vmm.start()
        vmm.pause()
        vmm.snapshot()
        assert vmm.state is VmRunState.PAUSED
        vmm.stop()
        vmm.wait(DEADLINE_S)


def test_snapshot_before_the_first_run_starts_forks_where_it_would() -> None:
    with oracle() as vmm:
        snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            assert finish(fork) == counted(0x1234_5678)
        assert finish(vmm) == counted(0x1234_5678)


def test_snapshot_of_an_ended_guest_goes_on_behind_its_end() -> None:
    with Vmm(flat(exit_with(1) + print_text(b"on") + exit_with(2))) as vmm:
        assert vmm.run(DEADLINE_S).code == 1
        snapshot = vmm.snapshot()
        with pytest.raises(StateError, match="ended"):
            vmm.run(DEADLINE_S)
        for machine in (snapshot.fork(), vmm):
            if machine is vmm:
                vmm.reset(snapshot)
            assert machine.run(DEADLINE_S).code == 2
            assert machine.serial.take_output() == b"on"


def test_snapshots_of_snapshots_are_a_tree() -> None:
    """Each machine counts on from where its branch stood."""
    with oracle(7) as root:
        tree: list[tuple[Snapshot, Vmm]] = [(root.snapshot(), root)]
        for level in range(4):
            snapshot, vmm = tree[-1]
            fork = snapshot.fork()
            assert fork.run(0.002 + 0.001 * level).reason is ExitReason.TIMEOUT
            tree.append((fork.snapshot(), fork))
        for snapshot, _ in reversed(tree):
            with snapshot.fork() as fork:
                assert finish(fork) == counted(7)
        flat = tree[-1][0].flatten()
        assert flat.mappings == 1
        for _, vmm in tree:
            vmm.close()
        with flat.fork() as fork:
            assert finish(fork) == counted(7)


def test_layers_hold_only_what_changed_and_flattening_joins_them() -> None:
    with Vmm(flat(SPIN, size_mib=8)) as vmm:
        vmm.memory.fill(0, 8 << 20, 1)
        first = vmm.snapshot()
        assert first.memory_bytes == 8 << 20
        vmm.memory.write(0x10000, b"changed")
        second = vmm.snapshot()
        assert second.memory_bytes - first.memory_bytes == 4096
        assert (first.mappings, second.mappings) == (1, 3)
        flat_one = second.flatten()
        assert (flat_one.mappings, flat_one.memory_bytes) == (1, 8 << 20)
        with second.fork() as fork, flat_one.fork() as other:
            assert fork.memory.read(0xFFFE, 10) == other.memory.read(0xFFFE, 10) == b"\1\1changed\1"


def test_reset_returns_the_number_of_pages() -> None:
    with Vmm(flat(SPIN, size_mib=8)) as vmm:
        vmm.memory.fill(0, 8 << 20, 1)
        snapshot = vmm.snapshot()
        assert vmm.reset(snapshot) == 0
        for page in (3, 4, 1000):
            vmm.memory.write(page * 4096 + 5, b"x")
        vmm.memory.write(7 * 4096, b"\1")  # written, and the same
        view = vmm.memory.view(2000 * 4096, 4096)
        view[17] = 9
        assert vmm.reset(snapshot) == 4
        assert view[17] == 1
        assert vmm.reset(snapshot) == 0
        assert vmm.memory.read(0, 8 << 20) == b"\1" * (8 << 20)


def test_many_resets_give_back_what_one_dirtied() -> None:
    with Vmm(flat(SPIN, size_mib=16)) as vmm:
        snapshot = vmm.snapshot()
        vmm.memory.fill(0, 16 << 20, 1)
        assert vmm.reset(snapshot) >= 4096 - 1
        for number in range(20):
            vmm.memory.write(0, bytes([number + 1]))
            assert vmm.reset(snapshot) == 1
        assert vmm.memory.read(0, 16 << 20) == snapshot.fork().memory.read(0, 16 << 20)


def test_reset_goes_to_any_snapshot_of_such_a_machine() -> None:
    with oracle(1) as vmm, oracle(2) as other:
        vmm.run(0.01)
        ours, theirs = vmm.snapshot(), other.snapshot()
        vmm.run(0.01)
        later = vmm.snapshot()
        for snapshot, nonce in ((ours, 1), (theirs, 2), (later, 1), (ours, 1)):
            vmm.reset(snapshot)
            assert finish(vmm) == counted(nonce)


def test_reset_of_a_running_machine_goes_on_from_there() -> None:
    with oracle() as vmm:
        snapshot = vmm.snapshot()
        vmm.start()
        for _ in range(5):
            try:
                vmm.reset(snapshot)
            except StateError:  # it was faster
                break
        assert vmm.wait(DEADLINE_S) is not None


def test_reset_refuses_a_machine_of_another_shape_and_changes_nothing() -> None:
    with oracle() as vmm, Vmm(flat(ORACLE, "user64", address=0x10000, size_mib=4)) as larger:
        snapshot = vmm.snapshot()
        with pytest.raises(StateError, match="memory slots"):
            larger.reset(snapshot)
        with oracle(cpu=CpuConfig(vcpus=2)) as two, pytest.raises(StateError, match="vcpus 2, the snapshot 1"):
            two.reset(snapshot)
        with oracle(exit_port=None) as portless, pytest.raises(StateError, match="exit_port"):
            portless.reset(snapshot)
        vmm.close()
        with pytest.raises(StateError, match="closed"):
            vmm.reset(snapshot)
        with pytest.raises(StateError, match="closed"):
            vmm.snapshot()
        assert larger.memory.size == 4 << 20


def test_reset_refuses_devices_that_are_missing_and_changes_nothing() -> None:
    class Stateless:
        def read(self, offset: int, size: int) -> int:
            return 0

    with oracle() as vmm, oracle() as other:
        vmm.add_pio_device(0x80, 1, Tape(b""))
        snapshot = vmm.snapshot()
        other.memory.write(RAM_AT, b"mine")
        with pytest.raises(StateError, match="pio 0x80: the snapshot has a device there"):
            other.reset(snapshot)
        other.add_pio_device(0x80, 1, Stateless())
        with pytest.raises(StateError, match=r"has no restore\(\)"):
            other.reset(snapshot)
        assert (other.state, other.memory.read(RAM_AT, 4)) == (VmRunState.CREATED, b"mine")


def test_reset_to_another_cpuid_is_refused_once_the_guest_has_run() -> None:
    def machine(*hide: str) -> Vmm:
        return Vmm(flat(exit_with(9), "long64", address=0x10000, cpu=CpuConfig(hide=hide)))

    with machine("cx16") as vmm, machine() as fresh, machine() as other:
        snapshot = vmm.snapshot()
        cpuid = [part for part in snapshot.state if part[0] == "cpuid"]
        fresh.reset(snapshot)
        assert [part for part in fresh.snapshot().state if part[0] == "cpuid"] == cpuid
        assert fresh.run(DEADLINE_S).code == 9
        fresh.reset(snapshot)
        assert other.run(DEADLINE_S).code == 9
        other.memory.write(RAM_AT, b"mine")
        with pytest.raises(StateError, match=r"another CPUID.*fork"):
            other.reset(snapshot)
        assert (other.state, other.memory.read(RAM_AT, 4)) == (VmRunState.EXITING, b"mine")


def test_two_vcpus_go_on_together() -> None:
    with Vmm(flat(count_vcpus(2), "user64", address=0x10000, cpu=CpuConfig(vcpus=2))) as vmm:
        snapshot = vmm.snapshot()
        for machine in (vmm, *(snapshot.fork() for _ in range(3))):
            assert machine.run(DEADLINE_S).code == 2
            machine.close()


# Two vCPUs, 64 bits, ring 3: each counts to 100 million in a register and in memory of its own, and
# then both meet at 0x6000; the second to come there ends the machine.
TWO_COUNT = (
    b"\xb9\x00\xe1\xf5\x05"  #  mov ecx, 100000000
    b"\x89\xfe\xc1\xe6\x0c"  #  mov esi, edi; shl esi, 12
    # back:
    b"\xff\x86\x00\x70\x00\x00"  #  inc dword [rsi + 0x7000]
    b"\xff\xc9\x75\xf6"  #      dec ecx; jnz back
    b"\xb8\x01\x00\x00\x00"  #  mov eax, 1
    b"\xf0\x0f\xc1\x04\x25\x00\x60\x00\x00"  #  lock xadd [0x6000], eax
    b"\xff\xc8\x75\x04" + exit_with(3) + b"\xf3\x90\xeb\xfc"  #      dec eax; jnz wait
)


def test_two_vcpus_interrupted_count_to_the_same_end() -> None:
    config = flat(TWO_COUNT, "user64", address=0x10000, cpu=CpuConfig(vcpus=2))
    with Vmm(config) as vmm:
        vmm.start()
        snapshots = while_it_runs(vmm, 5)
        assert vmm.wait(DEADLINE_S) is not None
        for snapshot in snapshots:
            with snapshot.fork() as fork:
                assert fork.run(DEADLINE_S).code == 3
                assert [fork.memory.read(at, 4) for at in (0x7000, 0x8000)] == [struct.pack("<I", 100_000_000)] * 2


# Real mode with an interrupt controller: IRQ 4 at vector 0x24, whose handler sends back what the
# serial port received. It says "r", waits with interrupts off until the host sets [0x2000], and
# then takes what is pending.
INTERRUPTED = (
    b"\xfa"  #                                          cli
    b"\xb0\x11\xe6\x20\xb0\x20\xe6\x21\xb0\x04\xe6\x21\xb0\x01\xe6\x21"  # the PIC: vectors from 0x20
    b"\xb0\xef\xe6\x21"  #                              all masked but IRQ 4
    b"\xc7\x06\x90\x00\x00\x11\xc7\x06\x92\x00\x00\x00"  # [0x90] = 0:0x1100
    b"\xba\xf9\x03\xb0\x01\xee"  #                      mov dx, 0x3f9; mov al, 1; out dx, al
    b"\xba\xf8\x03\xb0\x72\xee"  #                      print 'r'
    b"\x80\x3e\x00\x20\x00\x74\xf9"  #                  wait: cmp byte [0x2000], 0; je wait
    b"\xfb\xf4" + exit_with(5)  #                                      sti; hlt
).ljust(0x100, b"\x90") + b"\xba\xf8\x03\xec\xee\xb0\x20\xe6\x20\xcf"  # in al, dx; out dx, al; EOI; iret


def test_interrupt_that_is_pending_arrives_in_every_fork() -> None:
    seen = threading.Event()

    def look(piece: bytes) -> None:
        if b"r" in piece:
            vmm.serial.send(b"x")
            vmm.stop()
            seen.set()

    with Vmm(flat(INTERRUPTED, irqchip=True, pit=False, serial=SerialConfig(output=look))) as vmm:
        assert vmm.run(DEADLINE_S).reason is ExitReason.STOPPED
        assert seen.is_set()
        snapshot = vmm.snapshot()
        for _ in range(3):
            with snapshot.fork() as fork:
                fork.memory.write(0x2000, b"\1")
                assert fork.run(DEADLINE_S).code == 5
                assert fork.serial.take_output() == b"x"


def test_state_of_a_fork_is_that_of_its_snapshot() -> None:
    """Nothing but time tells them apart: the clock, the TSC, and what the PIT and the LAPIC count down."""
    for config in (
        flat(SPIN),
        flat(SPIN, irqchip=True),
        flat(ORACLE, "user64", address=0x10000, cpu=CpuConfig(vcpus=2)),
    ):
        with Vmm(config) as vmm:
            vmm.run(0.01)
            first = vmm.snapshot()
            with first.fork() as fork:
                second = fork.snapshot()
            timeless = {"clock", "pit", "lapic", "msrs"}
            assert [r for r in first.state if r[0] not in timeless] == [r for r in second.state if r[0] not in timeless]
            assert msrs_without_time(first) == msrs_without_time(second)


def msrs_without_time(snapshot: Snapshot) -> list[dict[int, int]]:
    tables = [dict(struct.iter_unpack("<IQ", data)) for kind, _, data in snapshot.state if kind == "msrs"]
    assert all(0x10 in table for table in tables)
    # The time stamp counter, and Hyper-V's run time and reference time, which some KVMs list.
    times = {0x10, 0x4000_0010, 0x4000_0020}
    return [{index: value for index, value in table.items() if index not in times} for table in tables]


def test_registers_of_every_class_come_back() -> None:
    with Vmm(flat(SPIN, "user64", address=0x10000)) as vmm:
        vcpu = vmm.vcpus[0]
        vcpu.regs.r15 = 0x1122_3344_5566_7788
        vcpu.debugregs.db0 = 0x4444
        vcpu.msrs[0xC000_0102] = 0x5555
        vcpu.sregs.cr2 = 0x6666
        snapshot = vmm.snapshot()
        with snapshot.fork() as fork:
            for machine in (fork, vmm):
                if machine is vmm:
                    vcpu.regs.r15 = vcpu.debugregs.db0 = vcpu.msrs[0xC000_0102] = vcpu.sregs.cr2 = 0
                    vmm.reset(snapshot)
                other = machine.vcpus[0]
                assert other.regs.r15 == 0x1122_3344_5566_7788
                assert other.debugregs.db0 == 0x4444
                assert other.msrs[0xC000_0102] == 0x5555
                assert other.sregs.cr2 == 0x6666


def test_forks_have_their_own_consoles_loops_and_memory() -> None:
    code = print_text(b"hello ") + b"\xba\xf8\x03\xa0\x00\x20\xee" + exit_with(9)  # mov al, [0x2000]; out dx, al
    manager, texts = EventManager(), [bytearray() for _ in range(3)]
    with Vmm(flat(code)) as vmm:
        snapshot = vmm.snapshot()
        for number, text in enumerate(texts):
            serial, shared = SerialConfig(output=text.extend), manager if number else None
            with snapshot.fork(serial=serial, event_manager=shared) as fork:
                fork.memory.write(0x2000, b"%d" % number)
                assert fork.run(DEADLINE_S).code == 9
                assert fork.config.serial.output is not None
        assert texts == [b"hello 0", b"hello 1", b"hello 2"]
        assert vmm.memory.read(0x2000, 1) == b"\0"
        with pytest.raises(ConfigError, match="serial"):
            snapshot.fork(serial="console")  # type: ignore[arg-type]


def test_entropy_is_written_before_a_fork_runs() -> None:
    with oracle() as vmm:
        snapshot = vmm.snapshot()
    by_place = [snapshot.fork(entropy=(NONCE_AT, 4)) for _ in range(2)]
    by_call = snapshot.fork(entropy=lambda fork: fork.memory.write(NONCE_AT, struct.pack("<I", 77)))
    nonces = [int.from_bytes(fork.memory.read(NONCE_AT, 4), "little") for fork in (*by_place, by_call)]
    assert len(set(nonces)) == 3
    for fork, nonce in zip((*by_place, by_call), nonces, strict=True):
        with fork:
            assert finish(fork) == counted(nonce)


def test_many_forks_are_made_in_parallel_or_not_at_all() -> None:
    with oracle() as vmm:
        vmm.run(0.01)
        snapshot = vmm.snapshot()
    forks = snapshot.fork_many(20, lambda number: {"entropy": lambda fork: fork.memory.write(0x6000, bytes([number]))})
    for number, fork in enumerate(forks):
        with fork:
            assert fork.memory.read(0x6000, 1) == bytes([number])
            assert finish(fork) == counted(0x1234_5678)

    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError):
        snapshot.fork_many(5, lambda number: {"entropy": lambda _fork: 1 // (number - 3)})
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_shared_with_others_is_refused_and_named() -> None:
    with Vmm(flat(SPIN)) as vmm:
        fd = os.memfd_create("shared")
        os.ftruncate(fd, 4096)
        slot = vmm.memory.add(0x200000, source=fd)
        with pytest.raises(StateError, match="0x200000"):
            vmm.snapshot()
        vmm.memory.remove(slot)
        vmm.snapshot()
        os.close(fd)


def test_added_memory_is_in_the_snapshot() -> None:
    with Vmm(flat(SPIN)) as vmm:
        vmm.memory.add(0x800000, 0x10000)
        vmm.memory.write(0x800100, b"added")
        snapshot = vmm.snapshot()
        vmm.memory.write(0x800100, b"later")
        with snapshot.fork() as fork:
            assert fork.memory.read(0x800100, 5) == b"added"
        vmm.reset(snapshot)
        assert vmm.memory.read(0x800100, 5) == b"added"


def test_dirty_log_sees_what_a_reset_writes() -> None:
    with Vmm(flat(SPIN)) as vmm:
        snapshot = vmm.snapshot()
        vmm.memory.write(0x3000, b"x")
        vmm.memory.log_dirty = True
        vmm.reset(snapshot)
        assert vmm.memory.take_dirty().ranges == [(0x3000, 4096)]


@pytest.fixture
def halted() -> Iterator[Vmm]:
    with Vmm(flat(HALT)) as vmm:
        yield vmm


def test_halt_is_left_behind(halted: Vmm) -> None:
    assert halted.run(DEADLINE_S).reason is ExitReason.HALT
    with halted.snapshot().fork() as fork:
        assert fork.vcpus[0].regs.rip == 0x1001


def test_snapshot_from_a_callback_of_the_running_machine() -> None:
    snapshots: list[Snapshot] = []

    def look(piece: bytes) -> None:
        if not snapshots:
            snapshots.append(vmm.snapshot())

    with oracle(5, serial=SerialConfig(output=look)) as vmm:
        assert vmm.run(DEADLINE_S).code == 9
    with snapshots[0].fork() as fork:
        assert counted(5).endswith(finish(fork))


class Tape:
    """A device that gives its bytes one after the other."""

    def __init__(self, tape: bytes) -> None:
        self.tape = tape
        self.at = 0

    def read(self, offset: int, size: int) -> int:
        self.at += 1
        return self.tape[self.at - 1]

    def save(self) -> bytes:
        return struct.pack("<I", self.at)

    def restore(self, state: bytes) -> None:
        (self.at,) = struct.unpack("<I", state)


# Prints what port 0x80 gives, four times, and stops in between.
READS_TAPE = b"".join(b"\xba\x80\x00\xec\xba\xf8\x03\xee" for _ in range(4)) + exit_with(1)


def test_python_devices_are_saved_and_restored() -> None:
    with Vmm(flat(READS_TAPE)) as vmm:
        tape = Tape(b"abcd")
        vmm.add_pio_device(0x80, 1, tape)
        tape.at = 2
        snapshot = vmm.snapshot()
        vmm.vcpus[0].regs.rip += 16  # two letters have been printed elsewhere
        later = vmm.snapshot()
        assert (vmm.run(DEADLINE_S).code, vmm.serial.take_output()) == (1, b"cd")
        vmm.reset(later)
        assert (tape.at, vmm.run(DEADLINE_S).code, vmm.serial.take_output()) == (2, 1, b"cd")
        with pytest.raises(StateError, match=r"pio 0x80: .*setup"):
            snapshot.fork()
        with later.fork(setup=lambda fork: fork.add_pio_device(0x80, 1, Tape(b"abCD"))) as fork:
            assert (fork.run(DEADLINE_S).code, fork.serial.take_output()) == (1, b"CD")


def test_python_device_that_cannot_be_saved_is_named() -> None:
    class Stateless:
        def read(self, offset: int, size: int) -> int:
            return 0

    class Failing(Tape):
        def save(self) -> bytes:
            raise ZeroDivisionError

    with Vmm(flat(SPIN)) as vmm:
        vmm.add_pio_device(0x80, 1, Stateless())
        with pytest.raises(StateError, match=r"pio 0x80: the .*Stateless there has no save\(\)"):
            vmm.snapshot()
        vmm.remove_pio_device(0x80)
        vmm.add_pio_device(0x80, 1, Failing(b""))
        with pytest.raises(ZeroDivisionError):
            vmm.snapshot()
        vmm.remove_pio_device(0x80)
        vmm.snapshot()


def test_snapshot_from_a_devices_own_callback_is_refused_and_from_another_thread_waits() -> None:
    class Asks(Tape):
        def read(self, offset: int, size: int) -> int:
            if not entered.is_set():
                with pytest.raises(StateError, match="not answered yet"):
                    vmm.snapshot()
                entered.set()
                assert go.wait(DEADLINE_S)
            return super().read(offset, size)

    entered, go = threading.Event(), threading.Event()
    snapshots: list[Snapshot] = []
    with Vmm(flat(READS_TAPE)) as vmm:
        vmm.add_pio_device(0x80, 1, Asks(b"abcd"))
        vmm.start()
        assert entered.wait(DEADLINE_S)
        other = threading.Thread(target=lambda: snapshots.append(vmm.snapshot()))
        other.start()
        # While the machine is held for the snapshot, its vCPU can be looked into.
        is_held = False
        while not is_held:
            with contextlib.suppress(StateError):
                is_held = vmm.vcpus[0].regs.rip > 0
        go.set()
        other.join()
        exit = vmm.wait(DEADLINE_S)
        assert exit is not None
        assert (exit.code, vmm.serial.take_output()) == (1, b"abcd")
    with snapshots[0].fork(setup=lambda fork: fork.add_pio_device(0x80, 1, Tape(b"abcd"))) as fork:
        assert (fork.run(DEADLINE_S).code, fork.serial.take_output()) == (1, b"abcd")


# 64 bits, ring 3: takes YMM3 and YMM4 from 0x7000, sets [0x3000], waits until the host sets
# [0x2000], and leaves both at 0x6000.
HOLDS_YMM = (
    b"\xc5\xfe\x6f\x1c\x25\x00\x70\x00\x00"  #         vmovdqu ymm3, [0x7000]
    b"\xc5\xfe\x6f\x24\x25\x20\x70\x00\x00"  #         vmovdqu ymm4, [0x7020]
    b"\xc6\x04\x25\x00\x30\x00\x00\x01"  #             mov byte [0x3000], 1
    b"\x80\x3c\x25\x00\x20\x00\x00\x00\x74\xf6"  # back: cmp byte [0x2000], 0; je back
    b"\xc5\xfe\x7f\x1c\x25\x00\x60\x00\x00"  #         vmovdqu [0x6000], ymm3
    b"\xc5\xfe\x7f\x24\x25\x20\x60\x00\x00"  #         vmovdqu [0x6020], ymm4
) + exit_with(4)  # fmt: skip


def test_avx_registers_go_on() -> None:
    nonce = os.urandom(64)
    with Vmm(flat(HOLDS_YMM, "user64", address=0x10000, size_mib=2, cpu=CpuConfig(template="host"))) as vmm:
        vcpu = vmm.vcpus[0]
        vmm.memory.write(0x7000, nonce)
        try:
            vcpu.sregs.cr4 |= 1 << 18  # OSXSAVE
            vcpu.xcrs.xcr0 = 7
        except VmmError as error:
            pytest.skip(f"no AVX for guests here: {error}")
        while not vmm.memory.read_u8(0x3000):
            vmm.run(0.02)
            if vmm.state is VmRunState.EXITING:
                pytest.skip("no AVX for guests here")
        snapshot = vmm.snapshot()
        for machine in (snapshot.fork(), snapshot.fork(), vmm):
            if machine is vmm:
                vmm.reset(snapshot)
            machine.memory.write(0x7000, bytes(64))  # one that started again would hold this
            machine.memory.write(0x2000, b"\1")
            assert machine.run(DEADLINE_S).code == 4
            assert machine.memory.read(0x6000, 64) == nonce
            machine.close()

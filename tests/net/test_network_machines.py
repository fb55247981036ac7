"""Machines on a network inside the process, and copies of both at one instant.

Covers src/vmm/together.rs and src/py/network_snapshot.rs.
"""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from guests import SPIN, flat
from pyvmm import ConfigError, Net, Network, PythonNet, StateError, Vmm, VmRunState
from virtio_driver import BUFFERS, Buffer, Driver, machine

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm


def test_only_machines_of_the_network_are_captured_with_it() -> None:
    net = Network()
    with Vmm(flat(SPIN)) as vmm:
        with pytest.raises(StateError, match="not connected to this network"):
            net.snapshot([vmm])
        with pytest.raises(ValueError, match="each once"):
            net.snapshot([vmm, vmm])
        with pytest.raises(ValueError, match="one or more machines"):
            net.snapshot([])


PAYLOAD = 64


class Station:
    """A flat guest on a network, and the driver of its device."""

    def __init__(self, vmm: Vmm, number: int, driver: Driver | None = None) -> None:
        self.vmm, self.number = vmm, number
        self.driver = driver or Driver(vmm)
        if driver is None:
            assert self.driver.start(queues=2) == 15

    def send(self, to: int, counter: int) -> None:
        frame = bytes([2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, self.number, 0x88, 0xB5]) + counter.to_bytes(PAYLOAD, "little")
        self.vmm.memory.write(BUFFERS, bytes(12) + frame)
        self.driver.exchange(1, Buffer(BUFFERS, 12 + len(frame), writable=False))

    def receive(self) -> int:
        length = self.driver.exchange(0, Buffer(BUFFERS + 0x1000, 2048, writable=True))
        return self.counter(length)

    def counter(self, length: int) -> int:
        assert length == 12 + 14 + PAYLOAD
        return int.from_bytes(self.vmm.memory.read(BUFFERS + 0x1000 + 26, PAYLOAD), "little")

    def fork(self, vmm: Vmm) -> Station:
        return Station(vmm, self.number, self.driver.fork(vmm))


@contextmanager
def two_stations(net: Network) -> Iterator[tuple[Station, Station]]:
    with Vmm(machine(nets=[Net(net.port("a"))])) as one, Vmm(machine(nets=[Net(net)])) as other:
        a, b = Station(one, 1), Station(other, 2)
        # Both addresses are known from now on.
        a.send(0xFF, 0)
        assert b.receive() == 0
        b.send(1, 0)
        assert a.receive() == 0
        yield a, b


def test_two_machines_exchange_frames_and_a_partition_is_made_and_healed() -> None:
    net = Network(seed=1)
    with two_stations(net) as (a, b):
        assert len(net.ports) == 2
        ports = net.ports
        tap = net.port("tap")
        for counter in range(5):
            a.send(2, counter)
            assert b.receive() == counter
        net.partition([ports[0]], [ports[1]])
        a.send(2, 100)
        net.heal()
        a.send(2, 101)
        assert b.receive() == 101
        assert ports[1].stats.partitioned == 1
        # A program takes part.
        tap.send(bytes([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 9, 0x88, 0xB5]) + (7).to_bytes(PAYLOAD, "little"))
        assert b.receive() == 7
        b.send(9, 8)
        assert tap.receive(60)[14] == 8
        with pytest.raises(StateError, match="a machine uses the port"):
            ports[0].receive(timeout=0)
        with pytest.raises(StateError, match="another machine uses the port"):
            Vmm(machine(nets=[Net(ports[0])]))


def test_copies_of_a_network_have_the_frames_on_their_way_once() -> None:
    net = Network(seed=1)
    with two_stations(net) as (a, b):
        net.set_link(*net.ports, delay=0.2)
        for counter in range(1, 9):
            a.send(2, counter)
            b.send(1, 100 + counter)
        snapshot = net.snapshot([a.vmm, b.vmm])
        pairs = [(a, b)]
        forks = [snapshot.fork() for _ in range(2)]
        for fork in forks:
            pairs.append((a.fork(fork.machines[0]), b.fork(fork.machines[1])))
            assert [port.name for port in fork.ports] == ["a", "port1"]
            assert fork.network.link(*fork.ports).delay == 0.2
        for one, other in reversed(pairs):
            assert [other.receive() for _ in range(8)] == list(range(1, 9))
            assert [one.receive() for _ in range(8)] == list(range(101, 109))
            one.send(2, 9)
            assert other.receive() == 9
        for network in (net, *(fork.network for fork in forks)):
            stats = [port.stats for port in network.ports]
            assert [s.received for s in stats] == [9, 10]
            assert [s.queued + s.overflowed + s.discarded for s in stats] == [0, 0]
        for fork in forks:
            for vmm in fork.machines:
                vmm.close()


def test_a_copy_has_the_devices_that_it_is_given_and_no_unknown_ones() -> None:
    net = Network(seed=1)
    with two_stations(net) as (a, b):
        snapshot = net.snapshot([a.vmm, b.vmm])
        own = PythonNet()
        fork = snapshot.fork(lambda number: {"virtio": {"net0": Net(own)} if number == 0 else None})
        with fork.machines[0] as one, fork.machines[1]:
            a.fork(one).send(2, 7)
            assert own.receive()[0][:6] == bytes([2, 0, 0, 0, 0, 2])
            assert [port.stats.sent for port in fork.ports] == [port.stats.sent for port in net.ports]
        with pytest.raises(ConfigError, match="it has net0") as refused:
            snapshot.fork(lambda _: {"virtio": {"net1": Net(PythonNet())}})
        assert refused.value.at == 'virtio["net1"]'


def test_running_machines_are_captured_while_a_frame_is_on_its_way() -> None:
    net = Network(seed=1)
    with two_stations(net) as (a, b):
        net.set_link(*net.ports, delay=2.0)
        a.send(2, 42)
        with ThreadPoolExecutor() as pool:
            received = pool.submit(b.receive)
            while b.vmm.state is not VmRunState.RUNNING:
                assert not received.done()
            snapshot = net.snapshot([a.vmm, b.vmm], timeout=60)
            assert received.result(60) == 42
        fork = snapshot.fork()
        with fork.machines[0], fork.machines[1] as vmm:
            copy = Station(vmm, 2, Driver(vmm))
            vmm.run_until(b"!", timeout=60)
            assert copy.counter(12 + 14 + PAYLOAD) == 42
            assert fork.ports[1].stats.received == 2


# Waits for a frame with the expected counter, answers with the next one, and so on up to a limit.
GAME = 0x3000
PLAYER = (
    "bb{notify} bf{received} be{sent} bd{expected} b9{limit}"  # load ebx, edi, esi, ebp, ecx
    "66393d02080100 74f7"  #                        next: cmp [used of 0], di; je next
    "47 a11a101000 39e8 7535"  #                    inc edi; mov eax, [frame]; cmp eax, ebp; jne bad
    "83c502 40 a31a201000"  #                       add ebp, 2; inc eax; mov [answer], eax
    "66ff0502040100 c70300000000"  #                inc word [available of 0]; notify
    "66ff0502140100 c70301000000"  #                inc word [available of 1]; notify
    "46 66393502180100 75f7"  #                     inc esi; sent: cmp [used of 1], si; jne sent
    "39cd 72bc 31c0 eb02"  #                        cmp ebp, ecx; jb next; xor eax, eax; jmp end
    "b001 e6f4 ebfc"  #                             bad: mov al, 1; end: out 0xf4, al; jmp end
)


def prepare(player: Station, other: int, expected: int, limit: int) -> None:
    """Let a guest play when it continues. The chain for the next frame is available already."""
    driver, memory = player.driver, player.vmm.memory
    driver.add(0, [Buffer(BUFFERS + 0x1000, 2048, writable=True)])
    driver.write(0x50, 0)
    header = bytes([2, 0, 0, 0, 0, other, 2, 0, 0, 0, 0, player.number, 0x88, 0xB5])
    memory.write(BUFFERS + 0x2000, bytes(12) + header + bytes(PAYLOAD))
    answer = struct.pack("<QIHH", BUFFERS + 0x2000, 12 + 14 + PAYLOAD, 0, 0)
    memory.write(driver.rings[1].descriptors, answer)
    numbers = {"notify": driver.base + 0x50, "received": driver.rings[0].taken, "sent": driver.rings[1].taken}
    numbers |= {"expected": expected, "limit": limit}
    code = PLAYER.format(**{name: number.to_bytes(4, "little").hex() for name, number in numbers.items()})
    memory.write(GAME, bytes.fromhex(code))
    # The driver's loop continues here.
    memory.write(0x1005, b"\xe9" + struct.pack("<i", GAME - 0x100A))


def finish(*machines: Vmm) -> list[int | None]:
    with ThreadPoolExecutor() as pool:
        return [exit.code for exit in pool.map(lambda vmm: vmm.run(timeout=120), machines)]


def test_guests_that_answer_each_other_continue_in_every_copy_without_a_frame_lost_or_twice() -> None:
    net = Network(seed=1)
    with two_stations(net) as (a, b):
        # The first counter is on its way before the game begins.
        b.send(1, 0)
        prepare(a, other=2, expected=0, limit=80)
        prepare(b, other=1, expected=1, limit=80)
        net.set_link(*net.ports, delay=0.0005, jitter=0.0005)
        with ThreadPoolExecutor() as pool:
            original = pool.submit(finish, a.vmm, b.vmm)
            snapshots = []
            for sent in (2, 9, 17, 26, 34):
                while net.ports[0].stats.sent < sent and not original.done():
                    pass
                snapshots.append(net.snapshot([a.vmm, b.vmm], timeout=60))
            assert original.result(120) == [0, 0]
        for snapshot in snapshots:
            fork = snapshot.fork()
            with fork.machines[0], fork.machines[1]:
                assert finish(*fork.machines) == [0, 0]
                sums = [port.stats for port in fork.ports]
                assert sum(s.lost + s.overflowed + s.discarded + s.partitioned for s in sums) == 0

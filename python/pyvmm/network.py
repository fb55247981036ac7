"""What `Network` and its ports return, and the copies of a network with its machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyvmm._pyvmm import Network, NetworkPort, Snapshot, Vmm
    from pyvmm.snapshots import Entropy


class LinkConditions(NamedTuple):
    """What a link does to the frames that pass it.

    Attributes:
        delay: how many seconds a frame takes.
        jitter: by how many seconds the delay varies, in both directions.
        loss: the probability that a frame is lost.
        duplicate: the probability that a frame arrives twice.
        reorder: the probability that the next frame overtakes a frame.
        bandwidth: bits per second; 0 means no limit.
        backlog: how many seconds a frame may wait for bandwidth before it is dropped.
    """

    delay: float
    jitter: float
    loss: float
    duplicate: float
    reorder: float
    bandwidth: int
    backlog: float


class PortStats(NamedTuple):
    """What has become of the frames of a port.

    Of the frames that it has sent, each is counted once: `sent` is the sum of `sent_lost`,
    `sent_over_bandwidth`, `sent_malformed`, `sent_unclaimed` and `sent_forwarded`. Of the frames to
    it, `addressed` and `duplicated` together are the sum of `received`, `queued`, `lost`,
    `over_bandwidth`, `partitioned`, `overflowed` and `discarded`.

    Attributes:
        sent: frames that the port has sent.
        sent_bytes: their bytes.
        sent_lost: lost by the `loss` of the port.
        sent_over_bandwidth: would have waited too long for the bandwidth of the port.
        sent_malformed: too short or too long.
        sent_unclaimed: for no other port.
        sent_forwarded: went to one other port, or to several.
        addressed: frames to the port, and those to all.
        duplicated: copies that were added on the way.
        received: taken by the machine or the program.
        received_bytes: their bytes.
        reordered: how many of them the next one was to overtake.
        lost: lost on the way.
        over_bandwidth: would have waited too long for bandwidth.
        partitioned: came from the other side of a partition.
        overflowed: dropped because the port's queue was full.
        discarded: dropped because the machine of the port was closed or reset.
        queued: on the way, or arrived and not taken yet.
    """

    sent: int
    sent_bytes: int
    sent_lost: int
    sent_over_bandwidth: int
    sent_malformed: int
    sent_unclaimed: int
    sent_forwarded: int
    addressed: int
    duplicated: int
    received: int
    received_bytes: int
    reordered: int
    lost: int
    over_bandwidth: int
    partitioned: int
    overflowed: int
    discarded: int
    queued: int


class NetworkFork(NamedTuple):
    """A copy of a network, with copies of its machines.

    Attributes:
        network: the network.
        machines: the machines, in the order in which they were captured.
        ports: all ports, in the order in which the original's were made: those of the machines, and
            those that programs use.
    """

    network: Network
    machines: list[Vmm]
    ports: list[NetworkPort]


class NetworkSnapshot:
    """A network and machines of it at one instant: `Network.snapshot` makes it.

    Attributes:
        machines: the snapshot of each machine. A fork of one of them is not connected.
    """

    machines: list[Snapshot]

    def __init__(self, machines: list[Snapshot], frozen: Any, places: list[list[tuple[str, int]]]) -> None:
        self.machines = machines
        self._frozen = frozen
        self._places = places

    def fork(
        self, changes: Callable[[int], dict[str, Any]] | None = None, *, entropy: Entropy | None = None
    ) -> NetworkFork:
        """Create a new network, and a new machine for each that was captured, connected to it.

        The copies share nothing with the original and other copies. The network has the ports, the
        conditions and the partitions of the original, continues its decisions and counts, and has
        the frames that were on their way.

        Args:
            changes: called with the number of each machine, returns a dict of arguments for
                `Snapshot.fork`. A device that its `virtio` has is not connected to the network.
            entropy: as for `Snapshot.fork`, for the machines whose arguments do not include it.
        """
        network, numbered = self._frozen.thaw()
        ports: dict[int, NetworkPort] = dict(numbered)
        machines: list[Vmm] = []
        try:
            for number, snapshot in enumerate(self.machines):
                arguments = {"entropy": entropy, **(changes(number) if changes else {})}
                machine = snapshot.fork(**arguments)
                machines.append(machine)
                given = arguments.get("virtio") or {}
                for device, port in self._places[number]:
                    if device not in given:
                        network._connect(machine, device, ports[port])
        except BaseException:
            for machine in machines:
                machine.close()
            raise
        return NetworkFork(network, machines, list(ports.values()))


def snapshot(network: Network, machines: Iterable[Vmm], timeout: float | None) -> NetworkSnapshot:
    """Implement `Network.snapshot`."""
    all_machines = list(machines)
    if len({id(machine) for machine in all_machines}) != len(all_machines) or not all_machines:
        raise ValueError("machines: expected one or more machines, each once")
    return NetworkSnapshot(*network._capture(all_machines, timeout))

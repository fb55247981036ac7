"""A network inside the process, used by programs: where frames go, and what its links do.

Covers src/py/network.rs, src/py/network_port.rs, src/py/network_conditions.rs and
python/pyvmm/network.py.
"""

from __future__ import annotations

import asyncio
import gc
import select
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import (
    ClosedError,
    ConfigError,
    EventManager,
    Events,
    EventSet,
    LinkConditions,
    Network,
    PortStats,
    StreamError,
    WaitTimeoutError,
)

if TYPE_CHECKING:
    from pathlib import Path

    from pyvmm import EventOps, NetworkPort

BROADCAST = b"\xff" * 6
PERFECT = LinkConditions(0.0, 0.0, 0.0, 0.0, 0.0, 0, 1.0)


def mac(port: NetworkPort | int) -> bytes:
    return b"\x02\x00\x00\x00\x00" + bytes([port if isinstance(port, int) else int(port.name.removeprefix("port"))])


def frame(source: NetworkPort, to: NetworkPort | None, payload: bytes = b"") -> bytes:
    return (BROADCAST if to is None else mac(to)) + mac(source) + b"\x88\xb5" + payload


def drain(port: NetworkPort) -> list[bytes]:
    """The payloads of all frames that have arrived."""
    found = []
    while True:
        try:
            found.append(port.receive(timeout=0)[14:])
        except WaitTimeoutError:
            return found


def numbered(port: NetworkPort, to: NetworkPort, count: int) -> None:
    for number in range(count):
        port.send(frame(port, to, number.to_bytes(4, "little")))


def check_sums(port: NetworkPort) -> None:
    s = port.stats
    assert s.sent == s.sent_lost + s.sent_over_bandwidth + s.sent_malformed + s.sent_unclaimed + s.sent_forwarded
    ends = s.received + s.queued + s.lost + s.over_bandwidth + s.partitioned + s.overflowed + s.discarded
    assert s.addressed + s.duplicated == ends


def test_a_frame_goes_to_the_port_of_its_address_and_before_it_is_known_to_all() -> None:
    net = Network(seed=1)
    a, b, c = net.port(), net.port(), net.port()
    a.send(frame(a, b, b"first"))
    assert (b.receive(10)[14:], c.receive(10)[14:]) == (b"first", b"first")
    b.send(frame(b, a, b"answer"))
    a.send(frame(a, b, b"second"))
    a.send(frame(a, None, b"all"))
    assert (drain(a), drain(b), drain(c)) == ([b"answer"], [b"second", b"all"], [b"all"])
    assert (a.stats.sent, a.stats.sent_bytes, a.stats.received, a.stats.received_bytes) == (3, 19 + 20 + 17, 1, 20)
    assert isinstance(a.stats, PortStats)
    assert net.ports == [a, b, c]
    assert [port.name for port in net.ports] == ["port0", "port1", "port2"]
    assert a.network == net
    assert hash(net.ports[0]) == hash(a)
    assert repr(net) == "Network(seed=1, ports=3)"
    assert repr(a) == 'NetworkPort("port0")'


def test_a_port_of_which_nobody_knows_is_closed() -> None:
    net = Network()
    port = net.port("tap")
    assert net.ports == [port]
    del port
    gc.collect()
    assert net.ports == []
    with net.port("tap") as again:
        assert not again.closed
    assert again.closed
    assert repr(again) == "NetworkPort(closed)"


def test_conditions_add_up_and_change_only_where_they_are_given() -> None:
    net = Network()
    a, b = net.port(), net.port()
    assert a.conditions == (PERFECT, PERFECT)
    a.set("out", delay=0.5, loss=0.25)
    a.set("in", bandwidth=1_000_000, backlog=0.1)
    a.set(loss=0.125)
    out, into = a.conditions
    assert out == PERFECT._replace(delay=0.5, loss=0.125)
    assert into == PERFECT._replace(loss=0.125, bandwidth=1_000_000, backlog=0.1)
    net.set_link(a, b, jitter=0.001, one_way=True)
    net.set_link(a, b, reorder=0.5, duplicate=None)
    assert net.link(a, b) == PERFECT._replace(jitter=0.001, reorder=0.5)
    assert net.link(b, a) == PERFECT._replace(reorder=0.5)


def test_what_is_out_of_range_is_refused_and_changes_nothing() -> None:
    net = Network()
    a, b = net.port("a"), net.port("b")
    foreign = Network().port()
    for name, value in [("loss", 1.5), ("delay", -1.0), ("delay", float("nan")), ("jitter", 1e9), ("bandwidth", -1)]:
        with pytest.raises(ConfigError) as refused:
            a.set(**{name: value, "duplicate": 0.5})  # type: ignore[arg-type]
        assert refused.value.at == name
    assert a.conditions == (PERFECT, PERFECT)
    with pytest.raises(TypeError, match='a link has no "los", only delay, jitter'):
        a.set(los=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match='direction: "up" is not'):
        a.set("up", loss=0.1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match='has a port "a" already'):
        net.port("a")
    with pytest.raises(ConfigError, match="room for at least one frame"):
        net.port(queue=0)
    with pytest.raises(ConfigError, match="of another network"):
        net.partition([a], [foreign])
    with pytest.raises(ConfigError, match="two groups"):
        net.partition([a], [b, a])
    with pytest.raises(ConfigError, match="no link to itself"):
        net.set_link(a, a, loss=1.0)
    with pytest.raises(ValueError, match="at least two groups"):
        net.partition([a])
    with pytest.raises(TypeError, match="a group is a list of ports"):
        net.partition(a, b)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="13 bytes are no Ethernet frame"):
        a.send(bytes(13))
    with pytest.raises(ValueError, match="65554 bytes are no Ethernet frame"):
        a.send(bytes(65_554))
    a.send(bytearray(14))
    assert not net.is_partitioned(a, b)


def test_a_partition_cuts_both_ways_until_it_is_healed() -> None:
    net = Network()
    a, b, c = net.port(), net.port(), net.port()
    net.partition([a], [b])
    assert net.is_partitioned(a, b)
    assert net.is_partitioned(b, a)
    for port in (a, b, c):
        port.send(frame(port, None, port.name.encode()))
    assert [drain(port) for port in (a, b, c)] == [[b"port2"], [b"port2"], [b"port0", b"port1"]]
    assert (a.stats.partitioned, b.stats.partitioned, c.stats.partitioned) == (1, 1, 0)
    net.partition([a], [c])
    net.heal([b], [a])
    assert (net.is_partitioned(a, b), net.is_partitioned(a, c)) == (False, True)
    net.heal()
    a.send(frame(a, None, b"back"))
    assert [drain(port) for port in (b, c)] == [[b"back"], [b"back"]]


def test_frames_on_their_way_do_not_cross_a_new_partition() -> None:
    net = Network()
    a, b = net.port(), net.port()
    a.set(delay=3600.0)
    a.send(frame(a, b))
    assert b.stats.queued == 1
    net.partition([a], [b])
    assert (b.stats.queued, b.stats.partitioned) == (0, 1)


@given(
    seed=st.integers(0, 2**64 - 1),
    loss=st.floats(0, 1),
    duplicate=st.floats(0, 1),
    reorder=st.floats(0, 1),
)
def test_the_decisions_repeat_with_the_seed(seed: int, loss: float, duplicate: float, reorder: float) -> None:
    def run() -> list[bytes]:
        net = Network(seed=seed)
        a, b = net.port(), net.port()
        net.set_link(a, b, loss=loss, duplicate=duplicate)
        b.set("in", reorder=reorder)
        numbered(a, b, 40)
        # Ends the wait of a frame that was to be overtaken.
        b.set("in", reorder=0.0)
        net.set_link(a, b, loss=0.0, duplicate=0.0)
        numbered(a, b, 1)
        check_sums(b)
        return drain(b)

    assert run() == run()


def test_other_seeds_and_other_links_decide_otherwise() -> None:
    def lost(seed: int) -> tuple[frozenset[bytes], frozenset[bytes]]:
        net = Network(seed=seed)
        a, b, c = net.port(), net.port(), net.port()
        for port in (b, c):
            port.send(frame(port, None))
            port.set("in", loss=0.5)
        drain(b), drain(c)
        for number in range(100):
            a.send(frame(a, None, bytes([number])))
        return frozenset(drain(b)), frozenset(drain(c))

    assert len({*lost(1), *lost(2)}) == 4
    assert lost(1) == lost(1)


def test_a_lossy_link_loses_about_as_many_as_it_says_and_counts_them() -> None:
    net = Network(seed=5)
    a, b = net.port(), net.port()
    a.set("out", loss=0.25)
    b.set("in", loss=0.5, duplicate=0.5)
    numbered(a, b, 2000)
    assert 400 < a.stats.sent_lost < 600
    assert a.stats.sent_forwarded == b.stats.addressed
    assert b.stats.addressed * 4 // 10 < b.stats.lost < b.stats.addressed * 6 // 10
    found = drain(b)
    assert len(found) == b.stats.received
    assert set(Counter(found).values()) == {1, 2}
    check_sums(a)
    check_sums(b)


def test_reordered_frames_are_overtaken_by_one() -> None:
    net = Network(seed=3)
    a, b = net.port(), net.port()
    net.set_link(a, b, reorder=0.3)
    numbered(a, b, 200)
    net.set_link(a, b, reorder=0.0)
    a.send(frame(a, b, b"end"))
    order = [int.from_bytes(payload, "little") for payload in drain(b) if payload != b"end"]
    assert sorted(order) == list(range(200))
    assert order != sorted(order)
    assert all(abs(place - number) <= 1 for place, number in enumerate(order))
    assert b.stats.reordered > 20


def test_a_delayed_frame_arrives_later_and_jitter_keeps_the_order() -> None:
    net = Network(seed=1)
    a, b = net.port(), net.port()
    net.set_link(a, b, delay=0.02, jitter=0.02)
    numbered(a, b, 50)
    assert [int.from_bytes(b.receive(60)[14:], "little") for _ in range(50)] == list(range(50))


def test_a_queue_that_is_not_read_is_bounded() -> None:
    net = Network()
    a, b = net.port(), net.port(queue=10)
    numbered(a, b, 1000)
    assert (b.stats.queued, b.stats.overflowed) == (10, 990)
    assert len(drain(b)) == 10
    big = net.port()
    for _ in range(400):
        a.send(frame(a, big, bytes(65_000)))
    assert big.stats.queued * 65_014 <= 16 << 20
    assert big.stats.overflowed > 100


def test_a_bandwidth_drops_what_would_wait_too_long() -> None:
    net = Network()
    a, b = net.port(), net.port()
    # 125 bytes a frame, 1,000 bits: one a second.
    a.set("out", bandwidth=1000, backlog=5.0)
    for _ in range(20):
        a.send(frame(a, b, bytes(111)))
    assert b.stats.queued in {6, 7}, "a second may have passed"
    assert a.stats.sent_over_bandwidth == 20 - b.stats.queued


def test_ports_are_used_on_several_threads() -> None:
    net = Network()
    a, b = net.port(), net.port()
    a.set("out", delay=0.0001)

    def echo() -> None:
        for _ in range(300):
            b.send(frame(b, a, b.receive(60)[14:]))

    thread = threading.Thread(target=echo)
    thread.start()
    for number in range(300):
        a.send(frame(a, b, bytes([number & 255])))
        assert a.receive(60)[14:] == bytes([number & 255])
    thread.join()


def test_a_program_that_waits_notices_that_the_port_is_closed() -> None:
    port = Network().port()
    raised: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(ClosedError) as closed:
            port.receive()
        raised.append(closed.value)

    thread = threading.Thread(target=wait)
    thread.start()
    port.close()
    thread.join()
    assert raised
    for call in (lambda: port.send(bytes(14)), port.fileno, lambda: port.set(loss=0.0), lambda: port.stats):
        with pytest.raises(ClosedError, match="the port is closed"):
            call()


def test_an_event_loop_and_poll_watch_a_port() -> None:
    net = Network()
    a, b = net.port(), net.port()
    a.set(delay=0.001)
    poll = select.poll()
    poll.register(b.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    found: list[bytes] = []

    class Tap:
        def init(self, ops: EventOps) -> None:
            ops.add(Events(b, EventSet.IN))

        def process(self, events: Events, ops: EventOps) -> None:
            found.append(b.receive(timeout=0)[14:])

    manager = EventManager()
    manager.add_subscriber(Tap())
    numbered(a, b, 3)
    while len(found) < 3:
        manager.run_with_timeout(60_000)
    assert found == [bytes([number, 0, 0, 0]) for number in range(3)]
    assert poll.poll(0) == []


def test_frames_are_iterated_in_asyncio() -> None:
    async def main() -> list[bytes]:
        net = Network()
        a, b = net.port(), net.port()
        a.set(delay=0.001)
        numbered(a, b, 3)
        found = []
        async for received in b:
            found.append(received[14:15])
            if len(found) == 3:
                asyncio.get_running_loop().call_soon(b.close)
        return found

    assert asyncio.run(main()) == [b"\0", b"\1", b"\2"]


def records(path: Path) -> list[bytes]:
    """The frames of a pcap file."""
    data, found = path.read_bytes(), []
    assert data[:4] == b"\x4d\x3c\xb2\xa1", "nanoseconds, little-endian"
    at = 24
    while at < len(data):
        kept, length = (int.from_bytes(data[at + place : at + place + 4], "little") for place in (8, 12))
        assert kept == length
        found.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    return found


def test_a_capture_has_what_is_sent_and_that_of_a_port_what_it_takes(tmp_path: Path) -> None:
    net = Network()
    a, b = net.port(), net.port()
    net.capture(tmp_path / "all")
    b.capture(tmp_path / "b")
    a.send(frame(a, b, b"arrives"))
    net.partition([a], [b])
    a.send(frame(a, b, b"is cut"))
    b.send(frame(b, a, b"is cut too"))
    assert drain(b) == [b"arrives"]
    net.capture(None)
    b.send(frame(b, a))
    b.capture(None)
    b.send(frame(b, a))
    assert [found[14:] for found in records(tmp_path / "all")] == [b"arrives", b"is cut", b"is cut too"]
    assert [found[14:] for found in records(tmp_path / "b")] == [b"is cut too", b"arrives", b""]
    for capture in (net.capture, a.capture):
        with pytest.raises(StreamError, match="No such file"):
            capture(tmp_path / "missing" / "file")

"""Network devices of machines: their backends, frames of a flat guest's driver, captures, forks.

Covers src/py/net.rs, src/py/config_net.rs, src/py/frame_queue.rs, src/virtio/net.rs,
python/pyvmm/nets.py.
"""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from pyvmm import (
    ClosedError,
    ConfigError,
    DatagramSocket,
    FrameQueue,
    Net,
    NetDevice,
    Network,
    PythonNet,
    Snapshot,
    StreamError,
    StreamSocket,
    Tap,
    UserNet,
    UserNetwork,
    Vmm,
    VmmConfig,
)
from virtio_driver import BUFFERS, Driver, machine, readable, writable

if TYPE_CHECKING:
    from pathlib import Path

kvm = pytest.mark.kvm

HEADER = 12
FRAME = b"\xff" * 6 + b"\x02\0\0\0\0\x01" + b"\x88\xb5" + bytes(46)
RECEIVE, SEND = BUFFERS, BUFFERS + 0x4000


def started(vmm: Vmm) -> Driver:
    driver = Driver(vmm)
    assert driver.start(queues=2) == 15
    return driver


def send(driver: Driver, frame: bytes) -> None:
    driver.vmm.memory.write(SEND, bytes(HEADER) + frame)
    driver.exchange(1, readable(SEND, HEADER + len(frame)))


def receive(driver: Driver) -> bytes:
    length = driver.exchange(0, writable(RECEIVE, 2048))
    return bytes(driver.vmm.memory.read(RECEIVE + HEADER, length - HEADER))


@kvm
def test_python_takes_and_gives_frames() -> None:
    taken: list[bytes] = []
    net = PythonNet(taken.extend)
    with Vmm(machine(nets=[Net(net, mac="02:00:00:00:00:09", mtu=1400)])) as vmm:
        driver = started(vmm)
        send(driver, FRAME)
        assert net.send(FRAME[::-1])
        assert receive(driver) == FRAME[::-1]
        assert taken == [FRAME]
        (device,) = vmm.nets
        assert isinstance(device, NetDevice)
        assert device is vmm.nets[0]
        assert (device.name, device.mac, device.mtu, device.link) == ("net0", "02:00:00:00:00:09", 1400, True)
        assert (device.backend, device.failure) == ("Python", None)
        assert device.counts == {
            "received": 1,
            "received_bytes": 60,
            "receive_dropped": 0,
            "sent": 1,
            "sent_bytes": 60,
            "send_dropped": 0,
            "backend_dropped": 0,
        }
        assert repr(device) == "NetDevice(net0, Python, link up)"
        assert driver.read(0x100) == 2  # the first bytes of the address
    with pytest.raises(ClosedError):
        _ = device.link
    assert repr(device) == "NetDevice(unreachable)"


@kvm
def test_without_a_callable_frames_wait_for_receive() -> None:
    net = PythonNet(queue=2)
    with Vmm(machine(nets=[Net(net)])) as vmm:
        driver = started(vmm)
        for number in range(3):
            send(driver, FRAME + bytes([number]))
        assert [frame[-1] for frame in net.receive()] == [0, 1]
        assert net.receive() == []
        assert net.dropped == vmm.nets[0].counts["backend_dropped"] == 1
        assert net.fileno() >= 0


@kvm
def test_an_exception_of_the_callable_ends_the_run() -> None:
    def fail(frames: list[bytes]) -> None:
        raise RuntimeError(f"{len(frames)} frames")

    with Vmm(machine(nets=[Net(PythonNet(fail))])) as vmm:
        driver = started(vmm)
        with pytest.raises(RuntimeError, match="1 frames"):
            send(driver, FRAME)


@kvm
def test_sockets_carry_frames_as_qemu_frames_them(tmp_path: Path) -> None:
    stream, stream_peer = socket.socketpair()
    datagram, datagram_peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with stream_peer, datagram_peer:
        with Vmm(machine(nets=[Net(StreamSocket(stream))])) as vmm:
            stream.close()
            driver = started(vmm)
            send(driver, FRAME)
            assert stream_peer.recv(4096) == struct.pack(">I", 60) + FRAME
            stream_peer.sendall(struct.pack(">I", 61) + FRAME + b"x")
            assert receive(driver) == FRAME + b"x"
        with Vmm(machine(nets=[Net(DatagramSocket(datagram))])) as vmm:
            datagram.close()
            driver = started(vmm)
            send(driver, FRAME)
            assert datagram_peer.recv(4096) == FRAME
            datagram_peer.send(FRAME[::-1])
            assert receive(driver) == FRAME[::-1]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "net"))
        listener.listen()
        with Vmm(machine(nets=[Net(f"stream:{tmp_path}/net")])) as vmm:
            driver = started(vmm)
            send(driver, FRAME)
            peer, _ = listener.accept()
            assert peer.recv(4096)[4:] == FRAME
            peer.close()
            # The guest runs the loop, which finds the end.
            send(driver, FRAME)
            device = vmm.nets[0]
            assert not device.link
            assert "stream" in (device.failure or "")
            assert vmm.virtio[0].failure == device.failure
            device.connect(replacement := PythonNet())
            send(driver, FRAME)
            assert replacement.receive() == [FRAME]
            assert device.link


@kvm
def test_machines_meet_in_a_network() -> None:
    network = Network(seed=1)
    with Vmm(machine(nets=[Net(network)])) as one, Vmm(machine(nets=[Net(network.port("other"))])) as other:
        drivers = [started(one), started(other)]
        assert one.nets[0].mac != other.nets[0].mac
        send(drivers[0], FRAME)
        assert receive(drivers[1]) == FRAME
        assert other.nets[0].backend == "network port other"
        assert getattr(other.nets[0].network, "name", None) == "other"


ARP = bytes.fromhex("0001080006040001") + b"\x02\0\0\0\0\x01" + bytes([10, 0, 2, 15]) + bytes(6) + bytes([10, 0, 2, 2])


@kvm
def test_a_user_network_answers_the_guest_and_forks_have_their_own() -> None:
    with Vmm(machine(nets=[Net(UserNet(forward=[(0, 22)]))])) as vmm:
        driver = started(vmm)
        send(driver, FRAME[:12] + b"\x08\x06" + ARP)
        assert receive(driver)[12:22] == b"\x08\x06" + ARP[:7] + b"\x02"
        network = vmm.nets[0].network
        assert isinstance(network, UserNetwork)
        with vmm.snapshot().fork() as fork:
            assert fork.nets[0].link
            another = fork.nets[0].network
            assert isinstance(another, UserNetwork)
            assert another.forwards != network.forwards
            own = driver.fork(fork)
            send(own, FRAME[:12] + b"\x08\x06" + ARP)
            assert receive(own)[12:22] == b"\x08\x06" + ARP[:7] + b"\x02"


@kvm
def test_an_unplugged_cable_drops_frames() -> None:
    net = PythonNet()
    with Vmm(machine(nets=[Net(net)])) as vmm:
        driver = started(vmm)
        vmm.nets[0].link = False
        assert driver.read(0x104) >> 16 & 1 == 0
        send(driver, FRAME)
        vmm.nets[0].link = True
        assert driver.read(0x104) >> 16 & 1 == 1
        assert vmm.nets[0].counts["send_dropped"] == 1
        assert net.receive() == []


@kvm
@pytest.mark.skipif(not shutil.which("tshark"), reason="tshark is not installed")
def test_wireshark_opens_a_capture(tmp_path: Path) -> None:
    net = PythonNet()
    with Vmm(machine(nets=[Net(net)])) as vmm:
        driver = started(vmm)
        vmm.nets[0].capture(tmp_path / "it.pcap")
        send(driver, FRAME)
        net.send(FRAME + b"abcd")
        receive(driver)
        assert vmm.nets[0].capture(None) == 2
        with pytest.raises(StreamError, match="/nonexistent/x"):
            vmm.nets[0].capture("/nonexistent/x")
    shown = subprocess.run(
        ["tshark", "-r", tmp_path / "it.pcap", "-T", "fields", "-e", "frame.len", "-e", "eth.type"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert shown.stdout == "60\t0x88b5\n64\t0x88b5\n"


@kvm
def test_a_fork_has_no_network_until_it_is_given_one(tmp_path: Path) -> None:
    net = PythonNet()
    with Vmm(machine(nets=[Net(net)])) as vmm:
        driver = started(vmm)
        send(driver, FRAME)
        snapshot = vmm.snapshot()
        snapshot.save(tmp_path / "it")
        mac = vmm.nets[0].mac
        for source in (snapshot, Snapshot.load(tmp_path / "it")):
            with source.fork() as fork:
                assert (fork.nets[0].link, fork.nets[0].mac) == (False, mac)
                assert "not connected" in (fork.nets[0].failure or "")
                own = driver.fork(fork)
                send(own, FRAME)
                fork.nets[0].connect(another := PythonNet())
                send(own, FRAME)
                assert another.receive() == [FRAME]
        taken: list[bytes] = []
        with snapshot.fork(virtio={"net0": Net(PythonNet(taken.extend))}) as fork:
            own = driver.fork(fork)
            send(own, FRAME)
            send(own, FRAME)
            assert fork.nets[0].link
            assert taken[0] == FRAME
        vmm.reset(snapshot)
        send(driver.fork(vmm), FRAME)
        assert net.receive()[-1] == FRAME


TAP = """
import os, socket, subprocess, sys
from pyvmm import ConfigError, Net, Tap, Vmm
from virtio_driver import machine
from test_nets import FRAME, send, started

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
with Vmm(machine(nets=[Net(Tap("pyvmm0"))])) as vmm:
    subprocess.run(["ip", "link", "set", "pyvmm0", "up"], check=True)
    peer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88b5))
    peer.bind(("pyvmm0", 0))
    driver = started(vmm)
    send(driver, FRAME)
    assert peer.recv(4096) == FRAME
    subprocess.run(["ip", "link", "delete", "pyvmm0"], check=True)
    send(driver, FRAME)
    send(driver, FRAME)
    print(vmm.nets[0].link, vmm.nets[0].failure)
"""


@kvm
def test_a_tap_interface_carries_frames_until_it_is_removed(tmp_path: Path) -> None:
    namespace = ["unshare", "--net", "--map-root-user"]
    if (
        not shutil.which("ip")
        or subprocess.run([*namespace, "ip", "tuntap", "add", "dev", "x", "mode", "tap"], check=False).returncode
    ):
        pytest.skip("no tap interface can be created in a network namespace")
    (tmp_path / "it.py").write_text(TAP)
    done = subprocess.run(
        [*namespace, sys.executable, tmp_path / "it.py"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert (done.stdout, done.returncode) == ("False tap pyvmm0: the tap interface was removed\n", 0), done.stderr


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (Net("nothing"), "nets[0].backend: expected user, tap:NAME"),
        (Net("stream:"), "nets[0].backend: expected user, tap:NAME"),
        (Net(3), "nets[0].backend: expected a UserNet"),
        (Net(StreamSocket(("host", 0))), "nets[0].backend.peer: expected (host, port)"),
        (Net(StreamSocket(None)), "nets[0].backend.peer: expected a socket"),
        (Net(DatagramSocket("x", own=3)), "nets[0].backend.own: expected a path"),
        (Net(Tap(object())), "nets[0].backend.interface: expected a socket"),
        (Net("tap:x", mac="1"), "nets[0].mac: expected an address"),
        (Net("tap:x", mac="03:00:00:00:00:00"), "nets[0].mac: 03:00:00:00:00:00 is not"),
        (Net("tap:x", mtu=3), "nets[0].mtu: it is smaller than 68"),
        ("tap:x", "nets[0]: expected a Net"),
    ],
)
def test_a_configuration_that_is_wrong_names_its_key(net: Net, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VmmConfig(nets=[net]).check()
    assert str(caught.value).startswith(text)


def test_files_have_backends_as_text() -> None:
    config = VmmConfig.from_toml('[[nets]]\nbackend = "tap:tap0"\nmac = "02:00:00:00:00:01"\n')
    assert config.nets == (Net("tap:tap0", mac="02:00:00:00:00:01"),)
    made = VmmConfig(nets=[Net(Tap("t")), Net(StreamSocket(("::1", 5))), Net(DatagramSocket("/x"))])
    assert [net["backend"] for net in made.to_dict()["nets"]] == ["tap:t", "stream:::1:5", "datagram:/x"]
    with pytest.raises(ConfigError, match=r"nets\[0\].backend: PythonNet cannot be written"):
        VmmConfig(nets=[Net(PythonNet())]).to_dict()
    with pytest.raises(ConfigError, match="expected a callable"):
        PythonNet(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="queue: 0 frames"):
        PythonNet(queue=0)


def test_a_queue_refuses_what_is_no_frame() -> None:
    queue = FrameQueue(1)
    with pytest.raises(ValueError, match="13 bytes are no Ethernet frame"):
        queue.send(bytes(13))
    assert (queue.send(bytes(14)), queue.send(bytes(14)), queue.dropped) == (True, False, 1)
    assert queue != FrameQueue(1)
    assert len({queue, queue}) == 1
    assert (queue.receive(1), queue.fileno() >= 0) == ([], True)

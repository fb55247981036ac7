"""Sockets between a program and a guest, whose driver is the test's.

Covers src/py/vsock.rs, src/vsock/watch.rs, src/virtio/vsock.rs, python/pyvmm/vsock.py, and
python/pyvmm/vsock_parts.py.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest
from pyvmm import (
    ClosedError,
    ConfigError,
    GuestEndedError,
    Snapshot,
    Vmm,
    VmmConfig,
    Vsock,
    VsockHost,
    VsockListener,
)
from pyvmm.cli_devices import NAMES, with_devices
from virtio_driver import BUFFERS, POLL, machine, writable
from vsock_guest import (
    DEADLINE_S,
    EVENT,
    FIRST_PORT,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    RX,
    SHUTDOWN,
    Guest,
    accepted,
    config,
    connected,
)

if TYPE_CHECKING:
    from pathlib import Path

kvm = pytest.mark.kvm


@kvm
def test_a_program_connects_to_the_guest_and_data_goes_both_ways() -> None:
    with Vmm(config()) as vmm:
        guest, end = connected(vmm)
        with end:
            assert isinstance(end, socket.socket)
            end.sendall(b"ping")
            assert guest.receive().data == b"ping"
            guest.send(FIRST_PORT, 52, RW, b"pong")
            assert end.recv(10) == b"pong"
            assert (vmm.vsock.cid, vmm.vsock.connections) == (3, 1)
            assert "1 connections" in repr(vmm.vsock)
        assert guest.receive()[2:4] == (SHUTDOWN, 3)
        guest.send(FIRST_PORT, 52, RST)
        assert vmm.vsock.connections == 0
    assert "unreachable" in repr(VsockHost(vmm))


@kvm
def test_a_port_that_nobody_listens_on_refuses() -> None:
    with Vmm(config()) as vmm:
        with pytest.raises(ConnectionRefusedError):
            vmm.vsock.connect(52)  # there is no driver
        guest = Guest(vmm)
        guest.prepare(RST)
        with pytest.raises(ConnectionRefusedError, match="port 52"):
            vmm.vsock.connect(52, timeout=DEADLINE_S)
        guest.finish()
        assert vmm.vsock.connections == 0


@kvm
def test_a_guest_that_does_not_answer_is_a_timeout_and_one_that_ends_says_so() -> None:
    with Vmm(config()) as vmm:
        guest = Guest(vmm)
        ring = guest.driver.rings[RX]
        # It polls until the end of the run.
        at, steps = guest.driver.at, struct.pack("<IIII", POLL, ring.used + 2, 99, 0)
        vmm.memory.write(at, steps)
        with pytest.raises(TimeoutError, match=r"0\.05 s"):
            vmm.vsock.connect(52, timeout=0.05)
        killer = threading.Timer(0.05, vmm.stop)
        killer.start()
        with pytest.raises(GuestEndedError, match="before the guest answered"):
            vmm.vsock.connect(52, timeout=DEADLINE_S)
        killer.join()
        with pytest.raises(ValueError, match="port"):
            vmm.vsock.connect(2**32)
        with pytest.raises(ValueError, match="timeout"):
            vmm.vsock.connect(1, timeout=-1)


@kvm
def test_the_guest_connects_to_a_listener() -> None:
    with Vmm(config()) as vmm, vmm.vsock.listen(7) as listener:
        assert isinstance(listener, VsockListener)
        assert listener.port == 7
        guest, end = accepted(vmm, listener, 7)
        with end:
            guest.send(7, 1025, RW, b"hello")
            assert end.recv(10) == b"hello"
            guest.send(7, 1025, SHUTDOWN, flags=2)
            assert end.recv(10) == b""
            end.sendall(b"the answer")
            assert guest.receive().data == b"the answer"
        with pytest.raises(OSError, match="in use"):
            vmm.vsock.listen(7)
        listener.close()
        guest.receive()
        guest.send(7, 1026, REQUEST)
        assert guest.receive().op == RST
        vmm.vsock.listen(7).close()


@kvm
def test_a_full_backlog_refuses() -> None:
    with Vmm(config()) as vmm, vmm.vsock.listen(7, backlog=0) as listener:
        guest, end = Guest(vmm), None
        answers = []
        for port in range(4):
            guest.send(7, port, REQUEST)
            answers.append(guest.receive().op)
        assert answers[0] == RESPONSE
        assert answers[-1] == RST
        end, _ = listener.accept()
        end.close()


@kvm
def test_a_listener_that_is_dropped_or_detached() -> None:
    with Vmm(config()) as vmm:
        listener = vmm.vsock.listen(7)
        number = listener.detach()
        with socket.socket(fileno=number) as plain:
            guest, end = accepted(vmm, plain, 7)
            end.close()
            guest.receive()
        guest.send(7, 1026, REQUEST)
        assert guest.receive().op == RST
        dropped = vmm.vsock.listen(7)
        held = [dropped]
        del dropped
        with pytest.warns(ResourceWarning):
            held.clear()
        vmm.vsock.listen(7).close()


@kvm
def test_what_an_end_has_not_read_arrives_after_the_guest_has_ended_it() -> None:
    with Vmm(config()) as vmm:
        guest, end = connected(vmm)
        data = bytes(range(256)) * 16
        for _ in range(16):
            guest.send(FIRST_PORT, 52, RW, data)
        guest.send(FIRST_PORT, 52, SHUTDOWN, flags=3)
        assert guest.receive().op == RST
        with end, end.makefile("rb") as file:
            assert file.read() == data * 16


@kvm
def test_a_guest_that_ignores_the_credit_is_reset() -> None:
    with Vmm(config()) as vmm:
        guest, end = connected(vmm)
        with end:
            size = 0x10000
            for _ in range(20):  # the socket takes some, the buffer 256 KiB
                guest.send(FIRST_PORT, 52, RW, bytes(size))
            ops = [guest.receive().op]
            while ops[-1] != RST:
                ops.append(guest.receive().op)


@kvm
def test_asyncio_hosts_both_ends() -> None:
    async def main(vmm: Vmm) -> None:
        guest = Guest(vmm)
        guest.prepare(RESPONSE)
        end = await vmm.vsock.connect_async(52, timeout=DEADLINE_S)
        await asyncio.to_thread(guest.finish)
        reader, writer = await asyncio.open_unix_connection(sock=end)
        writer.write(b"ping")
        await writer.drain()
        assert (await asyncio.to_thread(guest.receive)).data == b"ping"
        await asyncio.to_thread(guest.send, FIRST_PORT, 52, RW, b"pong")
        assert await reader.readexactly(4) == b"pong"
        writer.close()
        await writer.wait_closed()
        assert (await asyncio.to_thread(guest.receive)).op == SHUTDOWN
        heard: asyncio.Queue[bytes] = asyncio.Queue()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.put_nowait(await reader.readexactly(5))
            writer.close()

        server = await asyncio.start_unix_server(serve, sock=vmm.vsock.listen(7))
        await asyncio.to_thread(guest.send, 7, 1025, REQUEST)
        assert (await asyncio.to_thread(guest.receive)).op == RESPONSE
        await asyncio.to_thread(guest.send, 7, 1025, RW, b"hello")
        assert await heard.get() == b"hello"
        server.close()
        with pytest.raises(ValueError, match="port"):
            await vmm.vsock.connect_async(-1)

    with Vmm(config()) as vmm:
        asyncio.run(main(vmm))


@kvm
def test_a_wait_in_asyncio_can_be_cancelled() -> None:
    async def main(vmm: Vmm) -> None:
        guest = Guest(vmm)
        ring = guest.driver.rings[RX]
        vmm.memory.write(guest.driver.at, struct.pack("<IIII", POLL, ring.used + 2, 99, 0))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(vmm.vsock.connect_async(52), 0.05)

    with Vmm(config()) as vmm:
        asyncio.run(main(vmm))


@kvm
def test_programs_connect_by_the_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    with Vmm(config(uds_path=path, cid=9)) as vmm:
        guest = Guest(vmm)
        guest.cid = 9
        with socket.socket(socket.AF_UNIX) as program:
            program.settimeout(DEADLINE_S)
            program.connect(str(path))
            program.sendall(b"CONNECT 52\n")
            request = guest.receive()
            assert request[1:3] == (52, REQUEST)
            guest.send(request.host, 52, RESPONSE)
            assert program.recv(100) == f"OK {request.host}\n".encode()
            program.sendall(b"ping")
            assert guest.receive().data == b"ping"
        assert guest.receive().op == SHUTDOWN
        with socket.socket(socket.AF_UNIX) as beside:
            beside.bind(f"{path}_7")
            beside.listen()
            guest.send(7, 1025, REQUEST)
            assert guest.receive().op == RESPONSE
            beside.accept()[0].close()
        with pytest.raises(ConfigError, match="uds_path"):
            Vmm(config(uds_path=path))
    assert not path.exists()


@kvm
def test_a_fork_is_told_that_its_connections_are_gone_and_shares_nothing(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    with Vmm(config(uds_path=path)) as vmm, vmm.vsock.listen(7) as listener:
        guest, end = accepted(vmm, listener, 7)
        snapshot = vmm.snapshot()
        snapshot.save(tmp_path / "it")
        for kept in (snapshot, Snapshot.load(tmp_path / "it")):
            with kept.fork(virtio={"vsock": Vsock(cid=4, uds_path=tmp_path / "other")}) as fork:
                copy = Guest(fork, guest.driver.fork(fork))
                assert copy.driver.exchange(EVENT, writable(BUFFERS, 8)) == 4
                assert fork.memory.read(BUFFERS, 4) == bytes(4)
                assert (fork.vsock.connections, fork.vsock.cid) == (0, 4)
                copy.cid = 4
                copy.send(7, 1025, RW, b"lost")
                assert copy.receive().op == RST
                assert (tmp_path / "other").exists()
        with snapshot.fork() as fork:
            assert fork.vsock.cid == 3
        # The original continues.
        guest.send(7, 1025, RW, b"still there")
        assert end.recv(100) == b"still there"
        vmm.reset(snapshot)
        assert end.recv(100) == b""
        end.close()


@kvm
def test_closing_the_machine_ends_its_connections() -> None:
    vmm = Vmm(config())
    with vmm:
        _, end = connected(vmm)
        listener = vmm.vsock.listen(7)
        host = vmm.vsock
    assert end.recv(1) == b""
    end.close()
    listener.close()
    for use in (lambda: host.cid, lambda: host.listen(8), lambda: host.connect(8), lambda: vmm.vsock):
        with pytest.raises(ClosedError):
            use()


@kvm
def test_a_machine_without_one_says_what_to_do() -> None:
    with Vmm(machine()) as vmm, pytest.raises(ConfigError, match="vsock=Vsock"):
        _ = vmm.vsock


def test_values_of_the_configuration_are_named(tmp_path: Path) -> None:
    for cid in (2, 2**32 - 1):
        with pytest.raises(ConfigError, match=r"vsock\.cid"):
            Vmm(config(cid=cid))
    with pytest.raises(ConfigError, match=r"vsock\.uds_path"):
        Vmm(config(uds_path=3))
    with pytest.raises(ConfigError, match="longer"):
        Vmm(config(uds_path=tmp_path / ("v" * 100)))


def test_the_option_of_the_command_line() -> None:
    options: dict[str, object] = dict.fromkeys(NAMES)
    assert with_devices(VmmConfig(), {**options, "vsock": "3"}).vsock == Vsock()
    found = with_devices(VmmConfig(), {**options, "vsock": "5,uds=/tmp/v"}).vsock
    assert found == Vsock(cid=5, uds_path="/tmp/v")
    with pytest.raises(ConfigError, match=r"vsock\.cid"):
        with_devices(VmmConfig(), {**options, "vsock": "x"})


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError):
        Vmm(config(uds_path=tmp_path / "missing" / "v"))
    assert len(os.listdir("/proc/self/fd")) <= before

"""The virtio console, driven by a guest. Covers src/py/virtio_console.rs."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import pytest
from pyvmm import ClosedError, ConfigError, ConsoleDevice, ConsolePort, StateError, VirtioConsole, Vmm, VmmConfig
from virtio_driver import BUFFERS, Driver, machine, readable, writable

kvm = pytest.mark.kvm


def console_machine(*ports: str | ConsolePort) -> VmmConfig:
    return machine(console=VirtioConsole(ports=ports or ("console0",)))


def say(driver: Driver, text: bytes, queue: int = 1) -> None:
    driver.vmm.memory.write(BUFFERS, text)
    driver.exchange(queue, readable(BUFFERS, len(text)))


def hear(driver: Driver, queue: int = 0) -> bytes:
    length = driver.exchange(queue, writable(BUFFERS, 4096))
    return bytes(driver.vmm.memory.read(BUFFERS, length))


@kvm
def test_a_guest_and_a_socket_talk() -> None:
    with Vmm(console_machine()) as vmm:
        driver = Driver(vmm)
        assert driver.start(queues=2) == 15
        say(driver, b"hello")
        device = vmm.virtio_console
        assert isinstance(device, ConsoleDevice)
        assert device.ports == ("console0",)
        with device.connect() as host:
            with pytest.raises(StateError, match="connected already"):
                device.connect("console0")
            host.sendall(b"answer")
            assert hear(driver) == b"answer"
            assert host.recv(100) == b"hello"
        with pytest.raises(ConfigError, match="other"):
            device.connect("other")
    with pytest.raises(ClosedError):
        _ = device.ports
    assert repr(device) == "ConsoleDevice(unreachable)"


@kvm
def test_the_end_of_the_machine_is_the_end_of_the_stream() -> None:
    with Vmm(console_machine()) as vmm:
        host = vmm.virtio_console.connect()
    with host:
        host.settimeout(60)
        assert host.recv(1) == b""


@kvm
def test_a_thread_reads_while_another_runs_the_machine() -> None:
    found = []
    with Vmm(console_machine()) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        with vmm.virtio_console.connect() as host:
            thread = threading.Thread(target=lambda: found.append(host.recv(100)))
            thread.start()
            say(driver, b"to a thread")
            thread.join(60)
    assert found == [b"to a thread"]


@kvm
def test_it_works_in_asyncio() -> None:
    async def talk(vmm: Vmm, driver: Driver) -> bytes:
        host = vmm.virtio_console.connect()
        reader, writer = await asyncio.open_connection(sock=host)
        await asyncio.to_thread(say, driver, b"async")
        found = await reader.readexactly(5)
        writer.close()
        await writer.wait_closed()
        return found

    with Vmm(console_machine()) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        assert asyncio.run(talk(vmm, driver)) == b"async"


@kvm
def test_programs_connect_to_a_path(tmp_path: Path) -> None:
    path = tmp_path / "hvc0"
    with Vmm(console_machine(ConsolePort("console0", path))) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        with socket.socket(socket.AF_UNIX) as host:
            host.connect(str(path))
            say(driver, b"by path")
            assert host.recv(100) == b"by path"
        with pytest.raises(ConfigError, match="hvc0"):
            Vmm(console_machine(ConsolePort("console0", path)))
    assert not path.exists()


@kvm
def test_the_size_changes_while_the_guest_runs() -> None:
    with Vmm(console_machine("a", "b")) as vmm:
        driver = Driver(vmm)
        driver.start(1)
        assert driver.read(0x100) == 25 << 16 | 80
        assert driver.read(0x104) == 2
        vmm.virtio_console.resize(100, 40)
        assert driver.read(0x100) == 40 << 16 | 100
        assert driver.read(0x60) == 2


@kvm
def test_a_fork_has_what_was_said_and_no_connection(tmp_path: Path) -> None:
    with Vmm(console_machine(ConsolePort("console0", tmp_path / "it"))) as vmm:
        driver = Driver(vmm)
        driver.start(queues=2)
        say(driver, b"before")
        with vmm.snapshot().fork() as fork:
            mine = driver.fork(fork)
            with fork.virtio_console.connect() as host:
                say(mine, b" and in the fork")
                assert host.recv(100) == b"before and in the fork"


@pytest.mark.parametrize(
    "ports",
    [(), ("a", "a"), ("",), ("x/y",), tuple(map(str, range(17))), (1,), "abc" * 30],
)
def test_bad_ports_are_named(ports: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"console.ports"):
        Vmm(machine(console=VirtioConsole(ports=ports)))


@kvm
def test_a_machine_without_one_says_how_to_add_it() -> None:
    with Vmm() as vmm, pytest.raises(ConfigError, match="VirtioConsole"):
        _ = vmm.virtio_console

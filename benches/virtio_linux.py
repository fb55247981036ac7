"""Linux with virtio devices, against QEMU's microvm with the same kernel, and its networks against slirp and passt."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from pyvmm import Disk, Net, Network, Rng, UserNet, Vsock

from benches.guests import Guest, Ours, Qemu
from benches.measure import Result, UnmeasurableError, compare

RUNS = 7
BOOTS = 3
MIB = 1 << 20
DISK_MIB = 64
# How much the guest reads and writes, and how much it sends: where ring 0 is emulated, some
# megabytes in a second, and a tenth of one in packets of 1,500 bytes.
MOVED = 8 * MIB
SENT = 1 * MIB
PORT = 5201
USER = "net eth0 10.0.2.15 255.255.255.0 10.0.2.2"


def disks() -> Iterator[Result]:
    """MiB a second that Linux reads and writes on a raw file past its page cache, against QEMU microvm."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder, ExitStack() as stack:
        ours, theirs, called = (Path(folder) / name for name in ("ours.img", "theirs.img", "called.img"))
        for path in (ours, theirs, called):
            path.write_bytes(bytes(DISK_MIB * MIB))
        drive = f"file={theirs},format=raw,if=none,id=disk"
        qemu = stack.enter_context(Qemu("-drive", drive, "-device", "virtio-blk-device,drive=disk"))
        file = stack.enter_context(called.open("r+b", buffering=0))
        guest = stack.enter_context(Ours(disks=(Disk(ours), Disk(InPython(file.fileno())))))
        for name, command in (("read", "sum /dev/{} {} direct"), ("write", "overwrite /dev/{} {}")):
            raw, python = (command.format(disk, MOVED) for disk in ("vda", "vdb"))
            yield rates(f"linux-disk, {name}", raw, guest, qemu, "QEMU microvm")
            label = f"linux-disk, {name}, in Python"
            sides = (partial(rate, guest, python), partial(rate, guest, raw))
            yield compare(label, "MiB/s", *sides, "pyvmm, a raw file", 0.5, RUNS)


class InPython:
    """A disk whose requests this process answers in Python."""

    size = DISK_MIB * MIB

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def pread(self, length: int, offset: int) -> bytes:
        """Read from the file."""
        return os.pread(self.fd, length, offset)

    def pwrite(self, data: bytes, offset: int) -> int:
        """Write to the file."""
        return os.pwrite(self.fd, data, offset)

    def flush(self) -> None:
        """Write to the file's disk."""
        os.fdatasync(self.fd)


def rate(guest: Guest, command: str, moved: int = MOVED) -> float:
    """MiB a second of a command that moves so many bytes."""
    return moved / MIB / guest.seconds(command)


def rates(name: str, command: str, ours: Guest, theirs: Guest, theirs_name: str, moved: int = MOVED) -> Result:
    """The same command in two machines in turn."""
    first, second = (partial(rate, guest, command, moved) for guest in (ours, theirs))
    return compare(name, "MiB/s", first, second, theirs_name, 1.0, RUNS)


def users() -> Iterator[Result]:
    """MiB a second by TCP from Linux to the host through a user network, against QEMU's and passt's."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = server.getsockname()[1]
        threading.Thread(target=drained, args=(server,), daemon=True).start()
        command = f"send tcp:10.0.2.2:{port} {SENT}"
        ours = stack.enter_context(Ours(nets=(Net(UserNet(host_loopback=True)),)))
        slirp = stack.enter_context(Qemu("-netdev", "user,id=net", "-device", "virtio-net-device,netdev=net"))
        for guest in (ours, slirp):
            guest.run(USER)
        yield rates("linux-tcp, user network", command, ours, slirp, "QEMU slirp", SENT)
        passt = stack.enter_context(through_passt(stack))
        passt.run(USER)
        yield rates("linux-tcp, user network", command, ours, passt, "QEMU passt", SENT)
        server.shutdown(socket.SHUT_RDWR)


def drained(server: socket.socket) -> None:
    """Read all that connections send, one after the other."""
    while True:
        try:
            stream, _ = server.accept()
        except OSError:
            return
        with stream:
            while stream.recv(MIB):
                pass


def through_passt(stack: ExitStack) -> Qemu:
    """QEMU with passt behind its network device; the host's loopback interface is at 10.0.2.2."""
    if shutil.which("passt") is None:
        raise UnmeasurableError("passt is not installed: apt-get install passt")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pyvmm-bench-"))
    # Started by root, it becomes nobody.
    Path(folder).chmod(0o777)
    path = Path(folder, "passt")
    command = ["passt", "--foreground", "--one-off", "--quiet", "--socket", str(path), "--address", "10.0.2.15"]
    command += ["--netmask", "24", "--gateway", "10.0.2.2"]
    process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
    stack.callback(process.kill)
    deadline = time.monotonic() + 30
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise UnmeasurableError("passt does not start")
        time.sleep(0.01)
    netdev = f"stream,id=net,server=off,addr.type=unix,addr.path={path}"
    return Qemu("-netdev", netdev, "-device", "virtio-net-device,netdev=net")


def pairs() -> Iterator[Result]:
    """MiB a second by TCP between two Linuxes on a Network, against two QEMUs on a socket."""
    network = Network()
    with ExitStack() as stack:
        ours = [stack.enter_context(Ours(nets=(Net(network),))) for _ in range(2)]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        sockets = (f"socket,id=net,listen=127.0.0.1:{port}", f"socket,id=net,connect=127.0.0.1:{port}")
        theirs = [
            stack.enter_context(Qemu("-netdev", netdev, "-device", "virtio-net-device,netdev=net"))
            for netdev in sockets
        ]
        for pair in (ours, theirs):
            for number, guest in enumerate(pair, 1):
                guest.run(f"mac eth0 {number}")
                guest.run(f"net eth0 10.9.0.{number} 255.255.255.0")
        yield compare(
            *("linux-tcp, two machines", "MiB/s", lambda: between(*ours), lambda: between(*theirs)),
            *("two QEMUs on a socket", 1.0, RUNS),
        )


def between(sender: Guest, receiver: Guest) -> float:
    """From one machine to another."""
    receiver.type(f"receive tcp::{PORT} {SENT}")
    receiver.expect("listening")
    seconds = sender.seconds(f"send tcp:10.9.0.2:{PORT} {SENT}")
    receiver.end()
    return SENT / MIB / seconds


def boots() -> Iterator[Result]:
    """Seconds to userspace with disk, net, rng and vsock, against QEMU microvm and against no devices."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        path = Path(folder, "disk.img")
        path.write_bytes(bytes(DISK_MIB * MIB))
        devices: dict[str, Any] = {
            "disks": (Disk(path, read_only=True),),
            "nets": (Net(UserNet()),),
            "rng": Rng(),
            "vsock": Vsock(),
        }
        options = ["-drive", f"file={path},format=raw,if=none,id=disk,readonly=on"]
        options += ["-device", "virtio-blk-device,drive=disk", "-netdev", "user,id=net"]
        options += ["-device", "virtio-net-device,netdev=net", "-device", "virtio-rng-device"]
        vhost = Path("/dev/vhost-vsock").exists()
        if vhost:
            options += ["-device", "vhost-vsock-device,guest-cid=3"]
        # QEMU has its vsock from the host's kernel: where there is none, neither machine has one.
        same = {key: value for key, value in devices.items() if vhost or key != "vsock"}
        name = "linux-devices" if vhost else "linux-devices, without vsock"
        yield compare(
            *(name, "s", lambda: booted(lambda: Ours(**same)), lambda: booted(lambda: Qemu(*options))),
            *("QEMU microvm", 1.0, BOOTS),
        )
        yield compare(
            *("linux-devices", "s", lambda: booted(lambda: Ours(**devices)), lambda: booted(Ours)),
            *("pyvmm without devices", 1 / 1.05, BOOTS),
        )


def booted(make: Callable[[], Ours | Qemu]) -> float:
    """From the start of the machine to the line that its program prints."""
    start = time.perf_counter()
    with make():
        return time.perf_counter() - start

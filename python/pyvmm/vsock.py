"""The host's side of a guest's sockets, as sockets of Python: `Vmm.vsock`.

The machine's loop carries the data between them and the guest.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvmm.events import EventSet
from pyvmm.exceptions import ClosedError, GuestEndedError, VmmError
from pyvmm.exits import VmRunState

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from pyvmm._pyvmm import EventOps, Events, Vmm
    from pyvmm.console import Awaiter

LARGEST_PORT = 2**32 - 2


class VsockHost:
    """The host's side of a guest's sockets: `Vmm.vsock`.

    The sockets that it returns are unix stream sockets. They can be used from any thread, and stay
    open when the machine is closed. The loop of the machine has to run for data to move: in a
    thread, or in asyncio.
    """

    def __init__(self, vmm: Vmm) -> None:
        self._vmm = vmm

    @property
    def cid(self) -> int:
        """The guest's address."""
        return self._vmm._vsock_status()[0]

    @property
    def connections(self) -> int:
        """The number of connections, with those that the guest has not accepted or not ended yet."""
        return self._vmm._vsock_status()[1]

    def connect(self, port: int, timeout: float | None = None) -> socket.socket:
        """Connect to a port on which a program of the guest listens.

        Which thread runs the machine meanwhile is as for `Serial.expect`.

        Args:
            port: the guest's port.
            timeout: seconds; None means no limit.

        Raises:
            ConnectionRefusedError: nothing listens on the port, or the guest has no driver yet.
            TimeoutError: the guest has not answered in this time.
            GuestEndedError: the run ended before it did.
            OSError: there are too many connections, or the process is out of descriptors.
            StateError: a callback of the machine made the call.
            ClosedError: the machine is closed.
        """
        request = Request(self._vmm, port, timeout, "vsock.connect")
        end = request.beside()
        assert end is not None
        return end

    def connect_async(self, port: int, timeout: float | None = None) -> Coroutine[Any, Any, socket.socket]:
        """`connect` in a running asyncio loop. The socket does not block, as asyncio needs it."""
        _check_port(port)
        return self._connect_async(port, timeout)

    async def _connect_async(self, port: int, timeout: float | None) -> socket.socket:
        from pyvmm import aio

        request = Request(self._vmm, port, timeout, "vsock.connect_async")
        tasks = aio.Tasks(self._vmm.event_manager, request.cancel)
        waiting = aio.ThreadCall(lambda: request.beside(tasks.take), "pyvmm connect_async")
        end: socket.socket = await aio.supervise(waiting, tasks, request.cancel)
        end.setblocking(False)
        return end

    def listen(self, port: int, backlog: int = 128) -> VsockListener:
        """Listen on a port of the host, to which programs of the guest connect.

        The result is a listening socket: `accept` returns a socket for each connection. If more
        than `backlog` connections wait for that, others are refused. Its `close` ends it.

        Raises:
            OSError: the port is in use, or no temporary directory can be written.
            ClosedError: the machine is closed.
        """
        _check_port(port)
        listener = VsockListener(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener._begin(self._vmm, port, backlog)
        except BaseException:
            listener.close()
            raise
        return listener

    def __repr__(self) -> str:
        try:
            cid, connections = self._vmm._vsock_status()
        except VmmError:
            return "<VsockHost: unreachable>"
        return f"<VsockHost: cid {cid}, {connections} connections>"


def _check_port(port: int) -> None:
    if not 0 <= port <= LARGEST_PORT:
        raise ValueError(f"port: {port} is not a number from 0 to {LARGEST_PORT}")


class VsockListener(socket.socket):
    """A listening socket for connections of the guest: `VsockHost.listen`.

    It is a unix socket without a name, and works wherever such a socket does.
    """

    _port = 0
    _ending: weakref.finalize[..., VsockListener] | None = None

    @property
    def port(self) -> int:
        """The host's port."""
        return self._port

    def _begin(self, vmm: Vmm, port: int, backlog: int) -> None:
        with tempfile.TemporaryDirectory(prefix="pyvmm-") as folder:
            path = Path(folder, "v")
            self.bind(str(path))
            self.listen(backlog)
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        vmm._vsock_listen(port, handle)
        self._port = port
        self._ending = weakref.finalize(self, _unlisten, weakref.ref(vmm), port)
        self._ending.atexit = False

    def close(self) -> None:
        """End listening. Connections that were accepted stay."""
        if self._ending is not None:
            self._ending()
        super().close()

    def detach(self) -> int:
        """The descriptor, which this object does not close any more. The guest can still connect."""
        if self._ending is not None:
            self._ending.detach()
        return super().detach()


def _unlisten(vmm: weakref.ref[Vmm], port: int) -> None:
    """Do what ends a listener. It does not keep the machine alive."""
    found = vmm()
    if found is not None:
        with suppress(VmmError):  # the machine is closed, or the process is a forked child
            found._vsock_unlisten(port)


class Request:
    """One wait for the guest to accept a connection. `name` is the call, for errors."""

    def __init__(self, vmm: Vmm, port: int, timeout: float | None, name: str) -> None:
        _check_port(port)
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout: {timeout} is not a number of seconds of at least 0")
        self._vmm, self._port, self._timeout, self._name = vmm, port, timeout, name
        self._watch = vmm.serial._watch()
        self._end = socket.socket(fileno=vmm._vsock_connect(port))

    def cancel(self) -> None:
        """End the wait. May be called from any thread."""
        self._watch.cancel()

    def init(self, ops: EventOps) -> None:
        """Have the loop watch the socket."""
        # Imported here, because the native module needs this one while a machine is used.
        from pyvmm._pyvmm import Events

        ops.add(Events(self._end, EventSet.IN | EventSet.EDGE_TRIGGERED))

    def process(self, _events: Events, _ops: EventOps) -> None:
        """The guest has answered: end the wait."""
        self._watch.cancel()

    def beside(self, awaiter: Awaiter | None = None) -> socket.socket | None:
        """Wait for the answer. Return None after it was cancelled."""
        try:
            id = self._vmm.add_subscriber(self)
            try:
                is_accepted = self._wait(awaiter)
            finally:
                with suppress(VmmError):  # the machine is closed
                    self._vmm.event_manager.remove_subscriber(id)
        except BaseException:
            self._end.close()
            raise
        if is_accepted:
            return self._end
        self._end.close()
        return None

    def _is_accepted(self) -> bool | None:
        """Whether the guest has accepted. None if it has not answered yet."""
        with suppress(BlockingIOError):
            if self._end.recv(1, socket.MSG_DONTWAIT):
                return True
            if self._vmm.state is VmRunState.CLOSED:
                raise ClosedError("the machine is closed", at="machine")
            raise ConnectionRefusedError(f"{self._name}: the guest refuses connections to port {self._port}")
        return None

    def _wait(self, awaiter: Awaiter | None) -> bool:
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        may_start, over = True, None
        while True:
            if self._is_accepted():
                return True
            if self._watch.is_cancelled():
                return False
            if over is not None:
                raise self._ended(over[0])
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"{self._name}: the guest has not answered within {self._timeout} s")
            is_running, over = self._vmm._await_output(self._watch, left, (may_start, False), awaiter)
            self._watch.look()
            may_start = may_start and not is_running

    def _ended(self, exit: Any) -> VmmError:
        if self._vmm.state is VmRunState.CLOSED:
            return ClosedError("the machine is closed", at="machine")
        how = "with an exception" if exit is None else f"with {exit}"
        text = f"{self._name}: the run ended {how}, before the guest answered"
        return GuestEndedError(text, at=self._name, exit=exit)

"""The event loop alone, with no machine: an echo server over a socket pair."""

import socket

from pyvmm import EventManager, EventOps, Events, EventSet


class Echo:
    """Sends back what it receives."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.end, EventSet.IN))

    def process(self, events: Events, ops: EventOps) -> None:
        if received := self.end.recv(1024):
            self.end.sendall(received.upper())
        else:
            ops.remove(self.end)


client, server = socket.socketpair()
manager = EventManager()
manager.add_subscriber(Echo(server))
client.sendall(b"hello")
print(manager.run(), "event:", client.recv(1024))  # 1 event: b'HELLO'

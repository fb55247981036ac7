"""A network whose link loses frames and is cut: a client repeats its requests until they are answered."""

from threading import Thread

from pyvmm import ClosedError, Network, NetworkPort, WaitTimeoutError

SERVER, CLIENT, PROTOCOL = b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02", b"\x88\xb5"


def serve(port: NetworkPort) -> None:
    """Answer each request with its number, and the number squared."""
    try:
        while True:
            frame = port.receive()
            number = int.from_bytes(frame[14:], "big")
            port.send(frame[6:12] + SERVER + PROTOCOL + frame[14:] + (number**2).to_bytes(8, "big"))
    except ClosedError:
        pass


def ask(port: NetworkPort, number: int, tries: int) -> int | None:
    """Send a request until it is answered. None after this many tries."""
    for _ in range(tries):
        port.send(SERVER + CLIENT + PROTOCOL + number.to_bytes(8, "big"))
        try:
            while (answer := port.receive(timeout=0.1)[14:])[:8] != number.to_bytes(8, "big"):
                pass  # the answer to a request that was repeated
            return int.from_bytes(answer[8:], "big")
        except WaitTimeoutError:
            continue
    return None


net = Network(seed=7)
server, client = net.port("server"), net.port("client")
thread = Thread(target=serve, args=(server,))
thread.start()

net.set_link(client, server, delay=0.002, loss=0.3)
print([ask(client, number, tries=20) for number in range(5)])  # [0, 1, 4, 9, 16]

net.partition([client], [server])
print("cut:", ask(client, 6, tries=2))  # cut: None
net.heal()
net.set_link(client, server, loss=0.0)
print("healed:", ask(client, 7, tries=20))  # healed: 49

server.close()
thread.join()

"""Linux reads a disk and a web page that this program makes: linux_disk_and_network.py MACHINE.

MACHINE is the file virtio.toml in the folder that `pyvmm kernel --virtio` prints.
"""

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from pyvmm import Disk, Net, UserNet, Vmm, VmmConfig

PROMPT = "pyvmm> "


class Lines:
    """A disk of 1 MiB with a line of 16 bytes for each place, made when the guest reads it."""

    size = 1 << 20

    def pread(self, length: int, offset: int) -> bytes:
        """Return what is there. Reads are whole sectors."""
        lines = (b"at byte %7d\n" % at for at in range(offset, offset + length, 16))
        return b"".join(lines)


class Page(BaseHTTPRequestHandler):
    """What the web server answers."""

    def do_GET(self) -> None:
        """Answer one request."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"this page is made for the guest\n")

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def main() -> None:
    """Boot, type two commands, and print what they say."""
    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The gateway of the guest is the host's loopback interface. Nothing else is open.
    net = Net(UserNet(allow=(f"10.0.2.2:{server.server_port}",)))
    config = VmmConfig.from_file(sys.argv[1]).replace(disks=(Disk(Lines()),), nets=(net,))
    with Vmm(config) as vmm:
        vmm.start()
        vmm.serial.expect(PROMPT, timeout=300)
        for command in ("tail -c 16 /dev/vda", f"wget -q -O - http://10.0.2.2:{server.server_port}/"):
            vmm.serial.sendline(command)
            print(vmm.serial.expect("\r\n" + PROMPT, timeout=60).before.splitlines()[-1])
        vmm.stop()
        vmm.wait()
    server.shutdown()


main()

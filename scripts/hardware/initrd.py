"""The initial RAM disk: a busybox, the modules and an init that makes the machine's own file system the root."""

from __future__ import annotations

import lzma
from pathlib import Path

from packages import UnavailableError, has_module

MODULES = ["virtio_pci", "9pnet_virtio", "9p", "overlay", "kvm_amd"]
DIRECTORY, PROGRAM, DATA = 0o040755, 0o100755, 0o100644

INIT = """#!/busybox sh
b=/busybox
$b mount -t devtmpfs none /dev; $b mount -t proc none /proc; $b mount -t sysfs none /sys
for module in $($b cat /modules/order); do
    $b insmod /modules/$module.ko || echo "hardware: no module $module"
done
options=trans=virtio,version=9p2000.L,msize=1048576
$b mount -t 9p -o ro,cache=loose,$options root /lower
$b mount -t tmpfs -o size=3g none /upper; $b mkdir /upper/files /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work none /root
for folder in dev proc sys; do $b mount --move /$folder /root/$folder; done
$b mkdir -p /root/dev/shm /root/dev/pts /root/mnt/hardware
$b mount -t tmpfs none /root/dev/shm; $b mount -t devpts none /root/dev/pts
$b mount -t tmpfs none /root/run
$b ln -s /proc/self/fd /root/dev/fd
$b ln -s /proc/self/fd/0 /root/dev/stdin
$b ln -s /proc/self/fd/1 /root/dev/stdout
$b ln -s /proc/self/fd/2 /root/dev/stderr
$b mount -t 9p -o $options job /root/mnt/hardware
$b ip link set lo up
exec $b chroot /root /bin/bash /mnt/hardware/job
"""


def build(packages: Path, kernel: Path) -> bytes:
    """The archive, from the folders that packages were unpacked in."""
    folders = ["dev", "proc", "sys", "root", "lower", "upper", "modules"]
    files = [(name, DIRECTORY, b"") for name in folders]
    files.append(("init", PROGRAM, INIT.encode()))
    files.append(("busybox", PROGRAM, (packages / "bin/busybox").read_bytes()))
    modules = load_order(kernel)
    files += [(f"modules/{name}.ko", DATA, data) for name, data in modules.items()]
    files.append(("modules/order", DATA, "\n".join(modules).encode()))
    return archive(files)


def load_order(kernel: Path) -> dict[str, bytes]:
    """The modules by name, each behind those that it depends on."""
    built_in = {Path(line).stem.replace("-", "_") for line in lines(kernel, "modules.builtin")}
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in found or name in built_in:
            return
        file = has_module(name, kernel)
        if file is None:
            raise UnavailableError(f"Debian's kernel package has no module {name}")
        data = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
        for needed in depends(data):
            add(needed.replace("-", "_"))
        found[name] = data

    for name in MODULES:
        add(name)
    return found


def lines(kernel: Path, name: str) -> list[str]:
    """The lines of a file that lies beside the modules."""
    return [line for file in kernel.glob(f"**/{name}") for line in file.read_text().splitlines()]


def depends(module: bytes) -> list[str]:
    """What a module says it depends on, in its section .modinfo."""
    for entry in module.split(b"\0"):
        if entry.startswith(b"depends="):
            return [name for name in entry[8:].decode().split(",") if name]
    return []


def archive(files: list[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive in the format "newc" that the kernel unpacks."""
    out = bytearray()
    for inode, (name, mode, data) in enumerate([*files, ("TRAILER!!!", 0, b"")], 1):
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4)
        out += data + bytes(-len(data) % 4)
    return bytes(out)

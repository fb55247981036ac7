"""A small Linux to boot: built once from the distribution's source, and cached.

Its userspace is a shell of a few commands. The kernel boots on hardware KVM, and on a KVM that
emulates ring 0 in software. `pyvmm kernel` builds it on the command line.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pyvmm.exceptions import BootError

if TYPE_CHECKING:
    from collections.abc import Callable

BUILD = Path(__file__).with_name("build.sh")
PROGRESS_S = 1.0


def folder() -> Path:
    """The folder of the small Linux, whether it has been built or not.

    It is below PYVMM_CACHE, XDG_CACHE_HOME/pyvmm or ~/.cache/pyvmm, and named after a checksum of
    what the Linux is made from.
    """
    printed = subprocess.run(_command("where"), stdout=subprocess.PIPE, text=True, check=True).stdout  # noqa: S603
    return Path(printed.strip())


def build(
    what: Literal["small", "virtio", "tests"] = "small", *, progress: Callable[[int], object] | None = None
) -> Path:
    """Build the small Linux, unless that was done before.

    It needs about six minutes, 2 GiB of disk and Debian's packages for building kernels, which are
    installed if the user is root; otherwise the error says what to type.

    Args:
        what: "virtio" builds a Linux with drivers for every virtio device, and with busybox;
            "tests" builds both, and the kernels that only pyvmm's tests boot.
        progress: called about once a second with the number of files compiled so far; an exception
            that it raises ends the build.

    Returns:
        The folder, with `vmlinux`, `bzImage`, `initramfs.cpio`, the kernel's `cmdline`, and
        `machine.toml`, a configuration that starts a shell on the serial port. With virtio these
        are `vmlinux-virtio`, `virtio.cpio`, `cmdline` and `virtio.toml`.

    Raises:
        BootError: it cannot be built here; the message has the reason.
    """
    with subprocess.Popen(  # noqa: S603
        _command(what), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            stdout, stderr = _communicate(process, progress)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        reason = stderr.decode(errors="replace").strip() or f"{BUILD.name} ended with status {process.returncode}"
        raise BootError(f"the small Linux cannot be built: {reason}")
    return Path(stdout.decode().splitlines()[-1])


def _command(what: str) -> list[str]:
    """The command of the build. The file of an installed package may have lost its permission to run."""
    return ["bash", str(BUILD), what]


def _communicate(process: subprocess.Popen[bytes], progress: Callable[[int], object] | None) -> tuple[bytes, bytes]:
    """Wait for the build, and count the compiled files in the log that it writes."""
    if progress is None:
        return process.communicate()
    from pyvmm.aio import refuse_awaitable

    log = folder().with_suffix(".log")
    while True:
        try:
            return process.communicate(timeout=PROGRESS_S)
        except subprocess.TimeoutExpired:
            lines = log.read_bytes().splitlines() if log.exists() else []
            compiled = sum(line.startswith((b"  CC ", b"  AS ", b"  AR ")) for line in lines)
            refuse_awaitable(progress(compiled), "progress")

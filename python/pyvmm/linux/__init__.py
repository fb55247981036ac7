"""A small Linux to boot: built once from the distribution's source, and cached.

Its userspace is a shell of a few commands. The kernel boots on hardware KVM, and on a KVM that
emulates ring 0 in software. `pyvmm kernel` builds it on the command line.
"""

from __future__ import annotations

import subprocess
import threading
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


def build(what: Literal["small", "tests"] = "small", *, progress: Callable[[int], object] | None = None) -> Path:
    """Build the small Linux, unless that was done before.

    It needs about six minutes, 2 GiB of disk and Debian's packages for building kernels, which are
    installed if the user is root; otherwise the error says what to type.

    Args:
        what: "tests" also builds the kernels that only pyvmm's tests boot.
        progress: called about once a second with the number of files compiled so far.

    Returns:
        The folder, with `vmlinux`, `bzImage`, `initramfs.cpio`, the kernel's `cmdline`, and
        `machine.toml`, a configuration that starts a shell on the serial port.

    Raises:
        BootError: it cannot be built here; the message has the reason.
    """
    ended = threading.Event()
    with subprocess.Popen(  # noqa: S603
        _command(what), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        if progress is not None:
            log = folder().with_suffix(".log")
            threading.Thread(target=_watch, args=(log, progress, ended), name="pyvmm-kernel", daemon=True).start()
        try:
            stdout, stderr = process.communicate()
        except BaseException:
            process.terminate()
            raise
        finally:
            ended.set()
    if process.returncode != 0:
        reason = stderr.decode(errors="replace").strip() or f"{BUILD.name} ended with status {process.returncode}"
        raise BootError(f"the small Linux cannot be built: {reason}")
    return Path(stdout.decode().splitlines()[-1])


def _command(what: str) -> list[str]:
    """The command of the build. The file of an installed package may have lost its permission to run."""
    return ["bash", str(BUILD), what]


def _watch(log: Path, progress: Callable[[int], object], ended: threading.Event) -> None:
    """Count the compiled files in the log, which the build writes."""
    while not ended.wait(PROGRESS_S):
        try:
            lines = log.read_bytes().splitlines()
        except OSError:
            continue
        progress(sum(line.startswith((b"  CC ", b"  AS ", b"  AR ")) for line in lines))

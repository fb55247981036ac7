"""Debian's packages, unpacked into a folder of their own: nothing is installed, so no user needs to be root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

KERNEL = "linux-image-amd64"
WANTED = ["qemu-system-x86", "busybox-static"]
# QEMU looks for its modules, firmware and data beside itself: an installed copy would not do.
BESIDE_QEMU = ("qemu-", "seabios", "ipxe-qemu")
TOOLS = {"apt-get": "apt", "dpkg-deb": "dpkg", "xz": "xz-utils"}


class UnavailableError(Exception):
    """Something is missing; the text says what to type."""


class Packages:
    """An apt of its own: its lists, its cache, and a system on which nothing is installed."""

    def __init__(self, cache: Path) -> None:
        missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
        if missing:
            raise UnavailableError(f"this needs Debian's tools: type: sudo apt-get install {' '.join(missing)}")
        self.state = cache / "apt"
        for folder in ("lists/partial", "archives/partial", "debs"):
            (self.state / folder).mkdir(parents=True, exist_ok=True)
        (self.state / "status").touch()
        self.options = [
            f"Dir::State::Lists={self.state}/lists", f"Dir::State::status={self.state}/status",
            f"Dir::Cache={self.state}", "Debug::NoLocking=1", "APT::Sandbox::User=root",
            "Acquire::Retries=2", "Acquire::http::Timeout=60", "APT::Get::List-Cleanup=0",
        ]  # fmt: skip

    def _apt(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        command = [tool, "-qq", *(word for option in self.options for word in ("-o", option)), *arguments]
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=900)
        if result.returncode:
            raise UnavailableError(f"{tool} {arguments[0]} failed: {result.stderr.strip() or result.stdout.strip()}")
        return result.stdout

    def update(self) -> None:
        """Fetch the lists of packages."""
        self._apt("apt-get", "update")

    def kernel(self) -> str:
        """The package of Debian's current kernel."""
        for line in self._apt("apt-cache", "depends", KERNEL).splitlines():
            if "Depends: linux-image-" in line:
                return line.split()[-1]
        raise UnavailableError(f"the package {KERNEL} names no kernel: this needs Debian's repositories")

    def closure(self, packages: list[str]) -> list[str]:
        """These packages, and what they need that this machine has not."""
        plan = self._apt("apt-get", "--simulate", "--no-install-recommends", "install", *packages)
        needed = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
        wanted = (*packages, *BESIDE_QEMU)
        return [package for package in needed if package.startswith(wanted) or not is_installed(package)]

    def unpack(self, packages: list[str], root: Path) -> list[Path]:
        """Download packages, whose signatures apt checks, and unpack them below a folder."""
        folder = self.state / "debs"
        shutil.rmtree(folder)
        folder.mkdir()
        self._apt("apt-get", "download", *packages, cwd=folder)
        files = sorted(folder.glob("*.deb"))
        for file in files:
            subprocess.run(["dpkg-deb", "-x", file, root], check=True, timeout=300)
        names = [subprocess.check_output(["dpkg-deb", "-f", f, "Package"], text=True).strip() for f in files]
        if sorted(names) != sorted(packages):
            raise UnavailableError(f"apt-get download brought {names} where {packages} were asked for")
        return files


def is_installed(package: str) -> bool:
    """Whether this machine has a package."""
    query = ["dpkg-query", "-W", "-f", "${db:Status-Status}", package]
    result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    return result.stdout == "installed"


def has_module(name: str, root: Path) -> Path | None:
    """The file of a kernel module, compressed or not."""
    for spelling in {name, name.replace("-", "_"), name.replace("_", "-")}:
        for found in root.glob(f"**/{spelling}.ko*"):
            return found
    return None


def version_of(package: Path) -> str:
    """What a package's file says its version is."""
    return subprocess.check_output(["dpkg-deb", "-f", package, "Version"], text=True, timeout=60).strip()


def say(text: str) -> None:
    """A line for whoever waits."""
    print(f"pyvmm: {text}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """Where downloads live: outside the checkout."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvmm"
    return Path(os.environ.get("PYVMM_CACHE") or default) / "hardware"

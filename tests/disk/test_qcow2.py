"""qcow2 images that other programs make and check.

Covers src/disk/qcow2.rs, src/disk/storage.rs, src/disk/header.rs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from pyvmm import ConfigError, Disk, Vmm
from virtio_driver import machine

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed"),
]
KIB = 1024


def qemu_img(*arguments: str | Path) -> str:
    command = ["qemu-img", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_an_image_is_opened_and_its_overlay_is_in_order(tmp_path: Path) -> None:
    base, top, over = tmp_path / "base.raw", tmp_path / "top.qcow2", tmp_path / "over.qcow2"
    base.write_bytes(bytes(range(256)) * 4 * KIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", top)
    with Vmm(machine(disks=(Disk(top, read_only=True),))) as vmm:
        assert vmm.disks[0].size == KIB * KIB
    with Vmm(machine(disks=(Disk(base, overlay=over),))) as vmm:
        vmm.disks[0].resize(2 * KIB * KIB)
    qemu_img("check", "-q", over)
    information = json.loads(qemu_img("info", "--output=json", over))
    assert (information["virtual-size"], information["format"]) == (2 * KIB * KIB, "qcow2")
    assert information["backing-filename"] == str(base)
    assert information["backing-filename-format"] == "raw"


def test_an_image_cannot_name_any_file_as_its_base(tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    for name in ("/etc/passwd", "../other", "nbd:localhost:1"):
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", top, "1M")
        with pytest.raises(ConfigError, match="below its own folder"):
            Vmm(machine(disks=(Disk(top),)))
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", top, "1M")
    with pytest.raises(ConfigError, match="features"):
        Vmm(machine(disks=(Disk(top),)))

"""The vCPU that keeps KVM from changing its code for each machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kvm

TESTS = Path(__file__).parents[1]
LIVES = f"""
import os, sys
sys.path[:0] = [{str(TESTS)!r}]
from pathlib import Path
from guests import HALT, flat
from pyvmm import Vmm

def vcpus():
    return Path("/proc/self/maps").read_text().count("kvm-vcpu")

def life():
    with Vmm(flat(HALT)) as vmm:
        vmm.run(60)

life()
print(vcpus(), flush=True)
descriptors = os.listdir("/proc/self/fd")
for _ in range(5):
    life()
print(vcpus(), os.listdir("/proc/self/fd") == descriptors, len(os.listdir("/proc/self/task")), flush=True)
if (child := os.fork()) == 0:
    before = vcpus()
    life()
    print(before, vcpus(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def test_machines_without_interrupt_controller_leave_one_vcpu_and_no_descriptor() -> None:
    command = [sys.executable, "-W", "error", "-c", LIVES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["0", "1 True 1", "0 0"]

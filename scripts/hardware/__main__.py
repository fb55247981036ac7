"""Runs the tests on hardware KVM, on a machine that may have none.

    python3 scripts/hardware subset       the most useful test files
    python3 scripts/hardware all          every test
    python3 scripts/hardware run COMMAND  anything else, in the checkout

QEMU's TCG emulates AMD's SVM with nested paging. A stock Debian kernel that boots under it loads
the real kvm-amd, and gives a /dev/kvm with a hardware KVM's behaviour. The machine's own file
system is the root there, below a tmpfs: the checkout, its .venv and the Linux of the tests are used
as they are, and nothing that runs there changes them. Neither /dev/kvm nor root is needed here.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import initrd
import qemu
import tsc
from packages import WANTED, Packages, UnavailableError, cache_folder, say, version_of

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# The files of the subset, whose tests reach most of what a KVM does. Minutes together.
SUBSET = [
    "vm/test_vm", "vm/test_kvm", "vmm/test_vmm", "boot/test_boot", "cli/test_doctor", "boot/test_linux",
    "snapshot/test_snapshot", "snapshot/test_snapshot_vcpus", "snapshot/test_reset",
    "snapshot/test_snapshot_linux", "vm/test_interrupts", "memory/test_access",
    "memory/test_backing", "memory/test_dirty", "memory/test_slots",
]  # fmt: skip
LIMITS_S = {"subset": 1800, "all": 7200, "run": 3600}
TEST_LIMIT_S = 900
NO_STATUS = 124
# Switching static keys can also lock the processors up while the kernel boots, before anything is
# held: then it is started again. It boots in 7 s on a quiet host.
BOOT_LIMIT_S = 180
BOOTS = 4

# Two idle machines keep KVM's static keys switched on: under TCG with several threads, switching
# them can lock both processors up. One has vCPUs without a LAPIC; the other's second vCPU has its
# LAPIC disabled by software.
HOLD = """
import fcntl, os, struct, sys, time
CREATE_VM, CREATE_IRQCHIP, CREATE_VCPU, GET_SREGS, SET_SREGS = 0xAE01, 0xAE60, 0xAE41, 0x8138AE83, 0x4138AE84
APIC_BASE, ENABLED = 272, 1 << 11
kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
bare, whole = fcntl.ioctl(kvm, CREATE_VM, 0), fcntl.ioctl(kvm, CREATE_VM, 0)
held = [fcntl.ioctl(bare, CREATE_VCPU, 0)]
fcntl.ioctl(whole, CREATE_IRQCHIP, 0)
held += [fcntl.ioctl(whole, CREATE_VCPU, number) for number in range(2)]
sregs = bytearray(312)
fcntl.ioctl(held[2], GET_SREGS, sregs)
(base,) = struct.unpack_from("<Q", sregs, APIC_BASE)
struct.pack_into("<Q", sregs, APIC_BASE, base & ~ENABLED)
fcntl.ioctl(held[2], SET_SREGS, bytes(sregs))
print("hardware: two idle machines", flush=True)
os.close(1); os.close(2)
time.sleep(1e6)
"""

JOB = """#!/bin/bash
{exports}
# The overlay has no files without a name (O_TMPFILE); a tmpfs has.
export PATH={path} LANG=C.UTF-8 TERM=dumb TMPDIR=/run/tmp
mkdir -p $TMPDIR
ulimit -n 65536
power_off() {{ sync; echo o >/proc/sysrq-trigger; sleep 10; }}
[ -c /dev/kvm ] || {{ echo "hardware: kvm-amd gave no /dev/kvm" >/mnt/hardware/output; power_off; }}
exec 3< <(python3 /mnt/hardware/hold.py 2>&1)
read -r held <&3; exec 3<&-
up=$(cut -d' ' -f1 /proc/uptime)
echo "hardware: Linux $(uname -r) with kvm-amd after $up s; $held" >/mnt/hardware/output
cd {root}
( {command} ) </dev/null >>/mnt/hardware/output 2>&1
echo $? >/mnt/hardware/status
power_off
"""


def prepare(cache: Path) -> tuple[Path, dict[str, str]]:
    """The folder with QEMU, the kernel and the initial RAM disk, made once; and what is known of them."""
    sources = b"".join((HERE / name).read_bytes() for name in ("packages.py", "initrd.py", "qemu.py"))
    folder = cache / hashlib.sha256(sources).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "facts.json").exists():
            say(f"downloading QEMU and a kernel from Debian, once, 95 MB, into {folder}")
            shutil.rmtree(folder, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=cache) as stage:
                fill(Path(stage), Packages(Path(stage)))
                shutil.copytree(stage, folder, symlinks=True)
    facts: dict[str, str] = json.loads((folder / "facts.json").read_text())
    return folder, facts


def fill(folder: Path, packages: Packages) -> None:
    """Everything that `prepare` promises."""
    packages.update()
    kernel = packages.kernel()
    files = packages.unpack(packages.closure(WANTED), folder / "root")
    version = next(version_of(file) for file in files if file.name.startswith("qemu-system-x86_"))
    packages.unpack([kernel], folder / "kernel")
    (folder / "initrd").write_bytes(initrd.build(folder / "root", folder / "kernel"))
    (image,) = (folder / "kernel").glob("boot/vmlinuz-*")
    image.rename(folder / "vmlinuz")
    qemu.accept_busy_tss(folder / "root/usr/bin/qemu-system-x86_64", version)
    shutil.rmtree(folder / "kernel")
    shutil.rmtree(packages.state)
    facts = {"qemu": version, "kernel": kernel}
    (folder / "facts.json").write_text(json.dumps(facts))


def qemu_command(folder: Path, job: Path, cpu: str, limit_s: int) -> list[str]:
    """QEMU under a limit of its own: it ends with it even if this process is killed."""
    append = f"console=ttyS0 panic=-1 mitigations=off nokaslr quiet rdinit=/init tsc=reliable tsc_early_khz={tsc.khz()}"
    share = "security_model=none,multidevs=remap"
    return [
        "timeout", "--kill-after=10", str(limit_s),
        str(folder / "root/usr/bin/qemu-system-x86_64"), "-nodefaults", "-no-user-config", "-display", "none",
        "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", cpu, "-smp", "2", "-m", "4G", "-no-reboot",
        "-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initrd"), "-append", append,
        "-serial", f"file:{job}/console",
        "-virtfs", f"local,path=/,mount_tag=root,readonly=on,{share}",
        "-virtfs", f"local,path={job},mount_tag=job,{share}",
    ]  # fmt: skip


def pytest_command(mode: str, more: list[str]) -> str:
    """The tests of a mode. Each has more time than elsewhere: the processor is an emulated one."""
    files = [f"tests/{name}.py" for name in SUBSET] if mode == "subset" else []
    words = [".venv/bin/python", "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "--durations=10", "--tb=native"]
    words += ["--timeout", str(TEST_LIMIT_S), "-o", f"faulthandler_timeout={3 * TEST_LIMIT_S}"]
    return shlex.join([*words, *files, *more])


def environment() -> dict[str, str]:
    """What the tests there find set."""
    kept = {name: os.environ[name] for name in ("PYVMM_CACHE", "XDG_CACHE_HOME", "PYTHONPATH") if name in os.environ}
    return {"HOME": str(Path.home()), "PYVMM_REQUIRE_KVM": "1", "PYVMM_HARDWARE": "tcg", **kept}


def execute(folder: Path, job: Path, command: str, cpu: str, limit_s: int) -> int:
    """Run a command there, show what it prints as it comes, and return its status."""
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment().items())
    path = shlex.quote(f"{ROOT}/.venv/bin:{os.environ['PATH']}")
    text = JOB.format(exports=exports, path=path, root=shlex.quote(str(ROOT)), command=command)
    (job / "job").write_text(text)
    (job / "hold.py").write_text(HOLD)
    for _ in range(BOOTS):
        (job / "output").write_bytes(b"")
        if boot(folder, job, cpu, limit_s):
            break
        say(f"the kernel did not boot within {BOOT_LIMIT_S} s: started again")
    status = job / "status"
    if status.exists():
        return int(status.read_text())
    say(f"the machine ended without the command's status, or was not done after {limit_s} s; its last words:")
    for name in ("qemu", "console"):
        lines = (job / name).read_text(errors="replace").splitlines() if (job / name).exists() else []
        print("\n".join(lines[-20:]), file=sys.stderr)
    return NO_STATUS


def boot(folder: Path, job: Path, cpu: str, limit_s: int) -> bool:
    """Run the machine until it ends and show its output. False if its kernel does not boot."""
    libraries = ":".join(str(folder / "root" / name) for name in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"))
    with (job / "qemu").open("w") as errors:
        process = subprocess.Popen(
            qemu_command(folder, job, cpu, limit_s),
            env={**os.environ, "LD_LIBRARY_PATH": libraries},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
    until = time.monotonic() + BOOT_LIMIT_S
    try:
        with (job / "output").open("rb") as output:
            while process.poll() is None:
                show(output.read())
                if output.tell() == 0 and time.monotonic() > until:
                    return False
                time.sleep(0.2)
            show(output.read())
    finally:
        process.terminate()
        process.wait()
    return True


def show(data: bytes) -> None:
    """Pass output on."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def main() -> int:
    """Run it as the command line says."""
    parser = argparse.ArgumentParser(prog="hardware", description="Run the tests on hardware KVM, under QEMU's TCG.")
    parser.add_argument("mode", choices=LIMITS_S, help="which tests; or run, for another command")
    parser.add_argument("--limit", type=int, metavar="SECONDS", help="end the machine after so long")
    parser.add_argument("--cpu", default="max", help="QEMU's processor: max,-xsave; EPYC-Rome; ...")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="of run: the command; else: more for pytest")
    arguments = parser.parse_args()
    cache = cache_folder()
    try:
        folder, facts = prepare(cache)
    except (UnavailableError, qemu.UnknownQemuError, subprocess.SubprocessError, OSError) as error:
        say(str(error))
        return 1
    say(f"{facts['kernel']} under QEMU {facts['qemu']}, CPU {arguments.cpu}")
    more = arguments.rest
    command = shlex.join(more) if arguments.mode == "run" else pytest_command(arguments.mode, more)
    log = cache / f"{arguments.mode}.log"
    job = Path(tempfile.mkdtemp(prefix="job-", dir=cache))
    # A request to end ends QEMU too.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    began = time.monotonic()
    try:
        limit_s = arguments.limit or LIMITS_S[arguments.mode]
        status = execute(folder, job, command, arguments.cpu, limit_s)
        with log.open("wb") as out:
            for name in ("output", "console", "qemu"):
                out.write(f"== {name}\n".encode() + (job / name).read_bytes() if (job / name).exists() else b"")
    finally:
        shutil.rmtree(job, ignore_errors=True)
    say(f"status {status} after {time.monotonic() - began:.0f} s; log: {log}")
    return status


if __name__ == "__main__":
    sys.exit(main())

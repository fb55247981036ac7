"""What this machine can do for pyvmm, what is missing, and what to type about it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from typing import Any

import msgspec

from pyvmm._pyvmm import kvm_info
from pyvmm.exceptions import VmmError

# What is lost without a capability of KVM.
CAPABILITIES = {
    "user-memory": "no machine at all",
    "immediate-exit": "no machine at all: a kick could be lost",
    "ext-cpuid": "no choice of CPU features",
    "set-tss-addr": "no machine on Intel processors",
    "set-identity-map-addr": "no real mode on older Intel processors",
    "irqchip": "no Linux: it needs an interrupt controller",
    "pit2": "no in-kernel timer for Linux",
    "mp-state": "no second processor for Linux",
    "irqfd": "no interrupts from event sources",
    "ioeventfd": "no doorbells without an exit",
    "sync-regs": "slower register access",
    "readonly-mem": "no ROM",
    "xsave": "no AVX state in snapshots",
    "split-irqchip": "no interrupt controller outside the kernel",
    "guest-debug": "no debug registers",
    "tsc-control": "guests see the host's TSC frequency",
}
NEEDED = {"user-memory", "immediate-exit", "ext-cpuid", "set-tss-addr"}
FEW_FILES = 1024


class Check(msgspec.Struct, frozen=True):
    """One line of the report. `status` is ok, warning or missing; `fix` is what to do."""

    name: str
    status: str
    detail: str
    fix: str | None = None


def examine() -> list[Check]:
    """Every check, in the order they build on each other."""
    checks = [_platform(), _processors(), _memory(), _files()]
    try:
        info: dict[str, Any] = kvm_info()
    except VmmError as error:
        return [*checks, Check("KVM", "missing", str(error), error.hint)]
    checks.append(Check("/dev/kvm", "ok", f"opens, API version {info['api_version']}"))
    checks.append(_kind(info))
    return checks + [_capability(name, has) for name, has in info["capabilities"].items()]


def is_healthy(checks: list[Check]) -> bool:
    """Whether pyvmm can run a machine."""
    return all(check.status != "missing" for check in checks)


def _platform() -> Check:
    detail = f"{platform.system()} {platform.release()} on {platform.machine()}, Python {platform.python_version()}"
    good = sys.platform == "linux" and platform.machine() == "x86_64"
    fix = None if good else "use Linux on x86-64"
    return Check("platform", "ok" if good else "missing", detail, fix)


def _processors() -> Check:
    return Check("processors", "ok", f"{len(os.sched_getaffinity(0))} usable")


def _memory() -> Check:
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Check("memory", "ok", f"{size >> 20} MiB")


def _files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= FEW_FILES:
        return Check("open files", "ok", f"at most {soft}")
    return Check("open files", "warning", f"at most {soft}: room for few machines", f"ulimit -n {hard}")


def _kind(info: dict[str, Any]) -> Check:
    if not info["software_kvm"]:
        return Check("virtualization", "ok", f"hardware, up to {info['max_vcpus']} vCPUs")
    hidden = info["hidden_features"]
    detail = (
        f"the processor has neither vmx nor svm: KVM emulates ring 0 in software, slowly. "
        f"The auto template hides {len(hidden)} CPU features: {', '.join(hidden)}"
    )
    return Check("virtualization", "warning", detail, "use a machine with vmx or svm for speed")


def _capability(name: str, has: bool) -> Check:
    lost = CAPABILITIES.get(name, "")
    if has:
        return Check(f"KVM {name}", "ok", "")
    if name in NEEDED:
        return Check(f"KVM {name}", "missing", lost, "use a newer kernel")
    return Check(f"KVM {name}", "warning", lost)

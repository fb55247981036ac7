"""Checks what pyvmm needs on this host, reports what is missing, and suggests a fix."""

from __future__ import annotations

import os
import platform
import resource
import sys
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from pyvmm._pyvmm import Vmm, kvm_info
from pyvmm.boots import FlatBoot
from pyvmm.config import CpuConfig, MemoryConfig, VmmConfig
from pyvmm.exceptions import VmmError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.devices import Resource

# The consequence of each missing KVM capability.
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
Template = Literal["auto", "host", "software-kvm"]
TEMPLATES: tuple[Template, ...] = ("auto", "host", "software-kvm")
TRIAL_S = 10.0
TRIAL_CODE = bytes.fromhex("b0 2a e6 f4")  # mov al, 42; out 0xf4, al: in every mode


class Check(msgspec.Struct, frozen=True):
    """One line of the report. `status` is ok, warning or missing; `fix` is what to do."""

    name: str
    status: str
    detail: str
    fix: str | None = None


def examine() -> list[Check]:
    """Run every check, prerequisites first."""
    checks = [_platform(), _processors(), _memory(), _files()]
    try:
        info: dict[str, Any] = kvm_info()
    except VmmError as error:
        return [*checks, Check("KVM", "missing", str(error), error.hint)]
    checks.append(Check("/dev/kvm", "ok", f"opens, API version {info['api_version']}"))
    checks.append(_kind(info))
    checks += [_template(template) for template in TEMPLATES]
    return checks + [_capability(name, has) for name, has in info["capabilities"].items()]


def resources_of(config: VmmConfig | None) -> list[Resource]:
    """The resources of a machine with this configuration. None means a machine as Linux needs it."""
    if config is None:
        config = VmmConfig(boot=FlatBoot(TRIAL_CODE), irqchip=True, pit=True)
    with Vmm(config) as vmm:
        return vmm.resources


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


def _template(template: Template) -> Check:
    """Try a CPU template: KVM may refuse its CPUID or XCR0, the registers that a fork sets, or the first run."""
    name = f"CPU template {template}"
    failed = [f"{what}: {problem}" for what, problem in _trials(template) if problem]
    if not failed:
        return Check(name, "ok", "runs, and forks")
    if template == "auto":
        return Check(name, "missing", "; ".join(failed), 'try another: CpuConfig(template="host") or "software-kvm"')
    return Check(
        name, "warning", "; ".join(failed), f'do without CpuConfig(template="{template}"); "auto" is the default'
    )


def _trials(template: Template) -> Iterator[tuple[str, str | None]]:
    """The name of each trial, and the reason if it failed."""
    for mode in ("real16", "long64", "user64"):
        yield mode, _trial(template, mode, irqchip=False)
    yield "two processors with interrupt controllers", _trial(template, "long64", irqchip=True)


def _trial(template: Template, mode: Any, *, irqchip: bool) -> str | None:
    """Run a guest and a fork of it. Return the reason if one of them fails."""
    config = VmmConfig(
        boot=FlatBoot(TRIAL_CODE, mode=mode),
        memory=MemoryConfig(size_mib=1),
        cpu=CpuConfig(vcpus=2 if irqchip else 1, template=template),
        irqchip=irqchip,
    )
    try:
        with Vmm(config) as vmm:
            vcpu = vmm.vcpus[0]
            offered = [entry.edx << 32 | entry.eax for entry in vcpu.cpuid if (entry.function, entry.index) == (0xD, 0)]
            if offered and offered[0]:
                vcpu.xcrs.xcr0 = offered[0]
            with vmm.snapshot().fork() as fork:
                exits = vmm.run(TRIAL_S), fork.run(TRIAL_S)
    except VmmError as error:
        return str(error)
    wrong = [exit for exit in exits if exit.code != TRIAL_CODE[1]]
    return f"the guest ended with {wrong[0]}" if wrong else None


def _capability(name: str, has: bool) -> Check:
    lost = CAPABILITIES.get(name, "")
    if has:
        return Check(f"KVM {name}", "ok", "")
    if name in NEEDED:
        return Check(f"KVM {name}", "missing", lost, "use a newer kernel")
    return Check(f"KVM {name}", "warning", lost)

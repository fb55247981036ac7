"""Checks what pyvmm needs on this host, reports what is missing, and suggests a fix."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from pyvmm._pyvmm import Vmm, cpuid_table, kvm_info
from pyvmm.boots import FlatBoot
from pyvmm.config import CpuConfig, MemoryConfig, VmmConfig
from pyvmm.cpu_template import TEMPLATES
from pyvmm.exceptions import ConfigError, VmmError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.cpu_template import TemplateName
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


def _template(template: TemplateName) -> Check:
    """Try a CPU template: KVM may refuse its CPUID or XCR0, the registers that a fork sets, or the first run."""
    name = f"CPU template {template}"
    try:
        cpuid_table(CpuConfig(template=template))
    except ConfigError as error:
        return Check(name, "warning", str(error).removeprefix("cpu.template: "), "do without it on this host")
    failed = [f"{what}: {problem}" for what, problem in _trials(template) if problem]
    if not failed:
        return Check(name, "ok", "runs, and forks")
    if template == "auto":
        return Check(name, "missing", "; ".join(failed), 'try another: CpuConfig(template="host") or "software-kvm"')
    return Check(
        name, "warning", "; ".join(failed), f'do without CpuConfig(template="{template}"); "auto" is the default'
    )


def _trials(template: TemplateName) -> Iterator[tuple[str, str | None]]:
    """The name of each trial, and the reason if it failed."""
    for mode in ("real16", "long64", "user64"):
        yield mode, _trial(template, mode, irqchip=False)
    yield "two processors with interrupt controllers", _trial(template, "long64", irqchip=True)


def _trial(template: TemplateName, mode: Any, *, irqchip: bool) -> str | None:
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


def print_resources(resources: list[Resource], *, as_json: bool) -> None:
    """Print the owners of addresses, ports and lines."""
    import click
    from rich.console import Console
    from rich.table import Table

    if as_json:
        click.echo(json.dumps([resource._asdict() for resource in resources], indent=2))
        return
    table = Table("kind", "from", "to", "what", box=None)
    for kind, start, length, name, shared in resources:
        ends = (str(start), str(start + length - 1)) if kind == "gsi" else (f"{start:#x}", f"{start + length - 1:#x}")
        table.add_row(kind, *ends, f"{name} (shared)" if shared else name)
    Console().print(table)


def print_checks(checks: list[Check]) -> None:
    """Print the report, with what to do."""
    from rich.console import Console
    from rich.table import Table

    table = Table("check", "status", "detail", box=None)
    styles = {"ok": "green", "warning": "yellow", "missing": "red"}
    for line in checks:
        detail = line.detail if line.fix is None else f"{line.detail}\n-> {line.fix}"
        table.add_row(line.name, f"[{styles[line.status]}]{line.status}[/]", detail)
    Console().print(table)

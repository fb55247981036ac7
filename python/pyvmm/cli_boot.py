"""What the command line starts: finds out what a file is, and makes the boot of its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyvmm
from pyvmm import keyvalue
from pyvmm.boots import BootModule, ElfBoot, FirmwareBoot, FlatBoot, KernelBoot, LinuxBoot
from pyvmm.exceptions import ConfigError

if TYPE_CHECKING:
    from pyvmm.config import VmmConfig

BOOTS = ("auto", "linux", "kernel", "pvh", "multiboot", "elf", "program", "firmware", "flat")


class BootOptions(NamedTuple):
    """The options that say what is booted; None, or an empty tuple, if one is not given."""

    kernel: str | None
    kernel_form: str | None
    boot: str | None
    flat: str | None
    mode: str | None
    initrd: tuple[str, ...]
    append: str | None
    module: tuple[str, ...]


def boot_of(base: VmmConfig, options: BootOptions) -> Any:
    """The boot of a configuration with the options over it.

    Raises:
        ConfigError: the options contradict each other.
        BootError: the file is nothing that can be booted.
    """
    if options.flat is not None or options.mode is not None or options.boot == "flat":
        return _flat(base, options)
    options, load_address = _with_form(options)
    if options.kernel is None:
        return _changed(base, options)
    kind = _kind(options.kernel, options.boot)
    if load_address is not None and kind != "linux":
        detail = "only a bzImage of Linux is loaded at an address of one's choice"
        raise ConfigError(f"kernel.kernel_load_addr: {detail}", at="kernel.kernel_load_addr")
    if kind in {"program", "firmware"}:
        return _of_path(base, kind, options)
    if kind == "linux":
        return _linux(base, options, load_address)
    return _kernel(base, kind, options)


def _kind(path: str, wanted: str | None) -> str:
    """One of `BOOTS` other than "auto" and "flat"."""
    if wanted not in {None, "auto", "pvh"}:
        return str(wanted)
    # A pipe can be read only once, and what is missing is reported when it is read.
    if not Path(path).is_file():
        return "linux" if wanted != "pvh" else "kernel"
    found = pyvmm.Vmm._boot_kind(path)
    return "pvh" if wanted == "pvh" and found == "kernel" else found


def _with_form(options: BootOptions) -> tuple[BootOptions, int | None]:
    """The options with the values of the --kernel form, and its load address."""
    if options.kernel_form is None:
        return options, None
    if options.kernel is not None:
        raise ConfigError("kernel: named twice, as KERNEL and by --kernel", at="kernel")
    keys: dict[str, type[str] | type[int]] = {"path": str, "cmdline": str, "kernel_load_addr": int}
    found = keyvalue.parse("kernel", options.kernel_form, keys)
    if "path" not in found:
        raise ConfigError("kernel.path: is needed", at="kernel.path")
    append: Any = options.append or found.get("cmdline")
    kernel: Any = found["path"]
    address: Any = found.get("kernel_load_addr")
    return options._replace(kernel=kernel, append=append), address


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _changed(base: VmmConfig, options: BootOptions) -> Any:
    """The configuration's own boot with another command line, RAM disk or modules."""
    if options.boot not in {None, "auto"}:
        raise ConfigError("--boot: it needs a KERNEL", at="--boot")
    if isinstance(base.boot, KernelBoot):
        return base.boot.replace(**_given(cmdline=options.append, modules=_modules(options)))
    values = _given(initrd=options.initrd or None, cmdline=options.append)
    if isinstance(base.boot, LinuxBoot) and not options.module:
        return base.boot.replace(**values)
    if values or options.module:
        raise ConfigError("kernel: --initrd, --append and --module need a KERNEL", at="kernel")
    return base.boot


def _linux(base: VmmConfig, options: BootOptions, load_address: int | None) -> LinuxBoot:
    if options.module:
        path = Path(str(options.kernel))
        if path.is_dir() or not path.exists():
            pyvmm.Vmm._boot_kind(path)  # Raises the error of a file that cannot be read.
        raise ConfigError("--module: Linux takes no modules; name a RAM disk by --initrd", at="--module")
    protocol = "pvh" if options.boot == "pvh" else None
    given = _given(
        kernel=options.kernel,
        initrd=options.initrd or None,
        cmdline=options.append,
        load_address=load_address,
        protocol=protocol,
    )
    return base.boot.replace(**given) if isinstance(base.boot, LinuxBoot) else LinuxBoot(**given)


def _kernel(base: VmmConfig, kind: str, options: BootOptions) -> KernelBoot:
    protocol = kind if kind != "kernel" else None
    given = _given(kernel=options.kernel, cmdline=options.append, modules=_modules(options), protocol=protocol)
    return base.boot.replace(**given) if isinstance(base.boot, KernelBoot) else KernelBoot(**given)


def _modules(options: BootOptions) -> tuple[BootModule, ...] | None:
    """The RAM disk is the first module."""
    modules = [BootModule(path) for path in options.initrd]
    for module in options.module:
        path, _, cmdline = module.partition(",")
        modules.append(BootModule(path, cmdline=cmdline))
    return tuple(modules) or None


def _of_path(base: VmmConfig, kind: str, options: BootOptions) -> ElfBoot | FirmwareBoot:
    if options.append is not None or options.initrd or options.module:
        detail = f"--boot: a {kind} has no --append, --initrd or --module"
        raise ConfigError(detail, at="--boot")
    boot = ElfBoot if kind == "program" else FirmwareBoot
    path = str(options.kernel)
    return base.boot.replace(path=path) if isinstance(base.boot, boot) else boot(path)


def _flat(base: VmmConfig, options: BootOptions) -> FlatBoot:
    path, kernel = options.flat, options.kernel
    if options.boot == "flat" and path is None:
        path, kernel = kernel, None
    if path is None and (kernel or options.kernel_form) is not None:
        raise ConfigError("--mode: only flat code has a mode; it needs --flat or --boot flat", at="--mode")
    if (kernel or options.kernel_form) is not None or options.boot not in {None, "auto", "flat"}:
        raise ConfigError("--flat: flat code and a kernel cannot both be run", at="--flat")
    if options.append is not None or options.initrd or options.module:
        raise ConfigError("--flat: flat code has no --append, --initrd or --module", at="--flat")
    given = _given(path=path, mode=options.mode)
    if path is not None:
        given["code"] = b""
    if isinstance(base.boot, FlatBoot):
        return base.boot.replace(**given)
    if path is None:
        raise ConfigError("--mode: it needs --flat", at="--mode")
    return FlatBoot(**given)

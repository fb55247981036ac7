"""The configuration of a machine: typed, with defaults, loadable from a dict, TOML and JSON.

Fields are keyword-only, except the required field of a boot: `FlatBoot(code)`, `ElfBoot(path)`,
`LinuxBoot(kernel)`, `KernelBoot(kernel)` and `FirmwareBoot(path)`.

An object built in Python is checked when a machine is created from it, or by `VmmConfig.check`;
loaded values are checked at once. The error is a `ConfigError` that starts with the key:
``memory.size_mib: ...``. Objects do not change; each has `replace(**changes)`, which returns a copy
with other values: ``config.replace(memory=config.memory.replace(size_mib=64))``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_args, get_type_hints

import msgspec
from msgspec import Meta

from pyvmm.boots import BootModule, ElfBoot, EmbeddedBoot, FirmwareBoot, FlatBoot, KernelBoot, LinuxBoot
from pyvmm.config_files import decoded, no_output
from pyvmm.config_parts import FilePath, Names, Part, Port, Stream, nearest
from pyvmm.cpu_template import CHOICES, TEMPLATES, CpuTemplate, RegisterBits, TemplateName, is_file
from pyvmm.disks import Disk
from pyvmm.exceptions import ConfigError
from pyvmm.nets import Nets, as_text
from pyvmm.shares import Share
from pyvmm.virtio_parts import Balloon, ConsolePort, Rng, VirtioConsole, VirtioPrograms
from pyvmm.vsock_parts import Vsock

if TYPE_CHECKING:
    from collections.abc import Sequence


# In a file, a template is a string or a table.
if TYPE_CHECKING:
    Template: TypeAlias = TemplateName | FilePath | CpuTemplate
else:
    Template = str | CpuTemplate


# In a file, the content of a file of fw_cfg is a path.
if TYPE_CHECKING:
    from collections.abc import Mapping

    Contents: TypeAlias = Mapping[str, bytes | str | Path]
else:
    Contents = dict[str, str]


class _Size(Part, frozen=True):
    size_mib: Annotated[int, Meta(ge=1, le=2**23 - 1)] = 128


class MemoryConfig(_Size, frozen=True, kw_only=True):
    """Guest memory.

    Attributes:
        size_mib: size in MiB, 1 to 8,388,607 and at most the host's memory. RAM beyond 3 GiB starts
            at 4 GiB.
    """


class CpuConfig(Part, frozen=True, kw_only=True):
    """The vCPUs.

    Attributes:
        vcpus: the number of vCPUs, 1 to 4,096 and at most KVM's maximum, which `Kvm().max_vcpus`
            is. docs/processors.md says what more than 254 need.
        sockets: the number of packages that the vCPUs are divided into.
        threads: the number of threads of each core. Each package has vcpus / sockets / threads
            cores. A power of two, because each part of an APIC id has bits of its own; with several
            packages their vCPUs are a power of two also.
        hide: names of CPUID features to hide from the guest, as in /proc/cpuinfo;
            `pyvmm.cpu_features()` lists them.
        expose: names of features to show to the guest, even if the template hides them or KVM does
            not offer them. Whether they work depends on the processor and KVM.
        template: which other features are hidden: a name, the name of a .toml or .json file, or a
            `CpuTemplate`. "host" hides vmx and svm, because snapshots do not include their state,
            and AMX. "software-kvm" also hides the features that a KVM which emulates ring 0 cannot
            execute or answer, and presents an Intel vendor. "auto" is "software-kvm" if the host's
            processor has neither vmx nor svm, otherwise "host". "v2", "v3" and "v4" have the
            features of that level of the x86-64 psABI and no others, the same on every host. If KVM
            lacks one of them, the error names it. docs/processors.md describes them.
        fixups: pyvmm executes instructions that KVM's emulator refuses, as the processor would. For
            a KVM that emulates ring 0. docs/fixups.md lists the instructions; `vmm.fixups` counts
            them.
    """

    vcpus: Annotated[int, Meta(ge=1, le=4096)] = 1
    sockets: Annotated[int, Meta(ge=1, le=4096)] = 1
    threads: Annotated[int, Meta(ge=1, le=4096)] = 1
    hide: Names = ()
    expose: Names = ()
    template: Template = "auto"
    fixups: bool = False


class SerialConfig(Part, frozen=True, kw_only=True):
    """A serial port: COM1 at 0x3f8, or one of the others.

    Attributes:
        output: where the guest's output goes: a path, a file descriptor, a socket, a file object,
            or a callable that takes bytes. None keeps the newest MiB for
            `vmm.serial.take_output()`.
        input: where the guest's input comes from: a path, bytes, a file descriptor, a socket, a
            binary file object, or a callable that returns bytes (empty at the end, and None if no
            input is available yet). None means that only `vmm.serial.send()` sends input. If a file
            object has a file descriptor, the descriptor is read, without the object's buffer.
        input_eof: the bytes that the guest receives at the end of the input; base64 in TOML and
            JSON. The default is ^D.
    """

    output: Stream = None
    input: Stream = None
    input_eof: bytes = b"\x04"


# The ports with streams, by their keys.
SERIALS = ("serial", "com2", "com3", "com4", "debugcon")


class FwCfgConfig(Part, frozen=True, kw_only=True):
    """fw_cfg, QEMU's interface by which firmware and kernels get files: ports 0x510 to 0x51b.

    A guest also finds the size of memory, the number of vCPUs, and "etc/e820", the ranges of
    memory.

    Attributes:
        files: the contents by name: bytes, or the path of a file; in TOML and JSON, only a path. A
            name has at most 55 bytes; those of your own begin with "opt/" and a domain, as in
            "opt/org.example/greeting".
    """

    files: Contents = {}  # noqa: RUF012


class PlatformConfig(Part, frozen=True, kw_only=True):
    """The parts of a PC that the machine has. None means only if it boots a kernel or firmware.

    A part that is there by default gives way to an exit port or a device of the program at its
    ports.

    Attributes:
        acpi: the tables and registers of ACPI, by which a guest powers the machine off.
        pvpanic: the port 0x505, by which a guest reports a panic.
        reset_ports: the ports 0xcf9 and 0x92, which reset the machine.
        screen: the registers of a VGA text screen, 0x3c0 to 0x3df. `Vmm.screen` shows its text.
        debug_port: the port 0x402, to which firmware writes messages; `VmmConfig.debugcon` has its
            streams.
        pci: the ports 0xcf8 to 0xcff of a PCI bus without devices.
        hpet: the counter of an HPET at 0xfed00000; None means none, also for a PC.
        fw_cfg: files for the guest; None means no fw_cfg.
    """

    acpi: bool | None = None
    pvpanic: bool | None = None
    reset_ports: bool | None = None
    screen: bool | None = None
    debug_port: bool | None = None
    pci: bool | None = None
    hpet: bool | None = None
    fw_cfg: FwCfgConfig | None = None


class VmmConfig(Part, frozen=True, kw_only=True):
    """A complete machine.

    Attributes:
        memory: guest memory.
        cpu: the vCPUs.
        boot: the code or kernel that the machine starts.
        serial: the first serial port.
        com2: the second serial port, at 0x2f8 with interrupt line 3; None means no such port.
        com3: the third one, at 0x3e8 with line 4.
        com4: the fourth one, at 0x2e8 with line 3.
        debugcon: the streams of the debug port, which the machine has then.
        exit_port: a write to this port ends the run with the value as its code; None means no such
            port.
        irqchip: an in-kernel interrupt controller (PIC, I/O APIC, LAPICs); None means only for
            Linux, another kernel, or firmware.
        pit: an in-kernel timer (PIT); None means the same as `irqchip`.
        platform: the parts of a PC.
        disks: the virtual disks: the guest finds the first as /dev/vda.
        console: the virtio console; None means none.
        rng: the virtio entropy device; None means none.
        balloon: the virtio memory balloon; None means none.
        shares: directories of the host that the guest can mount.
        vsock: the virtio socket device; None means none.
        virtio: virtio devices that are Python objects: see `pyvmm.virtio_device`. A file cannot
            name any.
        nets: the network devices.
    """

    memory: MemoryConfig = MemoryConfig()
    cpu: CpuConfig = CpuConfig()
    boot: EmbeddedBoot | FlatBoot | ElfBoot | LinuxBoot | KernelBoot | FirmwareBoot = EmbeddedBoot()
    serial: SerialConfig = SerialConfig()
    com2: SerialConfig | None = None
    com3: SerialConfig | None = None
    com4: SerialConfig | None = None
    debugcon: SerialConfig | None = None
    exit_port: Port | None = 0xF4
    irqchip: bool | None = None
    pit: bool | None = None
    platform: PlatformConfig = PlatformConfig()
    disks: tuple[Disk, ...] = ()
    console: VirtioConsole | None = None
    rng: Rng | None = None
    balloon: Balloon | None = None
    shares: tuple[Share, ...] = ()
    vsock: Vsock | None = None
    virtio: VirtioPrograms = ()
    nets: Nets = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VmmConfig:
        """Create a configuration from nested dicts.

        Raises:
            ConfigError: a key is unknown or a value is of the wrong type or out of range.
        """
        return _checked(lambda: msgspec.convert(values, cls))

    @classmethod
    def from_toml(cls, text: str | bytes) -> VmmConfig:
        """Create a configuration from TOML text. Raises the same exceptions as `from_dict`."""
        return _checked(lambda: msgspec.toml.decode(text, type=cls))

    @classmethod
    def from_json(cls, text: str | bytes) -> VmmConfig:
        """Create a configuration from JSON text. Raises the same exceptions as `from_dict`."""
        return _checked(lambda: msgspec.json.decode(text, type=cls))

    @classmethod
    def from_file(cls, path: str | Path) -> VmmConfig:
        """Create a configuration from a .toml or .json file. Its paths are relative to the file's directory.

        Raises:
            ConfigError: as for `from_dict`, or the file cannot be read.
        """
        path = Path(path)
        try:
            config = _checked(lambda: decoded(path, cls, "a configuration file"), str(path))
        except ConfigError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise _error(str(path), getattr(error, "strerror", None) or str(error)) from error
        cpu = _beside(config.cpu, path.parent, "template") if is_file(config.cpu.template) else config.cpu
        return config.replace(
            cpu=cpu,
            platform=_files_beside(config.platform, path.parent),
            boot=_beside(config.boot, path.parent, "path", "kernel", "initrd"),
            disks=tuple(_beside(disk, path.parent, "source", "overlay") for disk in config.disks),
            shares=tuple(_beside(share, path.parent, "path") for share in config.shares),
            **{
                key: _beside(port, path.parent, "output", "input")
                for key in SERIALS
                if (port := getattr(config, key)) is not None
            },
        )

    def check(self) -> None:
        """Check what can be checked without KVM and without writing a file.

        Checked are the values, the host's memory, the names of CPU features, what is booted, the
        files of fw_cfg, and the streams of the serial ports, as for a machine with this
        configuration.

        Raises:
            ConfigError: a value is invalid, or a stream cannot be used.
            BootError: what is booted, or a file of fw_cfg, cannot be loaded.
        """
        from pyvmm._pyvmm import Vmm

        Vmm._check(self)
        for key in SERIALS:
            output = getattr(getattr(self, key), "output", None)
            if isinstance(output, (str, Path)) and (reason := no_output(Path(output))):
                raise _error(f"{key}.output", f"{output}: {reason}")

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """The JSON schema of a configuration."""
        return msgspec.json.schema(VmmConfig)

    def to_dict(self) -> dict[str, Any]:
        """Convert the configuration to plain values, for TOML and JSON.

        Raises:
            ConfigError: a stream of a serial port or a disk is a Python object, or a file of fw_cfg
                is bytes.
        """
        for key, end in ((key, end) for key in SERIALS for end in ("output", "input")):
            stream = getattr(getattr(self, key), end, None)
            if not isinstance(stream, (str, int, Path, type(None))):
                raise _error(f"{key}.{end}", f"{type(stream).__name__} cannot be written to a file")
        for at, disk in enumerate(self.disks):
            if not isinstance(disk.source, (str, Path)):
                raise _error(f"disks[{at}].source", f"{type(disk.source).__name__} cannot be written to a file")
        if self.virtio:
            raise _error("virtio", "devices in Python cannot be written to a file")
        for name, content in (self.platform.fw_cfg or FwCfgConfig()).files.items():
            if not isinstance(content, (str, Path)):
                raise _error(f"platform.fw_cfg.files.{name}", f"{type(content).__name__} cannot be written to a file")
        plain: dict[str, Any] = msgspec.to_builtins(as_text(self), enc_hook=str)
        return plain


_BOOTS: tuple[type[Part], ...] = (EmbeddedBoot, FlatBoot, ElfBoot, LinuxBoot, KernelBoot, FirmwareBoot)


def _beside(part: Any, directory: Path, *names: str) -> Any:
    """Make the relative paths of a part relative to a directory."""
    values = {name: getattr(part, name, None) for name in names}
    paths: dict[str, Any] = {n: str(directory / v) for n, v in values.items() if isinstance(v, (str, Path))}
    if isinstance(part, LinuxBoot) and isinstance(part.initrd, tuple):
        paths["initrd"] = tuple(str(directory / path) for path in part.initrd)
    if isinstance(part, KernelBoot):
        paths["modules"] = tuple(_module_beside(module, directory) for module in part.modules)
    return part.replace(**paths) if paths else part


def _files_beside(platform: PlatformConfig, directory: Path) -> PlatformConfig:
    """Make the relative paths of fw_cfg's files relative to a directory; in a file, each content is a path."""
    if platform.fw_cfg is None:
        return platform
    files = {name: str(directory / str(path)) for name, path in platform.fw_cfg.files.items()}
    return platform.replace(fw_cfg=platform.fw_cfg.replace(files=files))


def _module_beside(module: str | Path | BootModule, directory: Path) -> str | BootModule:
    if isinstance(module, BootModule):
        return module.replace(path=str(directory / module.path))
    return str(directory / module)


def _error(at: str, detail: str) -> ConfigError:
    return ConfigError(f"{at or 'config'}: {detail}", at=at or "config")


def _checked(load: Any, source: str = "config") -> VmmConfig:
    """Turn msgspec's errors into ours: "... - at `$.memory.size_mib`" becomes "memory.size_mib: ..."."""
    try:
        config: VmmConfig = load()
    except msgspec.ValidationError as error:
        detail, _, path = str(error).partition(" - at `$")
        key = path.strip("`.").replace("[...]", "")
        if unknown := re.search(r"unknown field `(.*)`", detail):
            raise _unknown_key(key, unknown[1]) from None
        raise _error(key or source, detail + _choices(key, detail)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _error(source, str(error)) from None
    template = config.cpu.template
    if isinstance(template, str) and not is_file(template) and template not in TEMPLATES:
        raise _error("cpu.template", f"'{template}' is not {CHOICES}")
    return config


def _choices(key: str, detail: str) -> str:
    """The valid values of a key that has only a few, as a suffix of the error."""
    tags = [str(boot.__struct_config__.tag) for boot in _BOOTS]
    values: dict[str, Sequence[str]] = {
        "boot.type": tags,
        "boot.mode": get_args(get_type_hints(FlatBoot)["mode"]),
        "boot.protocol": get_args(get_type_hints(LinuxBoot)["protocol"])
        + get_args(get_type_hints(KernelBoot)["protocol"])[2:],
        "cpu.template.base": TEMPLATES,
        "cpu.template.bits.register": get_args(get_type_hints(RegisterBits)["register"]),
    }
    return f"; one of {', '.join(values[key])}" if key in values and detail.startswith("Invalid") else ""


def _unknown_key(parent: str, name: str) -> ConfigError:
    parts: dict[str, list[type[Part]]] = {
        "": [VmmConfig],
        "memory": [MemoryConfig],
        "cpu": [CpuConfig],
        **{key: [SerialConfig] for key in SERIALS},
        "platform": [PlatformConfig],
        "platform.fw_cfg": [FwCfgConfig],
        "disks": [Disk],
        "console": [VirtioConsole],
        "console.ports": [ConsolePort],
        "rng": [Rng],
        "balloon": [Balloon],
        "shares": [Share],
        "vsock": [Vsock],
        "boot.modules": [BootModule],
        "cpu.template": [CpuTemplate],
        "cpu.template.bits": [RegisterBits],
    }
    structs = parts.get(re.sub(r"\[\d+\]", "", parent), list(_BOOTS))
    known = [field for struct in structs for field in struct.__struct_fields__]
    meant = nearest(name, known) or f"; known are {', '.join(sorted(set(known)))}"
    return _error(f"{parent}.{name}" if parent else name, f"unknown key{meant}")

"""The configuration of a machine: typed, with defaults, loadable from a dict, TOML and JSON.

Fields are keyword-only, except the required field of a boot: `FlatBoot(code)`, `ElfBoot(path)` and
`LinuxBoot(kernel)`.

An object built in Python is checked when a machine is created from it, or by `VmmConfig.check`;
loaded values are checked at once. The error is a `ConfigError` that starts with the key:
``memory.size_mib: ...``. Objects do not change; each has `replace(**changes)`, which returns a copy
with other values: ``config.replace(memory=config.memory.replace(size_mib=64))``.
"""

from __future__ import annotations

import difflib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, get_args, get_type_hints

import msgspec
from msgspec import Meta

from pyvmm.config_files import no_output, read
from pyvmm.exceptions import ConfigError

Address: TypeAlias = Annotated[int, Meta(ge=0, extra_json_schema={"maximum": 2**64 - 1})]
Port: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFC)]
# In a file, a path is a string. An object built in Python may also have a Path, and any sequence of
# names.
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    FilePath: TypeAlias = str | Path
    Names: TypeAlias = Sequence[str]
else:
    FilePath = str
    Names = tuple[str, ...]
STREAM_SCHEMA = {"type": ["string", "integer", "null"]}
Stream: TypeAlias = Annotated[Any, Meta(extra_json_schema=STREAM_SCHEMA)]

DEFAULT_CMDLINE = "console=ttyS0 panic=-1 reboot=k"


if TYPE_CHECKING:
    # To type checkers, these classes have no other constructor than that of their fields.
    from msgspec import StructMeta as _Constructor
else:

    class _Constructor(msgspec.StructMeta):
        """Explains which arguments a class of the configuration takes when it refuses some."""

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            try:
                return super().__call__(*arguments, **options)
            except TypeError as error:
                reason = _refusal(self, len(arguments), set(options)) or f"{self.__name__}: {error}"
                raise TypeError(reason) from None


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, metaclass=_Constructor):
    """A part of a configuration. Its fields are keyword-only, so new ones can be added anywhere."""

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values. `copy.replace` does the same.

        Raises:
            TypeError: there is no such field; the message names those that there are.
        """
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return type(self)(**(fields | changes))

    __replace__ = replace


class _Size(_Part, frozen=True):
    size_mib: Annotated[int, Meta(ge=1, le=2**23 - 1)] = 128


class MemoryConfig(_Size, frozen=True, kw_only=True):
    """Guest memory.

    Attributes:
        size_mib: size in MiB, 1 to 8,388,607 and at most the host's memory. RAM beyond 3 GiB starts
            at 4 GiB.
    """


class CpuConfig(_Part, frozen=True, kw_only=True):
    """The vCPUs.

    Attributes:
        vcpus: the number of vCPUs, 1 to 254.
        hide: names of CPUID features to hide from the guest, as in /proc/cpuinfo;
            `pyvmm.cpu_features()` lists them.
        expose: names of features to show to the guest, even if the template hides them or KVM does
            not offer them. Whether they work depends on the processor and KVM.
        template: which other features are hidden. "host" hides vmx and svm, because snapshots do
            not include their state. "software-kvm" also hides the features that a KVM which
            emulates ring 0 cannot execute or answer, and presents an Intel vendor. "auto" is
            "software-kvm" if the host's processor has neither vmx nor svm, otherwise "host".
        fixups: pyvmm executes instructions that KVM's emulator refuses, as the processor would. For
            a KVM that emulates ring 0. docs/fixups.md lists the instructions; `vmm.fixups` counts
            them.
    """

    vcpus: Annotated[int, Meta(ge=1, le=254)] = 1
    hide: Names = ()
    expose: Names = ()
    template: Literal["auto", "host", "software-kvm"] = "auto"
    fixups: bool = False


class EmbeddedBoot(_Part, frozen=True, tag_field="type", tag="embedded"):
    """The built-in guest: it prints, measures, answers its input, and ends."""


class _Code(_Part, frozen=True):
    code: bytes = b""


class FlatBoot(_Code, frozen=True, kw_only=True, tag_field="type", tag="flat"):
    """Code at an address.

    Every vCPU starts at the entry, with its number in RDI (EDI, DI) and its own stack of 4 KiB
    right below the code.

    Attributes:
        code: the machine code; base64 in TOML and JSON.
        path: the file with the code, instead of `code`.
        address: the guest-physical load address.
        entry: the start address; None means `address`.
        mode: "real16", 16-bit real mode; "protected32", 32-bit ring 0 without paging; "long64",
            64-bit ring 0; "user64", 64-bit ring 3 with a TSS that allows every port. Both 64-bit
            modes use identity mapping. Except in real mode, the tables for this use 0x80000 to
            0x9fbff.
    """

    path: FilePath | None = None
    address: Address = 0x1000
    entry: Address | None = None
    mode: Literal["real16", "protected32", "long64", "user64"] = "real16"


class _Program(_Part, frozen=True):
    path: FilePath


class ElfBoot(_Program, frozen=True, kw_only=True, tag_field="type", tag="elf"):
    """A static ELF program in 64-bit ring 3, without an operating system.

    Only the program's segments, with their permissions, and its stack are mapped, each at its own
    address. An exception ends the run: `Exit.reason` is `ExitReason.EXCEPTION`, and the exit says
    what the processor reported. The program can use every port. It starts with the stack of the
    System V ABI, without arguments.

    Attributes:
        path: the file, an x86-64 executable linked with -static -no-pie.
        stack_kib: the size of the stack, in KiB, rounded up to whole pages. It is at the top of
            memory. The pages around it are not mapped.
    """

    stack_kib: Annotated[int, Meta(ge=1, le=2**22)] = 256


class _Kernel(_Part, frozen=True):
    kernel: FilePath


class LinuxBoot(_Kernel, frozen=True, kw_only=True, tag_field="type", tag="linux"):
    """A Linux kernel, booted by the 64-bit boot protocol (the kernel's Documentation/arch/x86/boot.rst).

    Attributes:
        kernel: the file of an ELF vmlinux or a bzImage.
        initrd: the file of the initial RAM disk.
        cmdline: the kernel command line, at most 2,047 bytes of printable ASCII.
        load_address: the load address of a bzImage, 1 MiB to 3 GiB; None means its preferred
            address.
    """

    initrd: FilePath | None = None
    cmdline: Annotated[str, Meta(max_length=2047)] = DEFAULT_CMDLINE
    load_address: Address | None = None


class SerialConfig(_Part, frozen=True, kw_only=True):
    """The first serial port, COM1 at 0x3f8.

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


class VmmConfig(_Part, frozen=True, kw_only=True):
    """A complete machine.

    Attributes:
        memory: guest memory.
        cpu: the vCPUs.
        boot: the code or kernel that the machine starts.
        serial: the first serial port.
        exit_port: a write to this port ends the run with the value as its code; None means no such
            port.
        irqchip: an in-kernel interrupt controller (PIC, I/O APIC, LAPICs); None means only for
            Linux.
        pit: an in-kernel timer (PIT); None means the same as `irqchip`.
    """

    memory: MemoryConfig = MemoryConfig()
    cpu: CpuConfig = CpuConfig()
    boot: EmbeddedBoot | FlatBoot | ElfBoot | LinuxBoot = EmbeddedBoot()
    serial: SerialConfig = SerialConfig()
    exit_port: Port | None = 0xF4
    irqchip: bool | None = None
    pit: bool | None = None

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
        decode: Any = {".toml": msgspec.toml.decode, ".json": msgspec.json.decode}.get(path.suffix)
        if decode is None:
            raise _error(str(path), "the name of a configuration file must end in .toml or .json")
        try:
            text = read(path)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise _error(str(path), getattr(error, "strerror", None) or str(error)) from error
        config = _checked(lambda: decode(text, type=cls), str(path))
        return config.replace(
            boot=_beside(config.boot, path.parent, "path", "kernel", "initrd"),
            serial=_beside(config.serial, path.parent, "output", "input"),
        )

    def check(self) -> None:
        """Check what can be checked without KVM and without writing a file.

        Checked are the values, the host's memory, the names of CPU features, what is booted, and
        the streams of the serial port, as for a machine with this configuration.

        Raises:
            ConfigError: a value is invalid, or a stream cannot be used.
            BootError: what is booted cannot be loaded.
        """
        from pyvmm._pyvmm import Vmm

        Vmm._check(self)
        output = self.serial.output
        if isinstance(output, (str, Path)) and (reason := no_output(Path(output))):
            raise _error("serial.output", f"{output}: {reason}")

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """The JSON schema of a configuration."""
        return msgspec.json.schema(VmmConfig)

    def to_dict(self) -> dict[str, Any]:
        """Convert the configuration to plain values, for TOML and JSON.

        Raises:
            ConfigError: a stream of the serial port is a Python object.
        """
        for end in ("output", "input"):
            stream = getattr(self.serial, end)
            if not isinstance(stream, (str, int, Path, type(None))):
                raise _error(f"serial.{end}", f"{type(stream).__name__} cannot be written to a file")
        plain: dict[str, Any] = msgspec.to_builtins(self, enc_hook=str)
        return plain


_BOOTS: tuple[type[_Part], ...] = (EmbeddedBoot, FlatBoot, ElfBoot, LinuxBoot)
_STRUCTS: tuple[type[_Part], ...] = (VmmConfig, MemoryConfig, CpuConfig, *_BOOTS, SerialConfig)


def _beside(part: Any, directory: Path, *names: str) -> Any:
    """Make the relative paths of a part relative to a directory."""
    values = {name: getattr(part, name, None) for name in names}
    paths = {n: str(directory / v) for n, v in values.items() if isinstance(v, (str, Path))}
    return part.replace(**paths) if paths else part


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
    return config


def _choices(key: str, detail: str) -> str:
    """The valid values of a key that has only a few, as a suffix of the error."""
    tags = [str(boot.__struct_config__.tag) for boot in _BOOTS]
    values: dict[str, Sequence[str]] = {
        "boot.type": tags,
        "boot.mode": get_args(get_type_hints(FlatBoot)["mode"]),
        "cpu.template": get_args(get_type_hints(CpuConfig)["template"]),
    }
    return f"; one of {', '.join(values[key])}" if key in values and detail.startswith("Invalid") else ""


def _refusal(cls: Any, count: int, options: set[str]) -> str | None:
    """Why a class takes no such arguments: `count` of them by position, and these options."""
    name, parameters = cls.__name__, inspect.signature(cls).parameters
    first = [key for key, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    if not parameters:
        return f"{name} takes no options"
    known = f"(options: {', '.join(parameters)})"
    if unknown := sorted(options - set(parameters)):
        others = [struct.__name__ for struct in _STRUCTS if unknown[0] in struct.__struct_fields__]
        elsewhere = f", which is an option of {' and '.join(others)}" if others else _nearest(unknown[0], parameters)
        return f"{name} does not take {unknown[0]}{elsewhere} {known}"
    if count > len(first):
        unless = f", except {first[0]}" if first else ""
        return f"{name} takes its options by keyword{unless}, but got {count} without {known}"
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    missing = [key for key in required[count:] if key not in options]
    return f"{name} needs {missing[0]} {known}" if missing else None


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown_key(parent: str, name: str) -> ConfigError:
    parts: dict[str, list[type[_Part]]] = {
        "": [VmmConfig],
        "memory": [MemoryConfig],
        "cpu": [CpuConfig],
        "serial": [SerialConfig],
    }
    structs = parts.get(parent, list(_BOOTS))
    known = [field for struct in structs for field in struct.__struct_fields__]
    meant = _nearest(name, known) or f"; known are {', '.join(sorted(set(known)))}"
    return _error(f"{parent}.{name}" if parent else name, f"unknown key{meant}")

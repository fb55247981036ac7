"""CPU templates that change a named one, as an object or a TOML or JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta

from pyvmm.config_files import decoded
from pyvmm.config_parts import Names, Part
from pyvmm.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

TemplateName: TypeAlias = Literal["auto", "host", "software-kvm", "v2", "v3", "v4"]
TEMPLATES: tuple[TemplateName, ...] = get_args(TemplateName)
Word: TypeAlias = Annotated[int, Meta(ge=0, le=2**32 - 1)]
SUFFIXES = (".toml", ".json")


class RegisterBits(Part, frozen=True, kw_only=True):
    """Changes to bits of one register of CPUID.

    Attributes:
        leaf: the leaf, EAX of the instruction. The guest's table gains it if it lacks it.
        subleaf: the subleaf, ECX of the instruction; 0 if the leaf has none.
        register: "eax", "ebx", "ecx" or "edx".
        clear: the bits that become 0.
        set: the bits that become 1.
    """

    leaf: Word
    subleaf: Word = 0
    register: Literal["eax", "ebx", "ecx", "edx"]
    clear: Word = 0
    set: Word = 0


if TYPE_CHECKING:
    AllBits: TypeAlias = Sequence[RegisterBits]
else:
    AllBits = tuple[RegisterBits, ...]


class CpuTemplate(Part, frozen=True, kw_only=True):
    """A named CPU template with changes. `CpuConfig.hide` and `expose` are applied after it.

    Attributes:
        base: the template that is changed.
        hide: names of features to hide, as in `CpuConfig`.
        expose: names of features to show.
        bits: bits to change then, in this order, without any check.
    """

    base: TemplateName = "auto"
    hide: Names = ()
    expose: Names = ()
    bits: AllBits = ()

    @classmethod
    def from_file(cls, path: str | Path) -> CpuTemplate:
        """Read a template from a .toml or .json file with these keys.

        Raises:
            ConfigError: the file cannot be read, or a key or value is invalid, which is named.
        """
        path = Path(path)
        try:
            template: CpuTemplate = decoded(path, cls, "a CPU template")
            _check_names(template)
        except msgspec.ValidationError as error:
            detail, _, place = str(error).partition(" - at `$")
            key = place.strip("`.").replace("[...]", "")
            raise _error(path, f"{key}: {detail}" if key else detail) from None
        except (
            OSError,
            ValueError,
            msgspec.DecodeError,
        ) as error:  # ValueError: a null byte in the name, or no TOML or JSON
            raise _error(path, getattr(error, "strerror", None) or str(error)) from error
        return template


def resolve(template: Any) -> CpuTemplate:
    """The object for the value of `CpuConfig.template`, which may be a name, a file or an object.

    Raises:
        ConfigError: it is none of them, or the file cannot be used.
    """
    if isinstance(template, CpuTemplate):
        return template
    if isinstance(template, Path) or is_file(template):
        return CpuTemplate.from_file(template)
    if isinstance(template, str):
        if template in TEMPLATES:
            return CpuTemplate(base=template)
        raise ConfigError(f"cpu.template: '{template}' is not {CHOICES}", at="cpu.template")
    raise ConfigError(f"cpu.template: expected {CHOICES}, not {template!r:.60}", at="cpu.template")


CHOICES = f"one of {', '.join(TEMPLATES)}, or a .toml or .json file"


def is_file(template: object) -> bool:
    """Whether the value of `CpuConfig.template` names a file."""
    return isinstance(template, str) and template.endswith(SUFFIXES)


def _check_names(template: CpuTemplate) -> None:
    from pyvmm._pyvmm import cpu_features

    known = set(cpu_features())
    for key in ("hide", "expose"):
        if unknown := [name for name in getattr(template, key) if name not in known]:
            raise msgspec.ValidationError(f"'{unknown[0]}' is not a known CPUID feature - at `$.{key}`")


def _error(path: Path, detail: str) -> ConfigError:
    return ConfigError(f"cpu.template: {path}: {detail}", at="cpu.template")

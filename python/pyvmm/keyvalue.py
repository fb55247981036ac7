"""Parses options as the rust-vmm reference VMM takes them: ``path=vmlinux,cmdline="console=ttyS0 panic=1"``."""

from __future__ import annotations

from pyvmm.exceptions import ConfigError


def parse(option: str, text: str, keys: dict[str, type[str] | type[int]]) -> dict[str, str | int]:
    """Parse ``key=value,...`` to a dict.

    A part that does not start with a known key belongs to the value before it, so a command line
    may contain commas and equals signs. Quotes around a value are removed.

    Raises:
        ConfigError: the text does not start with a known key, a key appears twice, or a number is
            invalid.
    """
    found: dict[str, str] = {}
    last = None
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if equals and key in keys and not _is_open(found.get(last, "") if last else ""):
            if key in found:
                raise _error(f"{option}.{key}", "given twice")
            found[key] = value
            last = key
        elif last is None:
            raise _error(option, f"'{key}' is not one of {', '.join(keys)}")
        else:
            found[last] += f",{part}"
    return {key: _convert(f"{option}.{key}", value, keys[key]) for key, value in found.items()}


def _is_open(value: str) -> bool:
    """Whether a quoted value is incomplete."""
    return value.startswith('"') and (len(value) == 1 or not value.endswith('"'))


def _convert(at: str, value: str, kind: type[str] | type[int]) -> str | int:
    value = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
    if kind is str:
        return value
    try:
        return int(value, 0)
    except ValueError:
        raise _error(at, f"'{value}' is not a number") from None


def _error(at: str, detail: str) -> ConfigError:
    return ConfigError(f"{at}: {detail}", at=at)

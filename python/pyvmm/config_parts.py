"""The base of the configuration's classes: keyword arguments, copies with changes, and what a class takes.

`config` has the machine and `boots` what it starts.
"""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeAlias

import msgspec
from msgspec import Meta

Address: TypeAlias = Annotated[int, Meta(ge=0, extra_json_schema={"maximum": 2**64 - 1})]
Port: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFC)]
# In a file, a path is a string. An object built in Python may also have a Path, and any sequence of
# names or paths.
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    FilePath: TypeAlias = str | Path
    FilePaths: TypeAlias = str | Path | Sequence[str | Path]
    Names: TypeAlias = Sequence[str]
else:
    FilePath = str
    FilePaths = str | tuple[str, ...]
    Names = tuple[str, ...]
STREAM_SCHEMA = {"type": ["string", "integer", "null"]}
Stream: TypeAlias = Annotated[Any, Meta(extra_json_schema=STREAM_SCHEMA)]


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
                reason = refusal(self, len(arguments), set(options)) or f"{self.__name__}: {error}"
                raise TypeError(reason) from None


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, metaclass=_Constructor):
    """A part of a configuration. Its fields are keyword-only, so new ones can be added anywhere."""

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values. `copy.replace` does the same.

        Raises:
            TypeError: there is no such field; the message names those that there are.
        """
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return type(self)(**(fields | changes))

    __replace__ = replace


def parts(base: type[Part] = Part) -> list[type[Part]]:
    """The public classes of the configuration, in the order of their definition."""
    found = [cls for child in base.__subclasses__() for cls in (child, *parts(child))]
    return [cls for cls in found if not cls.__name__.startswith("_")]


def refusal(cls: Any, count: int, options: set[str]) -> str | None:
    """Why a class takes no such arguments: `count` of them by position, and these options."""
    name, parameters = cls.__name__, inspect.signature(cls).parameters
    first = [key for key, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    if not parameters:
        return f"{name} takes no options"
    known = f"(options: {', '.join(parameters)})"
    if unknown := sorted(options - set(parameters)):
        others = [struct.__name__ for struct in parts() if unknown[0] in struct.__struct_fields__]
        elsewhere = f", which is an option of {' and '.join(others)}" if others else nearest(unknown[0], parameters)
        return f"{name} does not take {unknown[0]}{elsewhere} {known}"
    if count > len(first):
        unless = f", except {first[0]}" if first else ""
        return f"{name} takes its options by keyword{unless}, but got {count} without {known}"
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    missing = [key for key in required[count:] if key not in options]
    return f"{name} needs {missing[0]} {known}" if missing else None


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is meant, as a suffix of the error."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""

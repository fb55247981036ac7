"""How a view of registers works: named fields of a kernel structure, each read or changed in the vCPU itself.

`registers.py` describes the structures. Runs on the thread of the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar, overload

from pyvmm._pyvmm import Register, RegisterView

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Self


class View(RegisterView):
    """Registers of one vCPU, by name."""

    __slots__ = ()
    _names: ClassVar[tuple[str, ...]] = ()
    _size: ClassVar[int] = 0

    def __init_subclass__(cls) -> None:
        """Collect the names of the registers."""
        cls._names += tuple(name for name, member in vars(cls).items() if isinstance(member, Register | Part))

    def __setattr__(self, name: str, value: object) -> None:
        """Change a register. Other names are refused."""
        if not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no register {name!r}")
        object.__setattr__(self, name, value)

    def update(self, **registers: int | Mapping[str, int]) -> None:
        """Change several registers at once, those of a part as a mapping: `sregs.update(cr0=0x80000011, cs={"l": 1})`.

        KVM sees them together, because some values are allowed only with others. If one is refused,
        none is changed.
        """
        area = bytearray(self._registers.read())
        self._put(area, registers)
        self._registers.replace(0, bytes(area))

    def _put(self, area: bytearray, registers: Mapping[str, int | Mapping[str, int]]) -> None:
        for name, value in registers.items():
            member = getattr(type(self), name, None)
            if isinstance(member, Part) and isinstance(value, Mapping):
                member.__get__(self, None)._put(area, value)
            elif isinstance(member, Register) and isinstance(value, int):
                at = self._base + member.offset
                try:
                    area[at : at + member.size] = value.to_bytes(member.size, "little")
                except OverflowError:
                    raise OverflowError(f"{name}: {value:#x} does not fit into {8 * member.size} bits") from None
            elif isinstance(member, Register | Part):
                needed = "an int" if isinstance(member, Register) else "a mapping"
                raise TypeError(f"{name}: expected {needed}, not {type(value).__name__}")
            else:
                raise AttributeError(f"{type(self).__name__} has no register {name!r}")

    def _rows(self) -> Iterator[tuple[str, str]]:
        for name in self._names:
            value = getattr(self, name)
            yield name, f"{value:#x}" if isinstance(value, int) else repr(value)

    def __repr__(self) -> str:
        """Show every register, in hex."""
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in self._rows())})"

    def _repr_html_(self) -> str:
        """Return a table, for notebooks."""
        return table(type(self).__name__, self._cells())

    def _cells(self) -> Iterator[tuple[str, str]]:
        """The rows of the table. A part is one line, without the name of its class."""
        for name, text in self._rows():
            value = getattr(self, name, None)
            yield name, "  ".join(map(" ".join, value._rows())) if isinstance(value, View) else text


# Colours and sizes are the notebook's own, so that they fit its theme.
LEFT = "text-align: left"
NAME = f"{LEFT}; vertical-align: top"
VALUE = f"{LEFT}; white-space: pre-wrap; font-family: var(--jp-code-font-family, monospace)"
# A table shows at most this much of a value.
LONGEST = 4096


def table(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return names and values as HTML."""
    cells = "".join(
        f"<tr><th style='{NAME}'>{escape(name)}</th><td style='{VALUE}'>{escape(_short(text))}</td></tr>"
        for name, text in rows
    )
    return f"<table><caption style='{LEFT}'>{escape(caption)}</caption>{cells}</table>"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"


V = TypeVar("V", bound=View)


class Part(Generic[V]):
    """A structure inside another structure."""

    def __init__(self, view: type[V], offset: int) -> None:
        self.view = view
        self.offset = offset

    @overload
    def __get__(self, view: None, owner: object) -> Self: ...
    @overload
    def __get__(self, view: View, owner: object) -> V: ...
    def __get__(self, view: View | None, owner: object) -> Self | V:
        """Return a view of the part."""
        if view is None:
            return self
        return self.view(view._registers, view._base + self.offset)

    def __set__(self, view: View, value: View) -> None:
        """Copy another structure into this one."""
        if not isinstance(value, self.view):
            raise TypeError(f"expected {self.view.__name__}, not {type(value).__name__}")
        data = value._registers.read()[value._base :][: self.view._size]
        view._registers.replace(view._base + self.offset, data)


def flags(value: int, names: Sequence[tuple[int, str]]) -> str:
    """Return the names of the bits that are set."""
    return " ".join(name for bit, name in names if value >> bit & 1)

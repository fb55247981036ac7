"""Every public member of an object, and a call of each that a test can make without knowing it."""

from __future__ import annotations

import ctypes
import inspect
from typing import TYPE_CHECKING, Any

import pyvmm
from pyvmm import EventFd, Events, EventSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm import EventOps


class Device:
    """Counts the guest's writes, and can be saved."""

    def write(self, offset: int, size: int, value: int) -> None: ...
    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None: ...


class Subscriber:
    """Watches an eventfd of its own."""

    def __init__(self) -> None:
        self.fd = EventFd()

    def init(self, ops: EventOps) -> None:
        ops.add(Events(self.fd, EventSet.IN))

    def process(self, events: Events, ops: EventOps) -> None:
        self.fd.read()


# Arguments by name, good enough for a call to be made.
ARGUMENTS: dict[str, Any] = {
    "address": 0, "length": 1, "size": 4096, "data": b"x", "buffer": bytearray(1), "value": 1, "timeout": 0.1,
    "base": 0x600, "seconds": 1, "milliseconds": 1, "source": 0, "line": 5, "kind": "io", "function": print,
    "device": Device(), "count": 1, "path": "/dev/null", "inputs": [1], "delay": 1.0, "time": 1.0, "text": b"x",
    "pattern": b"x", "vcpu": 0, "index": 0x10, "offset": 0, "bytes": b"x", "type": ctypes.c_uint8,
}  # fmt: skip


def of(thing: Any) -> Iterator[str]:
    """The names of every public member of an object, and of those that Python calls by itself."""
    for name in dir(type(thing)):
        if not name.startswith("_") or name in {"__enter__", "__exit__", "__repr__", "__hash__"}:
            yield name


def use(thing: Any, name: str, **own: Any) -> object:
    """Call a method, or read a property; `own` are arguments by name that fit the object."""
    member = inspect.getattr_static(type(thing), name)
    found = getattr(thing, name)
    if not (callable(member) or isinstance(member, staticmethod | classmethod)):
        return found
    if name == "__exit__":
        return found(None, None, None)
    if isinstance(thing, pyvmm.EventOps) and not name.startswith("_"):
        return found(Events(0))
    if name == "msi":
        return found(0xFEE00000, 1)
    made = {"event_fd": EventFd(), "events": Events(0), "subscriber": Subscriber()}
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:  # one of C's, which tells no signature, takes nothing
        return found()
    some = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in some]
    return found(*[(ARGUMENTS | made | own)[name] for name in needed])

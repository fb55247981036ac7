"""The exceptions of pyvmm. All derive from `VmmError`, and also from the matching built-in class."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.exits import Exit


class VmmError(Exception):
    """The base of every exception of pyvmm.

    Attributes:
        at: the place: a configuration key, a system call or an address, or None.
        hint: what to do about it, or None.
    """

    at: str | None
    hint: str | None

    def __init__(self, *args: object, at: str | None = None, hint: str | None = None) -> None:
        super().__init__(*args)
        self.at = at
        self.hint = hint


class ConfigError(VmmError, ValueError):
    """A value of the configuration cannot be used; `at` is its key."""


class KvmError(VmmError, OSError):
    """KVM refused a call; `at` is the ioctl, `errno` the reason."""


class KvmUnavailableError(KvmError):
    """The host offers no usable /dev/kvm; `hint` says what to do."""


class GuestMemoryError(VmmError, IndexError):
    """An address range is not entirely guest memory."""


class BootError(VmmError):
    """A kernel, initial RAM disk or code cannot be loaded."""


class StateError(VmmError, RuntimeError):
    """The call is not possible in the machine's present state."""


class ClosedError(StateError, ValueError):
    """The object, or its machine, is closed; `at` names it. Also a ValueError, as closed files raise."""


class WaitTimeoutError(VmmError, TimeoutError):
    """A callback of the machine did not return, or no frame arrived, within the time limit of a call that waits."""


class ExpectTimeoutError(VmmError, TimeoutError):
    """The console did not show what was expected in time. The text has its last lines.

    Attributes:
        pending: what the console has shown since the last match, as far as it is kept.
    """

    pending: str

    def __init__(self, *args: object, pending: str = "", at: str | None = None, hint: str | None = None) -> None:
        super().__init__(*args, at=at, hint=hint)
        self.pending = pending


class GuestEndedError(VmmError, EOFError):
    """The run ended before the console showed what was expected. The text has its last lines.

    Attributes:
        exit: how the run ended, or None if it was an exception, which its own caller gets.
        pending: what the console has shown since the last match, as far as it is kept.
    """

    exit: Exit | None
    pending: str

    def __init__(
        self,
        *args: object,
        exit: Exit | None = None,
        pending: str = "",
        at: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(*args, at=at, hint=hint)
        self.exit = exit
        self.pending = pending


class SnapshotError(VmmError, ValueError):
    """A snapshot cannot be used: it is damaged, of another machine, or has changed; `at` names the part."""


class EventError(VmmError, OSError):
    """The event manager or an event source refused a call."""


class StreamError(VmmError, OSError):
    """A stream of the serial port, or the file of a trace or a snapshot, cannot be read or written."""

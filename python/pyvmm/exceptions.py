"""Every exception of pyvmm. All are `VmmError`; each is also the built-in class a caller would expect."""


class VmmError(Exception):
    """The base of every exception of pyvmm.

    Attributes:
        at: the place: a configuration key, a system call, an address; None where there is none.
        hint: what to do about it, where that is known.
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
    """An address range that is not all in guest memory."""


class BootError(VmmError):
    """A kernel, initial RAM disk or code that cannot be loaded."""


class StateError(VmmError, RuntimeError):
    """The call is not possible in the machine's present state."""


class ClosedError(StateError, ValueError):
    """What it is called on is closed, or its machine is; `at` names it. A ValueError too, as a closed file gives."""


class WaitTimeoutError(VmmError, TimeoutError):
    """A callback of the machine did not return within the time limit of a call that waits for it."""


class SnapshotError(VmmError, ValueError):
    """A snapshot cannot be used: damaged, of another machine, or no longer as it was; `at` names the part."""


class EventError(VmmError, OSError):
    """The event manager or an event source refused a call."""


class StreamError(VmmError, OSError):
    """A stream of the serial port, or the file of a trace or a snapshot, cannot be read or written."""

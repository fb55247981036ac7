"""A KVM virtual machine monitor as a Python object."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING

from pyvmm._pyvmm import (
    EventFd,
    EventManager,
    EventOps,
    Events,
    GuestMemory,
    KvmVm,
    RemoteEndpoint,
    Serial,
    SubscriberId,
    TimerFd,
    Vmm,
    VmmExitHandler,
    WrappedExitHandler,
    close_all,
    cpu_features,
    embedded_guest,
    kvm_info,
)
from pyvmm.devices import Unanswered
from pyvmm.events import EventSet, Subscriber
from pyvmm.exceptions import (
    BootError,
    ConfigError,
    EventError,
    GuestMemoryError,
    KvmError,
    KvmUnavailableError,
    StateError,
    StreamError,
    VmmError,
)
from pyvmm.exits import Exit, ExitHandler, ExitReason, VmRunState

if TYPE_CHECKING:
    from pyvmm.config import (
        CpuConfig,
        EmbeddedBoot,
        FlatBoot,
        LinuxBoot,
        MemoryConfig,
        SerialConfig,
        VmmConfig,
    )

__version__ = "0.1.0"

__all__ = [
    "BootError",
    "ConfigError",
    "CpuConfig",
    "EmbeddedBoot",
    "EventError",
    "EventFd",
    "EventManager",
    "EventOps",
    "EventSet",
    "Events",
    "Exit",
    "ExitHandler",
    "ExitReason",
    "FlatBoot",
    "GuestMemory",
    "GuestMemoryError",
    "KvmError",
    "KvmUnavailableError",
    "KvmVm",
    "LinuxBoot",
    "MemoryConfig",
    "RemoteEndpoint",
    "Serial",
    "SerialConfig",
    "StateError",
    "StreamError",
    "Subscriber",
    "SubscriberId",
    "TimerFd",
    "Unanswered",
    "VmRunState",
    "Vmm",
    "VmmConfig",
    "VmmError",
    "VmmExitHandler",
    "WrappedExitHandler",
    "cpu_features",
    "embedded_guest",
    "kvm_info",
]

# No vCPU may be running when the interpreter goes down.
atexit.register(close_all)

# Imported when first used: the event loop needs no configuration, and this is most of the import's time.
_CONFIG = {"CpuConfig", "EmbeddedBoot", "FlatBoot", "LinuxBoot", "MemoryConfig", "SerialConfig", "VmmConfig"}


def __getattr__(name: str) -> object:
    if name not in _CONFIG:
        raise AttributeError(f"module 'pyvmm' has no attribute '{name}'")
    from pyvmm import config

    globals().update({known: getattr(config, known) for known in _CONFIG})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(set(globals()) | _CONFIG)

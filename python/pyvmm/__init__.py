"""A KVM virtual machine monitor as a Python object."""

import atexit

from pyvmm._pyvmm import (
    EventFd,
    EventManager,
    EventOps,
    Events,
    GuestMemory,
    KvmVm,
    Serial,
    SubscriberId,
    Vmm,
    VmmExitHandler,
    WrappedExitHandler,
    close_all,
    cpu_features,
    embedded_guest,
    kvm_info,
)
from pyvmm.config import (
    CpuConfig,
    EmbeddedBoot,
    FlatBoot,
    LinuxBoot,
    MemoryConfig,
    SerialConfig,
    VmmConfig,
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
    "Serial",
    "SerialConfig",
    "StateError",
    "StreamError",
    "Subscriber",
    "SubscriberId",
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

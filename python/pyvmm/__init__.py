"""A KVM virtual machine monitor as a Python object."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING

from pyvmm._pyvmm import (
    BalloonDevice,
    ConsoleDevice,
    DescriptorChain,
    DirtyPages,
    DiskDevice,
    EventFd,
    EventManager,
    EventOps,
    Events,
    FrameQueue,
    GuestMemory,
    IrqLine,
    Kvm,
    KvmVm,
    MemorySlot,
    NetDevice,
    Network,
    NetworkPort,
    RemoteEndpoint,
    Serial,
    Snapshot,
    Stats,
    SubscriberId,
    TimerFd,
    Trace,
    UserNetwork,
    Vcpu,
    VcpuExit,
    VirtioDevice,
    VirtioTransport,
    Virtqueue,
    Vmm,
    VmmExitHandler,
    WrappedExitHandler,
    close_all,
    cpu_features,
    cpuid_features,
    cpuid_table,
    embedded_guest,
    kick_signal,
    kvm_info,
    set_kick_signal,
)
from pyvmm._pyvmm import __version__ as __version__
from pyvmm.devices import ReadableDevice, Resource, Unanswered, WritableDevice
from pyvmm.events import EventSet, Subscriber
from pyvmm.exceptions import (
    BootError,
    ClosedError,
    ConfigError,
    EventError,
    ExpectTimeoutError,
    GuestEndedError,
    GuestMemoryError,
    KvmError,
    KvmUnavailableError,
    SnapshotError,
    StateError,
    StreamError,
    VmmError,
    WaitTimeoutError,
)
from pyvmm.exits import (
    Answer,
    AnsweredBy,
    Exit,
    ExitAction,
    ExitHandler,
    ExitKind,
    ExitReason,
    Stop,
    VmRunState,
)
from pyvmm.stats import ExitCount, VcpuTime, VirtioCount

if TYPE_CHECKING:
    from pyvmm.boots import BootModule, ElfBoot, EmbeddedBoot, FirmwareBoot, FlatBoot, KernelBoot, LinuxBoot
    from pyvmm.config import CpuConfig, FwCfgConfig, MemoryConfig, PlatformConfig, SerialConfig, VmmConfig
    from pyvmm.console import Console
    from pyvmm.cpu_template import CpuTemplate, RegisterBits
    from pyvmm.disks import Disk, DiskBackend
    from pyvmm.hostcalls import HostcallError, HostcallStatus
    from pyvmm.kvm import Cap
    from pyvmm.nets import DatagramSocket, Net, PythonNet, StreamSocket, Tap
    from pyvmm.network import LinkConditions, NetworkFork, NetworkSnapshot, PortStats
    from pyvmm.patterns import Expected
    from pyvmm.screen import Screen
    from pyvmm.shares import Share
    from pyvmm.snapshots import ForkExecutor
    from pyvmm.user_net import Forward, UserNet
    from pyvmm.virtio_device import VirtioProgram
    from pyvmm.virtio_parts import Balloon, ConsolePort, Rng, VirtioConsole
    from pyvmm.vsock import VsockHost, VsockListener
    from pyvmm.vsock_parts import Vsock

__all__ = [
    "Answer",
    "AnsweredBy",
    "Balloon",
    "BalloonDevice",
    "BootError",
    "BootModule",
    "Cap",
    "ClosedError",
    "ConfigError",
    "Console",
    "ConsoleDevice",
    "ConsolePort",
    "CpuConfig",
    "CpuTemplate",
    "DatagramSocket",
    "DescriptorChain",
    "DirtyPages",
    "Disk",
    "DiskBackend",
    "DiskDevice",
    "ElfBoot",
    "EmbeddedBoot",
    "EventError",
    "EventFd",
    "EventManager",
    "EventOps",
    "EventSet",
    "Events",
    "Exit",
    "ExitAction",
    "ExitCount",
    "ExitHandler",
    "ExitKind",
    "ExitReason",
    "ExpectTimeoutError",
    "Expected",
    "FirmwareBoot",
    "FlatBoot",
    "ForkExecutor",
    "Forward",
    "FrameQueue",
    "FwCfgConfig",
    "GuestEndedError",
    "GuestMemory",
    "GuestMemoryError",
    "HostcallError",
    "HostcallStatus",
    "IrqLine",
    "KernelBoot",
    "Kvm",
    "KvmError",
    "KvmUnavailableError",
    "KvmVm",
    "LinkConditions",
    "LinuxBoot",
    "MemoryConfig",
    "MemorySlot",
    "Net",
    "NetDevice",
    "Network",
    "NetworkFork",
    "NetworkPort",
    "NetworkSnapshot",
    "PlatformConfig",
    "PortStats",
    "PythonNet",
    "ReadableDevice",
    "RegisterBits",
    "RemoteEndpoint",
    "Resource",
    "Rng",
    "Screen",
    "Serial",
    "SerialConfig",
    "Share",
    "Snapshot",
    "SnapshotError",
    "StateError",
    "Stats",
    "Stop",
    "StreamError",
    "StreamSocket",
    "Subscriber",
    "SubscriberId",
    "Tap",
    "TimerFd",
    "Trace",
    "Unanswered",
    "UserNet",
    "UserNetwork",
    "Vcpu",
    "VcpuExit",
    "VcpuTime",
    "VirtioConsole",
    "VirtioCount",
    "VirtioDevice",
    "VirtioProgram",
    "VirtioTransport",
    "Virtqueue",
    "VmRunState",
    "Vmm",
    "VmmConfig",
    "VmmError",
    "VmmExitHandler",
    "Vsock",
    "VsockHost",
    "VsockListener",
    "WaitTimeoutError",
    "WrappedExitHandler",
    "WritableDevice",
    "cpu_features",
    "cpuid_features",
    "cpuid_table",
    "embedded_guest",
    "kick_signal",
    "kvm_info",
    "set_kick_signal",
]

# No vCPU may run while the interpreter finalizes.
atexit.register(close_all)

# Imported on first use: the event loop does not need them, and they take most of the import time.
_BOOTS = ("BootModule", "ElfBoot", "EmbeddedBoot", "FirmwareBoot", "FlatBoot", "KernelBoot", "LinuxBoot")
_CONFIG = ("CpuConfig", "FwCfgConfig", "MemoryConfig", "PlatformConfig", "SerialConfig", "VmmConfig")
_CPU = ("CpuTemplate", "RegisterBits")
_DISKS = ("Disk", "DiskBackend")
_NETS = ("DatagramSocket", "Net", "PythonNet", "StreamSocket", "Tap")
_VIRTIO = ("Balloon", "ConsolePort", "Rng", "VirtioConsole")
_LAZY = {
    **dict.fromkeys(_BOOTS, "pyvmm.boots"),
    **dict.fromkeys(_CONFIG, "pyvmm.config"),
    **dict.fromkeys(_CPU, "pyvmm.cpu_template"),
    **dict.fromkeys(("HostcallError", "HostcallStatus"), "pyvmm.hostcalls"),
    **dict.fromkeys(_DISKS, "pyvmm.disks"),
    **dict.fromkeys(("Forward", "UserNet"), "pyvmm.user_net"),
    **dict.fromkeys(_NETS, "pyvmm.nets"),
    **dict.fromkeys(_VIRTIO, "pyvmm.virtio_parts"),
    "VirtioProgram": "pyvmm.virtio_device",
    **dict.fromkeys(("VsockHost", "VsockListener"), "pyvmm.vsock"),
    "Cap": "pyvmm.kvm",
    "Console": "pyvmm.console",
    "Share": "pyvmm.shares",
    "Screen": "pyvmm.screen",
    "Expected": "pyvmm.patterns",
    "LinkConditions": "pyvmm.network",
    "NetworkFork": "pyvmm.network",
    "NetworkSnapshot": "pyvmm.network",
    "PortStats": "pyvmm.network",
    "ForkExecutor": "pyvmm.snapshots",
    "Vsock": "pyvmm.vsock_parts",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'pyvmm' has no attribute '{name}'")
    from importlib import import_module

    globals()[name] = getattr(import_module(_LAZY[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

"""How a run ends: `Exit` and `ExitReason`. Also hooks, run states, and the exit handler protocol."""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from pyvmm import VcpuExit


class ExitReason(StrEnum):
    """Why a run ended."""

    HALT = "halt"
    """The guest executed HLT with no interrupt controller to wake it."""
    RESET = "reset"
    """The guest reset the machine, by any of a PC's ways or KVM's system event."""
    SHUTDOWN = "shutdown"
    """A triple fault; the exit has a fault text."""
    CODE = "code"
    """The guest wrote to the exit port; `Exit.code` is the value."""
    STOPPED = "stopped"
    """The host ended the run: `stop()` or a kick."""
    TIMEOUT = "timeout"
    """The timeout of `run` passed."""
    DEBUG = "debug"
    """A breakpoint or a single step that no hook handled. The next `run` continues."""
    INTERNAL_ERROR = "internal-error"
    """KVM_EXIT_INTERNAL_ERROR: KVM could not continue, often because of an instruction that it cannot emulate."""
    FAIL_ENTRY = "fail-entry"
    """KVM_EXIT_FAIL_ENTRY: the processor refused the vCPU's state; `Exit.code` is its reason."""
    UNKNOWN_EXIT = "unknown-exit"
    """A KVM exit that pyvmm does not handle; `Exit.code` is its number."""
    VCPU_ERROR = "vcpu-error"
    """KVM_RUN failed; `Exit.code` is the errno."""
    EXCEPTION = "exception"
    """A program of `ElfBoot` raised an exception; `Exit.vector` is its number."""
    POWEROFF = "poweroff"
    """The guest switched the machine off, by ACPI or KVM's system event."""
    PANIC = "panic"
    """The guest reported a panic, by the pvpanic port."""
    ALL_HALTED = "all-halted"
    """All vCPUs halted with interrupts off, on a machine with an interrupt controller. The next `run` continues."""


class Exit(NamedTuple):
    """The result of `run`. It compares only with another `Exit`, never a plain tuple of the same values.

    Attributes:
        reason: why the run ended.
        code: the guest's exit code; for an unknown exit, a failed entry or a failed KVM_RUN, its
            number.
        vcpu: the vCPU that ended; None if the host ended the run.
        fault: for a fault, KVM's report, the instruction, its bytes and the registers, as text.
        value: the value of the `Stop` with which a device or an exit hook ended the run.
        vector: the number of the exception that ended a program of `ElfBoot`: 0 divide error, 3
            breakpoint, 6 invalid opcode, 13 general protection fault, 14 page fault, ...
        error_code: the exception's error code, if it has one. That of a page fault has bits for a
            page that is mapped (1), a write (2), ring 3 (4) and an instruction fetch (16).
        cr2: for a page fault, the address that could not be reached.
        rip: the instruction that raised the exception; for a breakpoint, the next one.
        symbol: the function or label that `rip` is in, if the program's file has symbols.
    """

    reason: ExitReason
    code: int | None = None
    vcpu: int | None = None
    fault: str | None = None
    value: object = None
    vector: int | None = None
    error_code: int | None = None
    cr2: int | None = None
    rip: int | None = None
    symbol: str | None = None

    def __eq__(self, other: object) -> bool:
        """Whether both are exits with the same values."""
        if isinstance(other, Exit):
            return tuple(self) == tuple(other)
        # NotImplemented would make Python try the other tuple's `==`, which accepts this one.
        return False if isinstance(other, tuple) else NotImplemented

    def __ne__(self, other: object) -> bool:
        """Whether `==` is false. Needed because tuple defines its own `!=`."""
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __lt__(self, other: object) -> bool:
        """By the values, in their order; so the others."""
        return _values(self) < _values(other)

    def __le__(self, other: object) -> bool:
        return _values(self) <= _values(other)

    def __gt__(self, other: object) -> bool:
        return _values(self) > _values(other)

    def __ge__(self, other: object) -> bool:
        return _values(self) >= _values(other)

    def __hash__(self) -> int:
        """The hash of its values."""
        return hash(tuple(self))

    def _repr_html_(self) -> str:
        """Return a table, for notebooks."""
        from pyvmm import notebook

        return notebook.exit(self)

    @property
    def is_fault(self) -> bool:
        """Whether the guest or its vCPU failed, rather than ended."""
        return self.fault is not None

    def __str__(self) -> str:
        """One line, and the fault's text below it."""
        line = str(self.reason)
        if self.code is not None:
            line += f" {self.code}"
        if self.vcpu is not None:
            line += f" (vCPU {self.vcpu})"
        return line if self.fault is None else f"{line}\n{self.fault}"


def _values(exit: object) -> tuple[object, ...]:
    # NotImplemented would have a tuple compare itself.
    if not isinstance(exit, Exit):
        raise TypeError(f"an Exit compares with another Exit, not with {type(exit).__qualname__}")
    return tuple(exit)


class ExitKind(StrEnum):
    """What an exit hook looks at: the exits of the kernel's KVM documentation, chapter 5."""

    IO = "io"
    """IN, OUT, INS and OUTS."""
    MMIO = "mmio"
    """Accesses to guest-physical addresses without memory."""
    MSR = "msr"
    """RDMSR and WRMSR of registers that KVM does not know, or that a hook asked for."""
    HLT = "hlt"
    """HLT: on a machine with an interrupt controller only when all vCPUs are halted with interrupts off."""
    SHUTDOWN = "shutdown"
    """A triple fault."""
    DEBUG = "debug"
    """A breakpoint or a single step."""
    INTERNAL_ERROR = "internal-error"
    """KVM could not continue, usually because of an instruction that it could not emulate."""
    SYSTEM_EVENT = "system-event"
    """The guest's platform code requests a reset or power-off."""
    FAIL_ENTRY = "fail-entry"
    """The processor refused the vCPU's state."""
    MEMORY_FAULT = "memory-fault"
    """An access that the memory's attributes forbid."""
    UNKNOWN = "unknown"
    """Any other exit."""


class ExitAction(Enum):
    """How an exit hook has handled an exit."""

    CONTINUE = "continue"
    """The exit is answered. A read returns all one bits unless `Vcpu.answer` was called; RDMSR returns 0."""
    RETRY = "retry"
    """The guest executes the instruction again, without traces of the first attempt. Writes cannot be retried."""


class AnsweredBy(StrEnum):
    """What has answered an exit."""

    DEVICE = "device"
    """A device, built in or in Python; `Answer.device` is its name."""
    HOOK = "hook"
    """A hook of `on_exit`."""
    MEMORY = "memory"
    """Memory that was added at the address after the exit."""
    RETRY = "retry"
    """A hook returned `ExitAction.RETRY`: the guest executes the instruction again."""
    NOTHING = "nothing"
    """No device and no hook. A read returns all one bits, an MSR access faults, other exits may end the run."""


class Answer(NamedTuple):
    """How an exit was answered, for a hook of `Vmm.on_answer`.

    Attributes:
        by: what answered it.
        data: the bytes that the guest reads or has written, all of them for a string instruction.
            None for exits that are no access, and for a read that faults or is executed again.
        device: the name of the device that answered: the class of a Python device, or the name of a
            built-in one.
        ends_run: whether the answer ends the run.
    """

    by: AnsweredBy
    data: bytes | None = None
    device: str | None = None
    ends_run: bool = False

    @property
    def value(self) -> int | None:
        """The data as a little-endian number."""
        return None if self.data is None else int.from_bytes(self.data, "little")


class Stop(NamedTuple):
    """Returned by a device's method or a hook to end the run. `Exit.value` is the value.

    The exit's reason is `ExitReason.STOPPED`, and the next `run` continues the guest.
    """

    value: object = None


class VmRunState(StrEnum):
    """The run state of a machine."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EXITING = "exiting"
    CLOSED = "closed"


class ExitHandler(Protocol):
    """Any object with this method can be a `KvmVm`'s exit handler."""

    def kick(self) -> object:
        """Notify the owner of the run loop. Called on the thread of the vCPU whose guest has ended."""


def _vcpu_exit(kind: str, *fields: object) -> VcpuExit:
    """Rebuild a `VcpuExit` from a pickle or a copy."""
    from pyvmm import VcpuExit

    exit: VcpuExit = getattr(VcpuExit, kind)(*fields)
    return exit

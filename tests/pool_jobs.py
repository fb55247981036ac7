"""Jobs that leave something behind, and what the next job observes."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from typing import TYPE_CHECKING

from guests import exit_with
from pyvmm import (
    EventFd,
    Snapshot,
    StateError,
    Vmm,
)

if TYPE_CHECKING:
    from collections.abc import Callable


DEADLINE_S = 60
# How long a guest may run that an earlier job keeps from its end.
ACT_S = 1.0
SEED_AT = 0x8000
# 64 bits, ring 0: an unanswered port, a character, the exit port; and again.
GUEST = (
    b"\x66\xba\x00\x05\xec"  #          back: mov dx, 0x500; in al, dx
    b"\x88\x04\x25\x00\x30\x00\x00"  #  mov [0x3000], al
    b"\x66\xba\xf8\x03\xb0\x61\xee"  #  mov dx, 0x3f8; mov al, 'a'; out dx, al
    b"\xb0\x02\xe6\xf4"  #              mov al, 2; out 0xf4, al
    b"\xeb\xe7"  #                      jmp back
)
heard: list[str] = []
"""What has been called that one job left."""
kept: list[object] = []
# What a job may do so that its fork is reset for the next, and not made anew: for everything else
# it is closed.
TAKEN_BACK: dict[str, Callable[[Vmm], object]] = {
    "Vmm.run": lambda vmm: vmm.run(DEADLINE_S),
    "Vmm.run_here": lambda vmm: vmm.run_here(DEADLINE_S),
    "Vmm.reset": lambda vmm: vmm.reset(kept_snapshot[0]),
    "Vmm.stop": lambda vmm: vmm.stop(),
    "Vmm.state": lambda vmm: vmm.state,
    "Vmm.exit": lambda vmm: vmm.exit,
    "Vmm.config": lambda vmm: vmm.config,
    "Vmm.unanswered": lambda vmm: vmm.unanswered,
    "Vmm.fixups": lambda vmm: vmm.fixups,
    "Vmm.symbols": lambda vmm: vmm.symbols,
    "Vmm.nmi": lambda vmm: vmm.nmi(),
    "Vmm.msi": lambda vmm: vmm.msi(0xFEE0_0000, 0x41),
    "Vmm.irq": lambda vmm: vmm.irq(5),
    "Vmm.vcpus": lambda vmm: vmm.vcpus,
    "Vmm.memory": lambda vmm: vmm.memory,
    "Vmm.serial": lambda vmm: vmm.serial,
    "Vmm.wait": lambda vmm: vmm.wait(0),  # raises: it was not started
    "Vmm.close": lambda vmm: None,  # then there is nothing to reset
    "IrqLine.line": lambda vmm: vmm.irq(5).line,
    "IrqLine.raise_": lambda vmm: vmm.irq(5).raise_(),
    "IrqLine.lower": lambda vmm: vmm.irq(5).lower(),
    "IrqLine.pulse": lambda vmm: vmm.irq(5).pulse(),
    "Vmm.console": lambda vmm: vmm.console.text,
    "Vmm.screen": lambda vmm: vmm.screen.text,
    "Vmm.serials": lambda vmm: vmm.serials,
    "Vmm.virtio": lambda vmm: vmm.virtio,
    "Vmm.disks": lambda vmm: vmm.disks,
    "Vmm.nets": lambda vmm: vmm.nets,
    "Vmm.vsock": lambda vmm: vmm.vsock,
    "Vmm.balloon": lambda vmm: vmm.balloon,
    "Vmm.virtio_console": lambda vmm: vmm.virtio_console,
    "Vmm.run_until": lambda vmm: vmm.run_until("a", DEADLINE_S),
    "Serial.expect": lambda vmm: vmm.serial.expect("a", DEADLINE_S),
    "Serial.sendline": lambda vmm: vmm.serial.sendline("x"),
    "Serial.take_output": lambda vmm: vmm.serial.take_output(),
    "Serial.send": lambda vmm: vmm.serial.send(b"x"),
    "Serial.send_break": lambda vmm: vmm.serial.send_break(),
    "Serial.input_waiting": lambda vmm: vmm.serial.input_waiting,
    "GuestMemory.read": lambda vmm: vmm.memory.read(0, 1),
    "GuestMemory.readinto": lambda vmm: vmm.memory.readinto(0, bytearray(1)),
    "GuestMemory.write": lambda vmm: vmm.memory.write(0, b"x"),
    "GuestMemory.fill": lambda vmm: vmm.memory.fill(0, 1, 1),
    "GuestMemory.find": lambda vmm: vmm.memory.find(b"x"),
    "GuestMemory.size": lambda vmm: vmm.memory.size,
    "GuestMemory.ranges": lambda vmm: vmm.memory.ranges,
    "GuestMemory.slots": lambda vmm: vmm.memory.slots,
    "GuestMemory.read_u8": lambda vmm: vmm.memory.read_u8(0),
    "GuestMemory.write_u8": lambda vmm: vmm.memory.write_u8(0, 1),
    "GuestMemory.read_u16": lambda vmm: vmm.memory.read_u16(0),
    "GuestMemory.write_u16": lambda vmm: vmm.memory.write_u16(0, 1),
    "GuestMemory.read_u32": lambda vmm: vmm.memory.read_u32(0),
    "GuestMemory.write_u32": lambda vmm: vmm.memory.write_u32(0, 1),
    "GuestMemory.read_u64": lambda vmm: vmm.memory.read_u64(0),
    "GuestMemory.write_u64": lambda vmm: vmm.memory.write_u64(0, 1),
    "Vmm.resources": lambda vmm: vmm.resources,
    "Vcpu.id": lambda vmm: vmm.vcpus[0].id,
    "Vcpu.regs": lambda vmm: vmm.vcpus[0].regs.update(rax=1),
    "Vcpu.sregs": lambda vmm: setattr(vmm.vcpus[0].sregs, "cr2", 1),
    "Vcpu.fpu": lambda vmm: vmm.vcpus[0].fpu.mxcsr,
    "Vcpu.xcrs": lambda vmm: vmm.vcpus[0].xcrs,
    "Vcpu.debugregs": lambda vmm: setattr(vmm.vcpus[0].debugregs, "db0", 1),
    "Vcpu.events": lambda vmm: vmm.vcpus[0].events.nmi_pending,
    "Vcpu.lapic": lambda vmm: vmm.vcpus[0].lapic.svr,
    "Vcpu.msrs": lambda vmm: vmm.vcpus[0].msrs[0x277],
    "Vcpu.mp_state": lambda vmm: vmm.vcpus[0].mp_state,
    "Vcpu.cpuid": lambda vmm: vmm.vcpus[0].cpuid,
    "Vcpu.translate": lambda vmm: vmm.vcpus[0].translate(0),
}
kept_snapshot: list[Snapshot] = []


left_threads: list[threading.Thread] = []


def hear(*_: object) -> None:
    heard.append("a callback")


class Device:
    def read(self, offset: int, size: int) -> int:
        heard.append("a device")
        return 7

    def write(self, offset: int, size: int, value: int) -> None:
        heard.append("a device")


def observe(vmm: Vmm) -> dict[str, object]:
    """All that tells a machine from another, and how it runs."""
    while left_threads:  # one may still call a subscriber of its own machine, which is heard too
        left_threads.pop().join(DEADLINE_S)
    heard.clear()
    vcpu = vmm.vcpus[0]
    seen: dict[str, object] = {
        "state": vmm.state,
        "unanswered": vmm.unanswered,
        "fixups": vmm.fixups,
        "counters": (vmm.stats.enabled, vmm.stats.exits, vmm.stats.vcpus),
        "input": vmm.serial.input_waiting,
        "output": vmm.serial.take_output(),
        "memory": vmm.memory.read(0, 2 << 20),
        "slots": vmm.memory.slots,
        "log_dirty": vmm.memory.log_dirty,
        "registers": (vcpu.regs.rip, vcpu.regs.rax, vcpu.sregs.cr3, vcpu.debugregs.dr7, vcpu.events.nmi_pending),
        "msrs": [vcpu.msrs[index] for index in (0x200, 0x277, 0x2FF, 0x403)],
        "turns": (vmm.event_manager.turns, vmm.event_manager.dispatched),
    }
    exit = vmm.run(DEADLINE_S)
    seen["run"] = (exit.reason, exit.code, exit.value, vmm.serial.take_output(), vmm.memory.read_u8(0x3000))
    seen["after"] = (vmm.state, vmm.unanswered)
    seen["heard"] = list(heard)
    return seen


def leave_running(vmm: Vmm) -> None:
    vmm.start()


def leave_paused(vmm: Vmm) -> None:
    vmm.start()
    with contextlib.suppress(StateError):  # it has ended
        vmm.pause()


def leave_exception(vmm: Vmm) -> None:
    def fail(*_: object) -> None:
        raise KeyError("of the job before")

    vmm.on_exit("io", fail)
    with contextlib.suppress(KeyError):
        vmm.run(DEADLINE_S)


def leave_timer(vmm: Vmm) -> None:
    vmm.event_manager.call_later(0, hear)


def leave_call(vmm: Vmm) -> None:
    vmm.event_manager.remote_endpoint().fire(hear)


def leave_subscriber(vmm: Vmm) -> None:
    fd = EventFd(1)
    vmm.event_manager.on(fd)(hear)
    kept.append(fd)


def leave_hostcall(vmm: Vmm) -> None:
    vmm.hostcall(1)(lambda: 0)


def leave_ioeventfd(vmm: Vmm) -> None:
    fd = EventFd()
    vmm.add_ioeventfd(0x500, fd, pio=True)
    kept.append(fd)


def leave_thread(vmm: Vmm) -> None:
    def run() -> None:
        with contextlib.suppress(Exception):  # also what a hook of the job raises
            vmm.run(0.01)

    thread = threading.Thread(target=run, daemon=True)
    left_threads.append(thread)
    thread.start()


def leave_msrs(vmm: Vmm) -> None:
    for index in (0x200, 0x277, 0x403):
        vmm.vcpus[0].msrs[index] = 6


def leave_failure(vmm: Vmm) -> None:
    vmm.vcpus[0].regs.rip = 0xDEAD_0000
    vmm.run(ACT_S)


def leave_debugging(vmm: Vmm) -> None:
    vmm.vcpus[0].debug(single_step=True)
    vmm.run(ACT_S)


def leave_fixup(vmm: Vmm) -> None:
    vmm.memory.write(0x10000, b"\x9b" + exit_with(5))  # fwait
    vmm.run(ACT_S)


def all_of(*acts: Callable[[Vmm], object]) -> Callable[[Vmm], object]:
    return lambda vmm: [act(vmm) for act in acts]


ACTS: dict[str, Callable[[Vmm], object]] = {
    "runs": lambda vmm: vmm.run(ACT_S),
    "runs out of time": lambda vmm: vmm.run(0),
    "writes": lambda vmm: vmm.memory.write(0x10000, b"\xf4" * 4096),
    "starts": leave_running,
    "pauses": leave_paused,
    "stops": lambda vmm: vmm.stop(),
    "kicks": lambda vmm: vmm.exit_handler.kick(),
    "runs and stops": all_of(lambda vmm: vmm.run(ACT_S), lambda vmm: vmm.stop()),
    "closes": lambda vmm: vmm.close(),
    "hooks": lambda vmm: vmm.on_exit("io", hear),
    "hooks for answers": lambda vmm: vmm.on_answer("io", hear),
    "filters": lambda vmm: vmm.on_exit("msr", hear, msrs=[0x277]),
    "raises in a hook": leave_exception,
    "adds a device": lambda vmm: vmm.add_pio_device(0x500, 1, Device()),
    "adds memory": lambda vmm: vmm.memory.add(0x1000_0000, 4096),
    "removes memory": lambda vmm: vmm.memory.remove(vmm.memory.slots[0]),
    "logs": lambda vmm: setattr(vmm.memory, "log_dirty", True),
    "counts": lambda vmm: vmm.stats.enable(),
    "views": lambda vmm: kept.append(vmm.memory.view(0x3000, 16)),
    "overlays": lambda vmm: kept.append(vmm.memory.overlay(0x3000, ctypes.c_uint32)),
    "sends": lambda vmm: vmm.serial.send(b"left"),
    "timer": leave_timer,
    "call": leave_call,
    "subscriber": leave_subscriber,
    "hostcall": leave_hostcall,
    "ioeventfd": leave_ioeventfd,
    "thread": leave_thread,
    "registers": lambda vmm: vmm.vcpus[0].regs.update(rip=0x1234, rax=7),
    "mp state": lambda vmm: setattr(vmm.vcpus[0], "mp_state", 0),
    "msrs": leave_msrs,
    "nmi": lambda vmm: vmm.nmi(),
    "fails": leave_failure,
    "debugs": leave_debugging,
    "fixes up": leave_fixup,
    "steps": lambda vmm: vmm.vcpus[0].run_once(),
    "text": lambda vmm: vmm.serial.stop_at(b"a"),
    "keeps": kept.append,
    "keeps parts": lambda vmm: kept.extend((vmm.memory, vmm.serial, vmm.vcpus, vmm.vcpus[0].regs)),
    "snapshots": lambda vmm: kept.append(vmm.snapshot()),
    "raises": lambda vmm: 1 / 0,
}
CLOSES: dict[str, Callable[[Vmm], object]] = {
    "Vmm.add_ioeventfd": leave_ioeventfd,
    "Vmm.remove_ioeventfd": lambda vmm: vmm.remove_ioeventfd(0x500, EventFd(), pio=True),
    "Vmm.add_irqfd": lambda vmm: vmm.add_irqfd(EventFd(), 5),
    "Vmm.remove_irqfd": lambda vmm: vmm.remove_irqfd(EventFd(), 5),
    "Vmm.add_mmio_device": lambda vmm: vmm.add_mmio_device(0xD000_0000, 4096, Device()),
    "Vmm.remove_mmio_device": all_of(
        lambda vmm: vmm.add_mmio_device(0xD000_0000, 4096, Device()),
        lambda vmm: vmm.remove_mmio_device(0xD000_0000),
    ),
    "Vmm.add_pio_device": ACTS["adds a device"],
    "Vmm.remove_pio_device": all_of(ACTS["adds a device"], lambda vmm: vmm.remove_pio_device(0x500)),
    "Vmm.add_subscriber": lambda vmm: vmm.event_manager,
    "Vmm.remove_subscriber": lambda vmm: vmm.event_manager,
    "Vmm.event_manager": lambda vmm: vmm.event_manager,
    "Vmm.exit_handler": lambda vmm: vmm.exit_handler,
    "Vmm.hostcall": leave_hostcall,
    "Vmm.on_exit": ACTS["hooks"],
    "Vmm.off_exit": all_of(ACTS["hooks"], lambda vmm: vmm.off_exit("io", hear)),
    "Vmm.on_answer": ACTS["hooks for answers"],
    "Vmm.off_answer": all_of(ACTS["hooks for answers"], lambda vmm: vmm.off_answer("io", hear)),
    "Vmm.start": leave_running,
    "Vmm.pause": lambda vmm: vmm.pause(),
    "Vmm.resume": lambda vmm: vmm.resume(),
    "Vmm.run_async": lambda vmm: vmm.event_manager,
    "Vmm.snapshot": lambda vmm: vmm.snapshot(),
    "Vmm.stats": lambda vmm: vmm.stats.enabled,
    "Vmm.trace": lambda vmm: vmm.trace("trace"),
    "Vmm.run_until_async": lambda vmm: vmm.event_manager,
    "Serial.expect_async": lambda vmm: vmm.event_manager,
    "Serial.stop_at": lambda vmm: vmm.serial.stop_at(b"a"),
    "Serial.fileno": lambda vmm: vmm.serial.fileno(),
    "Serial.input_wanted": lambda vmm: vmm.serial.input_wanted,
    "GuestMemory.add": ACTS["adds memory"],
    "GuestMemory.remove": ACTS["removes memory"],
    "GuestMemory.log_dirty": ACTS["logs"],
    "GuestMemory.take_dirty": all_of(ACTS["logs"], lambda vmm: vmm.memory.take_dirty()),
    "GuestMemory.view": lambda vmm: vmm.memory.view(0, 1),
    "GuestMemory.overlay": lambda vmm: vmm.memory.overlay(0, ctypes.c_uint8),
    "Vcpu.answer": all_of(ACTS["steps"], lambda vmm: vmm.vcpus[0].answer(b"x")),
    "Vcpu.debug": lambda vmm: vmm.vcpus[0].debug(),
    "Vcpu.kick": lambda vmm: vmm.vcpus[0].kick(),
    "Vcpu.run_once": lambda vmm: vmm.vcpus[0].run_once(),
}

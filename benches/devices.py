"""Python as a device, an exit hook, a doorbell and a callee, each against the same exits of the bare KVM loop."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from pyvmm import EventFd, EventOps, Events, Stop, Vcpu, VcpuExit, Vmm
from pyvmm.hostcalls import PORT

from benches import bare, loop
from benches.machines import EXIT, RUNS, config, reading
from benches.measure import Result, compare

EXITS = 20_000
ANSWERS, HOP_RUNS = 50_000, 21
RINGS = 2_000
BELL = 0x30
BLOCK, TEXT = 0x8000, 0x9000


def loading(exits: int) -> bytes:
    """Read the byte after the end of memory repeatedly, in real mode, then exit."""
    return (
        b"\xb8\xff\xff\x8e\xd8"  # mov ax, 0xffff; mov ds, ax
        b"\x66\xb9" + struct.pack("<I", exits) +  # mov ecx, exits
        b"\xa0\x10\x00"  # mov al, [0x10]
        b"\x66\x49"  #     dec ecx
        b"\x75\xf9"  #     jnz back
    ) + EXIT  # fmt: skip


def calling(calls: int) -> bytes:
    """Make a hostcall repeatedly, in real mode, then exit."""
    return (
        b"\xba" + struct.pack("<H", PORT) +  #        mov dx, port
        b"\x66\xb8" + struct.pack("<I", BLOCK) +  #   mov eax, block
        b"\x66\xb9" + struct.pack("<I", calls) +  #   mov ecx, calls
        b"\x66\xef"  #                               out dx, eax
        b"\x66\x49"  #                               dec ecx
        b"\x75\xfa"  #                               jnz back
    ) + EXIT  # fmt: skip


def ringing(rings: int) -> bytes:
    """Repeatedly ring the bell and wait until the word at 0x2000 counts it, in real mode, then exit."""
    return (
        b"\xbb\x00\x00"  #             mov bx, 0
        b"\x43"  #                     ring: inc bx
        b"\xe6" + bytes([BELL]) +  #   out bell, al
        b"\x39\x1e\x00\x20"  #        wait: cmp [0x2000], bx
        b"\x75\xfa"  #                 jne wait
        b"\x81\xfb" + struct.pack("<H", rings) +  # cmp bx, rings
        b"\x75\xf1"  #                 jne ring
    ) + EXIT  # fmt: skip


class Register:
    """A device of one register."""

    def read(self, _offset: int, _size: int) -> int:
        return 0x60


class Starts:
    """A device that ends the run at its first access."""

    def read(self, _offset: int, _size: int) -> Stop:
        return Stop("ready")


def timed(code: bytes, prepare: Callable[[Vmm], object], count: int) -> float:
    """How many a second of what the guest does so often."""
    with Vmm(config(code)) as vmm:
        prepare(vmm)
        start = time.perf_counter()
        exit = vmm.run()
        seconds = time.perf_counter() - start
    assert exit.code == 0
    return count / seconds


def accesses(exits: int = EXITS, runs: int = RUNS) -> Iterator[Result]:
    """Accesses that a Python device answers."""
    pio, mmio = reading(exits).replace(b"\xba\xfd\x03", b"\xba\x00\x05"), loading(exits)

    def on_ports() -> float:
        return timed(pio, lambda vmm: vmm.add_pio_device(0x500, 1, Register()), exits)

    def on_addresses() -> float:
        return timed(mmio, lambda vmm: vmm.add_mmio_device(0x10_0000, 0x1000, Register()), exits)

    name = "bare KVM loop"
    yield compare("port to a Python device", "exits/s", on_ports, lambda: exits / bare.time_run(pio), name, 0.9, runs)
    bare_mmio = lambda: exits / bare.time_run(mmio)  # noqa: E731
    yield compare("address to a Python device", "exits/s", on_addresses, bare_mmio, name, 0.9, runs)


def hooks(exits: int = EXITS, runs: int = RUNS) -> Iterator[Result]:
    """Exits to a hook that reads two registers, and to a built-in device with a hook of another kind."""
    code = reading(exits)

    def hook(vcpu: Vcpu, exit: VcpuExit) -> int | None:
        regs = vcpu.regs
        _ = regs.rip + regs.rax
        return 0x60 if isinstance(exit, VcpuExit.IoIn) else None

    def theirs() -> float:
        return exits / bare.time_run(code)

    def hooked() -> float:
        return timed(code, lambda vmm: vmm.on_exit("io", hook), exits)

    yield compare("exit to a hook that reads 2 registers", "exits/s", hooked, theirs, "bare KVM loop", 0.85, runs)

    def unused() -> float:
        return timed(code, lambda vmm: vmm.on_exit("hlt", hook), exits)

    def without() -> float:
        return timed(code, lambda _: None, exits)

    yield compare("exit beside a hook of another kind", "exits/s", unused, without, "without hooks", 0.98, runs)


def hops(answers: int = ANSWERS, runs: int = HOP_RUNS) -> Iterator[Result]:
    """What a hop to Python costs apart from KVM: the same exit answered again and again."""

    def hook(vcpu: Vcpu, _exit: VcpuExit) -> int:
        regs = vcpu.regs
        _ = regs.rip + regs.rax
        return 0x60

    def answering(vmm: Vmm) -> Callable[[], float]:
        """Stop the guest at its first exit; then each call answers the next one repeatedly."""
        vmm.run_here()
        return lambda: vmm._time_answers(answers) / answers * 1e9

    bare_calls = lambda: bare.time_calls(Register().read, 0, 1, answers) / answers * 1e9  # noqa: E731
    name, port = "a call from C", 0x500
    code = reading(runs + 3).replace(b"\xba\xfd\x03", b"\xba\x00\x05")
    with Vmm(config(code)) as vmm:
        vmm.add_pio_device(port, 1, Starts())
        ours = answering(vmm)
        vmm.remove_pio_device(port)
        vmm.add_pio_device(port, 1, Register())
        yield compare("hop to a Python device", "ns", ours, bare_calls, name, 1 / 3, runs)
    with Vmm(config(code)) as vmm:
        vmm.add_pio_device(port, 1, Starts())
        ours = answering(vmm)
        vmm.on_exit("io", hook)
        yield compare("hop to a hook that reads 2 registers", "ns", ours, bare_calls, name, 1 / 5, runs)


def gil(answers: int = ANSWERS, runs: int = HOP_RUNS) -> Iterator[Result]:
    """Two threads that both call Python, against one: vCPUs in devices, apart from KVM, and loops."""

    def together(work: list[Callable[[], object]]) -> float:
        threads = [threading.Thread(target=one) for one in work]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    def rate(work: list[Callable[[], object]], each: int) -> float:
        return len(work) * each / together(work)

    code = reading(2 * runs + 6).replace(b"\xba\xfd\x03", b"\xba\x00\x05")
    with Vmm(config(code)) as first, Vmm(config(code)) as second:
        for vmm in (first, second):
            vmm.add_pio_device(0x500, 1, Starts())
            vmm.run_here()
            vmm.remove_pio_device(0x500)
            vmm.add_pio_device(0x500, 1, Register())
        one, other = (partial(vmm._time_answers, answers) for vmm in (first, second))
        both, alone = (lambda: rate([one, other], answers)), (lambda: rate([one], answers))
        yield compare("2 vCPUs in Python devices", "hops/s", both, alone, "1 vCPU", 0.9, runs)

    dispatching = partial(loop.pyvmm_loop, 1, 1)
    both = lambda: rate([dispatching, dispatching], loop.DISPATCHES)  # noqa: E731
    alone = lambda: rate([dispatching], loop.DISPATCHES)  # noqa: E731
    yield compare("2 loops on 2 threads", "dispatches/s", both, alone, "1 loop", 0.9, runs)


def hostcalls(calls: int = EXITS, runs: int = RUNS) -> Iterator[Result]:
    """Hostcalls with 64 bytes."""
    code = calling(calls)
    block = struct.pack("<IIqII", 0, 0, 0, 1, 0) + struct.pack("<IIQ", 2, 64, TEXT)

    def prepare(vmm: Vmm) -> None:
        vmm.memory.write(BLOCK, block)
        vmm.hostcall(len)

    bare_exits = lambda: calls / bare.time_run(code)  # noqa: E731
    ours = lambda: timed(code, prepare, calls)  # noqa: E731
    yield compare("hostcall with 64 bytes", "calls/s", ours, bare_exits, "bare KVM loop", 0.7, runs)


def doorbells(rings: int = RINGS, runs: int = RUNS) -> Iterator[Result]:
    """An ioeventfd to a subscriber, which answers in the guest's memory."""
    code = ringing(rings)

    class Answers:
        def __init__(self, vmm: Vmm, bell: EventFd) -> None:
            self.bell, self.memory, self.count = bell, vmm.memory, 0

        def init(self, ops: EventOps) -> None:
            ops.add(Events(self.bell, drain=True))

        def process(self, _events: Events, _ops: EventOps) -> None:
            self.count += 1
            self.memory.write_u16(0x2000, self.count)

    def ours() -> float:
        with EventFd() as bell:

            def prepare(vmm: Vmm) -> None:
                vmm.add_ioeventfd(BELL, bell, pio=True)
                vmm.add_subscriber(Answers(vmm, bell))

            return timed(code, prepare, rings)

    theirs = lambda: rings / bare.time_rings(code, BELL, rings)  # noqa: E731
    yield compare("ioeventfd to a Python subscriber", "rings/s", ours, theirs, "epoll in C", 0.8, runs)

"""A machine whose callbacks make calls of it, each with a deadline."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from guests import flat
from pyvmm import Vmm, VmmError

if TYPE_CHECKING:
    from collections.abc import Callable


DEADLINE_S = 60.0
OUT_FOR_EVER = b"\xba\x00\x05\xb0\x78\xee\xeb\xfd"  # mov dx, 0x500; mov al, 'x'; back: out dx, al; jmp back
CALLS: dict[str, Callable[[Vmm], Any]] = {
    "run": lambda vmm: vmm.run(0),
    "wait": lambda vmm: vmm.wait(0),
    "start": lambda vmm: vmm.start(),
    "close": lambda vmm: vmm.close(),
    "pause": lambda vmm: vmm.pause(),
    "resume": lambda vmm: vmm.resume(),
    "snapshot": lambda vmm: vmm.snapshot(),
    "nmi": lambda vmm: vmm.nmi(0),
    "registers": lambda vmm: vmm.vcpus[0].regs.rip,
}


def within(call: Callable[[], Any]) -> Any:
    """What a call that might hang returns or raises."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert result, "it hangs"
    return result[0]


class Device:
    """Calls a function at the first write, and says when it is there."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.writes = 0
        self.entered, self.go, self.returned = threading.Event(), threading.Event(), threading.Event()
        self.result: Any = None

    def write(self, _offset: int, _size: int, _value: int) -> None:
        self.writes += 1
        if self.writes == 1:
            self.entered.set()
            assert self.go.wait(DEADLINE_S)
            try:
                self.result = self.call()
            except VmmError as error:
                self.result = error
            self.returned.set()

    def save(self) -> bytes:
        return b""

    def restore(self, _state: bytes) -> None:
        pass


def machine(call: Callable[[Vmm], Any]) -> tuple[Vmm, Device]:
    vmm = Vmm(flat(OUT_FOR_EVER))
    device = Device(lambda: call(vmm))
    vmm.add_pio_device(0x500, 1, device)
    return vmm, device

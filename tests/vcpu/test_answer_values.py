"""What a hook for answers sees is what the guest has.

Covers src/vcpu/answer.rs, with src/vcpu/report.rs and src/py/answers.rs.
"""

from __future__ import annotations

import struct
from typing import Any, Literal, NamedTuple

import pytest
from guests import exit_with, flat
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import Answer, AnsweredBy, ExitAction, Vcpu, VcpuExit, Vmm

pytestmark = pytest.mark.kvm
DEADLINE_S = 60
PORTS, ADDRESSES, RESULTS = 0x600, 0xD000_0000, 0x8000
# How an access is answered, and what does it.
HOW = {
    "device": AnsweredBy.DEVICE,
    "number": AnsweredBy.HOOK,
    "bytes": AnsweredBy.HOOK,
    "vcpu": AnsweredBy.HOOK,
    "continue": AnsweredBy.HOOK,
    "nobody": AnsweredBy.NOTHING,
}


class Access(NamedTuple):
    """An access of the guest: what is written, or the answer of a read."""

    where: Literal["port", "memory"]
    is_write: bool
    size: int
    how: str
    data: bytes

    def code(self, number: int) -> bytes:
        """The access, and a copy of EAX after it to memory; 32 bits."""
        prefix, wide = b"\x66" if self.size == 2 else b"", int(self.size > 1)
        code = b"\xb8" + self.data if self.is_write else b"\x31\xc0"  # mov eax, data; or xor eax, eax
        if self.where == "port":
            opcode = (0xEE if self.is_write else 0xEC) | wide
            code += b"\xba" + struct.pack("<I", PORTS + 4 * number) + prefix + bytes([opcode])  # mov edx, port
        else:
            opcode = (0xA2 if self.is_write else 0xA0) | wide
            code += prefix + bytes([opcode]) + struct.pack("<I", ADDRESSES + 8 * number)
        return code + b"\xa3" + struct.pack("<I", RESULTS + 4 * number)  # mov [result], eax

    def answer(self, vcpu: Vcpu) -> object:
        """What the exit hook returns."""
        data = self.data[: self.size]
        if HOW[self.how] is not AnsweredBy.HOOK:
            return None
        if self.is_write or self.how == "continue":
            return ExitAction.CONTINUE
        if self.how == "vcpu":
            vcpu.answer(data)
            return ExitAction.CONTINUE
        return data if self.how == "bytes" else int.from_bytes(data, "little")


class Register:
    """Reads the bytes of an access."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, offset: int, size: int) -> bytes:
        return self.data[:size]

    def write(self, offset: int, size: int, value: int) -> None:
        pass


ACCESSES = st.lists(
    st.builds(
        Access,
        st.sampled_from(["port", "memory"]),
        st.booleans(),
        st.sampled_from([1, 2, 4]),
        st.sampled_from(sorted(HOW)),
        st.binary(min_size=4, max_size=4),
    ),
    min_size=1,
    max_size=24,
)


def number_of(exit: Any) -> int:
    if isinstance(exit, VcpuExit.IoIn | VcpuExit.IoOut):
        return (exit.port - PORTS) // 4
    return int(exit.address - ADDRESSES) // 8


def run(accesses: list[Access]) -> tuple[list[Answer], list[bytes]]:
    """The answers of each access that hooks have seen, and EAX after it."""
    code = b"".join(access.code(number) for number, access in enumerate(accesses))
    answers: dict[int, Answer] = {}

    def hook(vcpu: Vcpu, exit: Any) -> object:
        number = number_of(exit)
        return accesses[number].answer(vcpu) if number >= 0 else None  # not the exit port

    with Vmm(flat(code + exit_with(0), "protected32")) as vmm:
        for number, access in enumerate(accesses):
            if access.how == "device" and access.where == "port":
                vmm.add_pio_device(PORTS + 4 * number, 4, Register(access.data))
            elif access.how == "device":
                vmm.add_mmio_device(ADDRESSES + 8 * number, 8, Register(access.data))
        vmm.on_exit("any", hook)
        vmm.on_answer("any", lambda _vcpu, exit, answer: answers.update({number_of(exit): answer}))
        assert vmm.run(DEADLINE_S).code == 0
        registers = [vmm.memory.read(RESULTS + 4 * number, 4) for number in range(len(accesses))]
    return [answers[number] for number in range(len(accesses))], registers


@given(ACCESSES)
def test_the_data_of_an_answer_is_what_the_guest_has(accesses: list[Access]) -> None:
    for access, answer, register in zip(accesses, *run(accesses), strict=True):
        assert answer.by is HOW[access.how], access
        assert answer.data == register[: access.size], access
        assert answer.value == int.from_bytes(register[: access.size], "little")

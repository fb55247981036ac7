"""How objects look in a notebook. Covers python/pyvmm/notebook.py."""

from __future__ import annotations

import contextlib
import html
import io
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
from guests import SPIN, TRIPLE_FAULT, exit_with, flat, print_text
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import Exit, ExitReason, SerialConfig, Vmm
from pyvmm.notebook import dump

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm import VmmConfig


def rows(object: Any) -> dict[str, str]:
    """The names and values of an object's table, as a reader sees them."""
    cells = re.findall(r"<th[^>]*>(.*?)</th><td[^>]*>(.*?)</td>", object._repr_html_(), re.DOTALL)
    return {html.unescape(name): html.unescape(text) for name, text in cells}


def test_exit_shows_what_applies_and_escapes_it() -> None:
    exit = Exit(ExitReason.EXCEPTION, vcpu=0, fault="<rip>", vector=14, cr2=0x10)
    assert rows(exit) == {"reason": "exception", "vcpu": "0", "fault": "<rip>", "vector": "14", "cr2": "0x10"}
    assert "<rip>" not in exit._repr_html_()


class Hostile:
    """A value whose text is HTML."""

    def __repr__(self) -> str:
        return "<img src=x onerror='alert(1)'>"


class Broken:
    """A value without a text."""

    def __repr__(self) -> str:
        raise LookupError("none")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("1", "'1'"),
        (Hostile(), "<img src=x onerror='alert(1)'>"),
        (Broken(), "Broken, whose repr() raises LookupError"),
        (b"x" * 10_000, "b'" + "x" * 4094 + "... (10,003 characters)"),
    ],
)
def test_value_of_any_class_is_shown_and_is_no_markup(value: object, shown: str) -> None:
    exit = Exit(ExitReason.STOPPED, value=value)
    assert rows(exit)["value"] == shown
    assert "<img" not in exit._repr_html_()


@pytest.mark.kvm
def test_parts_of_registers_are_a_line_each(make: Callable[[VmmConfig], Vmm]) -> None:
    vmm = make(flat(SPIN, "long64"))
    segment = rows(vmm.vcpus[0].sregs)["cs"]
    assert segment.startswith("base 0x0  limit 0xffffffff  selector 0x")
    assert rows(vmm.vcpus[0].sregs)["efer"] == "0x500"


@pytest.mark.kvm
def test_machine_whose_guest_failed_shows_one_line_of_it(make: Callable[[VmmConfig], Vmm]) -> None:
    vmm = make(flat(TRIPLE_FAULT, "long64"))
    exit = vmm.run(60)
    assert rows(vmm)["exit"] == "shutdown (vCPU 0)"
    assert "rip 0x" in rows(exit)["fault"]


@pytest.mark.kvm
def test_machine_and_its_parts_are_tables(make: Callable[[VmmConfig], Vmm]) -> None:
    vmm = make(flat(exit_with(3)))
    vmm.run(60)
    assert rows(vmm) | {"boot": "FlatBoot", "vCPUs": "1", "exit": "code 3 (vCPU 0)"} == rows(vmm)
    assert rows(vmm.vcpus[0])["rax"].endswith("3")
    assert rows(vmm.memory)["start"].splitlines()[0].startswith("00000000  ")
    snapshot = vmm.snapshot()
    assert rows(snapshot) | {"id": snapshot.id, "vCPUs": "1"} == rows(snapshot)


@pytest.mark.kvm
def test_console_shows_its_end_without_control_characters(make: Callable[[VmmConfig], Vmm]) -> None:
    vmm = make(flat(print_text(b"<b>hi</b>\n\x1b[31mred") + exit_with(0)))
    vmm.run(60)
    assert rows(vmm.console)["tail"] == "<b>hi</b>\n\\x1b[31mred"
    assert "<b>" not in vmm.console._repr_html_()


@pytest.mark.kvm
def test_machine_that_runs_or_is_closed_says_so(make: Callable[[VmmConfig], Vmm]) -> None:
    vmm = make(flat(SPIN))
    vcpu, memory = vmm.vcpus[0], vmm.memory
    vmm.start()
    assert rows(vmm)["state"] == "running"
    assert "registers" in rows(vcpu)
    vmm.close()
    assert rows(vmm)["memory"]
    assert rows(memory)["start"]
    assert rows(vcpu)["registers"]


@pytest.mark.kvm
def test_text_stream_shows_the_output(make: Callable[[VmmConfig], Vmm]) -> None:
    """The `sys.stdout` of a notebook is text without a binary object below it."""
    cells = io.StringIO()
    with contextlib.redirect_stdout(cells):
        vmm = make(flat(print_text("é!".encode() + b"\xff") + exit_with(0), serial=SerialConfig(output=sys.stdout)))
    vmm.run(60)
    assert cells.getvalue() == "é!\ufffd"


@pytest.mark.kvm
def test_text_stream_over_a_binary_one_gets_the_bytes(make: Callable[[VmmConfig], Vmm]) -> None:
    binary = io.BytesIO()
    text = io.TextIOWrapper(binary, "ascii")
    text.write("before ")
    make(flat(print_text(b"\xff") + exit_with(0), serial=SerialConfig(output=text))).run(60)
    assert binary.getvalue() == b"before \xff"


@given(st.binary(max_size=100), st.integers(0, 2**32 - 200))
def test_dump_shows_every_byte(data: bytes, address: int) -> None:
    lines = dump(data, address).splitlines()
    shown, before = b"", b""
    for at, line in enumerate(lines):
        if line == "*":
            following = int(lines[at + 1][:8], 16)
            shown += before * ((following - address - len(shown)) // 16)
            continue
        assert int(line[:8], 16) == address + len(shown)
        before = bytes.fromhex(line[10:57].strip())
        shown += before
    assert shown == data

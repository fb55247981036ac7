"""The rust-vmm reference VMM's form of an option."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import ConfigError
from pyvmm.keyvalue import parse

KEYS: dict[str, type[str] | type[int]] = {"path": str, "cmdline": str, "kernel_load_addr": int}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("path=/vmlinux", {"path": "/vmlinux"}),
        ("path=a,kernel_load_addr=0x100000", {"path": "a", "kernel_load_addr": 0x100000}),
        (
            "path=a,cmdline=console=ttyS0,115200 panic=1",
            {"path": "a", "cmdline": "console=ttyS0,115200 panic=1"},
        ),
        ('cmdline="a,path=b c",path=d', {"cmdline": "a,path=b c", "path": "d"}),
        ("path=", {"path": ""}),
    ],
)
def test_values_are_found(text: str, values: dict[str, object]) -> None:
    assert parse("kernel", text, KEYS) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "kernel: '' is not one of path, cmdline, kernel_load_addr"),
        ("file=a", "kernel: 'file' is not one of path, cmdline, kernel_load_addr"),
        ("path=a,path=b", "kernel.path: given twice"),
        ("kernel_load_addr=high", "kernel.kernel_load_addr: 'high' is not a number"),
    ],
)
def test_bad_text_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse("kernel", text, KEYS)
    assert str(raised.value) == message


@given(st.text(alphabet='pathcmdlinekernel_load_addr=,"0 '))
def test_any_text_parses_or_is_a_config_error(text: str) -> None:
    try:
        values = parse("kernel", text, KEYS)
    except ConfigError:
        return
    assert set(values) <= set(KEYS)

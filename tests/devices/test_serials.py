"""The serial ports beside COM1, the debug port, and what they share."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import pyvmm
from guests import HALT, exit_with, flat, out, read_in
from port_script import answers, machine, read, run, write
from pyvmm import ConfigError, Console, KvmVm, PlatformConfig, SerialConfig, Snapshot, StateError, StreamError, Vmm

pytestmark = pytest.mark.kvm
DEADLINE_S = 60.0
PORTS = {"com1": 0x3F8, "com2": 0x2F8, "com3": 0x3E8, "com4": 0x2E8, "debug_port": 0x402}
ALL: dict[str, Any] = {
    "com2": SerialConfig(),
    "com3": SerialConfig(),
    "com4": SerialConfig(),
    "platform": PlatformConfig(debug_port=True),
}
PRINTS_ON_ALL = b"".join(out(port, ord(letter)) for port, letter in zip(PORTS.values(), "12345", strict=True))


def test_each_port_prints_to_itself() -> None:
    with Vmm(flat(PRINTS_ON_ALL + exit_with(0), **ALL)) as vmm:
        assert list(vmm.serials) == list(PORTS)
        assert vmm.serials["com1"] is vmm.serial
        assert vmm.serials["com2"] is vmm.serials["com2"]
        assert vmm.run(DEADLINE_S).code == 0
        assert [port.take_output() for port in vmm.serials.values()] == [b"1", b"2", b"3", b"4", b"5"]
        assert vmm.console.text == "1"
        assert Console(vmm.serials["debug_port"]).text == "5"


def test_a_small_machine_has_one_port_and_a_pc_the_debug_port_too() -> None:
    with Vmm(flat(HALT)) as vmm:
        assert list(vmm.serials) == ["com1"]
    assert answers(read(0x2F8), read(0x402)) == [0xFF, 0xFF]
    assert answers(read(0x402), platform=PlatformConfig(debug_port=True)) == [0xE9]
    assert answers(read(0x402), debugcon=SerialConfig()) == [0xE9]


def test_each_port_has_its_own_registers_and_input() -> None:
    steps = [write(base + 7, base >> 4 & 0xFF) for base in (0x3F8, 0x2F8, 0x3E8, 0x2E8)]
    steps += [read(base + at) for base in (0x3F8, 0x2F8, 0x3E8, 0x2E8) for at in (7, 5, 0)]
    with machine(steps, **ALL) as vmm:
        vmm.serials["com3"].send(b"x")
        assert run(vmm, steps) == [0x3F, 0x60, 0, 0x2F, 0x60, 0, 0x3E, 0x61, ord("x"), 0x2E, 0x60, 0]


def test_the_resources_name_them() -> None:
    with Vmm(flat(HALT, irqchip=True, **ALL)) as vmm:
        found = {(r.kind, r.start, r.length, r.name) for r in vmm.resources}
    assert {("pio", 0x2F8, 8, "com2"), ("gsi", 3, 1, "com2"), ("gsi", 4, 1, "com3"), ("gsi", 3, 1, "com4")} <= found
    assert ("pio", 0x402, 1, "debug_port") in found


@pytest.mark.parametrize("port", ["com2", "com3", "com4", "debugcon"])
def test_streams_of_every_kind(port: str, tmp_path: Path) -> None:
    base = PORTS["debug_port" if port == "debugcon" else port]
    code = b"".join(out(base, byte) for byte in b"hello") + exit_with(0)
    heard = io.BytesIO()
    called: list[bytes] = []
    file = tmp_path / "out"
    outputs: list[Any] = [file, heard, called.append]
    for output in outputs:
        config: dict[str, Any] = {port: SerialConfig(output=output)}
        with Vmm(flat(code, **config)) as vmm:
            assert vmm.run(DEADLINE_S).code == 0
    assert file.read_bytes() == heard.getvalue() == b"".join(called) == b"hello"
    with pytest.raises(StreamError, match=f"{port}.output"):
        Vmm(flat(code).replace(**{port: SerialConfig(output=tmp_path / "none" / "out")}))


def test_input_from_python_reaches_its_port() -> None:
    poll = b"\xba\xfd\x02\xec\xa8\x01\x74\xf8" + read_in(0x2F8) + b"\xe6\xf4"  # wait for COM2; out 0xf4, al
    with Vmm(flat(poll, com2=SerialConfig(input=b"A"))) as vmm:
        assert vmm.run(DEADLINE_S).code == ord("A")


def test_expect_and_stop_at_work_on_each_port() -> None:
    code = b"".join(out(0x2E8, byte) for byte in b"login: ") + b"\xeb\xfe"
    with Vmm(flat(code, com4=SerialConfig())) as vmm:
        assert vmm.serials["com4"].expect("login: ", DEADLINE_S).matched == "login: "
        vmm.stop()
        vmm.wait(DEADLINE_S)
    with Vmm(flat(code, com4=SerialConfig())) as vmm:
        vmm.serials["com4"].stop_at(b"log")
        exit = vmm.run(DEADLINE_S)
        assert (exit.reason, exit.value) == ("stopped", b"log")


def test_snapshots_forks_and_files_have_them(tmp_path: Path) -> None:
    code = PRINTS_ON_ALL + HALT + read_in(0x2FF) + b"\xe6\xf4"
    with Vmm(flat(out(0x2FF, 0x77) + code, **ALL)) as vmm:
        vmm.run(DEADLINE_S)
        vmm.serials["com2"].send(b"waits")
        snapshot = vmm.snapshot()
        snapshot.save(tmp_path / "file")
        loaded = Snapshot.load(tmp_path / "file")
        for origin in (snapshot, loaded):
            with origin.fork() as fork:
                assert [port.take_output() for port in fork.serials.values()] == [b"1", b"2", b"3", b"4", b"5"]
                assert fork.serials["com2"].input_waiting == 5
                assert fork.run(DEADLINE_S).code == 0x77
                fork.reset(origin)
                assert fork.run(DEADLINE_S).code == 0x77
    with Vmm(flat(HALT)) as other, pytest.raises(StateError, match="com2"):
        other.reset(snapshot)


# COM1 and COM3 interrupt on line 4. Each interrupt handles COM1 if it has input, otherwise COM3,
# and stores what it reads at 0x3002 and on; the count is at 0x3000. LEVEL makes line 4
# level-triggered.
HANDLER = (
    b"\x50\x52\x53"  #                       push ax; push dx; push bx
    b"\xba\xfa\x03\xec\xa8\x01\xba\xf8\x03"  # mov dx, 0x3fa; in al, dx; test al, 1; mov dx, 0x3f8
    b"\x74\x03\xba\xe8\x03"  #             jz it; mov dx, 0x3e8
    b"\xec"  #                              it: in al, dx
    b"\x8b\x1e\x00\x30\x88\x87\x02\x30"  # mov bx, [0x3000]; mov [bx + 0x3002], al
    b"\xff\x06\x00\x30"  #               inc word [0x3000]
    b"\xb0\x20\xe6\x20\x5b\x5a\x58\xcf"  # mov al, 0x20; out 0x20, al; pop bx; pop dx; pop ax; iret
)
SET_UP = (
    b"\xfa\x31\xc0\x8e\xd8\x8e\xd0\xbc\x00\x70"  # cli; xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7000
    b"\xc7\x06\x30\x00\x00\x20\xc7\x06\x32\x00\x00\x00"  # the vector of IRQ 4 is 0:0x2000
    b"\xb0\x11\xe6\x20\xb0\x08\xe6\x21\xb0\x04\xe6\x21\xb0\x01\xe6\x21"  # the PIC: vectors from 8
    b"\xb0\xef\xe6\x21"  # only IRQ 4
)
LEVEL = b"\xba\xd0\x04\xb0\x10\xee"  # mov dx, 0x4d0; mov al, 0x10; out dx, al: the PIC's trigger mode


@pytest.mark.parametrize("trigger", [b"", LEVEL], ids=["edge", "level"])
def test_ports_that_share_a_line_each_interrupt(trigger: bytes) -> None:
    wait = b"\xfb\xf4\xfa\x83\x3e\x00\x30\x06\x72\xf6"  # sti; hlt; cli; cmp word [0x3000], 6; jb
    code = SET_UP + trigger + out(0x3F9, 1) + out(0x3E9, 1) + wait + exit_with(0)
    with Vmm(flat(code, irqchip=True, com3=SerialConfig())) as vmm:
        vmm.memory.write(0x2000, HANDLER)
        vmm.serial.send(b"abc")
        vmm.serials["com3"].send(b"xyz")
        assert vmm.run(DEADLINE_S).code == 0
        assert bytes(sorted(vmm.memory.read(0x3002, 6))) == b"abcxyz"


def test_a_kvm_vm_has_them_without_streams() -> None:
    with pytest.raises(ConfigError, match="a KvmVm has no event loop"):
        KvmVm(flat(HALT, com2=SerialConfig(output=sys.__stdout__)))


def test_the_command_line_writes_files(tmp_path: Path) -> None:
    (tmp_path / "guest").write_bytes(PRINTS_ON_ALL + exit_with(0))
    options = [text for port in ("com2", "com3", "com4", "debugcon") for text in (f"--{port}", str(tmp_path / port))]
    done = pyvmm("run", "--flat", tmp_path / "guest", *options)
    assert (done.returncode, done.stdout) == (0, b"1")
    assert [(tmp_path / port).read_bytes() for port in ("com2", "com3", "com4", "debugcon")] == [b"2", b"3", b"4", b"5"]

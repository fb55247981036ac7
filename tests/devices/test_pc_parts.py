"""The parts of a PC as a flat guest sees them: how it powers off, resets and panics, by Python and the command line.

Covers src/vmm/devices.rs.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from command_line import pyvmm
from guests import HALT, SPIN, TRIPLE_FAULT, elf, exit_with, flat, keeps_fault_state, out, read_in
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import (
    ConfigError,
    ExitReason,
    LinuxBoot,
    MemoryConfig,
    PlatformConfig,
    Snapshot,
    StateError,
    Stop,
    Unanswered,
    Vmm,
    VmmConfig,
)

if TYPE_CHECKING:
    from pathlib import Path

kvm = pytest.mark.kvm
ALL = PlatformConfig(acpi=True, pvpanic=True, reset_ports=True)
PVPANIC, RESET_CONTROL, SYSTEM_CONTROL = 0x505, 0xCF9, 0x92
SHOW = b"\xe6\xf4"  # out 0xf4, al

ENDS = {
    "a panic": (out(PVPANIC, 1), ExitReason.PANIC, 122),
    "a panic with other bits": (out(PVPANIC, 0xFF), ExitReason.PANIC, 122),
    "a shutdown": (out(PVPANIC, 4), ExitReason.POWEROFF, 0),
    "port 0xcf9, a hard reset": (out(RESET_CONTROL, 2) + out(RESET_CONTROL, 6), ExitReason.RESET, 121),
    "port 0xcf9, a power cycle": (out(RESET_CONTROL, 0xE), ExitReason.RESET, 121),
    "port 0x92": (out(SYSTEM_CONTROL, 3), ExitReason.RESET, 121),
    "keyboard controller": (out(0x64, 0xFE), ExitReason.RESET, 121),
    "ACPI": (b"\xba\x04\x06\xb8\x00\x20\xef", ExitReason.POWEROFF, 0),  # mov dx, 0x604; mov ax, 0x2000; out dx, ax
    "ACPI, the byte": (out(0x605, 0x20), ExitReason.POWEROFF, 0),
}


@kvm
@pytest.mark.parametrize("how", ENDS)
def test_each_way_to_end_has_its_reason_and_status(how: str, tmp_path: Path) -> None:
    code, reason, status = ENDS[how]
    with Vmm(flat(code + SPIN, platform=ALL)) as vmm:
        exit = vmm.run(60)
        assert (exit.reason, exit.vcpu, exit.fault) == (reason, 0, None)
    config, program = tmp_path / "vm.toml", tmp_path / "code"
    program.write_bytes(code + SPIN)
    config.write_text("[platform]\nacpi = true\npvpanic = true\nreset_ports = true\n")
    done = pyvmm("run", "--flat", program, "--config", config, "--timeout", "60")
    assert (done.returncode, done.stderr) == (status, b"")


@kvm
def test_triple_fault_without_an_idt_is_a_reset_and_any_other_a_fault(tmp_path: Path) -> None:
    program, config = tmp_path / "code", tmp_path / "vm.toml"
    config.write_text("boot = {type = 'flat', path = 'code', mode = 'long64'}\n")
    lidt = b"\x0f\x01\x1c\x25\x00\x20\x00\x00"  # lidt [0x2000], which is zeros
    for code, reason, status in ((lidt + TRIPLE_FAULT, "reset", 121), (TRIPLE_FAULT, "shutdown", 120)):
        program.write_bytes(code)
        done = pyvmm("run", "--config", config, "--timeout", "60", "--json")
        values = json.loads(done.stdout)
        if reason == "reset" and values["fault"] and not keeps_fault_state(values["fault"]):
            pytest.skip("kvm-amd does not keep the IDT of a triple fault")
        assert (values["reason"], done.returncode) == (reason, status)


@kvm
def test_reset_needs_its_bit_and_the_registers_read_back() -> None:
    code = out(RESET_CONTROL, 2) + out(SYSTEM_CONTROL, 0) + out(PVPANIC, 2) + read_in(RESET_CONTROL)
    with Vmm(flat(code + SHOW, platform=ALL)) as vmm:
        assert vmm.run(60).code == 2
    for port, value in ((SYSTEM_CONTROL, 2), (PVPANIC, 7)):
        with Vmm(flat(read_in(port) + SHOW, platform=ALL)) as vmm:
            assert vmm.run(60).code == value


@kvm
def test_other_machines_have_no_such_ports_unless_asked() -> None:
    code = out(PVPANIC, 1) + out(RESET_CONTROL, 6) + out(SYSTEM_CONTROL, 1) + exit_with(7)
    with Vmm(flat(code, irqchip=True)) as vmm:
        assert vmm.run(60).code == 7
        ports = [SYSTEM_CONTROL, PVPANIC, RESET_CONTROL]
        assert vmm.unanswered == [Unanswered("pio", port, 0, 1) for port in ports]
    with Vmm(flat(code, platform=PlatformConfig(pvpanic=True))) as vmm:
        assert vmm.run(60).reason is ExitReason.PANIC
        assert "pvpanic" in {resource.name for resource in vmm.resources}


def test_exit_port_at_a_part_that_is_asked_for_is_refused() -> None:
    for port in (PVPANIC - 3, PVPANIC):
        flat(HALT, exit_port=port).check()
        with pytest.raises(ConfigError, match=r"^exit_port: .* overlaps pvpanic"):
            flat(HALT, exit_port=port, platform=PlatformConfig(pvpanic=True)).check()


@pytest.mark.parametrize("value", ["yes", 1, []])
def test_a_part_is_there_or_not(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^platform\.acpi: Expected `bool \| null`"):
        VmmConfig.from_dict({"platform": {"acpi": value}})
    with pytest.raises(ConfigError, match=r"^platform\.acpi: expected True, False or None"):
        flat(HALT, platform=PlatformConfig(acpi=value)).check()  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^platform\.apic: unknown key; did you mean acpi\?"):
        VmmConfig.from_dict({"platform": {"apic": True}})
    with pytest.raises(ConfigError, match=r"^platform: expected a PlatformConfig"):
        flat(HALT, platform=value).check()


@kvm
def test_parts_and_their_state_are_in_snapshots_and_files(tmp_path: Path) -> None:
    code = out(RESET_CONTROL, 2) + HALT + read_in(RESET_CONTROL) + SHOW + out(PVPANIC, 1)
    with Vmm(flat(code, platform=ALL)) as vmm:
        assert vmm.run(60).reason is ExitReason.HALT
        snapshot = vmm.snapshot()
        snapshot.save(tmp_path / "file")
        vmm.reset(snapshot)
        assert vmm.run(60).code == 2
    loaded = Snapshot.load(tmp_path / "file")
    assert loaded.config.platform == ALL
    assert Snapshot.inspect(tmp_path / "file")["parts"] == ["acpi", "pvpanic", "reset_ports"]
    for kept in (snapshot, loaded):
        with kept.fork() as fork:
            assert fork.run(60).code == 2
    with Vmm(flat(code)) as other, pytest.raises(StateError, match="the parts of a PC none, the snapshot acpi"):
        other.reset(snapshot)


@kvm
def test_part_by_default_gives_way_to_a_device_of_the_program_and_one_that_is_asked_for_stays(tmp_path: Path) -> None:
    class Register:
        def write(self, offset: int, size: int, value: int) -> Stop:
            return Stop((offset, value))

        def save(self) -> bytes:
            return b""

        def restore(self, state: bytes) -> None:
            assert state == b""

    code = b"\xba\x05\x05\x00\x00\xb0\x01\xee" + HALT  # mov edx, 0x505; mov al, 1; out dx, al
    (tmp_path / "kernel").write_bytes(elf(0x100000, code))
    config = VmmConfig(boot=LinuxBoot(tmp_path / "kernel"), memory=MemoryConfig(size_mib=16))
    with Vmm(config) as vmm:
        assert vmm.run(60).reason is ExitReason.PANIC
    with Vmm(config) as vmm:
        vmm.add_pio_device(PVPANIC - 1, 4, Register())
        assert "pvpanic" not in {resource.name for resource in vmm.resources}
        assert {"acpi", "reset_ports"} <= {resource.name for resource in vmm.resources}
        with pytest.raises(ConfigError, match="overlaps i8042"):
            vmm.add_pio_device(0x64, 0xD00, Register())
        assert "reset_ports" in {resource.name for resource in vmm.resources}, "nothing is taken out for a refusal"
        snapshot = vmm.snapshot()
        assert vmm.run(60).value == (1, 1)
        with snapshot.fork(setup=lambda fork: fork.add_pio_device(PVPANIC - 1, 4, Register())) as fork:
            assert fork.run(60).value == (1, 1)
            with pytest.raises(ConfigError, match="overlaps acpi"):
                fork.add_pio_device(0x600, 1, Register())
    with Vmm(flat(out(PVPANIC, 1), platform=ALL)) as vmm, pytest.raises(ConfigError, match="overlaps pvpanic"):
        vmm.add_pio_device(PVPANIC - 1, 4, Register())


def access(port: int, size: int, value: int | None) -> bytes:
    """Real mode: write a port, or read it if there is no value."""
    prefix = b"\x66" if size == 4 else b""
    to_dx = b"\xba" + port.to_bytes(2, "little")
    if value is None:
        return to_dx + prefix + (b"\xec" if size == 1 else b"\xed")
    load = b"\xb0" if size == 1 else b"\xb8"
    data = (value % (1 << 8 * size)).to_bytes(size, "little")
    return to_dx + prefix + load + data + prefix + (b"\xee" if size == 1 else b"\xef")


PORTS = st.sampled_from([*range(0x5FE, 0x60E), *range(0x503, 0x507), *range(0xCF8, 0xD00), *range(0x90, 0x95)])


@kvm
@given(st.lists(st.tuples(PORTS, st.sampled_from([1, 2, 4]), st.none() | st.integers(0, 2**32 - 1)), max_size=30))
def test_no_access_does_more_than_end_the_run(accesses: list[tuple[int, int, int | None]]) -> None:
    code = b"".join(access(*one) for one in accesses) + exit_with(9)
    with Vmm(flat(code, platform=ALL)) as vmm:
        exit = vmm.run(60)
        assert exit.reason in (ExitReason.CODE, ExitReason.RESET, ExitReason.POWEROFF, ExitReason.PANIC)
        with vmm.snapshot().fork() as fork:
            assert fork.vcpus[0].regs.rip == vmm.vcpus[0].regs.rip


@kvm
def test_power_management_timer_counts_and_continues_in_a_fork() -> None:
    read = b"\xba\x08\x06\x66\xed"  # mov dx, 0x608; in eax, dx
    store = b"\x66\xa3\x00\x20" + read + b"\x66\xa3\x04\x20"  # mov [0x2000], eax; ...; mov [0x2004], eax
    with Vmm(flat(read + store + HALT + read + b"\x66\xa3\x08\x20" + HALT, platform=ALL)) as vmm:
        vmm.run(60)
        first, second = (int.from_bytes(vmm.memory.read(at, 4), "little") for at in (0x2000, 0x2004))
        with vmm.snapshot().fork() as fork:
            fork.run(60)
            third = int.from_bytes(fork.memory.read(0x2008, 4), "little")
    assert first <= second <= third < 3_579_545 * 60


@kvm
def test_a_file_of_a_machine_without_parts_is_as_it_was(tmp_path: Path) -> None:
    with Vmm(flat(HALT)) as vmm:
        vmm.snapshot().save(tmp_path / "file")
    records = Snapshot.inspect(tmp_path / "file")["records"]
    assert records[0] == ("machine", 0, 8)

"""Fix-ups as the program sees them: counts, exits that stay, hooks, kicks, and machines without them.

Covers src/fixup/cpu.rs.
"""

from __future__ import annotations

import pytest
from fixup_guests import needs_software_kvm
from guests import FWAIT_FOREVER, TRIPLE_FAULT, Mode, exit_with, flat, keeps_fault_state
from pyvmm import CpuConfig, Exit, ExitAction, ExitReason, KvmVm, Vcpu, VcpuExit, Vmm, kvm_info

pytestmark = pytest.mark.kvm
FIXUPS = CpuConfig(fixups=True)
CODE = 0x10000
DATA = 0x20000


def test_counts_say_what_was_executed_here() -> None:
    code = bytes.fromhex("f3 48 0f b8 c3 f3 48 0f b8 c3 9b")  # popcnt rax, rbx twice; fwait
    with Vmm(flat(code + exit_with(3), "long64", cpu=FIXUPS)) as vmm:
        assert vmm.fixups == {}
        assert vmm.run(10) == Exit(ExitReason.CODE, 3, 0)
        expected = {"popcnt": 2, "fwait": 1} if kvm_info()["software_kvm"] else {}
        assert vmm.fixups == expected
    assert vmm.fixups == expected


def test_without_fixups_the_exit_stays() -> None:
    needs_software_kvm()
    with Vmm(flat(bytes.fromhex("f3 48 0f b8 46 08"), "long64")) as vmm:
        exit = vmm.run(10)
        assert vmm.fixups == {}
    assert exit.reason is ExitReason.INTERNAL_ERROR
    assert exit.fault is not None
    assert "instruction at 0x1000: popcnt rax, [rsi+8]\ninstruction bytes: f3 48 0f b8 46 08" in exit.fault


@pytest.mark.parametrize(
    ("code", "text"),
    [("66 0f f7 c1", "maskmovdqu xmm0, xmm1"), ("f3 0f b8 04 25 00 00 00 60", "popcnt eax, [0x60000000]")],
    ids=["no-fix-up", "no-memory"],
)
def test_what_has_no_fixup_stays_an_exit_and_changes_nothing(code: str, text: str) -> None:
    needs_software_kvm()
    with Vmm(flat(bytes.fromhex(code), "long64", cpu=FIXUPS)) as vmm:
        exit = vmm.run(10)
        assert (exit.reason, vmm.fixups) == (ExitReason.INTERNAL_ERROR, {})
        assert exit.fault is not None
        assert text in exit.fault
        assert vmm.vcpus[0].regs.rip == 0x1000


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("real16", "popcnt ax, [bx+si+0x66]"),
        ("protected32", "popcnt eax, [eax+0x66]"),
        ("long64", "popcnt eax, [rax+0x66]"),
    ],
)
def test_instruction_is_read_with_the_bits_of_its_mode(mode: Mode, text: str) -> None:
    needs_software_kvm()
    with Vmm(flat(b"\xf3\x0f\xb8\x40\x66", mode)) as vmm:
        exit = vmm.run(10)
    assert exit.fault is not None
    assert f"instruction at 0x1000: {text}\n" in exit.fault


def test_other_faults_show_the_instruction_from_memory() -> None:
    with Vmm(flat(TRIPLE_FAULT, "long64")) as vmm:
        exit = vmm.run(10)
    assert exit.reason is ExitReason.SHUTDOWN
    assert exit.fault is not None
    if keeps_fault_state(exit.fault):
        assert "instruction at 0x100a: mov [rax], al\ninstruction bytes: 88 00" in exit.fault


def test_typed_exit_has_the_instruction_and_the_registers() -> None:
    needs_software_kvm()
    vm = KvmVm()
    vm.memory.add(0, 0x10000)
    vm.memory.write(0x1230, b"\xd9\xe8")  # fld1
    vcpu = vm.create_vcpu()
    vcpu.sregs.update(cs={"selector": 0x100, "base": 0x1000})
    vcpu.regs.update(rip=0x230, rbx=77, rflags=2)
    exit = vcpu.run_once()
    assert isinstance(exit, VcpuExit.InternalError)
    assert (exit.suberror, exit.disassembly, exit.instruction[:2]) == (1, "fld1", b"\xd9\xe8")
    assert (exit.registers["rbx"], exit.registers["rip"], exit.registers["cs"]) == (77, 0x230, 0x100)


def test_vcpu_driven_by_hand_has_fixups_too() -> None:
    code = bytes.fromhex("f3 48 0f b8 c3") + exit_with(3)  # popcnt rax, rbx
    with Vmm(flat(code, "long64", cpu=FIXUPS)) as vmm:
        (vcpu,) = vmm.vcpus
        vcpu.regs.rbx = 7
        assert isinstance(vcpu.run_once(), VcpuExit.IoOut)
        assert vcpu.regs.rip == 0x1000 + len(code)


@pytest.mark.parametrize("code", [b"\x0f\x01\xcb", b"\x66\x0f\xf7\xc1"], ids=["stac", "maskmovdqu"])
def test_hook_sees_what_is_left_to_it_and_may_go_on(code: bytes) -> None:
    """With fix-ups a hook is asked for what has none; without, for all that KVM refuses."""
    needs_software_kvm()
    seen: list[str | None] = []

    def skip(vcpu: Vcpu, exit: VcpuExit) -> ExitAction:
        assert isinstance(exit, VcpuExit.InternalError)
        seen.append(exit.disassembly)
        assert exit.registers["rip"] == vcpu.regs.rip
        vcpu.regs.rip += len(code)
        return ExitAction.CONTINUE

    for fixups in (False, True):
        with Vmm(flat(code + exit_with(5), "long64", cpu=CpuConfig(fixups=fixups))) as vmm:
            vmm.on_exit("internal-error", skip)
            assert vmm.run(10) == Exit(ExitReason.CODE, 5, 0)
    assert seen == (["stac"] if code[1] == 1 else ["maskmovdqu xmm0, xmm1"] * 2)


def test_kick_and_timeout_end_a_guest_that_does_nothing_but_fixups() -> None:
    with Vmm(flat(FWAIT_FOREVER, "long64", cpu=FIXUPS)) as vmm:
        assert vmm.run(0.2) == Exit(ExitReason.TIMEOUT)
        vmm.start()
        vmm.pause()
        assert vmm.vcpus[0].regs.rip in (0x1000, 0x1001)
        vmm.resume()
        vmm.stop()
        assert vmm.wait(10) == Exit(ExitReason.STOPPED)


def test_pages_that_a_fixup_writes_are_dirty() -> None:
    code = bytes.fromhex("0f ae 1e 48 0f c7 4e 40")  # stmxcsr [rsi]; cmpxchg16b [rsi+64]
    with Vmm(flat(code + exit_with(0), "long64", address=CODE, cpu=FIXUPS)) as vmm:
        vmm.memory.log_dirty = True
        vmm.vcpus[0].regs.update(rsi=DATA + 0xFC0, rax=0, rdx=0)
        assert vmm.run(10).code == 0
        ranges = vmm.memory.take_dirty().ranges
        assert all(any(start <= page < start + size for start, size in ranges) for page in (DATA, DATA + 0x1000))


def test_two_processors_exchange_16_bytes_one_after_the_other() -> None:
    """Each adds 1 to a counter of 128 bits 300 times; the one that comes last exits."""
    code = bytes.fromhex(
        "be 00 00 02 00"  #        mov esi, DATA
        "bf 2c 01 00 00"  #        mov edi, 300
        "48 8b 06"  #       again: mov rax, [rsi]
        "48 8b 56 08"  #           mov rdx, [rsi+8]
        "48 8d 58 01"  #    retry: lea rbx, [rax+1]
        "48 89 d1"  #              mov rcx, rdx
        "f0 48 0f c7 0e"  #        lock cmpxchg16b [rsi]
        "75 f2"  #                 jne retry
        "ff cf"  #                 dec edi
        "75 e7"  #                 jne again
        "b8 01 00 00 00"  #        mov eax, 1
        "f0 0f c1 46 20"  #        lock xadd [rsi+32], eax
        "85 c0"  #                 test eax, eax
        "74 04"  #                 jz wait
        "b0 07 e6 f4"  #           mov al, 7; out 0xf4, al
        "f3 90 eb fc"  #    wait:  pause; jmp wait
    )
    config = flat(code, "long64", address=CODE, cpu=CpuConfig(vcpus=2, fixups=True))
    with Vmm(config) as vmm:
        assert vmm.run(60).code == 7
        assert vmm.memory.read_u64(DATA) == 600


def test_debugger_steps_over_each_instruction_that_a_fixup_executes() -> None:
    code = bytes.fromhex("90 f3 48 0f b8 c3 0f 58 c1 0f 58 c1 90")  # nop; popcnt rax, rbx; addps xmm0, xmm1 twice; nop
    with Vmm(flat(code + exit_with(0), "long64", address=CODE, cpu=FIXUPS)) as vmm:
        (vcpu,) = vmm.vcpus
        vcpu.sregs.cr4 |= 1 << 9
        vcpu.debug(single_step=True)
        steps = [(type(vcpu.run_once()), vcpu.regs.rip - CODE) for _ in range(5)]
        assert steps == [(VcpuExit.Debug, rip) for rip in (1, 6, 9, 12, 13)]

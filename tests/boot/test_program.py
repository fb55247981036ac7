"""ELF programs: what is mapped with which permissions, and exceptions as data.

Covers src/cpu/exceptions.rs, src/cpu/paging.rs, src/vcpu/exception.rs, src/py/symbols.rs.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from guests import elf
from programs import DEADLINE_S, START, build, machine, run
from pyvmm import (
    BootError,
    ConfigError,
    CpuConfig,
    ElfBoot,
    Exit,
    ExitReason,
    KvmVm,
    MemoryConfig,
    Snapshot,
    StateError,
    Vmm,
    VmmConfig,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm
DIVIDE, BREAKPOINT, INVALID, STACK, PROTECTION, PAGE = 0, 3, 6, 12, 13, 14
USER, WRITE, PRESENT, FETCH = 4, 2, 1, 16
ASM = "int run(void) { __asm__ volatile(%s); return 0; }"


def crash(folder: Path, body: str, *flags: str) -> Exit:
    """What comes of a program that calls `crash`, whose body this is."""
    function = f"__attribute__((noinline)) int crash(void) {{ {body} return 0; }}"
    source = f"{START} {function} int run(void) {{ crash(); return 1; }}"
    exit = run(build(folder, source, *flags))
    assert exit.reason is ExitReason.EXCEPTION, exit
    assert exit.symbol == "crash"
    assert exit.is_fault
    assert exit.code is None
    assert exit.vcpu == 0
    return exit


def test_program_runs_with_its_data_and_ends_with_its_code(tmp_path: Path) -> None:
    source = (
        START
        + """
    static int zeros[5000], data[] = {40, 2}; const char text[] = "abc";
    int run(void) { zeros[4999] += data[0]; return zeros[4999] + data[1] + (text[2] == 'c') - 1; }"""
    )
    assert run(build(tmp_path, source)) == Exit(ExitReason.CODE, 42, 0)


def test_program_starts_with_an_aligned_stack_and_no_arguments(tmp_path: Path) -> None:
    source = """
    __asm__(".globl _start\\n_start: mov (%rsp), %rax; or 8(%rsp), %rax; or 16(%rsp), %rax; or 24(%rsp), %rax\\n"
            "mov %rsp, %rcx; and $15, %ecx; or %rcx, %rax; or %rdi, %rax; out %eax, $0xf4");"""
    assert run(build(tmp_path, source)).code == 0


@pytest.mark.parametrize(
    ("instruction", "vector", "error_code"),
    [
        ('"xor %%ecx, %%ecx; div %%ecx" ::: "eax", "ecx", "edx"', DIVIDE, None),
        ('"ud2"', INVALID, None),
        ('"int3"', BREAKPOINT, None),
        ('"hlt"', PROTECTION, 0),
        ('"cli"', PROTECTION, 0),
        ('"movabs $0x800000000000, %%rax; mov (%%rax), %%al" ::: "rax"', PROTECTION, 0),
        ('"mov %%rax, %%cr3" ::: "memory"', PROTECTION, 0),
        ('"mov $1, %%ecx; rdmsr" ::: "eax", "ecx", "edx"', PROTECTION, 0),
    ],
)
def test_instruction_that_faults_is_an_exit_with_its_vector(
    instruction: str, vector: int, error_code: int | None, tmp_path: Path
) -> None:
    exit = crash(tmp_path, f"__asm__ volatile({instruction});")
    assert (exit.vector, exit.error_code, exit.cr2) == (vector, error_code, None)


@pytest.mark.parametrize("number", [14, 32, 0x80])
def test_software_interrupt_is_an_exception(number: int, tmp_path: Path) -> None:
    exit = crash(tmp_path, f'__asm__ volatile("int ${number}");')
    # A KVM that emulates ring 0 may give the latter, and an emulated processor another number.
    assert exit.vector in {PROTECTION, INVALID}
    assert exit.error_code is None or exit.error_code & 7 == 2


def test_jump_to_what_is_no_address_is_a_protection_fault(tmp_path: Path) -> None:
    source = START + 'int run(void) { __asm__ volatile("movabs $0x800000000000, %rax; jmp *%rax"); return 1; }'
    exit = run(build(tmp_path, source))
    assert (exit.reason, exit.vector, exit.error_code) == (ExitReason.EXCEPTION, PROTECTION, 0)
    # Some processors report the jump, others its target.
    assert exit.symbol == "run" or (exit.rip, exit.symbol) == (0x8000_0000_0000, None)


def test_system_call_is_an_exception(tmp_path: Path) -> None:
    exit = run(build(tmp_path, START + 'int run(void) { __asm__ volatile("syscall"); return 1; }'))
    assert exit.reason is ExitReason.EXCEPTION
    # A KVM that emulates ring 0 may enter a kernel that is not there.
    assert (exit.vector, exit.symbol) in {(INVALID, "run"), (PAGE, None)}


@pytest.mark.parametrize(
    ("body", "address", "error_code"),
    [
        ("return *(volatile char *)0;", 0, USER),
        ("return *(volatile char *)0xfff;", 0xFFF, USER),
        ("*(volatile char *)16 = 1;", 16, USER | WRITE),
        ("*(volatile char *)0x80000 = 1;", 0x80000, USER | WRITE | PRESENT),  # the GDT
        ("*(volatile char *)0x87000 = 1;", 0x87000, USER | WRITE | PRESENT),  # the IDT
        ("*(volatile char *)0x84000 = 1;", 0x84000, USER | WRITE),  # the page tables
        ("return *(volatile char *)0x86ff0;", 0x86FF0, USER | PRESENT),  # the exceptions' stack
        ("*(volatile char *)0x700000 = 1;", 0x700000, USER | WRITE),
        ("*(volatile char *)0x100000000 = 1;", 0x100000000, USER | WRITE),
        ("*(volatile char *)0xffffffff80000000 = 1;", 0xFFFFFFFF80000000, USER | WRITE),
    ],
)
def test_access_to_what_a_program_has_not_is_a_page_fault(
    body: str, address: int, error_code: int, tmp_path: Path
) -> None:
    exit = crash(tmp_path, body)
    assert (exit.vector, exit.cr2, exit.error_code) == (PAGE, address, error_code)


def test_jump_to_null_is_a_page_fault_there(tmp_path: Path) -> None:
    exit = run(build(tmp_path, START + "int run(void) { return ((int (*volatile)(void))0)(); }"))
    assert (exit.reason, exit.vector, exit.rip, exit.cr2, exit.symbol) == (ExitReason.EXCEPTION, PAGE, 0, 0, None)
    assert exit.error_code is not None
    assert exit.error_code & ~FETCH == USER


@pytest.mark.parametrize(
    "declaration", ["const char place[64]", "int place(void); int place(void) { return 1; } char other"]
)
def test_code_and_constants_cannot_be_written(declaration: str, tmp_path: Path) -> None:
    source = f"""{START} {declaration} = {{1}};
    int run(void) {{ *(volatile char *)(uintptr_t)place = 7; return 1; }}"""
    exit = run(build(tmp_path, source))
    assert (exit.reason, exit.vector, exit.error_code) == (ExitReason.EXCEPTION, PAGE, USER | WRITE | PRESENT)


@pytest.mark.parametrize("where", ["static char place[64] = {0xc3}", "char place[64]; place[0] = 0xc3"])
def test_data_and_stack_cannot_be_executed(where: str, tmp_path: Path) -> None:
    source = f"""{START} int run(void) {{ {where}; __asm__ volatile("" :: "r"(place) : "memory");
    ((void (*volatile)(void))(uintptr_t)place)(); return 1; }}"""
    exit = run(build(tmp_path, source))
    assert (exit.reason, exit.vector, exit.error_code) == (ExitReason.EXCEPTION, PAGE, USER | FETCH | PRESENT)
    assert exit.rip == exit.cr2


@pytest.mark.parametrize("stack_kib", [4, 64, 1024])
def test_stack_has_the_given_size_and_ends_in_a_guard_page(stack_kib: int, tmp_path: Path) -> None:
    source = START + 'int run(void) { __asm__ volatile("1: push %rax; jmp 1b"); return 1; }'
    exit = run(build(tmp_path, source), stack_kib=stack_kib, size_mib=8)
    assert (exit.reason, exit.vector) == (ExitReason.EXCEPTION, PAGE)
    assert exit.cr2 == (8 << 20) - (stack_kib << 10) - 8
    assert exit.symbol == "run"


def test_recursion_without_an_end_is_a_page_fault_in_its_function(tmp_path: Path) -> None:
    source = (
        START
        + """
    __attribute__((noinline)) int deeper(volatile int *n) {
        volatile int a[64]; a[0] = *n + 1; return deeper(a) + a[0];
    }
    int run(void) { volatile int n = 0; return deeper(&n); }"""
    )
    exit = run(build(tmp_path, source))
    assert (exit.reason, exit.vector, exit.symbol) == (ExitReason.EXCEPTION, PAGE, "deeper")


def test_memory_above_the_stack_is_not_mapped(tmp_path: Path) -> None:
    source = START + 'int run(void) { __asm__ volatile("1: pop %rax; jmp 1b"); return 1; }'
    exit = run(build(tmp_path, source), size_mib=8)
    assert (exit.vector, exit.cr2) == (PAGE, 8 << 20)


@pytest.mark.parametrize("pointer", ["$0", "$0x87fff", "$8", "$0x7fffffff"])
def test_fault_with_a_broken_stack_pointer_is_still_an_exit(pointer: str, tmp_path: Path) -> None:
    exit = crash(tmp_path, f'__asm__ volatile("mov {pointer}, %esp; ud2");')
    assert exit.vector == INVALID


def test_push_to_a_stack_pointer_that_is_no_address_is_a_stack_fault(tmp_path: Path) -> None:
    exit = crash(tmp_path, '__asm__ volatile("movabs $0x800000001000, %rsp; push %rax");')
    assert exit.vector in {STACK, PROTECTION}  # a KVM that emulates ring 0 may say the latter


def test_vcpu_stands_where_the_exception_came(tmp_path: Path) -> None:
    source = (
        START + """int run(void) { __asm__ volatile("mov $0x1234, %ebx; mov $0x5678, %r15d; stc; ud2"); return 1; }"""
    )
    with Vmm(machine(build(tmp_path, source))) as vmm:
        exit = vmm.run(DEADLINE_S)
        (vcpu,) = vmm.vcpus
        assert (vcpu.regs.rip, vcpu.regs.rbx, vcpu.regs.r15) == (exit.rip, 0x1234, 0x5678)
        assert vcpu.regs.rflags & 1
        assert (vcpu.sregs.cs.dpl, vcpu.sregs.ss.dpl, vcpu.sregs.cs.selector & 3) == (3, 3, 3)
        assert exit.fault is not None
        assert exit.fault.startswith(f"invalid opcode (#UD), at {exit.rip:#x}, in run+")
        assert "instruction at" in exit.fault
        assert "ud2" in exit.fault
        assert "rbx 0x0000000000001234" in exit.fault
        assert vmm.memory.read(exit.rip or 0, 2) == b"\x0f\x0b"


def test_exception_of_a_fork_of_a_reset_and_of_a_loaded_snapshot_has_its_symbol(tmp_path: Path) -> None:
    source = START + """int run(void) { __asm__ volatile("mov $1, %al; out %al, $0xf4"); return *(volatile int *)0; }"""
    with Vmm(machine(build(tmp_path, source))) as vmm:
        assert vmm.run(DEADLINE_S).code == 1
        snapshot = vmm.snapshot()
        vmm.reset(snapshot)
        exits = [vmm.run_here(DEADLINE_S)]
        vmm.reset(snapshot)
        exits.append(vmm.run(DEADLINE_S))
    snapshot.save(tmp_path / "file")
    for each in (snapshot, Snapshot.load(tmp_path / "file")):
        with each.fork() as fork:
            exits.append(fork.run(DEADLINE_S))
    assert [(exit.reason, exit.vector, exit.symbol) for exit in exits] == [(ExitReason.EXCEPTION, PAGE, "run")] * 4


def test_fork_of_a_crash_crashes_again(tmp_path: Path) -> None:
    with Vmm(machine(build(tmp_path, START + "int run(void) { return *(volatile int *)16; }"))) as vmm:
        exit = vmm.run(DEADLINE_S)
        with vmm.snapshot().fork() as fork:
            assert fork.run(DEADLINE_S) == exit


def test_single_step_flag_is_a_debug_exception(tmp_path: Path) -> None:
    source = START + """int run(void) { __asm__ volatile("pushf; orl $0x100, (%rsp); popf; nop"); return 1; }"""
    exit = run(build(tmp_path, source))
    assert (exit.reason, exit.vector, exit.symbol) == (ExitReason.EXCEPTION, 1, "run")


def test_kvm_vm_has_exceptions_too(tmp_path: Path) -> None:
    with KvmVm(machine(build(tmp_path, START + "int run(void) { return *(volatile int *)0; }"))) as vm:
        vm.run()
        exit = vm.wait(DEADLINE_S)
        assert exit is not None
        assert (exit.reason, exit.vector, exit.symbol) == (ExitReason.EXCEPTION, PAGE, "run")


def test_symbols_are_those_of_the_file_and_a_fork_has_them(tmp_path: Path) -> None:
    source = START + "volatile int value = 7; int run(void) { return value; }"
    with Vmm(machine(build(tmp_path, source))) as vmm:
        assert {"_start", "run", "value"} <= vmm.symbols.keys()
        assert vmm.memory.read_u32(vmm.symbols["value"]) == 7
        with vmm.snapshot().fork() as fork:
            assert fork.symbols == vmm.symbols
            fork.memory.write_u32(fork.symbols["value"], 41)
            assert fork.run(DEADLINE_S).code == 41
    with pytest.raises(StateError):
        _ = vmm.symbols


def test_program_without_symbols_has_none(tmp_path: Path) -> None:
    program = build(tmp_path, START + "int run(void) { return *(volatile int *)0; }", "-s")
    with Vmm(machine(program)) as vmm:
        exit = vmm.run(DEADLINE_S)
        assert (exit.vector, exit.symbol, vmm.symbols) == (PAGE, None, {})
    with Vmm(VmmConfig(memory=MemoryConfig(size_mib=1))) as vmm:
        assert vmm.symbols == {}


def test_segment_that_may_be_written_and_executed_is_as_its_file_says(tmp_path: Path) -> None:
    source = (
        START
        + """char code[] = {0xb8, 1, 0, 0, 0, 0xc3};
    int run(void) { code[1] = 9; return ((int (*)(void))(uintptr_t)code)(); }"""
    )
    assert run(build(tmp_path, source, "-Wl,-N", "-w")).code == 9


def test_large_data_is_mapped_to_its_last_byte(tmp_path: Path) -> None:
    source = (
        START
        + """static volatile char large[9 << 20];
    int run(void) {
        large[0] = large[sizeof large - 1] = 1;
        return *(volatile char *)(((uintptr_t)large + sizeof large + 8191) & ~4095ul);
    }"""
    )
    exit = run(build(tmp_path, source), size_mib=32)
    assert (exit.reason, exit.vector, exit.error_code) == (ExitReason.EXCEPTION, PAGE, USER)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("-static-pie", "-fpie"), "-no-pie"),
        (("-Wl,-Ttext=0x1000",), "below 1 MiB"),
        (("-Wl,-Ttext=0x10000000",), "not entirely in guest memory"),
        (("-Wl,-z,noseparate-code", "-Wl,-z,max-page-size=16"), "other permissions"),
    ],
)
def test_program_that_cannot_be_loaded_is_refused_with_what_to_do(
    flags: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    program = build(tmp_path, START + "int data = 1; int run(void) { return ++data; }", *flags)
    with pytest.raises(BootError, match=reason) as raised:
        Vmm(machine(program))
    assert raised.value.at == "boot.path"


@pytest.mark.parametrize("image", [b"", b"hello", b"\x7fELF", elf(0x200000, b"\xf4")[:100], elf(2**64 - 1, b"\xf4")])
def test_file_that_is_no_program_is_refused(image: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(image)
    with pytest.raises(BootError, match=r"^boot\.path: "):
        Vmm(machine(tmp_path / "file"))


def test_names_of_a_hostile_symbol_table_are_short(tmp_path: Path) -> None:
    names = b"\0" + b"n" * 100_000 + b"\0"
    program = elf(0x200000, b"\x0f\x0b")
    table = 128
    symbols = struct.pack("<IBBHQQ", 1, 2, 0, 1, 0x200000, 2) * 1000
    program = program.ljust(table, b"\0") + symbols + names
    sections = struct.pack("<IIQQQQIIQQ", 0, 2, 0, 0, table, len(symbols), 1, 0, 8, 24)
    sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, table + len(symbols), len(names), 0, 0, 1, 0)
    header = bytearray(program)
    header[40:48] = struct.pack("<Q", len(program))
    header[58:62] = struct.pack("<HH", 64, 2)
    (tmp_path / "file").write_bytes(header + sections)
    exit = run(tmp_path / "file")
    assert (exit.vector, exit.symbol) == (INVALID, "n" * 256)


def test_machine_of_a_program_has_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(elf(0x200000, b"\x0f\x0b"))
    boot, memory = ElfBoot(tmp_path / "file"), MemoryConfig(size_mib=8)
    for config, at in [
        (VmmConfig(boot=boot, memory=memory, irqchip=True), "irqchip"),
        (VmmConfig(boot=boot, memory=memory, cpu=CpuConfig(vcpus=2)), "cpu.vcpus"),
        (VmmConfig(boot=boot, memory=memory, cpu=CpuConfig(hide=["nx"])), "cpu.hide"),
        (VmmConfig(boot=ElfBoot(tmp_path / "file", stack_kib=0), memory=memory), "boot.stack_kib"),
        (VmmConfig(boot=ElfBoot(tmp_path / "file", stack_kib=8192), memory=memory), "boot.path"),
        (VmmConfig(boot=ElfBoot(tmp_path / "file", stack_kib=2**63), memory=memory), "boot.path"),
    ]:
        with pytest.raises((ConfigError, BootError)) as raised:
            Vmm(config)
        assert raised.value.at == at

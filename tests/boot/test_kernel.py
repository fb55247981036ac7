"""Kernels other than Linux, compiled here: multiboot 1, PVH, ELF32 and ELF64, also position-independent and low.

Covers src/boot/elf.rs, src/boot/multiboot.rs, src/boot/pvh.rs and src/boot/relocations.rs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from kernels import DEADLINE_S, MULTIBOOT, SUPPORT, build, run
from pyvmm import (
    BootError,
    BootModule,
    ConfigError,
    CpuConfig,
    Exit,
    ExitReason,
    KernelBoot,
    MemoryConfig,
    Snapshot,
    Vmm,
    VmmConfig,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm

MAGIC = 0x2BADB002
# Says what multiboot told it, and ends with the number of modules.
TELL = """
int zeros[3000];
void run(u32 magic, u32 *info) {
    u32 cr0, cr4; u16 cs, ds, ss;
    __asm__ volatile("mov %%cr0, %0; mov %%cr4, %1; mov %%cs, %2; mov %%ds, %3; mov %%ss, %4"
                     : "=r"(cr0), "=r"(cr4), "=r"(cs), "=r"(ds), "=r"(ss));
    say("magic", magic); say("flags", info[0]); say("cr0", cr0 & ~0x10); say("cr4", cr4);
    say("lower", info[1]); say("upper", info[2]);
    put("cmdline="); put((char *)info[4]); put("\\nloader="); put((char *)info[16]); put("\\n");
    for (u32 n = 0; n < info[5]; n++) {
        u32 *module = (u32 *)info[6] + 4 * n;
        say("aligned", module[0] % 4096 == 0 && module[0] >= (u32)&zeros[3000]);
        put("module="); put((char *)module[2]); put(":");
        for (u8 *at = (u8 *)module[0]; at < (u8 *)module[1]; at++) out8(0x3f8, *at);
        put("\\n");
    }
    for (u8 *at = (u8 *)info[12]; at < (u8 *)info[12] + info[11]; at += 4 + *(u32 *)at) {
        put("map="); hex(*(u64 *)(at + 4)); put("+"); hex(*(u64 *)(at + 12)); put("*"); hex(at[20]); put("\\n");
    }
    end(info[5] + zeros[2999] + (cs == 0) + (ds == 0 || ss != ds));
}
"""


def lines(console: str) -> list[str]:
    """What a kernel said, of its memory map only the RAM: what else there is depends on the machine."""
    said = console.replace("\r", "").splitlines()
    return [line for line in said if not line.startswith("map=") or line.endswith("*0x1")]


def cli(kernel: Path, *options: str) -> tuple[int, str]:
    """What `pyvmm run` makes of a kernel: its status, and what it prints."""
    command = [
        sys.executable,
        "-m",
        "pyvmm",
        "run",
        str(kernel),
        "--memory",
        "8",
        "--timeout",
        str(DEADLINE_S),
        *options,
    ]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S * 2, check=False
    )
    return done.returncode, done.stdout.replace("\r", "") + done.stderr


def told(modules: list[str]) -> list[str]:
    """What a multiboot kernel of an 8 MiB machine says."""
    return [
        f"magic={MAGIC:#x}",
        "flags=0x24d",
        "cr0=0x1",
        "cr4=0x0",
        "lower=0x27f",
        "upper=0x1c00",
        'cmdline=a  b="c d"',
        "loader=pyvmm",
        *modules,
        "map=0x0+0x9fc00*0x1",
        "map=0x100000+0x700000*0x1",
    ]


@pytest.fixture
def modules(tmp_path: Path) -> list[BootModule]:
    for name, text in (("one", "first"), ("two", ""), ("three", "x" * 5000)):
        (tmp_path / name).write_text(text)
    return [
        BootModule(tmp_path / "one", cmdline="one 1,2"),
        BootModule(tmp_path / "two"),
        BootModule(tmp_path / "three"),
    ]


OF_MODULES = ["aligned=0x1", "module=one 1,2:first", "aligned=0x1", "module=:", "aligned=0x1", "module=:" + "x" * 5000]
LINE = 'a  b="c d"'


@pytest.mark.parametrize("address", [0x100000, 0x400000, 0x8000])
def test_multiboot_kernel_finds_its_line_its_modules_and_its_memory(
    address: int, tmp_path: Path, modules: list[BootModule]
) -> None:
    kernel = build(tmp_path, MULTIBOOT + TELL, "-m32", f"-Wl,-Ttext={address:#x}")
    exit, console = run(KernelBoot(kernel, cmdline=LINE, modules=modules))
    assert exit == Exit(ExitReason.CODE, 3, 0)
    assert lines(console) == told(OF_MODULES)


def test_command_line_boots_a_multiboot_kernel_with_modules(tmp_path: Path, modules: list[BootModule]) -> None:
    kernel = build(tmp_path, MULTIBOOT + TELL, "-m32")
    given = [
        f"--module={module.path},{module.cmdline}" if module.cmdline else f"--module={module.path}"
        for module in modules
    ]
    status, printed = cli(kernel, "--append", LINE, *given)
    assert (status, lines(printed)) == (3, told(OF_MODULES))
    status, printed = cli(kernel, "--append", LINE, "--boot", "multiboot", "--json")
    assert (status, json.loads(printed.partition("\n")[0])["code"]) == (0, 0)


def test_multiboot_header_in_a_64_bit_file_has_a_32_bit_entry(tmp_path: Path) -> None:
    entry = """
    __asm__(".code32\\n.section .text.boot, \\"ax\\"\\n.balign 4\\n.long 0x1badb002, 0, -0x1badb002\\n"
            ".globl _start\\n_start: cmp $0x2badb002, %eax\\n jne 1f\\n cmpl $0x24d, (%ebx)\\n jne 1f\\n"
            "mov $7, %eax\\n out %eax, $0xf4\\n1: mov $1, %eax\\n out %eax, $0xf4\\n.code64\\n.text\\n");"""
    kernel = build(tmp_path, entry)
    assert run(KernelBoot(kernel))[0].code == 7
    assert cli(kernel)[0] == 7


# A kernel that goes to 64-bit mode itself.
LONG = """
__asm__(".code32\\n.section .text.boot, \\"ax\\"\\n.balign 4\\n.long 0x1badb002, 3, -(0x1badb002 + 3)\\n"
        ".globl _start\\n_start: mov $stack + 16384, %esp\\n mov %ebx, %edi\\n"
        "movl $pdpt + 3, pml4\\n movl $pd + 3, pdpt\\n mov $0x83, %eax\\n xor %ecx, %ecx\\n"
        "1: mov %eax, pd(, %ecx, 8)\\n add $0x200000, %eax\\n inc %ecx\\n cmp $512, %ecx\\n jne 1b\\n"
        "mov $0x20, %eax\\n mov %eax, %cr4\\n mov $pml4, %eax\\n mov %eax, %cr3\\n"
        "mov $0xc0000080, %ecx\\n rdmsr\\n or $0x100, %eax\\n wrmsr\\n"
        "mov %cr0, %eax\\n or $0x80000000, %eax\\n mov %eax, %cr0\\n"
        "lgdt gdt_pointer\\n ljmp $8, $in_long\\n.code64\\nin_long: call run\\n"
        "gdt: .quad 0, 0x00af9b000000ffff\\ngdt_pointer: .word 15\\n .long gdt\\n.text\\n");
static u64 pml4[512] __attribute__((aligned(4096), used)), pdpt[512] __attribute__((aligned(4096), used));
static u64 pd[512] __attribute__((aligned(4096), used));
u8 stack[16384] __attribute__((aligned(16)));
void run(u32 *info) { put((char *)(u64)info[4]); end((int)sizeof(long) + info[5]); }
"""


def test_64_bit_kernel_in_a_32_bit_file_goes_to_long_mode_itself(tmp_path: Path) -> None:
    """As kvm-unit-tests are made: linked for 64 bits at 4 MiB, then converted."""
    if shutil.which("objcopy") is None:
        pytest.skip("there is no objcopy")
    kernel = build(tmp_path, SUPPORT + LONG, "-m64", "-Wl,-Ttext=0x400000")
    for form in ("elf32-i386", "elf32-x86-64"):
        subprocess.run(["objcopy", "-O", form, kernel, tmp_path / form], check=True)
        exit, console = run(KernelBoot(tmp_path / form, cmdline="long"))
        assert (exit.code, console) == (8, "long")


def test_addresses_in_the_header_place_a_kernel_that_is_no_elf_file(tmp_path: Path) -> None:
    if shutil.which("objcopy") is None:
        pytest.skip("there is no objcopy")
    addresses = '-DADDRESSES=".long header, 0x100000, _edata, _end, _start\\n"'
    # Without pages in the file, its parts are as far from each other as in memory.
    source = MULTIBOOT + TELL + "int initialized = 1;"
    kernel = build(tmp_path, source, "-m32", "-DHEADER_FLAGS=0x10007", addresses, "-Wl,-N")
    subprocess.run(["objcopy", "-O", "binary", kernel, tmp_path / "raw"], check=True)
    for file in (tmp_path / "raw", kernel):  # in an ELF file they count too
        exit, console = run(KernelBoot(file, cmdline=LINE))
        assert exit.code == 0, console
        # Flag bit 2 asks for a video mode, and gets the text screen.
        assert lines(console) == [line.replace("flags=0x24d", "flags=0x124d") for line in told([])]
    assert cli(tmp_path / "raw", "--append", LINE)[0] == 0


def test_header_that_demands_more_than_any_loader_has_is_refused(tmp_path: Path) -> None:
    kernel = build(tmp_path, MULTIBOOT + TELL, "-m32", "-DHEADER_FLAGS=0x108")
    with pytest.raises(BootError, match="unknown features of flag bits 3, 8"):
        run(KernelBoot(kernel))
    assert "flag bits 3, 8" in cli(kernel)[1]


# Prints a table that the linker or the loader relocates, and the zero page.
ENTRY_64 = '__asm__(".globl _start\\n_start: mov %rsi, %rdi\\n call run\\n");'
ENTRY_32 = '__asm__(".globl _start\\n_start: push %esi\\n call run\\n");'
TABLE = """
static const char *const table[] = {"zero", "one", "two"};
static void (*volatile const functions[])(const char *) = {put};
int zeros[3000];
void run(u8 *page) {
    u32 line = *(u32 *)(page + 0x228), disk = *(u32 *)(page + 0x218), size = *(u32 *)(page + 0x21c);
    functions[0](table[page[0x1e8] >= 3 ? 2 : 0]); put("\\n");
    put((char *)(unsigned long)line); put("\\n");
    for (u32 n = 0; n < size; n++) out8(0x3f8, ((u8 *)(unsigned long)disk)[n]);
    end(zeros[2999] + 5);
}
"""
PIE = ["-fpie", "-static-pie", "-Wl,--no-dynamic-linker"]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["-m64"], id="elf64"),
        pytest.param(["-m32"], id="elf32"),
        pytest.param(["-m64", "-Wl,-Ttext-segment=0x8000"], id="elf64-low"),
        pytest.param(["-m32", "-Wl,-Ttext-segment=0x8000"], id="elf32-low"),
        pytest.param(["-m64", *PIE, "-Wl,-Ttext=0x1000"], id="pie64"),
        pytest.param(["-m32", *PIE, "-Wl,-Ttext=0x1000"], id="pie32"),
        pytest.param(["-m64", *PIE, "-Wl,-Ttext=0x1000,-z,pack-relative-relocs"], id="pie64-packed"),
        pytest.param(["-m64", "-Wl,-Ttext-segment=0x200000,-z,max-page-size=65536"], id="elf64-64k"),
    ],
)
def test_elf_kernel_starts_at_its_entry(flags: list[str], tmp_path: Path) -> None:
    source = (ENTRY_64 if "-m64" in flags else ENTRY_32) + SUPPORT + TABLE
    kernel = build(tmp_path, source, *flags)
    (tmp_path / "disk").write_text("the disk")
    exit, console = run(KernelBoot(kernel, cmdline="a b", modules=[tmp_path / "disk"]))
    assert (exit, lines(console)) == (Exit(ExitReason.CODE, 5, 0), ["two", "a b", "the disk"])
    status, printed = cli(kernel, "--append", "a b", "--initrd", str(tmp_path / "disk"))
    assert (status, lines(printed)) == (5, ["two", "a b", "the disk"])


def test_elf64_kernel_reaches_memory_beyond_4_gib(tmp_path: Path) -> None:
    source = ENTRY_64 + SUPPORT + "void run(void) { volatile u64 *far = (u64 *)0x11ffffff8; *far = 40; end(*far + 2); }"
    assert run(KernelBoot(build(tmp_path, source)), size_mib=3584 + 512)[0].code == 42


def test_entry_may_be_virtual_and_thread_local_variables_are_the_kernels_own(tmp_path: Path) -> None:
    """As kernels of the higher half are linked: a virtual entry, and physical addresses by AT."""
    (tmp_path / "high.ld").write_text("""
    ENTRY(_start)
    SECTIONS {
        . = 0xffffffff80100000;
        .text : AT(ADDR(.text) - 0xffffffff80000000) { *(.text*) }
        .tdata : AT(ADDR(.tdata) - 0xffffffff80000000) { *(.tdata*) }
        .data : AT(ADDR(.data) - 0xffffffff80000000) { *(.data*) *(.rodata*) *(.bss*) }
        /DISCARD/ : { *(.note*) *(.comment) *(.eh_frame*) }
    }""")
    source = "__thread int local = 5; int run(void) { return local; }" + (
        '__asm__(".globl _start\\n_start: lea _start(%rip), %rax\\n shr $20, %rax\\n out %eax, $0xf4\\n");'
    )
    kernel = build(tmp_path, source, "-mcmodel=kernel", f"-Wl,-T{tmp_path / 'high.ld'}")
    assert run(KernelBoot(kernel))[0].code == 1


PVH = (
    SUPPORT
    + """
__asm__(".section .note.pvh, \\"a\\", @note\\n.long 4, 4, 18\\n.asciz \\"Xen\\"\\n.long _start\\n"
        ".text\\n.code32\\n.globl _start\\n_start: mov $stack + 16384, %esp\\n push %ebx\\n call run\\n");
u8 stack[16384] __attribute__((aligned(16)));
void run(u32 *info) {
    say("magic", info[0]); say("version", info[1]); say("rsdp", info[8] ? 1 : 0);
    put("cmdline="); put((char *)info[6]); put("\\n");
    for (u32 n = 0; n < info[3]; n++) {
        u64 *module = (u64 *)info[4] + 4 * n;
        put("module="); put((char *)(u32)module[2]); put(":");
        for (u8 *at = (u8 *)(u32)module[0]; at < (u8 *)(u32)(module[0] + module[1]); at++) out8(0x3f8, *at);
        put("\\n");
    }
    for (u32 n = 0; n < info[12]; n++) {
        u64 *range = (u64 *)info[10] + 3 * n;
        put("map="); hex(range[0]); put("+"); hex(range[1]); put("*"); hex(range[2]); put("\\n");
    }
    end(info[3]);
}
"""
)


def test_pvh_kernel_finds_its_line_its_modules_and_its_memory(tmp_path: Path, modules: list[BootModule]) -> None:
    kernel = build(tmp_path, PVH, "-m32", "-Wl,-Ttext-segment=0x100000")
    exit, console = run(KernelBoot(kernel, cmdline=LINE, modules=modules))
    assert exit == Exit(ExitReason.CODE, 3, 0)
    expected = [
        "magic=0x336ec578",
        "version=0x1",
        f"cmdline={LINE}",
        *(line for line in OF_MODULES if line.startswith("module")),
        *told([])[-2:],
    ]
    assert [line for line in lines(console) if not line.startswith("rsdp")] == expected
    given = [
        f"--module={module.path},{module.cmdline}" if module.cmdline else f"--module={module.path}"
        for module in modules
    ]
    assert cli(kernel, *given)[0] == 3
    with pytest.raises(BootError, match="no multiboot 1 header"):
        run(KernelBoot(kernel, protocol="multiboot"))


def test_modules_are_above_the_zeros_of_the_kernel_and_are_refused_if_they_do_not_fit(tmp_path: Path) -> None:
    source = MULTIBOOT + "int zeros[1 << 20];\n" + TELL.replace("int zeros[3000];", "").replace("3000", "1 << 20")
    kernel = build(tmp_path, source.replace("2999", "(1 << 20) - 1"), "-m32")
    (tmp_path / "module").write_bytes(b"m" * 100)
    (tmp_path / "large").write_bytes(b"m" * (3 << 20))
    exit, console = run(KernelBoot(kernel, modules=[tmp_path / "module"]))
    assert (exit.code, "aligned=0x1" in lines(console)) == (1, True)
    with pytest.raises(BootError, match=r"boot\.modules\[1\]: 3145728 bytes do not fit above the kernel"):
        run(KernelBoot(kernel, modules=[tmp_path / "module", tmp_path / "large"]))
    with pytest.raises(BootError, match="memory"):
        run(KernelBoot(kernel), size_mib=4)


# vCPU 1 counts in memory once it has an INIT and a SIPI for the code at 0x7000.
WAKE = """
static volatile u32 *const lapic = (u32 *)0xfee00000, *const count = (u32 *)0x6000;
void run(u32 magic, u32 *info) {
    static const u8 code[] = {0x31, 0xc0, 0x8e, 0xd8, 0x66, 0xff, 0x06, 0x00, 0x60, 0xf4};
    for (unsigned n = 0; n < sizeof code; n++) ((u8 *)0x7000)[n] = code[n];
    lapic[0xf0 / 4] = 0x1ff;
    u32 before = *count;
    lapic[0x310 / 4] = 1 << 24; lapic[0x300 / 4] = 0x4500;
    while (lapic[0x300 / 4] & 0x1000) {}
    lapic[0x310 / 4] = 1 << 24; lapic[0x300 / 4] = 0x4607;
    while (!*count) {}
    end(before * 100 + *count + 4);
}
"""


def test_other_vcpus_wait_for_init_and_sipi(tmp_path: Path) -> None:
    kernel = build(tmp_path, MULTIBOOT + WAKE, "-m32")
    assert run(KernelBoot(kernel), cpu=CpuConfig(vcpus=2))[0] == Exit(ExitReason.CODE, 5, 0)
    with pytest.raises(ConfigError, match=r"^irqchip: the other vCPUs wait for an interrupt"):
        run(KernelBoot(kernel), cpu=CpuConfig(vcpus=2), irqchip=False)
    kernel = build(tmp_path, MULTIBOOT + TELL, "-m32")
    assert run(KernelBoot(kernel), irqchip=False)[0].code == 0


def test_fork_and_saved_file_of_a_multiboot_machine_continue(tmp_path: Path) -> None:
    body = 'void run(u32 magic, u32 *info) { u32 n = info[5]; end(1); say("modules", n); end(2 + n); }'
    source = MULTIBOOT.replace('for (;;) __asm__ volatile("hlt");', "") + body
    kernel = build(tmp_path, source, "-m32")
    (tmp_path / "module").write_text("m")
    config = VmmConfig(boot=KernelBoot(kernel, modules=[tmp_path / "module"]), memory=MemoryConfig(size_mib=4))
    with Vmm(config) as vmm:
        assert vmm.run(DEADLINE_S).code == 1
        snapshot = vmm.snapshot()
    snapshot.save(tmp_path / "saved")
    for source_of in (snapshot, Snapshot.load(tmp_path / "saved")):
        with source_of.fork() as fork:
            assert fork.run(DEADLINE_S).code == 3
            assert fork.serial.take_output() == b"modules=0x1\n"


def test_machine_of_one_mebibyte_runs_a_low_kernel(tmp_path: Path) -> None:
    kernel = build(tmp_path, MULTIBOOT + TELL, "-m32", "-Wl,-Ttext=0x8000")
    exit, console = run(KernelBoot(kernel), size_mib=1)
    assert exit.code == 0
    assert "upper=0x0" in lines(console)


def test_kernel_over_the_tables_is_refused(tmp_path: Path) -> None:
    kernel = build(tmp_path, MULTIBOOT + TELL, "-m32", "-Wl,-Ttext-segment=0x7f000")
    with pytest.raises(BootError, match="overlap the tables that pyvmm writes"):
        run(KernelBoot(kernel))

//! The initial registers of a vCPU in each mode.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::exceptions::{IDT_LIMIT, Interrupted};
use super::gdt::{GDT_LIMIT, selector};
use crate::cpu::{Arguments, CpuMode, Start};
use crate::layout;
use crate::x86::{
    CR0_ET, CR0_MP, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_PAE, EFER_LMA,
    EFER_LME, EFER_NXE, RFLAGS_RESERVED,
};

/// Bytes of stack for each vCPU of a flat guest, right below its code.
const STACK_SIZE: u64 = 4096;

/// The limit of the TSS that PVH demands in TR.
const TSS32_LIMIT: u32 = 0x67;

/// At the top of an ELF program's stack, by the System V ABI: no arguments, no environment, no
/// auxiliary vector, all of them zeros.
const ARGUMENTS: u64 = 64;

/// The initial general registers of the vCPU with this number.
///
/// A flat guest has its vCPU's number in RDI and a stack right below `stack`, 4 KiB for each vCPU.
/// A kernel has the arguments of its boot protocol.
#[must_use]
pub fn start_regs(start: &Start, vcpu: u64) -> kvm_regs {
    let entry = start.entry;
    let stack = start.stack.unwrap_or(entry);
    let of_vcpu = stack.saturating_sub(vcpu * STACK_SIZE) & !15;
    let base = kvm_regs { rip: entry, rflags: RFLAGS_RESERVED, ..Default::default() };
    let flat = kvm_regs { rsp: of_vcpu, rdi: vcpu, ..base };
    match start.mode {
        CpuMode::Real16 => {
            let segment = real_mode_segment(entry);
            kvm_regs { rip: entry - segment * 16, rsp: of_vcpu.min(0xfff0), ..flat }
        }
        CpuMode::Kernel64 | CpuMode::Kernel32 | CpuMode::Loader32 => {
            let Arguments { rax, rbx, rsi } = start.arguments;
            kvm_regs { rsp: stack, rax, rbx, rsi, ..base }
        }
        CpuMode::Program64 => kvm_regs { rsp: of_vcpu.saturating_sub(ARGUMENTS), ..base },
        // The processor sets its own at the reset vector.
        CpuMode::Reset => base,
        CpuMode::Protected32 | CpuMode::Long64 | CpuMode::User64 => flat,
    }
}

/// Code in the first 64 KiB runs with CS = 0. Beyond, CS has the part that the offset cannot hold.
fn real_mode_segment(entry: u64) -> u64 {
    if entry <= 0xffff { 0 } else { entry >> 4 }
}

/// Change a new vCPU's system registers to those of `mode` at `entry`.
pub fn set_start_sregs(sregs: &mut kvm_sregs, mode: CpuMode, entry: u64) {
    if mode == CpuMode::Reset {
        return;
    }
    if mode == CpuMode::Real16 {
        let segment = u16::try_from(real_mode_segment(entry)).unwrap_or(u16::MAX);
        sregs.cs.selector = segment;
        sregs.cs.base = u64::from(segment) * 16;
        return;
    }
    let (code, data, dpl) = match mode {
        CpuMode::User64 | CpuMode::Program64 => (selector::USER_CODE, selector::USER_DATA, 3),
        _ => (selector::CODE, selector::DATA, 0),
    };
    sregs.cs = code_segment(code, dpl, !mode.is_32_bit());
    let data = data_segment(data, dpl);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        *segment = data;
    }
    for segment in [&mut sregs.fs, &mut sregs.gs] {
        *segment = data;
    }
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = GDT_LIMIT;
    set_control(sregs, mode);
    if matches!(mode, CpuMode::User64 | CpuMode::Program64) {
        sregs.tr = task_segment();
    }
    if mode == CpuMode::Program64 {
        (sregs.idt.base, sregs.idt.limit) = (layout::EXCEPTION_PAGE, IDT_LIMIT);
    }
}

fn set_control(sregs: &mut kvm_sregs, mode: CpuMode) {
    if mode == CpuMode::Loader32 {
        sregs.tr.limit = TSS32_LIMIT;
        (sregs.cr0, sregs.cr4) = (CR0_PE | CR0_ET, 0);
        return;
    }
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE;
    sregs.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT;
    if !mode.is_32_bit() {
        sregs.cr0 |= CR0_PG | CR0_WP;
        sregs.cr3 = layout::PML4;
        sregs.cr4 |= CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
    if mode == CpuMode::Program64 {
        sregs.efer |= EFER_NXE;
    }
}

/// Put a vCPU back into the state of a program that an exception has interrupted.
pub fn resume_program(regs: &mut kvm_regs, sregs: &mut kvm_sregs, at: &Interrupted) {
    (regs.rip, regs.rsp, regs.rflags) = (at.rip, at.rsp, at.rflags);
    if at.cs & 3 == 3 {
        sregs.cs = code_segment(selector::USER_CODE, 3, true);
        sregs.ss = data_segment(selector::USER_DATA, 3);
    }
}

fn code_segment(selector: u16, dpl: u8, long: bool) -> kvm_segment {
    let (l, db) = (u8::from(long), u8::from(!long));
    kvm_segment { type_: 0b1011, l, db, ..flat_segment(selector, dpl) }
}

fn data_segment(selector: u16, dpl: u8) -> kvm_segment {
    kvm_segment { type_: 0b0011, db: 1, ..flat_segment(selector, dpl) }
}

fn flat_segment(selector: u16, dpl: u8) -> kvm_segment {
    kvm_segment { selector, limit: u32::MAX, dpl, present: 1, s: 1, g: 1, ..Default::default() }
}

fn task_segment() -> kvm_segment {
    kvm_segment {
        base: layout::TSS,
        limit: layout::TSS_LIMIT,
        selector: selector::TSS,
        type_: 0b1011,
        present: 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_mode_reaches_its_whole_first_mib() {
        for (entry, cs, ip) in [(0, 0, 0), (0x7c00, 0, 0x7c00), (0xf_fff5, 0xffff, 5)] {
            let mut sregs = kvm_sregs::default();
            set_start_sregs(&mut sregs, CpuMode::Real16, entry);
            let regs = start_regs(&Start::new(CpuMode::Real16, entry), 0);
            assert_eq!((sregs.cs.selector, regs.rip), (cs, ip));
            assert_eq!(sregs.cs.base + regs.rip, entry);
        }
    }

    #[test]
    fn each_vcpu_has_its_number_and_its_own_stack() {
        let regs = start_regs(&Start::new(CpuMode::Long64, 0x10_0000), 2);
        assert_eq!((regs.rdi, regs.rsp), (2, 0x10_0000 - 8192));
    }

    #[test]
    fn a_program_has_an_aligned_stack_and_the_state_that_an_exception_interrupts_comes_back() {
        let start = Start { stack: Some(0x80_0000), ..Start::new(CpuMode::Program64, 0x40_0000) };
        let mut regs = start_regs(&start, 0);
        assert_eq!((regs.rsp, regs.rdi), (0x80_0000 - 64, 0));
        let mut sregs = kvm_sregs::default();
        set_start_sregs(&mut sregs, CpuMode::Program64, 0x40_0000);
        assert_eq!((sregs.idt.base, sregs.efer & EFER_NXE), (layout::EXCEPTION_PAGE, EFER_NXE));
        let start = sregs;
        (sregs.cs, sregs.ss) = (code_segment(selector::CODE, 0, true), kvm_segment::default());
        let at = Interrupted {
            vector: 0,
            error_code: None,
            rip: 0x40_1000,
            cs: u64::from(selector::USER_CODE),
            rflags: 0x202,
            rsp: 0x1234,
            ss: u64::from(selector::USER_DATA),
        };
        resume_program(&mut regs, &mut sregs, &at);
        assert_eq!((regs.rip, regs.rflags, regs.rsp), (0x40_1000, 0x202, 0x1234));
        assert_eq!(sregs, start);
    }

    #[test]
    fn a_kernel_has_the_arguments_and_the_control_registers_of_its_protocol() {
        let arguments = Arguments { rax: 0x2bad_b002, rbx: 0x9_0000, rsi: 7 };
        let stack = Some(0x9_0000);
        let start = Start { stack, arguments, ..Start::new(CpuMode::Loader32, 0x10_0000) };
        let regs = start_regs(&start, 0);
        assert_eq!((regs.rax, regs.rbx, regs.rsi), (0x2bad_b002, 0x9_0000, 7));
        assert_eq!((regs.rip, regs.rsp, regs.rflags), (0x10_0000, 0x9_0000, 2));
        let mut sregs = kvm_sregs::default();
        set_start_sregs(&mut sregs, CpuMode::Loader32, 0x10_0000);
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
        assert_eq!((sregs.cs.db, sregs.cs.limit, sregs.ss.limit), (1, u32::MAX, u32::MAX));
        set_start_sregs(&mut sregs, CpuMode::Kernel32, 0x10_0000);
        assert_eq!(sregs.cr4, CR4_OSFXSR | CR4_OSXMMEXCPT);
    }

    #[test]
    fn at_the_reset_vector_nothing_is_set() {
        let mut sregs = kvm_sregs { cr0: 0x6000_0010, ..Default::default() };
        set_start_sregs(&mut sregs, CpuMode::Reset, 0xffff_fff0);
        assert_eq!((sregs.cr0, sregs.cs.present), (0x6000_0010, 0));
    }

    #[test]
    fn ring_3_starts_with_privilege_3_and_a_task() {
        let mut sregs = kvm_sregs::default();
        set_start_sregs(&mut sregs, CpuMode::User64, 0);
        assert_eq!((sregs.cs.dpl, sregs.ss.dpl, sregs.cs.selector & 3), (3, 3, 3));
        assert_eq!(sregs.tr.limit, 0x2068);
    }
}

//! The initial registers of a vCPU in each mode.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::exceptions::{IDT_LIMIT, Interrupted};
use super::gdt::{GDT_LIMIT, selector};
use crate::cpu::CpuMode;
use crate::layout;
use crate::x86::{
    CR0_ET, CR0_MP, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_PAE, EFER_LMA,
    EFER_LME, EFER_NXE, RFLAGS_RESERVED,
};

/// Bytes of stack for each vCPU of a flat guest, right below its code.
const STACK_SIZE: u64 = 4096;

/// At the top of an ELF program's stack, by the System V ABI: no arguments, no environment, no
/// auxiliary vector, all of them zeros.
const ARGUMENTS: u64 = 64;

/// The initial general registers in `mode` at `entry`, for the vCPU with this number.
///
/// A flat guest has its vCPU's number in RDI and a stack right below `stack`, 4 KiB for each vCPU.
/// Linux has the address of its boot parameters in RSI.
#[must_use]
pub fn start_regs(mode: CpuMode, entry: u64, stack: u64, vcpu: u64) -> kvm_regs {
    let stack = stack.saturating_sub(vcpu * STACK_SIZE) & !15;
    let base = kvm_regs {
        rip: entry,
        rsp: stack,
        rdi: vcpu,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match mode {
        CpuMode::Real16 => {
            let segment = real_mode_segment(entry);
            kvm_regs { rip: entry - segment * 16, rsp: stack.min(0xfff0), ..base }
        }
        CpuMode::Linux64 => {
            kvm_regs { rsp: layout::ZERO_PAGE, rsi: layout::ZERO_PAGE, rdi: 0, ..base }
        }
        CpuMode::Program64 => kvm_regs { rsp: stack.saturating_sub(ARGUMENTS), rdi: 0, ..base },
        CpuMode::Protected32 | CpuMode::Long64 | CpuMode::User64 => base,
    }
}

/// Code in the first 64 KiB runs with CS = 0. Beyond, CS has the part that the offset cannot hold.
fn real_mode_segment(entry: u64) -> u64 {
    if entry <= 0xffff { 0 } else { entry >> 4 }
}

/// Change a new vCPU's system registers to those of `mode` at `entry`.
pub fn set_start_sregs(sregs: &mut kvm_sregs, mode: CpuMode, entry: u64) {
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
    let long = mode != CpuMode::Protected32;
    sregs.cs = code_segment(code, dpl, long);
    let data = data_segment(data, dpl);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        *segment = data;
    }
    for segment in [&mut sregs.fs, &mut sregs.gs] {
        *segment = data;
    }
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = GDT_LIMIT;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE;
    sregs.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT;
    if long {
        sregs.cr0 |= CR0_PG | CR0_WP;
        sregs.cr3 = layout::PML4;
        sregs.cr4 |= CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
    if matches!(mode, CpuMode::User64 | CpuMode::Program64) {
        sregs.tr = task_segment();
    }
    if mode == CpuMode::Program64 {
        sregs.efer |= EFER_NXE;
        (sregs.idt.base, sregs.idt.limit) = (layout::EXCEPTION_PAGE, IDT_LIMIT);
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
            let regs = start_regs(CpuMode::Real16, entry, entry, 0);
            assert_eq!((sregs.cs.selector, regs.rip), (cs, ip));
            assert_eq!(sregs.cs.base + regs.rip, entry);
        }
    }

    #[test]
    fn each_vcpu_has_its_number_and_its_own_stack() {
        let regs = start_regs(CpuMode::Long64, 0x10_0000, 0x10_0000, 2);
        assert_eq!((regs.rdi, regs.rsp), (2, 0x10_0000 - 8192));
    }

    #[test]
    fn a_program_has_an_aligned_stack_and_the_state_that_an_exception_interrupts_comes_back() {
        let mut regs = start_regs(CpuMode::Program64, 0x40_0000, 0x80_0000, 0);
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
    fn ring_3_starts_with_privilege_3_and_a_task() {
        let mut sregs = kvm_sregs::default();
        set_start_sregs(&mut sregs, CpuMode::User64, 0);
        assert_eq!((sregs.cs.dpl, sregs.ss.dpl, sregs.cs.selector & 3), (3, 3, 3));
        assert_eq!(sregs.tr.limit, 0x2068);
    }
}

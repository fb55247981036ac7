//! The initial registers of a vCPU in each mode.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::tables::{GDT_LIMIT, selector};
use crate::cpu::CpuMode;
use crate::layout;

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always one.
const RFLAGS_RESERVED: u64 = 2;

/// Bytes of stack for each vCPU of a flat guest, right below its code.
const STACK_SIZE: u64 = 4096;

/// The initial general registers in `mode` at `entry`, for the vCPU with this number.
///
/// A flat guest has its vCPU's number in RDI and a stack right below `code`, 4 KiB for each vCPU.
/// Linux has the address of its boot parameters in RSI.
#[must_use]
pub fn start_regs(mode: CpuMode, entry: u64, code: u64, vcpu: u64) -> kvm_regs {
    let stack = code.saturating_sub(vcpu * STACK_SIZE) & !15;
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
        CpuMode::User64 => (selector::USER_CODE, selector::USER_DATA, 3),
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
    if mode == CpuMode::User64 {
        sregs.tr = task_segment();
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
    fn ring_3_starts_with_privilege_3_and_a_task() {
        let mut sregs = kvm_sregs::default();
        set_start_sregs(&mut sregs, CpuMode::User64, 0);
        assert_eq!((sregs.cs.dpl, sregs.ss.dpl, sregs.cs.selector & 3), (3, 3, 3));
        assert_eq!(sregs.tr.limit, 0x2068);
    }
}

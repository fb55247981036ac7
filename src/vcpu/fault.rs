//! A fault as text a person can use: what KVM said, the instruction bytes, the registers.

use std::fmt::Write;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::run_page::InternalError;

/// What happened, then the vCPU's state. On the vCPU's thread.
pub(crate) fn describe(vcpu: &VcpuFd, what: &str) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => format!("{what}\n{}", registers(&regs, &sregs)),
        (Err(e), _) | (_, Err(e)) => format!("{what}\nthe registers cannot be read: {e}"),
    }
}

/// KVM's internal error, by the kernel's `KVM_INTERNAL_ERROR_*` numbers.
pub(crate) fn internal_error(error: &InternalError) -> String {
    let name = match error.suberror {
        1 => "KVM could not emulate an instruction",
        2 => "an exception arose while KVM delivered another",
        3 => "an exit arose while KVM delivered an event",
        4 => "an exit reason that KVM did not expect",
        _ => "KVM internal error",
    };
    let mut text = format!("{name} (suberror {})", error.suberror);
    if let Some(bytes) = error.instruction.get(..error.instruction_len).filter(|b| !b.is_empty()) {
        let _ = write!(text, "\ninstruction bytes: {}", hex(bytes));
    } else if let Some(data) = error.data.get(..error.ndata).filter(|d| !d.is_empty()) {
        let words: Vec<String> = data.iter().map(|word| format!("{word:#x}")).collect();
        let _ = write!(text, "\ndata: {}", words.join(" "));
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}

fn registers(r: &kvm_regs, s: &kvm_sregs) -> String {
    let general = [
        [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
        [("rsi", r.rsi), ("rdi", r.rdi), ("rbp", r.rbp), ("rsp", r.rsp)],
        [("r8", r.r8), ("r9", r.r9), ("r10", r.r10), ("r11", r.r11)],
        [("r12", r.r12), ("r13", r.r13), ("r14", r.r14), ("r15", r.r15)],
        [("cr0", s.cr0), ("cr2", s.cr2), ("cr3", s.cr3), ("cr4", s.cr4)],
    ];
    let mut text = format!("rip {:#018x}  rflags {:#x}  efer {:#x}\n", r.rip, r.rflags, s.efer);
    for row in general {
        let cells: Vec<String> =
            row.iter().map(|(name, v)| format!("{name:<3} {v:#018x}")).collect();
        let _ = writeln!(text, "{}", cells.join("  "));
    }
    for (name, segment) in
        [("cs", &s.cs), ("ss", &s.ss), ("ds", &s.ds), ("es", &s.es), ("tr", &s.tr)]
    {
        let _ = writeln!(text, "{}", segment_line(name, segment));
    }
    let _ = write!(
        text,
        "gdt {:#x} limit {:#x}  idt {:#x} limit {:#x}",
        s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit
    );
    text
}

fn segment_line(name: &str, s: &kvm_segment) -> String {
    format!(
        "{name}  {:#06x}  base {:#x}  limit {:#x}  type {:#x}  dpl {}  l {}  db {}",
        s.selector, s.base, s.limit, s.type_, s.dpl, s.l, s.db
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error() -> InternalError {
        InternalError {
            suberror: 1,
            instruction: [0; 15],
            instruction_len: 0,
            data: [0; 16],
            ndata: 0,
        }
    }

    #[test]
    fn an_emulation_failure_shows_its_bytes() {
        let mut failure = error();
        failure.instruction[..2].copy_from_slice(&[0xcd, 0x80]);
        failure.instruction_len = 2;
        assert!(internal_error(&failure).ends_with("instruction bytes: cd 80"));
    }

    #[test]
    fn an_unknown_suberror_shows_its_number_and_data() {
        let unknown = InternalError { suberror: 77, ndata: 1, ..error() };
        assert_eq!(internal_error(&unknown), "KVM internal error (suberror 77)\ndata: 0x0");
    }

    #[test]
    fn registers_are_named() {
        let regs = kvm_regs { rip: 0x7c00, ..Default::default() };
        let text = registers(&regs, &kvm_sregs::default());
        assert!(text.starts_with("rip 0x0000000000007c00"));
        assert!(text.contains("r15 0x") && text.contains("cr3 0x") && text.contains("gdt 0x0"));
    }
}

//! Describes a fault as text: KVM's report, the instruction bytes and the registers.

use std::fmt::{self, Write};

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION, kvm_regs, kvm_segment, kvm_sregs,
};

use super::run_page::InternalError;
use super::vcpu::Vcpu;
use crate::debug::{Paging, bitness, decode, disassemble};
use crate::layout::PAGE;
use crate::x86::{CR0_PE, EFER_LMA};

/// The longest instruction.
const MAX_BYTES: u64 = 15;

/// Text with `what` happened, the instruction and the vCPU's registers. On the vCPU's thread.
pub(crate) fn describe(vcpu: &Vcpu, what: &str) -> String {
    match (vcpu.fd().get_regs(), vcpu.fd().get_sregs()) {
        (Ok(regs), Ok(sregs)) if is_after_init(&regs, &sregs) => {
            format!("{what}\n{LOST}\n{}", registers(&regs, &sregs))
        }
        (Ok(regs), Ok(sregs)) => {
            let instruction = Instruction::at(vcpu, &regs, &sregs);
            format!("{what}\n{instruction}\n{}", registers(&regs, &sregs))
        }
        (Err(e), _) | (_, Err(e)) => format!("{what}\nthe registers cannot be read: {e}"),
    }
}

/// Whether a triple fault is how a kernel resets the machine: its IDT is too small for a single
/// gate, so that the next exception cannot be delivered. On the vCPU's thread.
pub(crate) fn is_deliberate(vcpu: &Vcpu) -> bool {
    vcpu.fd().get_sregs().is_ok_and(|sregs| has_no_gate(&sregs))
}

fn has_no_gate(sregs: &kvm_sregs) -> bool {
    let gate = match (sregs.cr0 & CR0_PE, sregs.efer & EFER_LMA) {
        (0, _) => 4,
        (_, 0) => 8,
        _ => 16,
    };
    u32::from(sregs.idt.limit) + 1 < gate
}

/// Replaces the instruction in the text.
const LOST: &str = "the instruction and the registers of the fault are lost: kvm-amd resets a vCPU that shuts down, so it is \
    in its state after INIT";

/// Whether a vCPU is at the reset vector with the registers that INIT leaves: Intel SDM volume
/// 3, table 10-1.
fn is_after_init(regs: &kvm_regs, sregs: &kvm_sregs) -> bool {
    let is_at_vector = regs.rip == 0xfff0 && sregs.cs.base == 0xffff_0000;
    is_at_vector && regs.rflags == 2 && regs.rsp == 0 && sregs.cr0 & CR0_PE == 0
}

/// The instruction at a vCPU's RIP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    /// Its linear address: CS's base and RIP.
    pub(super) address: u64,
    /// Its bytes, and perhaps some after it; empty if no memory is mapped there.
    pub(super) bytes: Vec<u8>,
    /// Its disassembly; `None` if the bytes are not a known instruction.
    pub(super) text: Option<String>,
}

impl Instruction {
    pub(super) fn at(vcpu: &Vcpu, regs: &kvm_regs, sregs: &kvm_sregs) -> Self {
        let bytes = instruction_bytes(vcpu, regs, sregs);
        let text = disassemble(&bytes, bitness(sregs), regs.rip);
        Self { address: linear(regs, sregs), bytes, text }
    }
}

/// The bytes at a vCPU's RIP: those that KVM reports it could not emulate, if they are a whole
/// instruction; otherwise those in memory.
pub(super) fn instruction_bytes(vcpu: &Vcpu, regs: &kvm_regs, sregs: &kvm_sregs) -> Vec<u8> {
    let from_kvm = match vcpu.page.exit_reason() {
        KVM_EXIT_INTERNAL_ERROR => emulation_bytes(&vcpu.page.internal_error()),
        _ => Vec::new(),
    };
    if decode(&from_kvm, bitness(sregs), regs.rip).is_some() {
        return from_kvm;
    }
    let in_memory = fetch(vcpu, sregs, linear(regs, sregs));
    if in_memory.len() > from_kvm.len() { in_memory } else { from_kvm }
}

/// The guest-physical address of the page of a vCPU's RIP.
pub(super) fn page_of_code(vcpu: &Vcpu, regs: &kvm_regs, sregs: &kvm_sregs) -> Option<u64> {
    let address = linear(regs, sregs);
    vcpu.translate(&Paging::of(sregs), address & !(PAGE - 1))
}

/// The bytes at a vCPU's RIP, up to the end of their page, which is at `page` in memory.
pub(super) fn bytes_in_page(vcpu: &Vcpu, page: u64, regs: &kvm_regs, sregs: &kvm_sregs) -> Vec<u8> {
    let within = linear(regs, sregs) % PAGE;
    let length = MAX_BYTES.min(PAGE - within);
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    match vcpu.memory().read(page + within, &mut bytes).is_ok() {
        true => bytes,
        false => Vec::new(),
    }
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "instruction at {:#x}: ", self.address)?;
        match &self.text {
            Some(text) => f.write_str(text)?,
            None if self.bytes.is_empty() => return f.write_str("no memory is mapped there"),
            None => f.write_str("unknown")?,
        }
        write!(f, "\ninstruction bytes: {}", hex(&self.bytes))
    }
}

pub(super) fn linear(regs: &kvm_regs, sregs: &kvm_sregs) -> u64 {
    match bitness(sregs) {
        64 => regs.rip,
        _ => sregs.cs.base.wrapping_add(regs.rip) & 0xffff_ffff,
    }
}

/// The bytes that KVM reports it could not emulate.
fn emulation_bytes(error: &InternalError) -> Vec<u8> {
    error.instruction.get(..error.instruction_len).unwrap_or_default().to_vec()
}

/// Up to 15 bytes at a linear address, the maximum length of an instruction.
fn fetch(vcpu: &Vcpu, sregs: &kvm_sregs, address: u64) -> Vec<u8> {
    let paging = Paging::of(sregs);
    (0..MAX_BYTES)
        .map_while(|n| {
            let at = vcpu.translate(&paging, address.wrapping_add(n))?;
            vcpu.memory().load::<u8>(at).ok()
        })
        .collect()
}

/// Describes KVM's internal error, by the kernel's `KVM_INTERNAL_ERROR_*` numbers. Without fix-ups,
/// also says that they may help.
pub(crate) fn internal_error(error: &InternalError, has_fixups: bool) -> String {
    let name = match error.suberror {
        1 => "KVM could not emulate an instruction",
        2 => "an exception occurred while KVM delivered another",
        3 => "an exit occurred while KVM delivered an event",
        4 => "an exit reason that KVM did not expect",
        _ => "KVM internal error",
    };
    let mut text = format!("{name} (suberror {})", error.suberror);
    // The fault shows the instruction with its bytes instead.
    let data =
        error.data.get(..error.ndata).filter(|d| !d.is_empty() && error.instruction_len == 0);
    if let Some(data) = data {
        let words: Vec<String> = data.iter().map(|word| format!("{word:#x}")).collect();
        let _ = write!(text, "\ndata: {}", words.join(" "));
    }
    if error.suberror == KVM_INTERNAL_ERROR_EMULATION && !has_fixups {
        text += "\nfix-ups are off: CpuConfig(fixups=True), or pyvmm run --fixups, executes many of these";
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}

/// The registers of an instruction that failed, by name.
pub(super) fn named(r: &kvm_regs, s: &kvm_sregs) -> Vec<(&'static str, u64)> {
    let selector = |segment: &kvm_segment| u64::from(segment.selector);
    let general = general(r).into_iter().chain(control(s));
    let rest = [
        ("rip", r.rip),
        ("rflags", r.rflags),
        ("efer", s.efer),
        ("cs", selector(&s.cs)),
        ("ss", selector(&s.ss)),
        ("ds", selector(&s.ds)),
        ("es", selector(&s.es)),
        ("fs", selector(&s.fs)),
        ("gs", selector(&s.gs)),
    ];
    general.chain(rest).collect()
}

fn general(r: &kvm_regs) -> [(&'static str, u64); 16] {
    [
        ("rax", r.rax),
        ("rbx", r.rbx),
        ("rcx", r.rcx),
        ("rdx", r.rdx),
        ("rsi", r.rsi),
        ("rdi", r.rdi),
        ("rbp", r.rbp),
        ("rsp", r.rsp),
        ("r8", r.r8),
        ("r9", r.r9),
        ("r10", r.r10),
        ("r11", r.r11),
        ("r12", r.r12),
        ("r13", r.r13),
        ("r14", r.r14),
        ("r15", r.r15),
    ]
}

fn control(s: &kvm_sregs) -> [(&'static str, u64); 4] {
    [("cr0", s.cr0), ("cr2", s.cr2), ("cr3", s.cr3), ("cr4", s.cr4)]
}

fn registers(r: &kvm_regs, s: &kvm_sregs) -> String {
    let mut text = format!("rip {:#018x}  rflags {:#x}  efer {:#x}\n", r.rip, r.rflags, s.efer);
    for row in general(r).chunks(4).chain([&control(s)[..]]) {
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
    fn an_instruction_shows_its_address_text_and_bytes() {
        let int =
            Instruction { address: 0x7c00, bytes: vec![0xcd, 0x80], text: Some("int 0x80".into()) };
        assert_eq!(int.to_string(), "instruction at 0x7c00: int 0x80\ninstruction bytes: cd 80");
        let unknown = Instruction { text: None, ..int.clone() };
        assert!(unknown.to_string().contains("unknown\ninstruction bytes: cd 80"));
        let nowhere = Instruction { bytes: Vec::new(), ..unknown };
        assert_eq!(nowhere.to_string(), "instruction at 0x7c00: no memory is mapped there");
    }

    #[test]
    fn only_a_vcpu_as_init_leaves_it_has_lost_its_fault() {
        let regs = kvm_regs { rip: 0xfff0, rflags: 2, rdx: 0x600, ..Default::default() };
        let mut sregs = kvm_sregs { cr0: 0x6000_0010, ..Default::default() };
        sregs.cs.base = 0xffff_0000;
        assert!(is_after_init(&regs, &sregs));
        assert!(!is_after_init(&kvm_regs { rsp: 8, ..regs }, &sregs), "it has run since INIT");
        assert!(!is_after_init(&regs, &kvm_sregs { cr0: CR0_PE, ..sregs }));
        assert!(!is_after_init(&kvm_regs { rip: 0x1000, ..regs }, &sregs));
    }

    #[test]
    fn an_idt_without_room_for_a_gate_is_deliberate_in_each_mode() {
        for (cr0, efer, limit) in [(0, 0, 2), (CR0_PE, 0, 6), (CR0_PE, EFER_LMA, 14)] {
            let mut sregs = kvm_sregs { cr0, efer, ..Default::default() };
            for (limit, is_deliberate) in [(0, true), (limit, true), (limit + 1, false)] {
                sregs.idt.limit = limit;
                assert_eq!(has_no_gate(&sregs), is_deliberate, "{limit}");
            }
            sregs.idt.limit = 0xffff;
            assert!(!has_no_gate(&sregs), "as after a reset");
        }
    }

    #[test]
    fn the_address_is_the_segments_base_and_rip() {
        let regs = kvm_regs { rip: 0x10, ..Default::default() };
        let mut sregs = kvm_sregs::default();
        sregs.cs.base = 0xffff_fff0;
        assert_eq!(linear(&regs, &sregs), 0, "32 bits wrap");
        (sregs.cs.l, sregs.efer) = (1, 1 << 10);
        assert_eq!(linear(&regs, &sregs), 0x10, "64 bits have no base");
    }

    #[test]
    fn an_unknown_suberror_shows_its_number_and_data() {
        let unknown = InternalError { suberror: 77, ndata: 1, ..error() };
        assert_eq!(internal_error(&unknown, false), "KVM internal error (suberror 77)\ndata: 0x0");
    }

    #[test]
    fn registers_are_named() {
        let regs = kvm_regs { rip: 0x7c00, ..Default::default() };
        let text = registers(&regs, &kvm_sregs::default());
        assert!(text.starts_with("rip 0x0000000000007c00"));
        assert!(text.contains("r15 0x") && text.contains("cr3 0x") && text.contains("gdt 0x0"));
    }
}

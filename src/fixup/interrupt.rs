//! Enters the handler of an interrupt or exception as the processor does: through the vectors of
//! real mode, the gates of protected mode, and those of long mode (Intel SDM volume 3, sections
//! 6.12 and 6.14, and volume 2, INT n). A fault on the way is returned, and `deliver.rs` raises it.
//! Virtual-8086 mode, shadow stacks and FRED are not supported, and the exit is reported.

use super::access::Access;
use super::cpu::{Cpu, Done, Flow, Stop, fault, fault_with, mask};
use super::deliver::{Event, Source};
use super::descriptor::{Descriptor, segment_of};
use super::stack::{Stack, null_stack};
use super::task::Reason;
use crate::x86::{AC, CR4_CET, CR4_FRED, GP, IF, NP, NT, RF, SS, TF, VM};

/// In an error code: the index refers to the IDT.
const CODE_IDT: u32 = 2;

/// A gate of the IDT.
struct Gate {
    selector: u16,
    offset: u64,
    /// Whether it is a trap gate, which does not disable interrupts.
    is_trap: bool,
    /// The size of each pushed value in bytes: 2, 4 or 8.
    width: usize,
    /// The index in the TSS's interrupt stack table; 0 for none.
    stack: u8,
}

/// What an entry of the IDT leads to.
enum Entry {
    Handler(Gate),
    /// Another task: the selector of its TSS.
    Task(u16),
}

impl Cpu<'_> {
    /// Enter the handler of an event. The registers change only if it succeeds.
    pub(super) fn enter(&mut self, event: &Event) -> Done<Flow> {
        if self.regs.rflags & VM != 0 || self.sregs.cr4 & (CR4_CET | CR4_FRED) != 0 {
            return Err(Stop::Unknown);
        }
        if !self.is_protected() {
            return self.real_interrupt(event.vector, event.next);
        }
        let gate = match self.entry_of_vector(event.vector, event.source == Source::Software)? {
            Entry::Task(selector) => return self.task_gate(selector, event),
            Entry::Handler(gate) => gate,
        };
        let code = self.code_of_gate(gate.selector)?;
        let is_conforming = code.is_conforming();
        let new_cpl = if is_conforming { self.cpl() } else { code.dpl() };
        if code.dpl() > self.cpl() {
            return fault_with(GP, u32::from(gate.selector & !3));
        }
        let (selector, old) = (gate.selector & !3 | u16::from(new_cpl), self.cpl());
        let mut stack = self.stack_of(&gate, old, new_cpl)?;
        let mut frame = Vec::with_capacity(6);
        if new_cpl < old || gate.width == 8 {
            frame.extend([u64::from(self.sregs.ss.selector), self.regs.rsp]);
        }
        frame.extend([event.flags(self), u64::from(self.sregs.cs.selector), event.next]);
        frame.extend(event.code.map(u64::from));
        let offset = self.entry_of(&gate, &code)?;
        self.push(&mut stack, &frame, gate.width, new_cpl)?;
        self.mark_accessed(&code)?;
        self.sregs.cs = segment_of(selector, &code, new_cpl);
        if new_cpl < old {
            self.sregs.ss = stack.segment;
        }
        self.regs.rsp = stack.pointer;
        self.regs.rip = offset;
        self.regs.rflags &= !(TF | NT | VM | RF);
        if !gate.is_trap {
            self.regs.rflags &= !IF;
        }
        Ok(Flow::Entered)
    }

    /// A task gate: the handler is another task, which finds the error code on its stack.
    fn task_gate(&mut self, selector: u16, event: &Event) -> Done<Flow> {
        let flags = event.flags(self);
        self.switch_task(selector, Reason::Gate, event.next, flags)?;
        if let Some(code) = event.code {
            let mut stack = Stack { segment: self.sregs.ss, pointer: self.regs.rsp };
            self.push(&mut stack, &[u64::from(code)], 4, self.cpl())?;
            self.regs.rsp = stack.pointer;
        }
        Ok(Flow::Entered)
    }

    /// The address of the gate's handler.
    fn entry_of(&self, gate: &Gate, code: &Descriptor) -> Done<u64> {
        let offset = gate.offset & mask(if gate.width == 8 { 8 } else { 4 });
        let is_outside = match gate.width {
            8 => !self.is_canonical(offset),
            _ => offset > u64::from(code.limit()),
        };
        if is_outside { fault_with(GP, 0) } else { Ok(offset) }
    }

    fn real_interrupt(&mut self, vector: u8, next: u64) -> Done<Flow> {
        let entry = u64::from(vector) * 4;
        if entry + 3 > u64::from(self.sregs.idt.limit) {
            return fault(GP);
        }
        let mut bytes = [0; 4];
        let at = self.sregs.idt.base.wrapping_add(entry);
        self.read_linear(at, &mut bytes, Access::implicit(false))?;
        let [low, high, cs_low, cs_high] = bytes;
        let mut stack = Stack { segment: self.sregs.ss, pointer: self.regs.rsp };
        let frame = [self.regs.rflags, u64::from(self.sregs.cs.selector), next];
        self.push(&mut stack, &frame, 2, 0)?;
        let selector = u16::from_le_bytes([cs_low, cs_high]);
        self.sregs.cs.selector = selector;
        self.sregs.cs.base = u64::from(selector) << 4;
        self.regs.rip = u64::from(u16::from_le_bytes([low, high]));
        self.regs.rsp = stack.pointer;
        self.regs.rflags &= !(IF | TF | AC | RF);
        Ok(Flow::Entered)
    }

    /// The bytes of an entry of the IDT, whose error code is `code`.
    fn raw_entry(&mut self, vector: u8, code: u32) -> Done<u128> {
        let size: u8 = if self.is_long() { 16 } else { 8 };
        let entry = u64::from(vector) * u64::from(size);
        if entry + u64::from(size) - 1 > u64::from(self.sregs.idt.limit) {
            return fault_with(GP, code);
        }
        let mut bytes = [0; 16];
        let data = bytes.get_mut(..usize::from(size)).ok_or(Stop::Unknown)?;
        let at = self.sregs.idt.base.wrapping_add(entry);
        self.read_linear(at, data, Access::implicit(false))?;
        Ok(u128::from_le_bytes(bytes))
    }

    /// The entry of a vector. `is_checked`: whether the gate's privilege is checked.
    fn entry_of_vector(&mut self, vector: u8, is_checked: bool) -> Done<Entry> {
        let code = u32::from(vector) << 3 | CODE_IDT;
        let raw = self.raw_entry(vector, code)?;
        let field =
            |shift: u32, bits: u32| u64::try_from(raw >> shift & ((1 << bits) - 1)).unwrap_or(0);
        let kind = field(40, 5);
        let width = match (kind, self.is_long()) {
            (0xe | 0xf, true) => 8,
            (0xe | 0xf, false) => 4,
            (6 | 7, false) => 2,
            (5, false) => 0, // a task gate
            _ => return fault_with(GP, code),
        };
        if is_checked && field(45, 2) < u64::from(self.cpl()) {
            return fault_with(GP, code);
        }
        if field(47, 1) == 0 {
            return fault_with(NP, code);
        }
        let selector = u16::try_from(field(16, 16)).unwrap_or(0);
        if width == 0 {
            return Ok(Entry::Task(selector));
        }
        let high = if width == 2 { 0 } else { field(48, 16) << 16 };
        let highest = if width == 8 { field(64, 32) << 32 } else { 0 };
        Ok(Entry::Handler(Gate {
            selector,
            offset: field(0, 16) | high | highest,
            is_trap: kind & 1 != 0,
            width,
            stack: if width == 8 { u8::try_from(field(32, 3)).unwrap_or(0) } else { 0 },
        }))
    }

    /// The code segment of the gate's handler.
    fn code_of_gate(&mut self, selector: u16) -> Done<Descriptor> {
        let code = u32::from(selector & !3);
        if code == 0 {
            return fault_with(GP, 0);
        }
        let Some(descriptor) = self.descriptor(selector)? else {
            return fault_with(GP, code);
        };
        let is_right = descriptor.is_code() && (!self.is_long() || descriptor.is_64_bit());
        if !is_right {
            return fault_with(GP, code);
        }
        if !descriptor.is_present() {
            return fault_with(NP, code);
        }
        Ok(descriptor)
    }

    fn stack_of(&mut self, gate: &Gate, old: u8, new: u8) -> Done<Stack> {
        let same = Stack { segment: self.sregs.ss, pointer: self.regs.rsp };
        if gate.width != 8 {
            return if new < old { self.inner_stack(new) } else { Ok(same) };
        }
        let at = match (gate.stack, new < old) {
            (0, false) => return Ok(Stack { pointer: same.pointer & !15, ..same }),
            (0, true) => 4 + u32::from(new) * 8,
            (stack, _) => 0x24 + (u32::from(stack) - 1) * 8,
        };
        let pointer = self.task_field(at, 8)? & !15;
        if !self.is_canonical(pointer) {
            return fault_with(SS, 0);
        }
        // A null selector with the new privilege. KVM takes the level from the segment's DPL.
        let segment = match new < old {
            true => null_stack(new),
            false => same.segment,
        };
        Ok(Stack { segment, pointer })
    }
}

#[cfg(test)]
mod tests {
    //! Covers src/fixup/stack.rs.

    use super::*;
    use crate::fixup::cpu::Fault;
    use crate::fixup::testing::{Ram, protected, run};
    use crate::x86::TS;
    use kvm_bindings::{kvm_regs, kvm_sregs};

    const GDT: usize = 0x2000;
    const IDT: usize = 0x3000;
    const TASK: usize = 0x4000;
    const INT: [u8; 2] = [0xcd, 0x21];

    /// Both rings in the GDT, a TSS, and a gate for vector 0x21 that ring 3 may use.
    fn machine(ring: u8) -> (Ram, kvm_sregs) {
        let mut ram = Ram::new(0x8000);
        let (code, data) = (0x00cf_9a00_0000_ffff_u64, 0x00cf_9200_0000_ffff_u64);
        let entries = [0, code, data, code | 3 << 45, data | 3 << 45, code | 4 << 40];
        for (n, entry) in entries.iter().enumerate() {
            ram.put(GDT + 8 * n, &entry.to_le_bytes());
        }
        ram.put(IDT + 8 * 0x21, &gate(0x08, 0xee).to_le_bytes());
        ram.put(TASK + 4, &0x7000_u32.to_le_bytes());
        ram.put(TASK + 8, &0x10_u32.to_le_bytes());
        let mut sregs = protected(ring);
        (sregs.gdt.base, sregs.gdt.limit) = (0x2000, 47);
        (sregs.idt.base, sregs.idt.limit) = (0x3000, 0x7ff);
        (sregs.tr.base, sregs.tr.limit, sregs.tr.type_) = (0x4000, 103, 11);
        (ram, sregs)
    }

    /// A gate of 32 bits to 0x5678.
    fn gate(selector: u64, access: u64) -> u64 {
        0x5678 | selector << 16 | access << 40
    }

    fn regs() -> kvm_regs {
        kvm_regs { rsp: 0x6000, rflags: IF | TF | NT | 2, ..Default::default() }
    }

    fn stop(ram: &mut Ram, sregs: kvm_sregs) -> (u8, Option<u32>) {
        match run(ram, regs(), sregs, &INT).unwrap_err() {
            Stop::Fault(Fault { vector, code, .. }) => (vector, code),
            stop => panic!("{stop:?}"),
        }
    }

    #[test]
    fn ring_3_gets_the_stack_of_the_task() {
        let (mut ram, sregs) = machine(3);
        let (after, system) = run(&mut ram, regs(), sregs, &INT).unwrap();
        assert_eq!((after.rip, after.rsp, after.rflags), (0x5678, 0x7000 - 20, 2));
        let frame: Vec<u32> = (0..5).map(|n| ram.u32(0x7000 - 20 + 4 * n)).collect();
        assert_eq!(frame, [0x1002, 0x1b, 0x4302, 0x6000, 0x23]);
        assert_eq!(
            (system.cs.selector, system.cs.dpl, system.ss.selector, system.ss.dpl),
            (8, 0, 0x10, 0)
        );
        assert_eq!(ram.bytes[GDT + 13] & 1, 1, "the descriptor has been accessed");
    }

    #[test]
    fn a_task_of_16_bits_has_its_stacks_elsewhere() {
        let (mut ram, mut sregs) = machine(3);
        ram.put(TASK + 2, &[0x00, 0x70, 0x10, 0x00]);
        sregs.tr.type_ = 3;
        let (after, _) = run(&mut ram, regs(), sregs, &INT).unwrap();
        assert_eq!(after.rsp, 0x7000 - 20);
    }

    #[test]
    fn conforming_code_keeps_the_ring_and_the_stack() {
        let (mut ram, sregs) = machine(3);
        ram.put(IDT + 8 * 0x21, &gate(0x28, 0xef).to_le_bytes());
        let (after, system) = run(&mut ram, regs(), sregs, &INT).unwrap();
        assert_eq!((after.rsp, after.rflags & IF), (0x6000 - 12, IF));
        assert_eq!((system.cs.selector, system.ss.selector), (0x2b, 0x23));
    }

    #[test]
    fn every_stack_that_is_none_is_an_invalid_task() {
        for (selector, expected) in [
            (0_u16, (TS, Some(0))),
            (0x08, (TS, Some(8))),
            (0x23, (TS, Some(0x20))),
            (0x11, (TS, Some(0x10))),
            (0x100, (TS, Some(0x100))),
        ] {
            let (mut ram, sregs) = machine(3);
            ram.put(TASK + 8, &selector.to_le_bytes());
            assert_eq!(stop(&mut ram, sregs), expected, "{selector:#x}");
        }
        let (mut ram, sregs) = machine(3);
        ram.bytes[GDT + 0x15] &= 0x7f;
        assert_eq!(stop(&mut ram, sregs), (SS, Some(0x10)), "not present");
        let (mut ram, mut sregs) = machine(3);
        (sregs.tr.limit, sregs.tr.selector) = (4, 0x28);
        assert_eq!(stop(&mut ram, sregs), (TS, Some(0x28)), "beyond the task's limit");
    }

    #[test]
    fn every_gate_that_cannot_be_entered_is_a_fault() {
        let (mut ram, mut sregs) = machine(0);
        sregs.idt.limit = 0x21 * 8 + 6;
        assert_eq!(stop(&mut ram, sregs), (GP, Some(0x21 * 8 + 2)), "beyond the table");
        for (made, expected) in [
            (gate(0x08, 0xe1), (GP, Some(0x10a))),
            (gate(0x08, 0x6e), (NP, Some(0x10a))),
            (gate(0x1b, 0xee), (GP, Some(0x18))),
            (gate(0x08, 0xe5), (GP, Some(8))), // a task gate
        ] {
            let (mut ram, sregs) = machine(0);
            ram.put(IDT + 8 * 0x21, &made.to_le_bytes());
            assert_eq!(stop(&mut ram, sregs), expected, "{made:#x}");
        }
        let (mut ram, sregs) = machine(3);
        ram.put(IDT + 8 * 0x21, &gate(0x08, 0x8e).to_le_bytes());
        assert_eq!(stop(&mut ram, sregs), (GP, Some(0x10a)), "the gate's privilege");
    }

    #[test]
    fn a_stack_that_ends_is_a_stack_fault_and_nothing_is_pushed() {
        let (mut ram, mut sregs) = machine(0);
        sregs.ss.limit = 0x5ffe;
        assert_eq!(stop(&mut ram, sregs), (SS, Some(0)));
        assert_eq!(ram.u32(0x5ffc), 0);
    }

    #[test]
    fn real_mode_pushes_words_and_goes_through_the_vectors() {
        let mut ram = Ram::new(0x2_0000);
        ram.put(0x84, &[0x10, 0x00, 0x00, 0x50]);
        let mut sregs = kvm_sregs::default();
        (sregs.idt.limit, sregs.cs.limit, sregs.ss.limit) = (0x3ff, 0xffff, 0xffff);
        sregs.ss.base = 0x1_0000;
        let regs = kvm_regs { rsp: 0x1234_0000, rflags: IF | AC | 2, ..Default::default() };
        let (after, system) = run(&mut ram, regs, sregs, &INT).unwrap();
        assert_eq!((after.rip, system.cs.base, after.rflags), (0x10, 0x5_0000, 2));
        assert_eq!(after.rsp, 0x1234_fffa, "SP wraps within its segment");
    }
}

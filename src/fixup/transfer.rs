//! Transfers between segments that KVM refuses: IRET outside real mode and 64-bit code, RETF to an
//! outer ring, and far JMP and CALL through call gates and to tasks (Intel SDM volume 2). Those to
//! and from virtual-8086 mode, and through the call gates of long mode, are not supported.

use iced_x86::{Instruction, Mnemonic, OpKind};
use kvm_bindings::kvm_segment;

use super::access::Access;
use super::cpu::{Cpu, Done, Flow, Stop, fault_with, mask};
use super::descriptor::{Descriptor, segment_of};
use super::stack::Stack;
use super::task::Reason;
use crate::x86::{
    AC, ARITHMETIC, DF, GP, ID, IF, IOPL, NP, NT, RF, RFLAGS_RESERVED, SS, TF, VIF, VIP, VM,
};

/// The instructions executed here, with their names.
const TABLE: [(Mnemonic, &str); 6] = [
    (Mnemonic::Iret, "iret"),
    (Mnemonic::Iretd, "iret"),
    (Mnemonic::Iretq, "iret"),
    (Mnemonic::Retf, "retf"),
    (Mnemonic::Jmp, "jmp"),
    (Mnemonic::Call, "call"),
];

pub(super) fn name(mnemonic: Mnemonic) -> Option<&'static str> {
    super::cpu::named(&TABLE, mnemonic)
}

pub(super) fn execute(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<Flow> {
    if !cpu.is_protected() || cpu.regs.rflags & VM != 0 {
        return Err(Stop::Unknown);
    }
    match i.mnemonic() {
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => interrupt_return(cpu, i),
        Mnemonic::Retf => {
            let mut pops = Pops::new(cpu, i)?;
            let (offset, selector) = (pops.next(cpu)?, pops.selector(cpu)?);
            let released = if i.op_count() == 1 { u64::from(i.immediate16()) } else { 0 };
            far_return(cpu, pops, offset, selector, released)
        }
        _ => far(cpu, i),
    }
}

/// Values that are popped from the stack. The vCPU's stack pointer moves only at the end.
struct Pops {
    pointer: u64,
    width: usize,
}

impl Pops {
    fn new(cpu: &Cpu<'_>, i: &Instruction) -> Done<Self> {
        let width = match i.code() {
            iced_x86::Code::Iretw | iced_x86::Code::Retfw | iced_x86::Code::Retfw_imm16 => 2,
            iced_x86::Code::Iretd | iced_x86::Code::Retfd | iced_x86::Code::Retfd_imm16 => 4,
            _ => return Err(Stop::Unknown),
        };
        Ok(Self { pointer: cpu.regs.rsp, width })
    }

    fn next(&mut self, cpu: &mut Cpu<'_>) -> Done<u64> {
        let mut bytes = [0; 8];
        let data = bytes.get_mut(..self.width).ok_or(Stop::Unknown)?;
        let at = self.pointer & cpu.stack_mask();
        let linear = cpu.linear(iced_x86::Register::SS, at, self.width, false)?;
        cpu.read_linear(linear, data, Access::explicit(cpu.cpl(), false))?;
        self.skip(cpu, u64::try_from(self.width).unwrap_or(0));
        Ok(u64::from_le_bytes(bytes))
    }

    fn selector(&mut self, cpu: &mut Cpu<'_>) -> Done<u16> {
        Ok(u16::try_from(self.next(cpu)? & mask(2)).unwrap_or(0))
    }

    fn skip(&mut self, cpu: &Cpu<'_>, bytes: u64) {
        let wrap = cpu.stack_mask();
        self.pointer = self.pointer & !wrap | self.pointer.wrapping_add(bytes) & wrap;
    }
}

fn interrupt_return(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<Flow> {
    if cpu.regs.rflags & NT != 0 {
        if cpu.is_long() {
            return fault_with(GP, 0);
        }
        let flags = cpu.regs.rflags & !NT;
        let mut link = [0; 2];
        cpu.read_linear(cpu.sregs.tr.base, &mut link, Access::implicit(false))?;
        let next = i.next_ip() & mask(4);
        cpu.switch_task(u16::from_le_bytes(link), Reason::Return, next, flags)?;
        cpu.unmasks_nmi = true;
        return Ok(Flow::Jumped);
    }
    let mut pops = Pops::new(cpu, i)?;
    let (offset, selector) = (pops.next(cpu)?, pops.selector(cpu)?);
    let popped = pops.next(cpu)?;
    let cpl = cpu.cpl();
    if pops.width == 4 && popped & VM != 0 && cpl == 0 && !cpu.is_long() {
        return Err(Stop::Unknown);
    }
    let changed = changeable(cpu.regs.rflags, cpl, pops.width);
    let flow = far_return(cpu, pops, offset, selector, 0)?;
    cpu.regs.rflags = cpu.regs.rflags & !changed | popped & changed | RFLAGS_RESERVED;
    cpu.unmasks_nmi = true;
    Ok(flow)
}

/// The flags that IRET loads at a privilege level.
fn changeable(now: u64, cpl: u8, width: usize) -> u64 {
    let mut changed = ARITHMETIC | TF | DF | NT;
    if width > 2 {
        changed |= RF | AC | ID;
    }
    if u64::from(cpl) <= (now & IOPL) >> 12 {
        changed |= IF;
    }
    if cpl == 0 {
        changed |= IOPL | if width > 2 { VIF | VIP } else { 0 };
    }
    changed
}

/// Return to a code segment of the same or an outer ring. `released`: bytes of parameters on both
/// stacks.
fn far_return(
    cpu: &mut Cpu<'_>,
    mut pops: Pops,
    offset: u64,
    selector: u16,
    released: u64,
) -> Done<Flow> {
    let (cpl, rpl) = (cpu.cpl(), level(selector));
    let code = returnable_code(cpu, selector)?;
    pops.skip(cpu, released);
    let target = checked_offset(cpu, offset, &code)?;
    if rpl == cpl {
        cpu.mark_accessed(&code)?;
        cpu.sregs.cs = segment_of(selector, &code, rpl);
        (cpu.regs.rip, cpu.regs.rsp) = (target, pops.pointer);
        return Ok(Flow::Jumped);
    }
    let (pointer, stack_selector) = (pops.next(cpu)?, pops.selector(cpu)?);
    let stack = returnable_stack(cpu, stack_selector, rpl, code.is_64_bit())?;
    cpu.mark_accessed(&code)?;
    cpu.sregs.cs = segment_of(selector, &code, rpl);
    cpu.sregs.ss = stack;
    cpu.regs.rip = target;
    let outer = Pops { pointer: 0, width: pops.width };
    let kept = cpu.regs.rsp & !cpu.stack_mask();
    cpu.regs.rsp = kept | pointer & cpu.stack_mask();
    let mut outer = Pops { pointer: cpu.regs.rsp, ..outer };
    outer.skip(cpu, released);
    cpu.regs.rsp = outer.pointer;
    for segment in [&mut cpu.sregs.ds, &mut cpu.sregs.es, &mut cpu.sregs.fs, &mut cpu.sregs.gs] {
        close(segment, rpl);
    }
    Ok(Flow::Jumped)
}

fn level(selector: u16) -> u8 {
    u8::try_from(selector & 3).unwrap_or(3)
}

/// The code segment that a far return names.
fn returnable_code(cpu: &mut Cpu<'_>, selector: u16) -> Done<Descriptor> {
    let error = u32::from(selector & !3);
    if error == 0 {
        return fault_with(GP, 0);
    }
    let Some(code) = cpu.descriptor(selector)? else { return fault_with(GP, error) };
    let rpl = level(selector);
    let is_level_right = if code.is_conforming() { code.dpl() <= rpl } else { code.dpl() == rpl };
    if !code.is_code() || rpl < cpu.cpl() || !is_level_right {
        return fault_with(GP, error);
    }
    if !code.is_present() {
        return fault_with(NP, error);
    }
    Ok(code)
}

fn checked_offset(cpu: &Cpu<'_>, offset: u64, code: &Descriptor) -> Done<u64> {
    let is_outside = match cpu.is_long() && code.is_64_bit() {
        true => !cpu.is_canonical(offset),
        false => offset > u64::from(code.limit()),
    };
    if is_outside { fault_with(GP, 0) } else { Ok(offset) }
}

/// The stack segment that a return to an outer ring names.
fn returnable_stack(
    cpu: &mut Cpu<'_>,
    selector: u16,
    rpl: u8,
    is_64_bit: bool,
) -> Done<kvm_segment> {
    let error = u32::from(selector & !3);
    if error == 0 {
        let is_allowed = cpu.is_long() && is_64_bit && rpl != 3 && level(selector) == rpl;
        return match is_allowed {
            true => Ok(super::stack::null_stack(rpl)),
            false => fault_with(GP, 0),
        };
    }
    let Some(data) = cpu.descriptor(selector)? else { return fault_with(GP, error) };
    if level(selector) != rpl || data.dpl() != rpl || !data.is_writable_data() {
        return fault_with(GP, error);
    }
    if !data.is_present() {
        return fault_with(SS, error);
    }
    cpu.mark_accessed(&data)?;
    Ok(segment_of(selector, &data, rpl))
}

/// Make a data segment null if the new ring must not use it.
fn close(segment: &mut kvm_segment, cpl: u8) {
    let is_conforming_code = segment.type_ & 12 == 12;
    if segment.dpl < cpl && !is_conforming_code {
        *segment = kvm_segment { unusable: 1, ..Default::default() };
    }
}

/// The selector and offset of a far JMP or CALL.
fn far_pointer(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<(u16, u64, usize)> {
    match i.op0_kind() {
        OpKind::FarBranch16 => Ok((i.far_branch_selector(), u64::from(i.far_branch16()), 2)),
        OpKind::FarBranch32 => Ok((i.far_branch_selector(), u64::from(i.far_branch32()), 4)),
        OpKind::Memory => {
            let width = match i.memory_size() {
                iced_x86::MemorySize::SegPtr16 => 2,
                iced_x86::MemorySize::SegPtr32 => 4,
                iced_x86::MemorySize::SegPtr64 => 8,
                _ => return Err(Stop::Unknown),
            };
            let mut bytes = [0; 10];
            let data = bytes.get_mut(..width + 2).ok_or(Stop::Unknown)?;
            cpu.read_operand(i, 0, data)?;
            let whole = bytes.iter().rev().fold(0_u128, |all, byte| all << 8 | u128::from(*byte));
            let part = |shift: usize, bytes: usize| {
                u64::try_from(whole >> (8 * shift) & u128::from(mask(bytes))).unwrap_or(0)
            };
            Ok((u16::try_from(part(width, 2)).unwrap_or(0), part(0, width), width))
        }
        _ => Err(Stop::Unknown),
    }
}

/// JMP and CALL through a call gate, a task gate or a TSS.
fn far(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<Flow> {
    let (selector, _, _) = far_pointer(cpu, i)?;
    let error = u32::from(selector & !3);
    if error == 0 {
        return fault_with(GP, 0);
    }
    let Some(d) = cpu.descriptor(selector)? else { return fault_with(GP, error) };
    if !d.is_system() || cpu.is_long() {
        return Err(Stop::Unknown);
    }
    let is_call = i.mnemonic() == Mnemonic::Call;
    if !matches!(d.kind(), 1 | 4 | 5 | 9 | 12) || d.dpl() < cpu.cpl().max(level(selector)) {
        return fault_with(GP, error);
    }
    let reason = if is_call { Reason::Call } else { Reason::Jump };
    let (next, flags) = (i.next_ip() & mask(4), cpu.regs.rflags);
    match d.kind() {
        4 | 12 if !d.is_present() => return fault_with(NP, error),
        4 | 12 => call_gate(cpu, &d, is_call, next)?,
        5 if !d.is_present() => return fault_with(NP, error),
        5 => cpu.switch_task(d.gate_selector(), reason, next, flags)?,
        _ => cpu.switch_task(selector, reason, next, flags)?,
    }
    Ok(Flow::Jumped)
}

fn call_gate(cpu: &mut Cpu<'_>, gate: &Descriptor, is_call: bool, next: u64) -> Done<()> {
    let (selector, width) = (gate.gate_selector(), if gate.kind() == 12 { 4 } else { 2 });
    let error = u32::from(selector & !3);
    if error == 0 {
        return fault_with(GP, 0);
    }
    let Some(code) = cpu.descriptor(selector)? else { return fault_with(GP, error) };
    let cpl = cpu.cpl();
    // JMP does not change the ring.
    let is_level_right = match is_call || code.is_conforming() {
        true => code.dpl() <= cpl,
        false => code.dpl() == cpl,
    };
    if !code.is_code() || !is_level_right {
        return fault_with(GP, error);
    }
    if !code.is_present() {
        return fault_with(NP, error);
    }
    let target = checked_offset(cpu, gate.gate_offset(width), &code)?;
    let new_cpl = if code.is_conforming() { cpl } else { code.dpl() };
    let mut stack = Stack { segment: cpu.sregs.ss, pointer: cpu.regs.rsp };
    if is_call {
        let mut frame = Vec::new();
        if new_cpl < cpl {
            stack = cpu.inner_stack(new_cpl)?;
            frame.extend([u64::from(cpu.sregs.ss.selector), cpu.regs.rsp]);
            frame.extend(parameters(cpu, gate.gate_count(), width)?);
        }
        frame.extend([u64::from(cpu.sregs.cs.selector), next]);
        cpu.push(&mut stack, &frame, width, new_cpl)?;
    }
    cpu.mark_accessed(&code)?;
    cpu.sregs.cs = segment_of(selector, &code, new_cpl);
    if new_cpl < cpl {
        cpu.sregs.ss = stack.segment;
    }
    (cpu.regs.rip, cpu.regs.rsp) = (target, stack.pointer);
    Ok(())
}

/// The parameters that a call gate copies, in the order in which they are pushed.
fn parameters(cpu: &mut Cpu<'_>, count: u64, width: usize) -> Done<Vec<u64>> {
    let mut pops = Pops { pointer: cpu.regs.rsp, width };
    let mut values = (0..count).map(|_| pops.next(cpu)).collect::<Done<Vec<_>>>()?;
    values.reverse();
    Ok(values)
}

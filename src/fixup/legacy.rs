//! BOUND, ARPL, and ENTER with nested frames (Intel SDM volume 2).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::access::Access;
use super::cpu::{Cpu, Done, Flow, Stop, fault, mask};
use super::stack::Stack;
use crate::x86::{BR, UD, VM, ZF};

/// The instructions executed here, with their names.
const TABLE: [(Mnemonic, &str); 3] =
    [(Mnemonic::Bound, "bound"), (Mnemonic::Arpl, "arpl"), (Mnemonic::Enter, "enter")];

pub(super) fn name(mnemonic: Mnemonic) -> Option<&'static str> {
    super::cpu::named(&TABLE, mnemonic)
}

pub(super) fn execute(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<Flow> {
    match i.mnemonic() {
        Mnemonic::Bound => bound(cpu, i)?,
        Mnemonic::Arpl => arpl(cpu, i)?,
        _ => enter(cpu, i)?,
    }
    Ok(Flow::Next)
}

fn signed(value: u64, size: usize) -> i64 {
    let shift = 64 - 8 * u32::try_from(size).unwrap_or(8);
    (value << shift).cast_signed() >> shift
}

fn bound(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let (index, size) = cpu.register(i.op0_register())?;
    let mut bytes = [0; 8];
    let data = bytes.get_mut(..2 * size).ok_or(Stop::Unknown)?;
    cpu.read_operand(i, 1, data)?;
    let both = u64::from_le_bytes(bytes);
    let (lower, upper) = (both & mask(size), both >> (8 * size) & mask(size));
    let index = signed(index, size);
    let is_inside = signed(lower, size) <= index && index <= signed(upper, size);
    if is_inside { Ok(()) } else { fault(BR) }
}

fn arpl(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    if !cpu.is_protected() || cpu.regs.rflags & VM != 0 {
        return fault(UD);
    }
    let in_memory = i.op_kind(0) == OpKind::Memory;
    let mut bytes = [0; 2];
    let old = if in_memory {
        cpu.check_write(i, 0, 2)?;
        cpu.read_operand(i, 0, &mut bytes)?;
        u64::from(u16::from_le_bytes(bytes))
    } else {
        cpu.register(i.op0_register())?.0 & mask(2)
    };
    let (other, _) = cpu.register(i.op1_register())?;
    cpu.regs.rflags &= !ZF;
    if old & 3 >= other & 3 {
        return Ok(());
    }
    cpu.regs.rflags |= ZF;
    let [low, high, ..] = (old & !3 | other & 3).to_le_bytes();
    if in_memory {
        return cpu.write_operand(i, 0, &[low, high]);
    }
    let (whole, _) = cpu.register(i.op0_register())?;
    let new = whole & !mask(2) | u64::from(u16::from_le_bytes([low, high]));
    cpu.set_register(i.op0_register(), new)
}

/// ENTER: push the frame pointer and those of the enclosing frames.
fn enter(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let width = match i.code() {
        Code::Enterw_imm16_imm8 if !cpu.is_64_bit() => 2,
        Code::Enterd_imm16_imm8 => 4,
        Code::Enterq_imm16_imm8 => 8,
        _ => return Err(Stop::Unknown),
    };
    let (allocated, level) = (u64::from(i.immediate16()), u64::from(i.immediate8_2nd() % 32));
    let step = u64::try_from(width).unwrap_or(8);
    let wrap = cpu.stack_mask();
    let frame = cpu.regs.rsp & !wrap | cpu.regs.rsp.wrapping_sub(step) & wrap;
    let mut pushed = vec![cpu.regs.rbp & mask(width)];
    for n in 1..level {
        let at = cpu.regs.rbp.wrapping_sub(n * step) & wrap;
        let linear = cpu.linear(iced_x86::Register::SS, at, width, false)?;
        let mut bytes = [0; 8];
        let data = bytes.get_mut(..width).ok_or(Stop::Unknown)?;
        cpu.read_linear(linear, data, Access::explicit(cpu.cpl(), false))?;
        pushed.push(u64::from_le_bytes(bytes));
    }
    if level > 0 {
        pushed.push(frame & mask(width));
    }
    let mut stack = Stack { segment: cpu.sregs.ss, pointer: cpu.regs.rsp };
    cpu.push(&mut stack, &pushed, width, cpu.cpl())?;
    let pointer = stack.pointer;
    cpu.regs.rsp = pointer & !wrap | pointer.wrapping_sub(allocated) & wrap;
    cpu.regs.rbp = cpu.regs.rbp & !mask(width) | frame & mask(width);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixup::cpu::Fault;
    use crate::fixup::testing::{Ram, protected, run};
    use kvm_bindings::kvm_regs;

    #[test]
    fn an_index_outside_its_bounds_is_an_exception() {
        let bound = [0x62, 0x06]; // bound eax, [esi]
        for (index, is_inside) in
            [(-5_i32, true), (-6, false), (7, true), (8, false), (i32::MIN, false)]
        {
            let mut ram = Ram::new(0x4000);
            ram.put(0x2000, &(-5_i32).to_le_bytes());
            ram.put(0x2004, &7_i32.to_le_bytes());
            let rax = u64::from(index.cast_unsigned());
            let regs = kvm_regs { rax, rsi: 0x2000, ..Default::default() };
            let result = run(&mut ram, regs, protected(0), &bound);
            let fault = Fault { vector: BR, code: None, address: None };
            assert_eq!(result.err(), (!is_inside).then_some(Stop::Fault(fault)), "{index}");
        }
    }

    #[test]
    fn the_privilege_of_a_selector_is_raised() {
        let mut ram = Ram::new(0x4000);
        let arpl = [0x63, 0xd8]; // arpl ax, bx
        let regs = kvm_regs { rax: 0xffff_0010, rbx: 0x23, ..Default::default() };
        let (after, _) = run(&mut ram, regs, protected(0), &arpl).unwrap();
        assert_eq!((after.rax, after.rflags & ZF), (0xffff_0013, ZF));
        let (again, _) = run(&mut ram, after, protected(0), &arpl).unwrap();
        assert_eq!((again.rax, again.rflags & ZF), (0xffff_0013, 0));
    }

    #[test]
    fn nested_frames_are_linked() {
        let mut ram = Ram::new(0x8000);
        ram.put(0x5ff8, &0x1111_u32.to_le_bytes());
        ram.put(0x5ffc, &0x2222_u32.to_le_bytes());
        let enter = [0xc8, 0x20, 0x00, 0x03]; // enter 0x20, 3
        let regs = kvm_regs { rsp: 0x4000, rbp: 0x6000, ..Default::default() };
        let (after, _) = run(&mut ram, regs, protected(0), &enter).unwrap();
        assert_eq!((after.rbp, after.rsp), (0x3ffc, 0x4000 - 16 - 0x20));
        let frame: Vec<u32> = (0..4).map(|n| ram.u32(0x3ff0 + 4 * n)).collect();
        assert_eq!(frame, [0x3ffc, 0x1111, 0x2222, 0x6000]);
    }
}

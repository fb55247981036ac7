//! Moves, logic and integer arithmetic on XMM registers, as far as kernels use them: SSE, SSE2 and
//! SSSE3 in their old encodings (Intel SDM volume 2). Nothing here has floating-point exceptions.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::cpu::{Cpu, Done, Flow, Stop, fault, fault_with};
use super::xsave::{SSE, get, image, put, set_image};
use crate::x86::{CR0_EM, CR0_TS, CR4_OSFXSR, GP, NM, UD};

const XMM: usize = 160;

/// The instructions executed here, with their names and kinds.
const TABLE: [(Mnemonic, &str, Operation); 61] = [
    (Mnemonic::Movd, "movd", Operation::Scalar),
    (Mnemonic::Movq, "movq", Operation::Scalar),
    (Mnemonic::Pmovmskb, "pmovmskb", Operation::Mask),
    (Mnemonic::Movlps, "movlps", Operation::Half(0)),
    (Mnemonic::Movlpd, "movlpd", Operation::Half(0)),
    (Mnemonic::Movhps, "movhps", Operation::Half(8)),
    (Mnemonic::Movhpd, "movhpd", Operation::Half(8)),
    (Mnemonic::Movlhps, "movlhps", Operation::Both(|a, b| a & LOW | b << 64)),
    (Mnemonic::Movhlps, "movhlps", Operation::Both(|a, b| a & !LOW | b >> 64)),
    (Mnemonic::Pxor, "pxor", Operation::Both(|a, b| a ^ b)),
    (Mnemonic::Xorps, "xorps", Operation::Both(|a, b| a ^ b)),
    (Mnemonic::Xorpd, "xorpd", Operation::Both(|a, b| a ^ b)),
    (Mnemonic::Por, "por", Operation::Both(|a, b| a | b)),
    (Mnemonic::Orps, "orps", Operation::Both(|a, b| a | b)),
    (Mnemonic::Orpd, "orpd", Operation::Both(|a, b| a | b)),
    (Mnemonic::Pand, "pand", Operation::Both(|a, b| a & b)),
    (Mnemonic::Andps, "andps", Operation::Both(|a, b| a & b)),
    (Mnemonic::Andpd, "andpd", Operation::Both(|a, b| a & b)),
    (Mnemonic::Pandn, "pandn", Operation::Both(|a, b| !a & b)),
    (Mnemonic::Andnps, "andnps", Operation::Both(|a, b| !a & b)),
    (Mnemonic::Andnpd, "andnpd", Operation::Both(|a, b| !a & b)),
    (Mnemonic::Paddb, "paddb", Operation::Lanes(8, |a, b| a.wrapping_add(b))),
    (Mnemonic::Paddw, "paddw", Operation::Lanes(16, |a, b| a.wrapping_add(b))),
    (Mnemonic::Paddd, "paddd", Operation::Lanes(32, |a, b| a.wrapping_add(b))),
    (Mnemonic::Paddq, "paddq", Operation::Lanes(64, |a, b| a.wrapping_add(b))),
    (Mnemonic::Psubb, "psubb", Operation::Lanes(8, |a, b| a.wrapping_sub(b))),
    (Mnemonic::Psubw, "psubw", Operation::Lanes(16, |a, b| a.wrapping_sub(b))),
    (Mnemonic::Psubd, "psubd", Operation::Lanes(32, |a, b| a.wrapping_sub(b))),
    (Mnemonic::Psubq, "psubq", Operation::Lanes(64, |a, b| a.wrapping_sub(b))),
    (Mnemonic::Pcmpeqb, "pcmpeqb", Operation::Lanes(8, equal)),
    (Mnemonic::Pcmpeqw, "pcmpeqw", Operation::Lanes(16, equal)),
    (Mnemonic::Pcmpeqd, "pcmpeqd", Operation::Lanes(32, equal)),
    (Mnemonic::Pmuludq, "pmuludq", Operation::Lanes(64, |a, b| (a & WORD).wrapping_mul(b & WORD))),
    (Mnemonic::Pmullw, "pmullw", Operation::Lanes(16, |a, b| a.wrapping_mul(b))),
    (Mnemonic::Pminub, "pminub", Operation::Lanes(8, |a, b| a.min(b))),
    (Mnemonic::Pmaxub, "pmaxub", Operation::Lanes(8, |a, b| a.max(b))),
    (Mnemonic::Punpcklbw, "punpcklbw", Operation::Both(|a, b| interleave(a, b, 8))),
    (Mnemonic::Punpcklwd, "punpcklwd", Operation::Both(|a, b| interleave(a, b, 16))),
    (Mnemonic::Punpckldq, "punpckldq", Operation::Both(|a, b| interleave(a, b, 32))),
    (Mnemonic::Unpcklps, "unpcklps", Operation::Both(|a, b| interleave(a, b, 32))),
    (Mnemonic::Punpcklqdq, "punpcklqdq", Operation::Both(|a, b| interleave(a, b, 64))),
    (Mnemonic::Punpckhbw, "punpckhbw", Operation::Both(|a, b| interleave(a >> 64, b >> 64, 8))),
    (Mnemonic::Punpckhwd, "punpckhwd", Operation::Both(|a, b| interleave(a >> 64, b >> 64, 16))),
    (Mnemonic::Punpckhdq, "punpckhdq", Operation::Both(|a, b| interleave(a >> 64, b >> 64, 32))),
    (Mnemonic::Unpckhps, "unpckhps", Operation::Both(|a, b| interleave(a >> 64, b >> 64, 32))),
    (Mnemonic::Punpckhqdq, "punpckhqdq", Operation::Both(|a, b| interleave(a >> 64, b >> 64, 64))),
    (Mnemonic::Pshufb, "pshufb", Operation::Both(shuffle_bytes)),
    (Mnemonic::Pshufd, "pshufd", Operation::Immediate(|_, b, n| shuffle(b, b, n, 32, 0))),
    (
        Mnemonic::Pshuflw,
        "pshuflw",
        Operation::Immediate(|_, b, n| shuffle(b, b, n, 16, 0) & LOW | b & !LOW),
    ),
    (
        Mnemonic::Pshufhw,
        "pshufhw",
        Operation::Immediate(|_, b, n| shuffle(b, b, n, 16, 64) << 64 | b & LOW),
    ),
    (Mnemonic::Shufps, "shufps", Operation::Immediate(|a, b, n| shuffle(a, b, n, 32, 0))),
    (Mnemonic::Palignr, "palignr", Operation::Immediate(align)),
    (Mnemonic::Pslldq, "pslldq", Operation::Immediate(|a, _, n| a.checked_shl(8 * n).unwrap_or(0))),
    (Mnemonic::Psrldq, "psrldq", Operation::Immediate(|a, _, n| a.checked_shr(8 * n).unwrap_or(0))),
    (Mnemonic::Psllw, "psllw", Operation::Shift(16, left)),
    (Mnemonic::Pslld, "pslld", Operation::Shift(32, left)),
    (Mnemonic::Psllq, "psllq", Operation::Shift(64, left)),
    (Mnemonic::Psrlw, "psrlw", Operation::Shift(16, right)),
    (Mnemonic::Psrld, "psrld", Operation::Shift(32, right)),
    (Mnemonic::Psrlq, "psrlq", Operation::Shift(64, right)),
    (Mnemonic::Psrad, "psrad", Operation::Shift(32, right_signed)),
];

const LOW: u128 = u64::MAX as u128;
const WORD: u64 = u32::MAX as u64;

/// The operation of an instruction on its operands.
#[derive(Clone, Copy)]
enum Operation {
    /// Moves a number between the lowest part of an XMM register and another operand. Writing the
    /// XMM register clears its upper part.
    Scalar,
    /// Moves half of a register, at this byte, from or to memory.
    Half(u32),
    /// Moves the sign of each byte to a general register.
    Mask,
    /// Combines both registers as a whole.
    Both(fn(u128, u128) -> u128),
    /// Combines each pair of numbers of this many bits.
    Lanes(u32, fn(u64, u64) -> u64),
    /// Combines both registers and an immediate byte.
    Immediate(fn(u128, u128, u32) -> u128),
    /// Shifts each number of this many bits by a common count.
    Shift(u32, fn(u64, u64, u32) -> u64),
}

pub(super) fn name(mnemonic: Mnemonic) -> Option<&'static str> {
    TABLE.iter().find(|(known, ..)| *known == mnemonic).map(|(_, name, _)| *name)
}

pub(super) fn execute(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<Flow> {
    let found = TABLE.iter().find(|(known, ..)| *known == i.mnemonic());
    let Some((_, _, kind)) = found else { return Err(Stop::Unknown) };
    if cpu.sregs.cr0 & CR0_EM != 0 || cpu.sregs.cr4 & CR4_OSFXSR == 0 {
        return fault(UD);
    }
    if cpu.sregs.cr0 & CR0_TS != 0 {
        return fault(NM);
    }
    let mut state = image(cpu)?;
    let is_changed = match kind {
        Operation::Scalar => scalar(cpu, i, &mut state)?,
        Operation::Half(at) => half(cpu, i, &mut state, at * 8)?,
        Operation::Mask => {
            let value = whole(&state, i.op1_register())?;
            let signs = (0..16).map(|n| u64::from(value >> (8 * n + 7) & 1 != 0) << n).sum();
            cpu.set_register(i.op0_register(), signs)?;
            false
        }
        kind => {
            let first = whole(&state, i.op0_register())?;
            let second = second(cpu, i, &state, matches!(kind, Operation::Shift(..)))?;
            set_whole(&mut state, i.op0_register(), result(*kind, i, first, second))?;
            true
        }
    };
    if is_changed {
        set_image(cpu, state, SSE)?;
    }
    Ok(Flow::Next)
}

fn result(kind: Operation, i: &Instruction, first: u128, second: u128) -> u128 {
    match kind {
        Operation::Both(made) => made(first, second),
        Operation::Lanes(bits, made) => {
            lanes(bits, |at| made(lane(first, at, bits), lane(second, at, bits)))
        }
        Operation::Immediate(made) => made(first, second, u32::from(i.immediate8())),
        Operation::Shift(bits, made) => {
            let count = u64::try_from(second & LOW).unwrap_or(u64::MAX);
            lanes(bits, |at| made(lane(first, at, bits), count, bits))
        }
        Operation::Scalar | Operation::Half(_) | Operation::Mask => first,
    }
}

fn place(register: Register) -> Done<usize> {
    let number = (register as usize).checked_sub(Register::XMM0 as usize);
    number.filter(|number| *number < 16).map(|number| XMM + 16 * number).ok_or(Stop::Unknown)
}

fn whole(state: &[u8], register: Register) -> Done<u128> {
    let at = place(register)?;
    Ok(u128::from(get(state, at, 8)?) | u128::from(get(state, at + 8, 8)?) << 64)
}

fn set_whole(state: &mut [u8], register: Register, value: u128) -> Done<()> {
    let at = place(register)?;
    put(state, at, 8, lane(value, 0, 64))?;
    put(state, at + 8, 8, lane(value, 64, 64))
}

/// The second operand: a register, 16 aligned bytes of memory, or for a shift the immediate.
fn second(cpu: &mut Cpu<'_>, i: &Instruction, state: &[u8], is_shift: bool) -> Done<u128> {
    match i.op_kind(1) {
        OpKind::Register => whole(state, i.op1_register()),
        OpKind::Immediate8 if is_shift => Ok(u128::from(i.immediate8())),
        OpKind::Immediate8 => Ok(0),
        OpKind::Memory => {
            let offset = cpu.offset(i, 1)?;
            if cpu.linear(i.memory_segment(), offset, 16, false)? % 16 != 0 {
                return fault_with(GP, 0);
            }
            let mut bytes = [0; 16];
            cpu.read_operand(i, 1, &mut bytes)?;
            Ok(u128::from_le_bytes(bytes))
        }
        _ => Err(Stop::Unknown),
    }
}

/// MOVD and MOVQ, in all directions. True when a register of `state` has changed.
fn scalar(cpu: &mut Cpu<'_>, i: &Instruction, state: &mut [u8]) -> Done<bool> {
    let is_xmm =
        |operand| i.op_kind(operand) == OpKind::Register && place(i.op_register(operand)).is_ok();
    match (is_xmm(0), is_xmm(1)) {
        (true, true) => {
            let value = whole(state, i.op1_register())? & LOW;
            set_whole(state, i.op0_register(), value)?;
            Ok(true)
        }
        (true, false) => {
            let (value, _) = cpu.load(i, 1)?;
            set_whole(state, i.op0_register(), u128::from(value))?;
            Ok(true)
        }
        (false, true) => {
            let value = lane(whole(state, i.op1_register())?, 0, 64);
            cpu.store(i, 0, value)?;
            Ok(false)
        }
        (false, false) => Err(Stop::Unknown),
    }
}

fn half(cpu: &mut Cpu<'_>, i: &Instruction, state: &mut [u8], shift: u32) -> Done<bool> {
    let mut bytes = [0; 8];
    if i.op_kind(0) == OpKind::Memory {
        let value = lane(whole(state, i.op1_register())?, shift, 64);
        cpu.write_operand(i, 0, &value.to_le_bytes())?;
        return Ok(false);
    }
    cpu.read_operand(i, 1, &mut bytes)?;
    let kept = whole(state, i.op0_register())? & !(LOW << shift);
    set_whole(state, i.op0_register(), kept | u128::from(u64::from_le_bytes(bytes)) << shift)?;
    Ok(true)
}

/// The number of `bits` at bit `at`.
fn lane(value: u128, at: u32, bits: u32) -> u64 {
    let masked = value >> at & (u128::MAX >> (128 - bits));
    u64::try_from(masked).unwrap_or(u64::MAX)
}

/// Build a register from numbers of `bits`, computed from their positions.
fn lanes(bits: u32, made: impl Fn(u32) -> u64) -> u128 {
    (0..128 / bits).fold(0, |all, n| {
        let number = u128::from(made(n * bits)) & (u128::MAX >> (128 - bits));
        all | number << (n * bits)
    })
}

fn equal(a: u64, b: u64) -> u64 {
    if a == b { u64::MAX } else { 0 }
}

/// Interleave the numbers of the lower halves.
fn interleave(a: u128, b: u128, bits: u32) -> u128 {
    lanes(bits, |at| {
        let from = if (at / bits).is_multiple_of(2) { a } else { b };
        lane(from, at / (2 * bits) * bits, bits)
    })
}

fn shuffle_bytes(a: u128, b: u128) -> u128 {
    lanes(8, |at| {
        let chosen = lane(b, at, 8);
        if chosen & 0x80 != 0 { 0 } else { lane(a, u32::try_from(chosen & 15).unwrap_or(0) * 8, 8) }
    })
}

/// Four numbers chosen by two bits each: the lower two from `a`, the upper two from `b`, from bit
/// `start` on.
fn shuffle(a: u128, b: u128, order: u32, bits: u32, start: u32) -> u128 {
    (0..4).fold(0, |all, n| {
        let from = if n < 2 { a } else { b };
        let chosen = order >> (2 * n) & 3;
        all | u128::from(lane(from, start + chosen * bits, bits)) << (n * bits)
    })
}

/// Sixteen of the thirty-two bytes of both, starting at byte `count` of the second.
fn align(a: u128, b: u128, count: u32) -> u128 {
    match count {
        0 => b,
        1..16 => b >> (8 * count) | a << (128 - 8 * count),
        16..32 => a >> (8 * (count - 16)),
        _ => 0,
    }
}

fn left(value: u64, count: u64, bits: u32) -> u64 {
    if count < u64::from(bits) { value << count } else { 0 }
}

fn right(value: u64, count: u64, bits: u32) -> u64 {
    if count < u64::from(bits) { value >> count } else { 0 }
}

fn right_signed(value: u64, count: u64, bits: u32) -> u64 {
    let count = count.min(u64::from(bits) - 1);
    let is_negative = value >> (bits - 1) & 1 != 0;
    let ones = if is_negative { !(u64::MAX >> (64 - bits) >> count) } else { 0 };
    value >> count | ones
}

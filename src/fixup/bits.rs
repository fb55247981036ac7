//! Arithmetic on general registers: POPCNT, CRC32, MOVBE, ADCX, ADOX, and bit manipulation with
//! BMI1 and BMI2 (Intel SDM volume 2). Flags that are undefined in the manual do not change.

use iced_x86::{Instruction, Mnemonic};

use super::cpu::{Cpu, Done, Flow, Stop, fault, mask};
use crate::x86::{ARITHMETIC, CF, OF, SF, UD, ZF};

/// The instructions executed here, with their names.
const TABLE: [(Mnemonic, &str); 21] = [
    (Mnemonic::Popcnt, "popcnt"),
    (Mnemonic::Crc32, "crc32"),
    (Mnemonic::Movbe, "movbe"),
    (Mnemonic::Movdiri, "movdiri"),
    (Mnemonic::Adcx, "adcx"),
    (Mnemonic::Adox, "adox"),
    (Mnemonic::Andn, "andn"),
    (Mnemonic::Bextr, "bextr"),
    (Mnemonic::Blsi, "blsi"),
    (Mnemonic::Blsmsk, "blsmsk"),
    (Mnemonic::Blsr, "blsr"),
    (Mnemonic::Bzhi, "bzhi"),
    (Mnemonic::Mulx, "mulx"),
    (Mnemonic::Pdep, "pdep"),
    (Mnemonic::Pext, "pext"),
    (Mnemonic::Rorx, "rorx"),
    (Mnemonic::Sarx, "sarx"),
    (Mnemonic::Shlx, "shlx"),
    (Mnemonic::Shrx, "shrx"),
    (Mnemonic::Lzcnt, "lzcnt"),
    (Mnemonic::Tzcnt, "tzcnt"),
];

pub(super) fn name(mnemonic: Mnemonic) -> Option<&'static str> {
    super::cpu::named(&TABLE, mnemonic)
}

pub(super) fn execute(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<Flow> {
    let is_vex = i.op_count() == 3
        || matches!(i.mnemonic(), Mnemonic::Blsi | Mnemonic::Blsmsk | Mnemonic::Blsr);
    if is_vex && !cpu.is_protected() {
        return fault(UD);
    }
    match i.mnemonic() {
        Mnemonic::Popcnt | Mnemonic::Lzcnt | Mnemonic::Tzcnt => count(cpu, i)?,
        Mnemonic::Crc32 => {
            let ((sum, _), (data, size)) = (cpu.load(i, 0)?, cpu.load(i, 1)?);
            cpu.store(i, 0, crc32c(sum, data, size))?;
        }
        Mnemonic::Movbe => {
            let (value, size) = cpu.load(i, 1)?;
            let shift = 64 - 8 * u32::try_from(size).map_err(|_| Stop::Unknown)?;
            cpu.store(i, 0, value.swap_bytes() >> shift)?;
        }
        Mnemonic::Movdiri => {
            let (value, _) = cpu.load(i, 1)?;
            cpu.store(i, 0, value)?;
        }
        Mnemonic::Adcx => add_with(cpu, i, CF)?,
        Mnemonic::Adox => add_with(cpu, i, OF)?,
        Mnemonic::Andn => {
            let ((first, size), (second, _)) = (cpu.load(i, 1)?, cpu.load(i, 2)?);
            let value = !first & second & mask(size);
            cpu.store(i, 0, value)?;
            set_flags(cpu, CF | OF | ZF | SF, zero(value) | sign(value, size));
        }
        Mnemonic::Blsi | Mnemonic::Blsmsk | Mnemonic::Blsr => lowest(cpu, i)?,
        Mnemonic::Bextr | Mnemonic::Bzhi => extract(cpu, i)?,
        Mnemonic::Pdep | Mnemonic::Pext => gather(cpu, i)?,
        Mnemonic::Mulx => multiply(cpu, i)?,
        _ => shift(cpu, i)?,
    }
    Ok(Flow::Next)
}

fn set_flags(cpu: &mut Cpu<'_>, which: u64, flags: u64) {
    cpu.regs.rflags = cpu.regs.rflags & !which | flags;
}

fn zero(value: u64) -> u64 {
    if value == 0 { ZF } else { 0 }
}

fn sign(value: u64, size: usize) -> u64 {
    if value & (mask(size) ^ mask(size) >> 1) != 0 { SF } else { 0 }
}

fn carry(is_set: bool) -> u64 {
    if is_set { CF } else { 0 }
}

fn bits(size: usize) -> u64 {
    u64::try_from(size).unwrap_or(8) * 8
}

fn count(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let (value, size) = cpu.load(i, 1)?;
    let width = bits(size);
    let result = match i.mnemonic() {
        Mnemonic::Popcnt => u64::from(value.count_ones()),
        Mnemonic::Lzcnt => u64::from(value.leading_zeros()) + width - 64,
        _ => u64::from(value.trailing_zeros()).min(width),
    };
    cpu.store(i, 0, result)?;
    match i.mnemonic() {
        Mnemonic::Popcnt => set_flags(cpu, ARITHMETIC, zero(value)),
        _ => set_flags(cpu, CF | ZF, zero(result) | carry(value == 0)),
    }
    Ok(())
}

/// One step of CRC-32C for each byte: the polynomial 0x1edc6f41, bit-reflected.
fn crc32c(sum: u64, data: u64, size: usize) -> u64 {
    let mut sum = sum & mask(4);
    for byte in data.to_le_bytes().into_iter().take(size) {
        sum ^= u64::from(byte);
        for _ in 0..8 {
            sum = sum >> 1 ^ if sum & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    sum
}

fn add_with(cpu: &mut Cpu<'_>, i: &Instruction, flag: u64) -> Done<()> {
    let ((first, size), (second, _)) = (cpu.load(i, 0)?, cpu.load(i, 1)?);
    let carried = u128::from(cpu.regs.rflags & flag != 0);
    let sum = u128::from(first) + u128::from(second) + carried;
    let has_carry = sum >> bits(size) & 1 != 0;
    cpu.store(i, 0, low(sum) & mask(size))?;
    set_flags(cpu, flag, if has_carry { flag } else { 0 });
    Ok(())
}

fn low(value: u128) -> u64 {
    u64::try_from(value & u128::from(u64::MAX)).unwrap_or(0)
}

fn lowest(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let (value, size) = cpu.load(i, 1)?;
    let less = value.wrapping_sub(1);
    let result = match i.mnemonic() {
        Mnemonic::Blsi => value & value.wrapping_neg(),
        Mnemonic::Blsmsk => value ^ less,
        _ => value & less,
    } & mask(size);
    let has_carry = (i.mnemonic() == Mnemonic::Blsi) == (value != 0);
    cpu.store(i, 0, result)?;
    let is_zero = if i.mnemonic() == Mnemonic::Blsmsk { 0 } else { zero(result) };
    set_flags(cpu, CF | OF | ZF | SF, carry(has_carry) | is_zero | sign(result, size));
    Ok(())
}

fn extract(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let ((value, size), (control, _)) = (cpu.load(i, 1)?, cpu.load(i, 2)?);
    let width = bits(size);
    let keep = |count: u64| if count >= 64 { u64::MAX } else { (1 << count) - 1 };
    if i.mnemonic() == Mnemonic::Bzhi {
        let count = control & 0xff;
        let result = value & keep(count);
        cpu.store(i, 0, result)?;
        let flags = carry(count >= width) | zero(result) | sign(result, size);
        set_flags(cpu, CF | OF | ZF | SF, flags);
        return Ok(());
    }
    let (start, count) = (control & 0xff, control >> 8 & 0xff);
    let result = if start >= width { 0 } else { value >> start & keep(count) };
    cpu.store(i, 0, result)?;
    set_flags(cpu, CF | OF | ZF, zero(result));
    Ok(())
}

fn gather(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let ((value, _), (chosen, _)) = (cpu.load(i, 1)?, cpu.load(i, 2)?);
    let (mut result, mut left, mut at) = (0, chosen, 0);
    while left != 0 {
        let bit = left.trailing_zeros();
        let (from, to) = if i.mnemonic() == Mnemonic::Pdep { (at, bit) } else { (bit, at) };
        result |= (value >> from & 1) << to;
        left &= left - 1;
        at += 1;
    }
    cpu.store(i, 0, result)
}

fn multiply(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let (value, size) = cpu.load(i, 2)?;
    let product = u128::from(value) * u128::from(cpu.regs.rdx & mask(size));
    // The upper half last: if both go to one register, the upper half remains.
    cpu.store(i, 1, low(product) & mask(size))?;
    cpu.store(i, 0, low(product >> bits(size)) & mask(size))
}

fn shift(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let (value, size) = cpu.load(i, 1)?;
    let width = bits(size);
    let count = match i.mnemonic() {
        Mnemonic::Rorx => u64::from(i.immediate8()),
        _ => cpu.load(i, 2)?.0,
    } & (width - 1);
    let is_negative = sign(value, size) != 0;
    let ones = mask(size) & !(mask(size) >> count);
    let result = match i.mnemonic() {
        Mnemonic::Shlx => value << count & mask(size),
        Mnemonic::Shrx => value >> count,
        Mnemonic::Sarx => value >> count | if is_negative { ones } else { 0 },
        // RORX
        _ if count == 0 => value,
        _ => (value >> count | value << (width - count)) & mask(size),
    };
    cpu.store(i, 0, result)
}

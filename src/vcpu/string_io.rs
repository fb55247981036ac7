//! Coalesces a repeated `OUTS` into one access. KVM exits for each element. For a device that
//! accepts several at once, the elements after the first are read from guest memory, and the
//! guest's registers are advanced as the instruction would do. On the vCPU's thread. Intel SDM
//! volume 2, OUTS and REP.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::vcpu::Vcpu;
use crate::layout::PAGE;
use crate::x86::{CR0_PE, DF, VM};

/// The longest instruction.
const LONGEST: usize = 15;

/// The segment of the elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Segment {
    Cs,
    Ds,
    Es,
    Fs,
    Gs,
    Ss,
}

/// A decoded `REP OUTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RepOuts {
    /// The size of an element, in bytes.
    size: usize,
    /// The width of RCX and RSI, in bits.
    address_bits: u32,
    segment: Segment,
}

/// Return all elements of the repeated `OUTS` that the vCPU executes, beginning with that of this
/// exit; `None` if it executes no such instruction, or this was the last element. The guest
/// continues after them.
///
/// Elements beyond the page in which the first one ends are not included, because the guest's
/// access rights may differ there.
pub(super) fn coalesce(vcpu: &mut Vcpu, port: u16, size: usize, first: &[u8]) -> Option<Vec<u8>> {
    // KVM's emulator has counted the first one already, and the exit came with the registers.
    let regs = vcpu.general().ok()?;
    if regs.rcx == 0 || regs.rdx & 0xffff != u64::from(port) {
        return None;
    }
    let sregs = vcpu.fd().get_sregs().ok()?;
    let bits = code_bits(&sregs, regs.rflags);
    let code = read_code(vcpu, &regs, &sregs, bits)?;
    let outs = decode(&code, bits).filter(|outs| outs.size == size)?;
    let (start, bytes) = span(&outs, &regs, segment(&sregs, outs.segment), bits == 64)?;
    let paging = crate::debug::Paging::of(&sregs);
    let physical = vcpu.translate(&paging, start)?;
    let mut data = vec![0; bytes];
    vcpu.memory().read(physical, &mut data).ok()?;
    let count = bytes / size;
    let after = advance(&outs, &regs, count as u64);
    vcpu.fd().set_regs(&after).ok()?;
    vcpu.page.set_registers(&after);
    // If the direction is down, the elements are in reverse order; the bytes of each are not.
    let is_down = regs.rflags & DF != 0;
    let elements = data.chunks_exact(size);
    let mut all = first.to_vec();
    if is_down {
        elements.rev().for_each(|element| all.extend_from_slice(element));
    } else {
        elements.for_each(|element| all.extend_from_slice(element));
    }
    Some(all)
}

/// The guest-physical pieces that the next `length` bytes of the string instruction at RIP are
/// written to; `None` if it is neither `INS` nor `MOVS`.
pub(super) fn target(
    vcpu: &Vcpu,
    regs: &kvm_regs,
    sregs: &kvm_sregs,
    length: u64,
) -> Option<Vec<(u64, usize)>> {
    let bits = code_bits(sregs, regs.rflags);
    let code = read_code(vcpu, regs, sregs, bits)?;
    let address_bits = string_target(&code, bits)?;
    let base = if bits == 64 { 0 } else { sregs.es.base };
    let paging = crate::debug::Paging::of(sregs);
    let mut pieces = Vec::new();
    let mut done = 0;
    while done < length {
        // If the direction is down, there is one element at a time.
        let at = linear(base, regs.rdi.wrapping_add(done) & mask(address_bits), bits == 64);
        let here = (PAGE - at % PAGE).min(length - done);
        if let Some(physical) = vcpu.translate(&paging, at) {
            pieces.push((physical, usize::try_from(here).ok()?));
        }
        done += here;
    }
    Some(pieces)
}

/// With how many bits `INS` or `MOVS` counts; `None` for another instruction.
fn string_target(code: &[u8; LONGEST], bits: u32) -> Option<u32> {
    let mut has_address_size = false;
    for byte in code {
        match byte {
            0x67 => has_address_size = true,
            0xf2 | 0xf3 | 0x66 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 => {}
            0x40..=0x4f if bits == 64 => {}
            0x6c | 0x6d | 0xa4 | 0xa5 => {
                return Some(match (bits, has_address_size) {
                    (64, false) => 64,
                    (16, false) | (32, true) => 16,
                    _ => 32,
                });
            }
            _ => return None,
        }
    }
    None
}

fn code_bits(sregs: &kvm_sregs, rflags: u64) -> u32 {
    match () {
        () if sregs.cr0 & CR0_PE == 0 || rflags & VM != 0 => 16,
        () if sregs.cs.l != 0 => 64,
        () if sregs.cs.db != 0 => 32,
        () => 16,
    }
}

fn read_code(vcpu: &Vcpu, regs: &kvm_regs, sregs: &kvm_sregs, bits: u32) -> Option<[u8; LONGEST]> {
    let base = if bits == 64 { 0 } else { sregs.cs.base };
    let at = linear(base, regs.rip, bits == 64);
    let paging = crate::debug::Paging::of(sregs);
    let mut code = [0; LONGEST];
    // Up to the end of its page. An instruction that crosses it is not coalesced.
    let here = usize::try_from((PAGE - at % PAGE).min(LONGEST as u64)).ok()?;
    let physical = vcpu.translate(&paging, at)?;
    vcpu.memory().read(physical, code.get_mut(..here)?).ok()?;
    Some(code)
}

fn segment(sregs: &kvm_sregs, name: Segment) -> &kvm_segment {
    match name {
        Segment::Cs => &sregs.cs,
        Segment::Ds => &sregs.ds,
        Segment::Es => &sregs.es,
        Segment::Fs => &sregs.fs,
        Segment::Gs => &sregs.gs,
        Segment::Ss => &sregs.ss,
    }
}

fn decode(code: &[u8; LONGEST], bits: u32) -> Option<RepOuts> {
    let (mut is_repeated, mut has_operand_size, mut has_address_size) = (false, false, false);
    let mut segment = Segment::Ds;
    for byte in code {
        match byte {
            0xf2 | 0xf3 => is_repeated = true,
            0x66 => has_operand_size = true,
            0x67 => has_address_size = true,
            0x2e => segment = Segment::Cs,
            0x36 => segment = Segment::Ss,
            0x3e => segment = Segment::Ds,
            0x26 => segment = Segment::Es,
            0x64 => segment = Segment::Fs,
            0x65 => segment = Segment::Gs,
            0x40..=0x4f if bits == 64 => {} // REX changes nothing here
            0x6e | 0x6f if is_repeated => {
                let size = match (byte, bits == 16, has_operand_size) {
                    (0x6e, _, _) => 1,
                    (_, true, false) | (_, false, true) => 2,
                    _ => 4,
                };
                let address_bits = match (bits, has_address_size) {
                    (64, false) => 64,
                    (16, false) | (32, true) => 16,
                    _ => 32,
                };
                return Some(RepOuts { size, address_bits, segment });
            }
            _ => return None,
        }
    }
    None
}

fn mask(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

/// Outside of 64-bit mode, a linear address has 32 bits.
fn linear(base: u64, offset: u64, is_long: bool) -> u64 {
    let address = base.wrapping_add(offset);
    if is_long { address } else { address & mask(32) }
}

/// The linear address and the size of the remaining elements that lie entirely in the segment and
/// in the page where the previous element, which KVM has read, ends.
fn span(
    outs: &RepOuts,
    regs: &kvm_regs,
    segment: &kvm_segment,
    is_long: bool,
) -> Option<(u64, usize)> {
    let mask = mask(outs.address_bits);
    let (size, left, offset) = (outs.size as u64, regs.rcx & mask, regs.rsi & mask);
    let is_fs_or_gs = matches!(outs.segment, Segment::Fs | Segment::Gs);
    let base = if is_long && !is_fs_or_gs { 0 } else { segment.base };
    let next = linear(base, offset, is_long);
    let within = next % PAGE;
    if within.checked_add(size).is_none_or(|end| end > PAGE) {
        return None;
    }
    let is_down = regs.rflags & DF != 0;
    let is_new_page = if is_down { within + size == PAGE } else { within == 0 };
    let has_wrapped = if is_down { mask - offset < size } else { offset < size };
    if is_new_page || has_wrapped {
        return None;
    }
    let room = if is_down { within / size + 1 } else { (PAGE - within) / size };
    // Up to the end of the segment, or to where the offset would wrap around.
    let room = room.min(if is_down { offset / size + 1 } else { (mask - offset) / size });
    let count = left.min(room);
    if count == 0 {
        return None;
    }
    if !is_long {
        let last = if is_down { offset + size - 1 } else { offset + count * size - 1 };
        // Expand-down segments, which are not used in practice, are not coalesced.
        let grows_down = segment.s != 0 && segment.type_ & 0b1100 == 0b0100;
        if grows_down || last > u64::from(segment.limit) {
            return None;
        }
    }
    let start = if is_down { next - (count - 1) * size } else { next };
    Some((start, usize::try_from(count * size).ok()?))
}

fn advance(outs: &RepOuts, regs: &kvm_regs, count: u64) -> kvm_regs {
    let mask = mask(outs.address_bits);
    let bytes = count * outs.size as u64;
    let moved = if regs.rflags & DF != 0 {
        regs.rsi.wrapping_sub(bytes)
    } else {
        regs.rsi.wrapping_add(bytes)
    };
    // A 16-bit write keeps the upper bits of a register. A 32-bit write clears them.
    let keep = if outs.address_bits == 16 { !mask } else { 0 };
    kvm_regs {
        rcx: regs.rcx & keep | regs.rcx.wrapping_sub(count) & mask,
        rsi: regs.rsi & keep | moved & mask,
        ..*regs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn code(bytes: &[u8]) -> [u8; LONGEST] {
        let mut code = [0x90; LONGEST];
        code[..bytes.len()].copy_from_slice(bytes);
        code
    }

    fn outs(size: usize, address_bits: u32, segment: Segment) -> Option<RepOuts> {
        Some(RepOuts { size, address_bits, segment })
    }

    const FLAT: kvm_segment = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0,
        type_: 3,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };

    #[test]
    fn widths_go_by_mode_and_prefixes() {
        assert_eq!(decode(&code(&[0xf3, 0x6e]), 16), outs(1, 16, Segment::Ds));
        assert_eq!(decode(&code(&[0xf3, 0x6f]), 16), outs(2, 16, Segment::Ds));
        assert_eq!(decode(&code(&[0x66, 0xf3, 0x6f]), 16), outs(4, 16, Segment::Ds));
        assert_eq!(decode(&code(&[0xf3, 0x6f]), 32), outs(4, 32, Segment::Ds));
        assert_eq!(decode(&code(&[0x67, 0x26, 0xf3, 0x6f]), 32), outs(4, 16, Segment::Es));
        assert_eq!(decode(&code(&[0xf3, 0x48, 0x6f]), 64), outs(4, 64, Segment::Ds));
        assert_eq!(decode(&code(&[0xf3, 0x67, 0x6e]), 64), outs(1, 32, Segment::Ds));
    }

    #[test]
    fn what_is_no_repeated_outs_is_left_alone() {
        assert_eq!(decode(&code(&[0x6e]), 16), None);
        assert_eq!(decode(&code(&[0xf3, 0x6c]), 16), None);
        assert_eq!(decode(&[0xf3; LONGEST], 64), None);
        assert_eq!(decode(&code(&[0x48, 0x6e]), 32), None);
    }

    #[test]
    fn where_a_string_goes_is_told_by_its_opcode_and_prefixes() {
        assert_eq!(string_target(&code(&[0xf3, 0x6c]), 16), Some(16));
        assert_eq!(string_target(&code(&[0x67, 0xf3, 0x66, 0xa5]), 16), Some(32));
        assert_eq!(string_target(&code(&[0xf3, 0x48, 0xa5]), 64), Some(64));
        assert_eq!(string_target(&code(&[0x67, 0x6d]), 32), Some(16));
        assert_eq!(string_target(&code(&[0xf3, 0x6e]), 64), None);
        assert_eq!(string_target(&[0x66; LONGEST], 32), None);
    }

    #[test]
    fn elements_are_taken_to_the_end_of_the_page() {
        let elements = RepOuts { size: 2, address_bits: 32, segment: Segment::Ds };
        let regs = kvm_regs { rcx: 100, rsi: 0x1ff8, ..Default::default() };
        assert_eq!(span(&elements, &regs, &FLAT, false), Some((0x1ff8, 8)));
        let across = kvm_regs { rsi: 0x1fff, ..regs };
        assert_eq!(span(&elements, &across, &FLAT, false), None);
        let down = kvm_regs { rsi: 0x1006, rflags: DF, ..regs };
        assert_eq!(span(&elements, &down, &FLAT, false), Some((0x1000, 8)));
        for new_page in
            [kvm_regs { rsi: 0x2000, ..regs }, kvm_regs { rsi: 0x1ffe, rflags: DF, ..regs }]
        {
            assert_eq!(span(&elements, &new_page, &FLAT, false), None);
        }
        let high = kvm_segment { base: 0xffff_f000, ..FLAT };
        let around = kvm_regs { rsi: 0x1010, ..regs };
        assert_eq!(span(&elements, &around, &high, false), Some((0x10, 200)));
        let small = kvm_segment { limit: 0x1ff9, ..FLAT };
        assert_eq!(span(&elements, &regs, &small, false), None);
    }

    #[test]
    fn registers_keep_what_the_width_does_not_reach() {
        let elements = RepOuts { size: 1, address_bits: 16, segment: Segment::Ds };
        let regs = kvm_regs { rcx: 0xabcd_0003, rsi: 0x1234_fffe, ..Default::default() };
        let after = advance(&elements, &regs, 3);
        assert_eq!((after.rcx, after.rsi), (0xabcd_0000, 0x1234_0001));
        let wide = RepOuts { address_bits: 32, ..elements };
        let after = advance(&wide, &kvm_regs { rcx: 0xff_0000_0003, ..regs }, 1);
        assert_eq!(after.rcx, 2);
    }

    proptest! {
        #[test]
        fn a_span_lies_in_one_page_and_nothing_panics(
            bytes in prop::array::uniform15(any::<u8>()), bits in prop_oneof![Just(16u32), Just(32), Just(64)],
            rcx in any::<u64>(), rsi in any::<u64>(), rflags in any::<u64>(), base in any::<u64>(), limit in any::<u32>(),
            size in prop_oneof![Just(1usize), Just(2), Just(4)],
        ) {
            let _ = decode(&bytes, bits);
            let elements = RepOuts { size, address_bits: bits, segment: Segment::Gs };
            let regs = kvm_regs { rcx, rsi, rflags, ..Default::default() };
            let segment = kvm_segment { base, limit, ..FLAT };
            if let Some((start, length)) = span(&elements, &regs, &segment, bits == 64) {
                prop_assert!(length > 0 && length % size == 0);
                prop_assert_eq!(start / PAGE, (start + (length as u64 - 1)) / PAGE);
                let _ = advance(&elements, &regs, (length / size) as u64);
            }
        }
    }
}

//! Disassembles one instruction, in nasm syntax, for the mode of its vCPU. Accepts any bytes.

use crate::x86::EFER_LMA;
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, NasmFormatter};
use kvm_bindings::kvm_sregs;

/// The width of code, 16, 32 or 64 bits, from CS and the mode (Intel SDM volume 3, section 3.4.5).
/// In real mode, CS may still be a 32-bit segment.
#[must_use]
pub fn bitness(sregs: &kvm_sregs) -> u32 {
    match (sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0, sregs.cs.db != 0) {
        (true, _) => 64,
        (false, true) => 32,
        (false, false) => 16,
    }
}

/// Decode the first instruction of some bytes at `ip`. None if they are not a complete instruction.
#[must_use]
pub fn decode(bytes: &[u8], bitness: u32, ip: u64) -> Option<Instruction> {
    let instruction = Decoder::with_ip(bitness, bytes, ip, DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then_some(instruction)
}

/// The first instruction of some bytes as text: `popcnt rax, [rbx+0x8]`. None if they are not a
/// complete instruction.
#[must_use]
pub fn disassemble(bytes: &[u8], bitness: u32, ip: u64) -> Option<String> {
    let instruction = decode(bytes, bitness, ip)?;
    let mut formatter = NasmFormatter::new();
    let options = formatter.options_mut();
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_space_after_operand_separator(true);
    options.set_uppercase_hex(false);
    options.set_branch_leading_zeros(false);
    let mut text = String::new();
    formatter.format(&instruction, &mut text);
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_segment;
    use proptest::prelude::*;

    fn sregs(l: u8, db: u8, efer: u64) -> kvm_sregs {
        kvm_sregs { cs: kvm_segment { l, db, ..Default::default() }, efer, ..Default::default() }
    }

    #[test]
    fn bits_are_those_of_the_mode() {
        assert_eq!(bitness(&sregs(1, 0, EFER_LMA)), 64);
        assert_eq!(bitness(&sregs(0, 1, EFER_LMA)), 32, "compatibility mode");
        assert_eq!(bitness(&sregs(0, 0, EFER_LMA)), 16);
        assert_eq!(bitness(&sregs(1, 1, 0)), 32, "CS.L means nothing outside long mode");
        assert_eq!(bitness(&sregs(0, 0, 0)), 16);
    }

    #[test]
    fn instructions_read_as_they_are_written() {
        let text = |bytes: &[u8], bits| disassemble(bytes, bits, 0x1000).unwrap();
        assert_eq!(text(&[0xcd, 0x80], 64), "int 0x80");
        assert_eq!(text(&[0xf3, 0x48, 0x0f, 0xb8, 0x43, 0x08], 64), "popcnt rax, [rbx+8]");
        assert_eq!(text(&[0xeb, 0xfe], 16), "jmp short 0x1000");
        assert_eq!(disassemble(&[0x0f], 64, 0), None, "half an instruction");
        assert_eq!(disassemble(&[], 64, 0), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..20), ip in any::<u64>()) {
            for bits in [16, 32, 64] {
                let _ = disassemble(&bytes, bits, ip);
            }
        }
    }
}

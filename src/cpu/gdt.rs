//! The global descriptor table: segments for every mode. Pure data.

use crate::cpu::CpuMode;
use crate::layout;

/// Selectors of the GDT, which serves every mode. Linux's boot protocol fixes the first two.
pub mod selector {
    /// Code of ring 0: 32 or 64 bits, by mode.
    pub const CODE: u16 = 0x10;
    /// Data of ring 0.
    pub const DATA: u16 = 0x18;
    /// The TSS, two entries long.
    pub const TSS: u16 = 0x20;
    /// Code of ring 3.
    pub const USER_CODE: u16 = 0x30 | 3;
    /// Data of ring 3.
    pub const USER_DATA: u16 = 0x38 | 3;
}

// Descriptors as in the Intel manual, volume 3, section 3.4.5: base 0, limit 4 GiB, accessed.
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const CODE64: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const RING_3: u64 = 3 << 45;
const TSS64_BUSY: u64 = 0x0000_8b00_0000_0000;

/// The size of the GDT minus one.
pub const GDT_LIMIT: u16 = 8 * 8 - 1;

/// The GDT for a mode.
#[must_use]
pub fn gdt(mode: CpuMode) -> [u64; 8] {
    let code = if mode.is_32_bit() { CODE32 } else { CODE64 };
    let limit = u64::from(layout::TSS_LIMIT);
    let tss = TSS64_BUSY | limit & 0xffff | (layout::TSS & 0xff_ffff) << 16;
    [0, 0, code, DATA, tss, 0, CODE64 | RING_3, DATA | RING_3]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_3_has_the_same_segments_with_its_privilege() {
        let table = gdt(CpuMode::User64);
        let entry = |selector: u16| table[usize::from(selector >> 3)];
        assert_eq!(entry(selector::USER_CODE), entry(selector::CODE) | RING_3);
        assert_eq!(entry(selector::USER_DATA), entry(selector::DATA) | RING_3);
        assert_eq!(usize::from(GDT_LIMIT), size_of_val(&table) - 1);
    }
}

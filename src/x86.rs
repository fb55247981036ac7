//! Bits of the architecture: control registers, EFER, RFLAGS, entries of page tables, and exception
//! vectors (Intel SDM volume 3, chapters 2, 5 and 6). What pyvmm chooses itself is in `layout.rs`.

pub(crate) const CR0_PE: u64 = 1;
pub(crate) const CR0_MP: u64 = 1 << 1;
pub(crate) const CR0_EM: u64 = 1 << 2;
pub(crate) const CR0_TS: u64 = 1 << 3;
pub(crate) const CR0_ET: u64 = 1 << 4;
pub(crate) const CR0_NE: u64 = 1 << 5;
pub(crate) const CR0_WP: u64 = 1 << 16;
pub(crate) const CR0_PG: u64 = 1 << 31;

pub(crate) const CR4_TSD: u64 = 1 << 2;
pub(crate) const CR4_PSE: u64 = 1 << 4;
pub(crate) const CR4_PAE: u64 = 1 << 5;
pub(crate) const CR4_PGE: u64 = 1 << 7;
pub(crate) const CR4_OSFXSR: u64 = 1 << 9;
pub(crate) const CR4_OSXMMEXCPT: u64 = 1 << 10;
pub(crate) const CR4_LA57: u64 = 1 << 12;
pub(crate) const CR4_VMXE: u64 = 1 << 13;
pub(crate) const CR4_FSGSBASE: u64 = 1 << 16;
pub(crate) const CR4_PCIDE: u64 = 1 << 17;
pub(crate) const CR4_OSXSAVE: u64 = 1 << 18;
pub(crate) const CR4_SMAP: u64 = 1 << 21;
pub(crate) const CR4_PKE: u64 = 1 << 22;
pub(crate) const CR4_CET: u64 = 1 << 23;
pub(crate) const CR4_FRED: u64 = 1 << 32;

pub(crate) const EFER_LME: u64 = 1 << 8;
pub(crate) const EFER_LMA: u64 = 1 << 10;
pub(crate) const EFER_NXE: u64 = 1 << 11;
pub(crate) const EFER_SVME: u64 = 1 << 12;

/// The bit of RFLAGS that is always one.
pub(crate) const RFLAGS_RESERVED: u64 = 1 << 1;
pub(crate) const CF: u64 = 1;
pub(crate) const PF: u64 = 1 << 2;
pub(crate) const AF: u64 = 1 << 4;
pub(crate) const ZF: u64 = 1 << 6;
pub(crate) const SF: u64 = 1 << 7;
pub(crate) const TF: u64 = 1 << 8;
pub(crate) const IF: u64 = 1 << 9;
pub(crate) const DF: u64 = 1 << 10;
pub(crate) const OF: u64 = 1 << 11;
pub(crate) const IOPL: u64 = 3 << 12;
pub(crate) const NT: u64 = 1 << 14;
pub(crate) const RF: u64 = 1 << 16;
pub(crate) const VM: u64 = 1 << 17;
pub(crate) const AC: u64 = 1 << 18;
pub(crate) const VIF: u64 = 1 << 19;
pub(crate) const VIP: u64 = 1 << 20;
pub(crate) const ID: u64 = 1 << 21;
/// The flags of arithmetic.
pub(crate) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

pub(crate) const PTE_PRESENT: u64 = 1;
pub(crate) const PTE_WRITABLE: u64 = 1 << 1;
pub(crate) const PTE_USER: u64 = 1 << 2;
pub(crate) const PTE_ACCESSED: u64 = 1 << 5;
pub(crate) const PTE_DIRTY: u64 = 1 << 6;
pub(crate) const PTE_LARGE: u64 = 1 << 7;
pub(crate) const PTE_NO_EXECUTE: u64 = 1 << 63;
/// The address in an entry of 8 bytes.
pub(crate) const PTE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

pub(crate) const DE: u8 = 0;
pub(crate) const DB: u8 = 1;
pub(crate) const BR: u8 = 5;
pub(crate) const UD: u8 = 6;
pub(crate) const NM: u8 = 7;
pub(crate) const DOUBLE_FAULT: u8 = 8;
pub(crate) const TS: u8 = 10;
pub(crate) const NP: u8 = 11;
pub(crate) const SS: u8 = 12;
pub(crate) const GP: u8 = 13;
pub(crate) const PAGE_FAULT: u8 = 14;
pub(crate) const MF: u8 = 16;
pub(crate) const XM: u8 = 19;

#[cfg(test)]
mod tests {
    use super::*;

    const CR0: &[u64] = &[CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_ET, CR0_NE, CR0_WP, CR0_PG];
    const CR4: &[u64] = &[
        CR4_TSD,
        CR4_PSE,
        CR4_PAE,
        CR4_PGE,
        CR4_OSFXSR,
        CR4_OSXMMEXCPT,
        CR4_LA57,
        CR4_VMXE,
        CR4_FSGSBASE,
        CR4_PCIDE,
        CR4_OSXSAVE,
        CR4_SMAP,
        CR4_PKE,
        CR4_CET,
        CR4_FRED,
    ];
    const EFER: &[u64] = &[EFER_LME, EFER_LMA, EFER_NXE, EFER_SVME];
    const RFLAGS: &[u64] =
        &[RFLAGS_RESERVED, CF, PF, AF, ZF, SF, TF, IF, DF, OF, IOPL, NT, RF, VM, AC, VIF, VIP, ID];
    const ENTRY: &[u64] = &[
        PTE_PRESENT,
        PTE_WRITABLE,
        PTE_USER,
        PTE_ACCESSED,
        PTE_DIRTY,
        PTE_LARGE,
        PTE_NO_EXECUTE,
        PTE_ADDRESS,
    ];

    #[test]
    fn no_bit_of_a_register_or_an_entry_has_two_names() {
        for set in [CR0, CR4, EFER, RFLAGS, ENTRY] {
            let all = set.iter().fold(0, |all, bits| {
                assert_eq!(all & bits, 0, "{bits:#x}");
                all | bits
            });
            assert_ne!(all, 0);
        }
    }
}

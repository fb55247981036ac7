//! Tables of CPUID leaves: what they say, and changes to them. Pure data.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::features::{Feature, Register, feature, feature_names};
use super::template::RegisterBits;

/// KVM's emulator executes SYSENTER from 32-bit code under a 64-bit kernel only for an Intel
/// processor. The SYSCALL that Linux uses on other processors loses the upper half of the kernel's
/// address.
pub(super) fn set_vendor(entries: &mut [kvm_cpuid_entry2], vendor: [u8; 12]) {
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| vendor[at + n]));
    for entry in entries.iter_mut().filter(|e| matches!(e.function, 0 | 0x8000_0000)) {
        (entry.ebx, entry.edx, entry.ecx) = (word(0), word(4), word(8));
    }
}

pub(super) fn hide(entries: &mut [kvm_cpuid_entry2], feature: Feature) {
    for entry in entries.iter_mut().filter(|e| (e.function, e.index) == feature.leaf) {
        *register_mut(entry, feature.register) &= !(1 << feature.bit);
    }
}

pub(super) fn expose(entries: &mut Vec<kvm_cpuid_entry2>, feature: Feature) {
    let Feature { leaf, register, bit } = feature;
    change(entries, &RegisterBits { leaf, register, clear: 0, set: 1 << bit });
}

/// Change bits of a leaf, which the table gains if it lacks it.
pub(super) fn change(entries: &mut Vec<kvm_cpuid_entry2>, bits: &RegisterBits) {
    let (function, index) = bits.leaf;
    if !entries.iter().any(|e| (e.function, e.index) == bits.leaf) {
        let of_leaf = entries.iter().find(|e| e.function == function).map(|e| e.flags);
        let indexed = index != 0 || INDEXED.contains(&function);
        let flags = of_leaf.unwrap_or(if indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 });
        entries.push(kvm_cpuid_entry2 { function, index, flags, ..Default::default() });
        extend(entries, bits.leaf);
    }
    for entry in entries.iter_mut().filter(|e| (e.function, e.index) == bits.leaf) {
        let register = register_mut(entry, bits.register);
        *register = *register & !bits.clear | bits.set;
    }
}

/// Leaves with subleaves.
const INDEXED: [u32; 15] =
    [4, 7, 0xb, 0xd, 0xf, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1d, 0x1e, 0x1f, 0x8000_001d, 0x8000_0026];

/// Raise the number of the last leaf, and of leaf 7's last subleaf, to a new one.
fn extend(entries: &mut [kvm_cpuid_entry2], (function, index): (u32, u32)) {
    let first = function & 0xf000_0000;
    for entry in entries.iter_mut() {
        if (entry.function, entry.index) == (first, 0) {
            entry.eax = entry.eax.max(function);
        } else if (function, entry.function, entry.index) == (7, 7, 0) {
            entry.eax = entry.eax.max(index);
        }
    }
}

/// Whether the table has a feature.
#[must_use]
pub fn has(entries: &[kvm_cpuid_entry2], name: &str) -> bool {
    let Some(feature) = feature(name) else {
        return false;
    };
    entries.iter().any(|e| {
        let mut entry = *e;
        (e.function, e.index) == feature.leaf
            && *register_mut(&mut entry, feature.register) & 1 << feature.bit != 0
    })
}

/// Linux 6.1 does not report how many entries it fills in. The caller's zeros remain in the others.
#[must_use]
pub fn without_tail(mut entries: Vec<kvm_cpuid_entry2>) -> Vec<kvm_cpuid_entry2> {
    while entries.last() == Some(&kvm_cpuid_entry2::default()) {
        entries.pop();
    }
    entries
}

/// The bits of XCR0 that a guest may set, according to KVM's table of supported features.
#[must_use]
pub fn xcr0_mask(supported: &[kvm_cpuid_entry2]) -> u64 {
    let leaf = supported.iter().find(|entry| (entry.function, entry.index) == (0xd, 0));
    leaf.map_or(0, |entry| u64::from(entry.edx) << 32 | u64::from(entry.eax))
}

/// The vendor's twelve letters.
#[must_use]
pub fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let leaf = entries.iter().find(|entry| entry.function == 0).copied().unwrap_or_default();
    let letters = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    String::from_utf8_lossy(&letters).into_owned()
}

/// Whether the vendor is AMD or one whose processors are like AMD's.
#[must_use]
pub(super) fn is_amd(entries: &[kvm_cpuid_entry2]) -> bool {
    matches!(vendor(entries).as_str(), "AuthenticAMD" | "HygonGenuine")
}

/// Names of the features that are only in the first table.
#[must_use]
pub fn missing(has: &[kvm_cpuid_entry2], lacks: &[kvm_cpuid_entry2]) -> Vec<&'static str> {
    feature_names().filter(|name| self::has(has, name) && !self::has(lacks, name)).collect()
}

fn register_mut(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut entry.eax,
        Register::Ebx => &mut entry.ebx,
        Register::Ecx => &mut entry.ecx,
        Register::Edx => &mut entry.edx,
    }
}

#[cfg(test)]
mod tests {
    //! Covers src/cpu/features.rs.

    use super::*;
    use crate::cpu::names_in;

    #[test]
    fn names_stand_at_their_bits() {
        let at = |name| feature(name).map(|f| (f.leaf.0, f.bit));
        assert_eq!(at("sse2"), Some((1, 26)));
        assert_eq!(at("pbe"), Some((1, 31)));
        assert_eq!(at("popcnt"), Some((1, 23)));
        assert_eq!(at("hypervisor"), Some((1, 31)));
        assert_eq!(at("avx512vl"), Some((7, 31)));
        assert_eq!(at("rdpid"), Some((7, 22)));
        assert_eq!(at("pks"), Some((7, 31)));
        assert_eq!(at("arch_capabilities"), Some((7, 29)));
        assert_eq!(at("fsrm"), Some((7, 4)));
        assert_eq!(at("avx_vnni"), Some((7, 4)));
        assert_eq!(at("lm"), Some((0x8000_0001, 29)));
        assert_eq!(at("mwaitx"), Some((0x8000_0001, 29)));
        assert_eq!(at("kvm_pv_unhalt"), Some((0x4000_0001, 7)));
        assert_eq!(at("kvm_pv_ipi"), Some((0x4000_0001, 11)));
        assert_eq!(at("kvm_pv_sched_yield"), Some((0x4000_0001, 13)));
        assert_eq!(at("kvmclock_stable_bit"), Some((0x4000_0001, 24)));
        assert_eq!(at("-"), None);
    }

    #[test]
    fn the_tail_that_kvm_leaves_alone_is_no_part_of_a_table() {
        let zeros = kvm_cpuid_entry2::default();
        let leaf = kvm_cpuid_entry2 { function: 1, ..zeros };
        assert_eq!(without_tail(vec![zeros, leaf, zeros, zeros]), [zeros, leaf]);
        assert_eq!(without_tail(vec![zeros; 3]), []);
    }

    #[test]
    fn xcr0_may_have_what_leaf_0xd_says() {
        let leaf = kvm_cpuid_entry2 { function: 0xd, eax: 7, edx: 1, ..Default::default() };
        assert_eq!(xcr0_mask(&[leaf]), 0x1_0000_0007);
        assert_eq!(xcr0_mask(&[]), 0, "a processor without XSAVE");
    }

    #[test]
    fn a_register_s_features_are_named_in_the_order_of_its_bits() {
        let names: Vec<_> =
            names_in((1, 0), Register::Ecx, 1 << 31 | 1 << 23 | 1 << 16 | 1).collect();
        assert_eq!(names, ["pni", "popcnt", "hypervisor"]);
        assert_eq!(names_in((1, 0), Register::Eax, u32::MAX).next(), None);
        assert_eq!(names_in((7, 3), Register::Ebx, u32::MAX).next(), None);
    }

    #[test]
    fn a_new_leaf_raises_the_number_of_the_last() {
        let last = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        let mut entries = vec![last(0, 0xd), last(7, 0), last(0x8000_0000, 0x8000_0008)];
        for (leaf, flags) in [((7, 1), 0), ((0x1d, 1), 1), ((0x8000_0007, 0), 0)] {
            let bits = RegisterBits { leaf, register: Register::Edx, clear: 2, set: 8 };
            change(&mut entries, &bits);
            let new = entries.last().unwrap();
            assert_eq!(((new.function, new.index), new.edx, new.flags), (leaf, 8, flags));
        }
        assert_eq!((entries[0].eax, entries[1].eax, entries[2].eax), (0x1d, 1, 0x8000_0008));
        change(
            &mut entries,
            &RegisterBits { leaf: (0x1d, 1), register: Register::Edx, clear: 9, set: 2 },
        );
        assert_eq!(entries.iter().find(|e| e.function == 0x1d).unwrap().edx, 2);
    }

    #[test]
    fn no_name_stands_twice() {
        let mut names: Vec<_> = feature_names().collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn hiding_clears_one_bit_of_one_leaf() {
        let entry = |function| kvm_cpuid_entry2 { function, ecx: u32::MAX, ..Default::default() };
        let mut entries = [entry(1), entry(7)];
        hide(&mut entries, feature("popcnt").unwrap());
        assert_eq!(entries[0].ecx, !(1 << 23));
        assert_eq!(entries[1].ecx, u32::MAX);
        assert!(!has(&entries, "popcnt"));
        assert!(has(&entries, "aes"));
    }

    #[test]
    fn exposing_sets_one_bit_and_adds_a_leaf_that_is_not_there() {
        let mut entries = vec![kvm_cpuid_entry2 { function: 1, ..Default::default() }];
        for name in ["popcnt", "avx2", "sha512"] {
            expose(&mut entries, feature(name).unwrap());
            assert!(has(&entries, name));
        }
        assert_eq!(entries[0].ecx, 1 << 23);
        assert_eq!(entries.len(), 3, "leaf 1, leaf 7, its subleaf 1");
    }

    #[test]
    fn the_vendor_is_spelt_over_three_registers() {
        let mut entries = [kvm_cpuid_entry2::default()];
        set_vendor(&mut entries, *b"GenuineIntel");
        assert_eq!(entries[0].ebx, u32::from_le_bytes(*b"Genu"));
        assert_eq!(entries[0].edx, u32::from_le_bytes(*b"ineI"));
        assert_eq!(entries[0].ecx, u32::from_le_bytes(*b"ntel"));
    }

    #[test]
    fn what_one_table_lacks_of_another_is_named() {
        let entry = |ecx| kvm_cpuid_entry2 { function: 1, ecx, ..Default::default() };
        let popcnt_and_aes = [entry(1 << 23 | 1 << 25)];
        assert_eq!(missing(&popcnt_and_aes, &[entry(1 << 25)]), ["popcnt"]);
        assert!(missing(&[], &popcnt_and_aes).is_empty());
        let mut table = [kvm_cpuid_entry2::default()];
        set_vendor(&mut table, *b"GenuineIntel");
        assert_eq!(vendor(&table), "GenuineIntel");
    }
}

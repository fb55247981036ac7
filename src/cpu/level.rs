//! The CPUID table of a micro-architecture level: a list of what is kept of KVM's, so that it is
//! the same on every host of one vendor, except for the processor's name and its caches.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::entries::{has, is_amd};
use super::features::{Feature, Register, feature};
use super::template::Level;
use super::xstate;

/// AMD's copy in leaf 0x80000001 EDX of leaf 1 EDX: AMD APM volume 3, appendix E.
const AMD_COPIES: u32 = 0x0183_f3ff;

/// The last leaves of a table, as the processor gives them itself.
const LAST_EXTENDED: u32 = 0x8000_0008;
const LAST_EXTENDED_AMD: u32 = 0x8000_001e;
const LAST_OF_KVM: u32 = 0x4000_0001;

/// The table of a level, and the features of the level that KVM lacks. With `tiles`, it also keeps
/// what AMX needs.
pub(super) fn table(
    supported: &[kvm_cpuid_entry2],
    level: Level,
    tiles: bool,
) -> (Vec<kvm_cpuid_entry2>, Vec<&'static str>) {
    let shape = Shape {
        features: level.features().filter_map(feature).collect(),
        xcr0: level.xcr0() | if tiles { xstate::TILES } else { 0 },
        is_amd: is_amd(supported),
    };
    let mut entries: Vec<_> = supported.iter().filter_map(|entry| shape.kept(*entry)).collect();
    if !entries.iter().any(|entry| entry.function == 0xb) {
        // The topology, which x2APIC needs.
        let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        entries.push(kvm_cpuid_entry2 { function: 0xb, flags, ..Default::default() });
    }
    xstate::set_size(&mut entries);
    let missing = level.features().filter(|name| !has(&entries, name)).collect();
    (entries, missing)
}

struct Shape {
    features: Vec<Feature>,
    xcr0: u32,
    is_amd: bool,
}

impl Shape {
    /// The last basic leaf: the topology, XSAVE or AMX.
    fn last(&self) -> u32 {
        match self.xcr0 {
            0 => 0xb,
            xcr0 if xcr0 & xstate::TILES != 0 => 0x1e,
            _ => 0xd,
        }
    }

    /// Only the features of a leaf.
    fn features(&self, entry: &kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
        let leaf = (entry.function, entry.index);
        let bits = |register: Register, value: u32| {
            let here = self.features.iter().filter(|f| (f.leaf, f.register) == (leaf, register));
            value & here.fold(0, |bits, feature| bits | 1 << feature.bit)
        };
        kvm_cpuid_entry2 {
            eax: bits(Register::Eax, entry.eax),
            ebx: bits(Register::Ebx, entry.ebx),
            ecx: bits(Register::Ecx, entry.ecx),
            edx: bits(Register::Edx, entry.edx),
            ..*entry
        }
    }

    /// What is kept of a leaf: its features, and what are no features.
    fn kept(&self, entry: kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
        let features = self.features(&entry);
        let kvm_cpuid_entry2 { function, index, eax, ebx, ecx, .. } = entry;
        Some(match (function, index) {
            (0, _) => kvm_cpuid_entry2 { eax: self.last(), ..entry },
            // The model, and the size of a cache line.
            (1, _) => kvm_cpuid_entry2 { eax, ebx, ..features },
            (0xd, _) if self.xcr0 == 0 => return None,
            (0xd, 0) => kvm_cpuid_entry2 { eax: eax & self.xcr0, ..features },
            (0xd, 1) => features,
            (0xd, part @ 2..=31) if self.xcr0 & 1 << part != 0 => entry,
            (0xb, 0) | (2 | 4, _) => entry,
            (0x1d | 0x1e, _) if self.xcr0 & xstate::TILES != 0 => entry,
            (LAST_OF_KVM, _) | (7, 0) => features,
            (0x4000_0000, _) => kvm_cpuid_entry2 { eax: LAST_OF_KVM, ..entry },
            (0x8000_0000, _) => {
                let last = if self.is_amd { LAST_EXTENDED_AMD } else { LAST_EXTENDED };
                kvm_cpuid_entry2 { eax: eax.min(last), ..entry }
            }
            (0x8000_0001, _) => {
                let copies = if self.is_amd { AMD_COPIES } else { 0 };
                let topoext = if self.is_amd { ecx & 1 << 22 } else { 0 };
                let (ecx, edx) = (features.ecx | topoext, features.edx | entry.edx & copies);
                kvm_cpuid_entry2 { eax, ebx, ecx, edx, ..entry }
            }
            // The name and the caches.
            (0x8000_0002..=0x8000_0006, _) => entry,
            // The sizes of addresses.
            (0x8000_0008, _) => kvm_cpuid_entry2 { eax, ecx, ..features },
            (0x8000_001d | 0x8000_001e, _) if self.is_amd => entry,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table that has every bit of every leaf.
    fn everything(vendor: [u32; 3]) -> Vec<kvm_cpuid_entry2> {
        let mut all = Vec::new();
        let basic = (0..=0x24).flat_map(|leaf| (0..20).map(move |index| (leaf, index)));
        let extended = (0x8000_0000..=0x8000_0026).map(|leaf| (leaf, 0));
        let kvm = [(0x4000_0000, 0), (0x4000_0001, 0)];
        for (function, index) in basic.chain(extended).chain(kvm) {
            let ones = u32::MAX;
            let entry = kvm_cpuid_entry2 {
                function,
                index,
                eax: ones,
                ebx: ones,
                ecx: ones,
                edx: ones,
                ..Default::default()
            };
            all.push(match (function, index) {
                (0, _) => {
                    let [ebx, edx, ecx] = vendor;
                    kvm_cpuid_entry2 { ebx, ecx, edx, ..entry }
                }
                // Components of 64 bytes, one after the other.
                (0xd, part @ 2..) => {
                    kvm_cpuid_entry2 { eax: 64, ebx: 576 + 64 * (part - 2), ..entry }
                }
                _ => entry,
            });
        }
        all
    }

    const INTEL: [u32; 3] = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];
    const AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];

    fn leaf(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table.iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap()
    }

    #[test]
    fn a_level_has_its_features_and_no_others() {
        for (level, vendor) in
            [(Level::V2, INTEL), (Level::V3, AMD), (Level::V4, INTEL), (Level::V4, AMD)]
        {
            let (table, missing) = table(&everything(vendor), level, false);
            assert!(missing.is_empty());
            let names: Vec<_> = level.features().collect();
            for name in crate::cpu::feature_names() {
                let is_shape = name == "topoext" && vendor == AMD;
                assert_eq!(has(&table, name), names.contains(&name) || is_shape, "{name}");
            }
            assert_eq!(leaf(&table, 7, 0).eax, 0, "no further subleaf");
            let last = if level == Level::V2 { 0xb } else { 0xd };
            assert_eq!(leaf(&table, 0, 0).eax, last);
            let beyond =
                |entry: &&kvm_cpuid_entry2| (last + 1..0x4000_0000).contains(&entry.function);
            assert_eq!(table.iter().find(beyond), None);
        }
    }

    #[test]
    fn two_hosts_give_the_same_table() {
        let more = everything(AMD);
        let mut less = more.clone();
        less.retain(|entry| !matches!(entry.function, 0x0e..=0x24 | 0x8000_0020..));
        for entry in &mut less {
            match (entry.function, entry.index) {
                (7, 0) => (entry.eax, entry.edx) = (0, 0),
                (0xd, 0) => entry.eax = 0xe7,
                (0xd, 1) => entry.eax = 0,
                (0x8000_0007, _) => entry.edx = 0,
                _ => {}
            }
        }
        assert_eq!(table(&more, Level::V4, false), table(&less, Level::V4, false));
    }

    #[test]
    fn what_the_host_lacks_is_named() {
        let mut host = everything(INTEL);
        for entry in host.iter_mut().filter(|entry| entry.function == 7) {
            entry.ebx &= !(1 << 16 | 1 << 31);
        }
        assert_eq!(table(&host, Level::V4, false).1, ["avx512f", "avx512vl"]);
        assert!(table(&host, Level::V3, false).1.is_empty());
        assert!(table(&[], Level::V2, false).1.contains(&"popcnt"));
    }

    #[test]
    fn xsave_has_the_parts_of_the_level_and_the_size_for_them() {
        for (level, tiles, parts, size) in [
            (Level::V3, false, 0x7, 640),
            (Level::V4, false, 0xe7, 576 + 64 * 6),
            (Level::V3, true, 0x6_0007, 576 + 64 * 17),
        ] {
            let (table, _) = table(&everything(INTEL), level, tiles);
            let first = leaf(&table, 0xd, 0);
            assert_eq!((first.eax, first.ecx, first.edx), (parts, size, 0));
            let subleaves = table.iter().filter(|entry| entry.function == 0xd && entry.index > 1);
            let kept = subleaves.fold(0, |kept, entry| kept | 1 << entry.index);
            assert_eq!(kept, parts & !3);
            assert_eq!(table.iter().any(|entry| entry.function == 0x1d), tiles);
        }
        let (two, _) = table(&everything(INTEL), Level::V2, false);
        assert!(!two.iter().any(|entry| entry.function == 0xd));
    }

    #[test]
    fn a_table_without_topology_gains_its_leaf() {
        let (table, _) = table(&[], Level::V2, false);
        assert_eq!(table.iter().map(|entry| entry.function).collect::<Vec<_>>(), [0xb]);
    }
}

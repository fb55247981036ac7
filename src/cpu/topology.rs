//! The topology in CPUID: one package, a core for each vCPU, one thread in each core. KVM's table
//! has the host's topology, or zeros. Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// Leaf 4 and 0x8000001d: bits of EAX.
const CACHE_TYPE: u32 = 0x1f;
const CACHE_SHARING: u32 = 0xfff << 14;
const CACHE_CORES: u32 = 0x3f << 26;

/// One of the machine's vCPUs.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuTopology {
    /// Its APIC id, which is its number.
    pub(super) id: u32,
    /// The number of vCPUs.
    pub(super) vcpus: u32,
    /// Whether the table is that of an AMD or a compatible processor.
    pub(super) is_amd: bool,
}

impl CpuTopology {
    /// The number of APIC id bits that distinguish the cores of the package.
    fn bits(self) -> u32 {
        self.vcpus.next_power_of_two().trailing_zeros()
    }

    /// Write the topology to a table.
    pub(super) fn put(self, entries: &mut Vec<kvm_cpuid_entry2>) {
        let Self { id, vcpus, is_amd } = self;
        let is_many = u32::from(vcpus > 1);
        for leaf in [0xb, 0x1f] {
            self.put_levels(entries, leaf);
        }
        for entry in entries {
            match entry.function {
                1 => {
                    entry.ebx = entry.ebx & 0xffff | vcpus.min(0xff) << 16 | id << 24;
                    entry.edx = entry.edx & !(1 << 28) | is_many << 28; // ht: several in the package
                }
                4 => self.put_cache(entry, CACHE_CORES),
                0x8000_0001 => {
                    // cmp_legacy: the processors are cores, not threads of one core.
                    entry.ecx = entry.ecx & !(1 << 1) | (is_many & u32::from(is_amd)) << 1;
                }
                // On other vendors the leaf is empty, or was copied from the host.
                0x8000_0008 if is_amd || entry.ecx != 0 => {
                    entry.ecx = entry.ecx & !0xf0ff | (vcpus - 1).min(0xff) | self.bits() << 12;
                }
                0x8000_001d => self.put_cache(entry, 0),
                0x8000_001e => {
                    (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0);
                }
                // The level list is empty here; the other leaves describe the levels.
                0x8000_0026 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, id),
                _ => {}
            }
        }
    }

    /// A cache: the package shares the third level, and each core has its own others.
    fn put_cache(self, entry: &mut kvm_cpuid_entry2, cores: u32) {
        if entry.eax & CACHE_TYPE == 0 {
            return; // after the last cache
        }
        let others = (1 << self.bits()) - 1;
        let is_shared = entry.eax >> 5 & 7 >= 3;
        let sharing = if is_shared { others << 14 } else { 0 };
        let kept = entry.eax & !CACHE_SHARING & !cores;
        entry.eax = kept | sharing & CACHE_SHARING | others << 26 & cores;
    }

    /// Write the levels of a leaf that lists them, if the table has it.
    fn put_levels(self, entries: &mut Vec<kvm_cpuid_entry2>, leaf: u32) {
        let Some(first) = entries.iter().position(|entry| entry.function == leaf) else { return };
        entries.retain(|entry| entry.function != leaf);
        let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
            function: leaf,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: kind << 8 | index,
            edx: self.id,
            ..Default::default()
        };
        let levels = [
            level(0, 0, 1, LEVEL_THREAD),
            level(1, self.bits(), self.vcpus, LEVEL_CORE),
            level(2, 0, 0, 0),
        ];
        entries.splice(first..first, levels);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx: 0x7777, ..Default::default() }
    }

    fn table(is_amd: bool, id: u32, vcpus: u32) -> Vec<kvm_cpuid_entry2> {
        // From a host with 32 threads on 16 cores.
        let mut table = vec![
            entry(0, 0, 0x1f),
            kvm_cpuid_entry2 { ebx: 0x0520_0800, edx: 1 << 28, ..entry(1, 0, 0) },
            entry(4, 0, 0xfc00_4121),
            entry(4, 3, 0xfc07_c163),
            entry(4, 4, 0),
            entry(0xb, 0, 1),
            entry(0x1f, 0, 0),
            kvm_cpuid_entry2 { ecx: 0x0002, ..entry(0x8000_0001, 0, 0) },
            kvm_cpuid_entry2 { ecx: 0x1_501f, ..entry(0x8000_0008, 0, 0x3030) },
            entry(0x8000_001d, 3, 0x3_c163),
            entry(0x8000_001e, 0, 5),
        ];
        CpuTopology { id, vcpus, is_amd }.put(&mut table);
        table
    }

    fn leaf(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found: Vec<_> =
            table.iter().filter(|e| (e.function, e.index) == (function, index)).collect();
        assert_eq!(found.len(), 1, "{function:#x} {index}");
        *found[0]
    }

    #[test]
    fn every_leaf_tells_the_same_number_of_cores() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6), (255, 8)] {
            for id in [0, vcpus - 1] {
                let table = table(true, id, vcpus);
                let one = leaf(&table, 1, 0);
                assert_eq!(
                    (one.ebx >> 24, one.ebx >> 16 & 0xff, one.ebx & 0xffff),
                    (id, vcpus, 0x800)
                );
                assert_eq!(one.edx >> 28 & 1, u32::from(vcpus > 1));
                for leaves in [0xb, 0x1f] {
                    let [thread, core, end] = [0, 1, 2].map(|index| leaf(&table, leaves, index));
                    assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
                    assert_eq!((core.eax, core.ebx, core.ecx), (bits, vcpus, 0x201));
                    assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
                    assert!([thread, core, end].iter().all(|level| level.edx == id));
                }
                let eight = leaf(&table, 0x8000_0008, 0);
                assert_eq!((eight.eax, eight.ecx), (0x3030, 0x1_0000 | bits << 12 | (vcpus - 1)));
                let place = leaf(&table, 0x8000_001e, 0);
                assert_eq!((place.eax, place.ebx, place.ecx), (id, id, 0));
            }
        }
    }

    #[test]
    fn the_last_cache_is_the_package_s_and_the_first_a_core_s_own() {
        let table = table(false, 1, 3);
        assert_eq!(leaf(&table, 4, 0).eax, 3 << 26 | 0x121);
        assert_eq!(leaf(&table, 4, 3).eax, 3 << 26 | 3 << 14 | 0x163);
        assert_eq!(leaf(&table, 4, 4).eax, 0);
        assert_eq!(leaf(&table, 0x8000_001d, 3).eax, 3 << 14 | 0x163);
    }

    #[test]
    fn cores_are_marked_as_such_on_amd_s_alone() {
        for (is_amd, vcpus, marked) in [(true, 2, 2), (true, 1, 0), (false, 2, 0)] {
            assert_eq!(leaf(&table(is_amd, 0, vcpus), 0x8000_0001, 0).ecx, marked);
        }
        let mut intel = vec![entry(0x8000_0008, 0, 0)];
        CpuTopology { id: 0, vcpus: 2, is_amd: false }.put(&mut intel);
        assert_eq!(leaf(&intel, 0x8000_0008, 0).ecx, 0);
    }

    #[test]
    fn a_table_without_levels_gets_none() {
        let mut entries = vec![entry(1, 0, 0)];
        CpuTopology { id: 0, vcpus: 2, is_amd: false }.put(&mut entries);
        assert_eq!(entries.len(), 1);
    }
}

//! The topology in CPUID: packages, cores, threads. KVM's table has the host's topology, or zeros.
//! Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::entries::change;
use super::features::Register;
use super::template::RegisterBits;
use crate::error::{Error, ErrorKind, Result};

const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// Leaf 4 and 0x8000001d: bits of EAX.
const CACHE_TYPE: u32 = 0x1f;
const CACHE_SHARING: u32 = 0xfff << 14;
const CACHE_CORES: u32 = 0x3f << 26;

/// The packages, cores and threads of a machine. The number of a vCPU is its APIC id, in which each
/// of the three has bits of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// The number of vCPUs, from 1.
    pub vcpus: u32,
    /// The number of packages.
    pub sockets: u32,
    /// The number of threads of each core.
    pub threads: u32,
}

impl Topology {
    /// One package, in which each vCPU is a core.
    #[must_use]
    pub fn flat(vcpus: u32) -> Self {
        Self { vcpus, sockets: 1, threads: 1 }
    }

    /// # Errors
    /// [`ErrorKind::Config`] if the vCPUs cannot be divided so that their numbers are APIC ids.
    pub(super) fn check(self) -> Result<()> {
        let Self { vcpus, sockets, threads } = self;
        let bad = |key: &str, detail: String| Err(Error::new(ErrorKind::Config, key, detail));
        let parts = u64::from(sockets) * u64::from(threads);
        if parts == 0 || u64::from(vcpus) % parts != 0 {
            let detail = format!(
                "{vcpus} vCPUs cannot be divided into {sockets} sockets with {threads} threads a core"
            );
            return bad(if threads == 1 { "cpu.sockets" } else { "cpu.threads" }, detail);
        }
        if !threads.is_power_of_two() {
            return bad("cpu.threads", format!("{threads} is not a power of two"));
        }
        let each = vcpus / sockets;
        if sockets > 1 && !each.is_power_of_two() {
            let detail = format!("{each} vCPUs in each of several sockets are not a power of two");
            return bad("cpu.sockets", detail);
        }
        Ok(())
    }

    /// The number of vCPUs in each package.
    fn in_package(self) -> u32 {
        self.vcpus / self.sockets.max(1)
    }

    /// The number of APIC id bits that distinguish the threads of a core.
    fn thread_bits(self) -> u32 {
        self.threads.next_power_of_two().trailing_zeros()
    }

    /// The number of APIC id bits that distinguish the vCPUs of a package.
    fn package_bits(self) -> u32 {
        self.in_package().next_power_of_two().trailing_zeros()
    }
}

/// One of the machine's vCPUs.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuTopology {
    /// Its APIC id, which is its number.
    pub(super) id: u32,
    /// That of the machine.
    pub(super) machine: Topology,
    /// Whether the table is that of an AMD or a compatible processor.
    pub(super) is_amd: bool,
}

impl CpuTopology {
    /// Write the topology to a table.
    pub(super) fn put(self, entries: &mut Vec<kvm_cpuid_entry2>) {
        let Self { id, machine, is_amd } = self;
        let (in_package, bits) = (machine.in_package(), machine.package_bits());
        let is_many = u32::from(in_package > 1);
        if machine.vcpus > 256 {
            // Only this leaf has ids of more than 8 bits.
            let nothing =
                RegisterBits { leaf: (0xb, 0), register: Register::Eax, clear: 0, set: 0 };
            change(entries, &nothing);
        }
        for leaf in [0xb, 0x1f] {
            self.put_levels(entries, leaf);
        }
        for entry in entries {
            match entry.function {
                1 => {
                    // An id of more than 8 bits is in leaf 0xb.
                    entry.ebx = entry.ebx & 0xffff | in_package.min(0xff) << 16 | id << 24;
                    entry.edx = entry.edx & !(1 << 28) | is_many << 28; // ht: several in the package
                }
                4 => self.put_cache(entry, CACHE_CORES),
                0x8000_0001 => {
                    // cmp_legacy: the package has several cores.
                    entry.ecx = entry.ecx & !(1 << 1) | (is_many & u32::from(is_amd)) << 1;
                }
                // On other vendors the leaf is empty, or was copied from the host.
                0x8000_0008 if is_amd || entry.ecx != 0 => {
                    entry.ecx = entry.ecx & !0xf0ff | (in_package - 1).min(0xff) | bits << 12;
                }
                0x8000_001d => self.put_cache(entry, 0),
                0x8000_001e => self.put_place(entry),
                // The level list is empty here; the other leaves describe the levels.
                0x8000_0026 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, id),
                _ => {}
            }
        }
    }

    /// Where the vCPU is: its APIC id, its core and the core's threads, and its node, of which each
    /// package is one.
    fn put_place(self, entry: &mut kvm_cpuid_entry2) {
        let Self { id, machine, .. } = self;
        let core = (id & ((1 << machine.package_bits()) - 1)) >> machine.thread_bits();
        let threads = (machine.threads - 1).min(0xff);
        let node = id >> machine.package_bits() & 0xff;
        (entry.eax, entry.ebx, entry.ecx) = (id, threads << 8 | core & 0xff, node);
    }

    /// A cache: the package shares the third level, and each core has its own others.
    fn put_cache(self, entry: &mut kvm_cpuid_entry2, cores: u32) {
        if entry.eax & CACHE_TYPE == 0 {
            return; // after the last cache
        }
        let (package, thread) = (self.machine.package_bits(), self.machine.thread_bits());
        let is_shared = entry.eax >> 5 & 7 >= 3;
        let others = |bits: u32| (1u32 << bits) - 1;
        let sharing = others(if is_shared { package } else { thread }).min(0xfff);
        let kept = entry.eax & !CACHE_SHARING & !cores;
        let in_package = others(package - thread).min(0x3f);
        entry.eax = kept | sharing << 14 | in_package << 26 & cores;
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
        let machine = self.machine;
        let levels = [
            level(0, machine.thread_bits(), machine.threads, LEVEL_THREAD),
            level(1, machine.package_bits(), machine.in_package(), LEVEL_CORE),
            level(2, 0, 0, 0),
        ];
        entries.splice(first..first, levels);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx: 0x7777, ..Default::default() }
    }

    fn table(is_amd: bool, id: u32, machine: Topology) -> Vec<kvm_cpuid_entry2> {
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
            entry(0x8000_001d, 0, 0x3_c121),
            entry(0x8000_001d, 3, 0x3_c163),
            entry(0x8000_001e, 0, 5),
        ];
        CpuTopology { id, machine, is_amd }.put(&mut table);
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
        // Long because it has every leaf.
        for (vcpus, bits) in [
            (1, 0),
            (2, 1),
            (3, 2),
            (6, 3),
            (32, 5),
            (64, 6),
            (200, 8),
            (255, 8),
            (256, 8),
            (1000, 10),
            (4096, 12),
        ] {
            for id in [0, vcpus / 2, vcpus - 1] {
                let table = table(true, id, Topology::flat(vcpus));
                let one = leaf(&table, 1, 0);
                assert_eq!(
                    (one.ebx >> 24, one.ebx >> 16 & 0xff, one.ebx & 0xffff),
                    (id & 0xff, vcpus.min(255), 0x800)
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
                let count = (vcpus - 1).min(255);
                assert_eq!((eight.eax, eight.ecx), (0x3030, 0x1_0000 | bits << 12 | count));
                let place = leaf(&table, 0x8000_001e, 0);
                assert_eq!((place.eax, place.ebx, place.ecx), (id, id & 0xff, 0));
                let addressable = (1 << bits) - 1;
                assert_eq!(
                    leaf(&table, 4, 3).eax,
                    addressable.min(63) << 26 | addressable << 14 | 0x163
                );
                assert_eq!(leaf(&table, 0x8000_001d, 3).eax, addressable << 14 | 0x163);
            }
        }
    }

    #[test]
    fn threads_and_sockets_have_their_own_bits_of_the_id() {
        let machine = Topology { vcpus: 16, sockets: 2, threads: 2 };
        machine.check().unwrap();
        let table = table(true, 13, machine); // socket 1, core 2, thread 1
        let one = leaf(&table, 1, 0);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (13, 8));
        assert_eq!((leaf(&table, 0xb, 0).eax, leaf(&table, 0xb, 0).ebx), (1, 2));
        assert_eq!((leaf(&table, 0xb, 1).eax, leaf(&table, 0xb, 1).ebx), (3, 8));
        assert_eq!(leaf(&table, 4, 0).eax, 3 << 26 | 1 << 14 | 0x121, "4 cores, 2 threads share");
        assert_eq!(leaf(&table, 4, 3).eax, 3 << 26 | 7 << 14 | 0x163);
        assert_eq!(leaf(&table, 0x8000_001d, 0).eax, 1 << 14 | 0x121);
        assert_eq!(leaf(&table, 0x8000_0008, 0).ecx, 0x1_0000 | 3 << 12 | 7);
        let place = leaf(&table, 0x8000_001e, 0);
        assert_eq!((place.eax, place.ebx, place.ecx), (13, 1 << 8 | 2, 1));
    }

    #[test]
    fn what_has_no_place_in_an_id_is_refused() {
        for (vcpus, sockets, threads, key) in [
            (3, 1, 2, "cpu.threads"),
            (6, 1, 3, "cpu.threads"),
            (3, 2, 1, "cpu.sockets"),
            (6, 2, 1, "cpu.sockets"),
            (2, 0, 1, "cpu.sockets"),
            (2, 1, 0, "cpu.threads"),
            (2, u32::MAX, u32::MAX, "cpu.threads"),
        ] {
            let error = Topology { vcpus, sockets, threads }.check().unwrap_err();
            assert_eq!(error.at, key, "{error}");
        }
        for (vcpus, sockets, threads) in [(1, 1, 1), (6, 1, 2), (8, 2, 2), (3, 3, 1), (1000, 1, 4)]
        {
            Topology { vcpus, sockets, threads }.check().unwrap();
        }
    }

    proptest! {
        /// What Linux does with the leaves: an id is a package, a core and a thread, none twice.
        #[test]
        fn each_vcpu_has_a_place_of_its_own(cores in 1..40u32, sockets in 1..5u32, bits in 0..3u32) {
            let threads = 1 << bits;
            let machine = Topology { vcpus: cores * sockets * threads, sockets, threads };
            prop_assume!(machine.check().is_ok());
            let mut places = std::collections::HashSet::new();
            for id in 0..machine.vcpus {
                let table = table(true, id, machine);
                let [thread, core] = [0, 1].map(|index| leaf(&table, 0xb, index));
                let package = id >> core.eax;
                let of_core = (id & ((1 << core.eax) - 1)) >> thread.eax;
                prop_assert!(package < sockets && of_core < cores);
                prop_assert!(places.insert((package, of_core, id & ((1 << thread.eax) - 1))));
                let place = leaf(&table, 0x8000_001e, 0);
                prop_assert_eq!((place.ecx & 0xff, place.ebx & 0xff), (package, of_core));
            }
        }
    }

    #[test]
    fn the_last_cache_is_the_package_s_and_the_first_a_core_s_own() {
        let table = table(false, 1, Topology::flat(3));
        assert_eq!(leaf(&table, 4, 0).eax, 3 << 26 | 0x121);
        assert_eq!(leaf(&table, 4, 3).eax, 3 << 26 | 3 << 14 | 0x163);
        assert_eq!(leaf(&table, 4, 4).eax, 0);
        assert_eq!(leaf(&table, 0x8000_001d, 3).eax, 3 << 14 | 0x163);
    }

    #[test]
    fn cores_are_marked_as_such_on_amd_s_alone() {
        for (is_amd, vcpus, marked) in [(true, 2, 2), (true, 1, 0), (false, 2, 0)] {
            let table = table(is_amd, 0, Topology::flat(vcpus));
            assert_eq!(leaf(&table, 0x8000_0001, 0).ecx, marked);
        }
        let mut intel = vec![entry(0x8000_0008, 0, 0)];
        CpuTopology { id: 0, machine: Topology::flat(2), is_amd: false }.put(&mut intel);
        assert_eq!(leaf(&intel, 0x8000_0008, 0).ecx, 0);
    }

    #[test]
    fn a_table_without_levels_gets_them_only_for_ids_that_nothing_else_holds() {
        for (vcpus, leaves) in [(2, 2), (256, 2), (257, 5)] {
            let mut entries = vec![entry(0, 0, 7), entry(1, 0, 0)];
            let id = vcpus - 1;
            CpuTopology { id, machine: Topology::flat(vcpus), is_amd: false }.put(&mut entries);
            assert_eq!(entries.len(), leaves);
            assert_eq!(entries[0].eax, if vcpus > 256 { 0xb } else { 7 });
            assert_eq!(entries[leaves - 1].edx, if vcpus > 256 { id } else { 1 << 28 });
        }
    }
}

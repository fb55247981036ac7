//! The CPUID of the guest: the features that KVM supports, except those hidden by name, and the id
//! of each vCPU.

use std::borrow::Cow;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Kvm, VcpuFd};

use super::config::{CpuConfig, CpuTemplate};
use super::features::{Feature, Register, feature, feature_names};
use super::topology::CpuTopology;
use crate::error::{Error, Result};
use crate::process::OnceBox;

/// Hardware virtualization. No template offers it, because snapshots do not include the state of a
/// guest that uses it.
const NESTING: &str = "vmx svm";

/// Features that a KVM which emulates ring 0 in software cannot execute or executes very slowly,
/// and hypercalls that it does not answer. Its guests also see an Intel processor; see
/// [`set_vendor`].
const SOFTWARE_KVM: &str = "xsave smap smep popcnt fsgsbase umip pcid invpcid rdpid erms fsrm avx f16c fma avx2 \
    vaes vpclmulqdq avx_vnni avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 \
    avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_bf16 avx512_vp2intersect xsaveopt xsavec xgetbv1 xsaves \
    arch_capabilities kvm_pv_unhalt kvm_pv_ipi kvm_pv_sched_yield";

/// Whether KVM must emulate, because the host's processor has no hardware virtualization.
#[must_use]
pub fn host_is_software_kvm() -> bool {
    // Queried once, because CPUID costs an exit if the host is itself a guest.
    static ANSWER: OnceBox<bool> = OnceBox::new();
    *ANSWER.get_or_init(|| {
        // CPUID leaves 1 and 0x80000001: VMX is ECX bit 5, SVM is ECX bit 2.
        let vmx = std::arch::x86_64::__cpuid(1).ecx & 1 << 5 != 0;
        let svm = std::arch::x86_64::__cpuid(0x8000_0001).ecx & 1 << 2 != 0;
        !vmx && !svm
    })
}

/// Whether KVM keeps page tables of its own, derived from the guest's: it has no nested paging.
#[must_use]
pub fn host_shadows_page_tables() -> bool {
    static ANSWER: OnceBox<bool> = OnceBox::new();
    *ANSWER.get_or_init(|| {
        let is_off =
            |path| std::fs::read(path).is_ok_and(|value| matches!(value[..], [b'N' | b'0', ..]));
        host_is_software_kvm()
            || is_off("/sys/module/kvm_intel/parameters/ept")
            || is_off("/sys/module/kvm_amd/parameters/npt")
    })
}

/// What is computed once for each template.
struct TemplateTable {
    /// The features that KVM supports and the template does not hide.
    entries: Vec<kvm_cpuid_entry2>,
    /// The table of the only vCPU of a machine with these features.
    only_vcpu: OnceBox<CpuId>,
}

fn templated(kvm: &Kvm, is_software: bool) -> Result<&'static TemplateTable> {
    static TABLES: [OnceBox<TemplateTable>; 2] = [const { OnceBox::new() }; 2];
    let [host, software] = &TABLES;
    let table = if is_software { software } else { host };
    table.get_or_try_init(|| {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| Error::kvm("KVM_GET_SUPPORTED_CPUID", e))?;
        let mut entries = supported.as_slice().to_vec();
        hidden(is_software).filter_map(feature).for_each(|f| hide(&mut entries, f));
        if is_software {
            set_vendor(&mut entries, *b"GenuineIntel");
        }
        Ok(TemplateTable { entries, only_vcpu: OnceBox::new() })
    })
}

/// The CPUID table of one machine, before the ids of the vCPUs are added.
#[derive(Debug)]
pub struct GuestCpuid {
    entries: Cow<'static, [kvm_cpuid_entry2]>,
    /// Where the table of its only vCPU is kept, if the features are those of a template.
    only_vcpu: Option<&'static OnceBox<CpuId>>,
}

/// The CPUID table of one machine.
///
/// # Errors
/// If KVM does not report its supported CPUID.
pub fn guest_cpuid(kvm: &Kvm, config: &CpuConfig) -> Result<GuestCpuid> {
    let TemplateTable { entries, only_vcpu } = templated(kvm, is_software(config.template))?;
    let mut table = GuestCpuid { entries: entries.into(), only_vcpu: Some(only_vcpu) };
    if config.hide.is_empty() && config.expose.is_empty() {
        return Ok(table);
    }
    let entries = table.entries.to_mut();
    config.hide.iter().filter_map(|name| feature(name)).for_each(|f| hide(entries, f));
    config.expose.iter().filter_map(|name| feature(name)).for_each(|f| expose(entries, f));
    table.only_vcpu = None;
    Ok(table)
}

/// The features that [`CpuTemplate::Auto`] hides on this host.
#[must_use]
pub fn hidden_by_default() -> Vec<&'static str> {
    hidden(is_software(CpuTemplate::Auto)).collect()
}

fn hidden(is_software: bool) -> impl Iterator<Item = &'static str> {
    let software = if is_software { SOFTWARE_KVM } else { "" };
    NESTING.split_whitespace().chain(software.split_whitespace())
}

fn is_software(template: CpuTemplate) -> bool {
    match template {
        CpuTemplate::Auto => host_is_software_kvm(),
        CpuTemplate::Host => false,
        CpuTemplate::SoftwareKvm => true,
    }
}

/// KVM's emulator executes SYSENTER from 32-bit code under a 64-bit kernel only for an Intel
/// processor. The SYSCALL that Linux uses on other processors loses the upper half of the kernel's
/// address.
fn set_vendor(entries: &mut [kvm_cpuid_entry2], vendor: [u8; 12]) {
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| vendor[at + n]));
    for entry in entries.iter_mut().filter(|e| matches!(e.function, 0 | 0x8000_0000)) {
        (entry.ebx, entry.edx, entry.ecx) = (word(0), word(4), word(8));
    }
}

fn hide(entries: &mut [kvm_cpuid_entry2], feature: Feature) {
    for entry in entries.iter_mut().filter(|e| (e.function, e.index) == feature.leaf) {
        *register_mut(entry, feature.register) &= !(1 << feature.bit);
    }
}

fn expose(entries: &mut Vec<kvm_cpuid_entry2>, feature: Feature) {
    let (function, index) = feature.leaf;
    if !entries.iter().any(|e| (e.function, e.index) == feature.leaf) {
        // Only leaves with subleaves have this flag. In `WORDS` these are 7 and 0xd.
        let flags = if matches!(function, 7 | 0xd) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        entries.push(kvm_cpuid_entry2 { function, index, flags, ..Default::default() });
    }
    for entry in entries.iter_mut().filter(|e| (e.function, e.index) == feature.leaf) {
        *register_mut(entry, feature.register) |= 1 << feature.bit;
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

/// Read a vCPU's table from KVM.
///
/// # Errors
/// If KVM refuses the ioctl.
pub fn of_vcpu(fd: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>> {
    let table =
        fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(|e| Error::kvm("KVM_GET_CPUID2", e))?;
    Ok(without_tail(table.as_slice().to_vec()))
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

impl GuestCpuid {
    /// Whether it has a feature.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        has(&self.entries, name)
    }

    /// Call `set` with the table of one vCPU, with its id and the machine's topology.
    ///
    /// # Errors
    /// Those of `set`. The table itself is no longer than KVM's own.
    pub fn with_vcpu<T>(
        &self,
        id: u8,
        vcpus: u8,
        set: impl FnOnce(&CpuId) -> Result<T>,
    ) -> Result<T> {
        match self.only_vcpu {
            Some(kept) if (id, vcpus) == (0, 1) => {
                set(kept.get_or_try_init(|| for_vcpu(&self.entries, id, vcpus))?)
            }
            _ => set(&for_vcpu(&self.entries, id, vcpus)?),
        }
    }
}

fn for_vcpu(table: &[kvm_cpuid_entry2], id: u8, vcpus: u8) -> Result<CpuId> {
    let mut entries = table.to_vec();
    entries.iter_mut().filter(|entry| entry.function == 1).for_each(|entry| {
        entry.ecx |= 1 << 31; // hypervisor
    });
    let is_amd = matches!(vendor(table).as_str(), "AuthenticAMD" | "HygonGenuine");
    CpuTopology { id: id.into(), vcpus: vcpus.max(1).into(), is_amd }.put(&mut entries);
    CpuId::from_entries(&entries).map_err(|_| {
        Error::new(crate::error::ErrorKind::Kvm, "KVM_SET_CPUID2", "the CPUID table is too long")
    })
}

#[cfg(test)]
mod tests {
    //! Covers src/cpu/features.rs.

    use super::*;

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
    fn every_template_name_is_known_and_no_name_stands_twice() {
        assert!(hidden(true).all(|name| feature(name).is_some()));
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

    #[test]
    fn each_vcpu_gets_its_own_id() {
        let entry = kvm_cpuid_entry2 { function: 1, ebx: u32::MAX, ..Default::default() };
        let cpuid = for_vcpu(&[entry], 3, 4).unwrap();
        assert_eq!(cpuid.as_slice()[0].ebx, 0x0304_ffff);
    }

    #[test]
    fn only_the_table_of_a_single_vcpu_is_kept() {
        static KEPT: OnceBox<CpuId> = OnceBox::new();
        let entry = kvm_cpuid_entry2 { function: 1, ebx: u32::MAX, ..Default::default() };
        let table = GuestCpuid { entries: vec![entry].into(), only_vcpu: Some(&KEPT) };
        let ebx =
            |id, vcpus| table.with_vcpu(id, vcpus, |cpuid| Ok(cpuid.as_slice()[0].ebx)).unwrap();
        assert_eq!(
            [ebx(1, 2), ebx(0, 2), ebx(0, 1), ebx(0, 1)],
            [0x0102_ffff, 0x0002_ffff, 0x0001_ffff, 0x0001_ffff]
        );
        assert!(KEPT.get().is_some());
    }
}

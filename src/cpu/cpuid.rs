//! The CPUID of the guest: the features that KVM supports, except those hidden by name, and the id
//! of each vCPU.

use std::borrow::Cow;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::config::CpuConfig;
use super::entries::{change, expose, hide, is_amd, set_vendor};
pub use super::entries::{has, missing, vendor, without_tail, xcr0_mask};
use super::features::{Feature, Register, feature};
use super::level;
use super::template::{BaseTemplate, Level, hidden};
use super::topology::{CpuTopology, Topology};
use super::xstate;
use crate::error::{Error, ErrorKind, Result};
use crate::process::OnceBox;

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
    /// The features that the template promises and KVM lacks.
    missing: Vec<&'static str>,
    /// The table of the only vCPU of a machine with these features.
    only_vcpu: OnceBox<CpuId>,
}

/// A template's table, with what AMX needs if the process has the permission for it and the guest
/// is to have it.
fn templated(kvm: &Kvm, base: BaseTemplate, tiles: bool) -> Result<&'static TemplateTable> {
    static TABLES: [[OnceBox<TemplateTable>; 5]; 2] = [const { [const { OnceBox::new() }; 5] }; 2];
    let [host, software, two, three, four] = &TABLES[usize::from(tiles)];
    let table = match base {
        BaseTemplate::Level(Level::V2) => two,
        BaseTemplate::Level(Level::V3) => three,
        BaseTemplate::Level(Level::V4) => four,
        _ if is_software(base) => software,
        _ => host,
    };
    table.get_or_try_init(|| {
        let mut entries = supported(kvm)?.as_slice().to_vec();
        let mut missing = Vec::new();
        if let BaseTemplate::Level(level) = base {
            unlisted(kvm, level).for_each(|feature| expose(&mut entries, feature));
            (entries, missing) = level::table(&entries, level, tiles);
        } else {
            hidden(is_software(base)).filter_map(feature).for_each(|f| hide(&mut entries, f));
            if !tiles {
                xstate::remove_tiles(&mut entries);
            }
            if is_software(base) {
                set_vendor(&mut entries, *b"GenuineIntel");
            }
        }
        Ok(TemplateTable { entries, missing, only_vcpu: OnceBox::new() })
    })
}

/// Features of a level that guests have although KVM's table lacks them. Not every KVM that
/// emulates the TSC deadline timer lists it. One that emulates ring 0, and runs ring 3 on the
/// processor itself, lists few of the processor's.
fn unlisted(kvm: &Kvm, level: Level) -> impl Iterator<Item = Feature> {
    let timer = kvm.check_extension(Cap::TscDeadlineTimer).then_some("tsc_deadline_timer");
    let names = level.instructions().filter(|_| host_is_software_kvm());
    let of_processor = names.filter_map(feature).filter(|feature| processor_has(*feature));
    timer.into_iter().filter_map(feature).chain(of_processor)
}

fn processor_has(feature: Feature) -> bool {
    let (leaf, subleaf) = feature.leaf;
    if std::arch::x86_64::__get_cpuid_max(leaf & 0x8000_0000).0 < leaf {
        return false;
    }
    let found = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    let value = match feature.register {
        Register::Eax => found.eax,
        Register::Ebx => found.ebx,
        Register::Ecx => found.ecx,
        Register::Edx => found.edx,
    };
    value & 1 << feature.bit != 0
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
/// If KVM does not report its supported CPUID; [`ErrorKind::Config`] if the host lacks a feature
/// that the template promises; those of `xstate::request` if the guest is to have AMX.
pub fn guest_cpuid(kvm: &Kvm, config: &CpuConfig) -> Result<GuestCpuid> {
    let CpuConfig { template, hide: hidden, expose: exposed, .. } = config;
    let tiles = request_tiles(kvm, config)?;
    let TemplateTable { entries, missing, only_vcpu } = templated(kvm, template.base, tiles)?;
    let mut table = GuestCpuid { entries: entries.into(), only_vcpu: Some(only_vcpu) };
    let changes = [&template.hide, &template.expose, hidden, exposed];
    if changes.iter().all(|names| names.is_empty()) && template.bits.is_empty() {
        return check_missing(missing, &table, &[], template.base).map(|()| table);
    }
    let entries = table.entries.to_mut();
    let features =
        |names: &[String]| names.iter().filter_map(|name| feature(name)).collect::<Vec<_>>();
    features(&template.hide).into_iter().for_each(|f| hide(entries, f));
    features(&template.expose).into_iter().for_each(|f| expose(entries, f));
    template.bits.iter().for_each(|bits| change(entries, bits));
    features(hidden).into_iter().for_each(|f| hide(entries, f));
    features(exposed).into_iter().for_each(|f| expose(entries, f));
    if tiles && let Some(xfd) = feature("xfd") {
        expose(entries, xfd);
    }
    table.only_vcpu = None;
    check_missing(missing, &table, &[&template.hide, hidden], template.base)?;
    Ok(table)
}

/// What KVM supports on this host.
///
/// # Errors
/// If KVM does not report it.
pub fn supported(kvm: &Kvm) -> Result<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| Error::kvm("KVM_GET_SUPPORTED_CPUID", e))
}

/// Check that the guest has what its template promises, except for what is hidden by name. What is
/// exposed by name counts as there.
fn check_missing(
    missing: &[&'static str],
    table: &GuestCpuid,
    hidden: &[&[String]],
    base: BaseTemplate,
) -> Result<()> {
    let is_hidden = |name: &str| hidden.iter().any(|names| names.iter().any(|other| other == name));
    let lacks: Vec<_> =
        missing.iter().filter(|name| !is_hidden(name) && !table.has(name)).copied().collect();
    if lacks.is_empty() {
        return Ok(());
    }
    let detail = format!("this host does not offer {}: {}", base.name(), lacks.join(", "));
    Err(Error::new(ErrorKind::Config, "cpu.template", detail).hint(
        "pyvmm doctor --cpuid prints what it offers; cpu.expose shows a feature all the same",
    ))
}

/// Ask for AMX if the guest is to have it. Returns whether it is.
fn request_tiles(kvm: &Kvm, config: &CpuConfig) -> Result<bool> {
    let is_tiles = |name: &&String| name.starts_with("amx_") && !config.hide.contains(name);
    let lists = [("cpu.expose", &config.expose), ("cpu.template.expose", &config.template.expose)];
    let mut wanted = lists.iter().flat_map(|(at, names)| {
        names.iter().filter(is_tiles).map(move |name| (*at, name.as_str()))
    });
    let Some((at, _)) = wanted.clone().next() else { return Ok(false) };
    xstate::request(at)?;
    let supported = supported(kvm)?;
    let lacks = |name: &str| !has(supported.as_slice(), name);
    let tiles = u64::from(xstate::TILES);
    if xcr0_mask(supported.as_slice()) & tiles != tiles {
        let detail = "this KVM has no KVM_X86_XCOMP_GUEST_SUPP for AMX (Linux 5.17)";
        return Err(Error::new(ErrorKind::Unavailable, at, detail));
    }
    match wanted.find(|(_, name)| lacks(name)) {
        Some((at, name)) => {
            let detail = format!("the host's processor has no {name}");
            Err(Error::new(ErrorKind::Unavailable, at, detail))
        }
        None => Ok(true),
    }
}

/// The features that [`BaseTemplate::Auto`] hides on this host.
#[must_use]
pub fn hidden_by_default() -> Vec<&'static str> {
    hidden(is_software(BaseTemplate::Auto)).collect()
}

fn is_software(template: BaseTemplate) -> bool {
    match template {
        BaseTemplate::Auto => host_is_software_kvm(),
        BaseTemplate::SoftwareKvm => true,
        BaseTemplate::Host | BaseTemplate::Level(_) => false,
    }
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
        id: u32,
        machine: Topology,
        set: impl FnOnce(&CpuId) -> Result<T>,
    ) -> Result<T> {
        match self.only_vcpu {
            Some(kept) if machine.vcpus == 1 => {
                set(kept.get_or_try_init(|| for_vcpu(&self.entries, id, machine))?)
            }
            _ => set(&for_vcpu(&self.entries, id, machine)?),
        }
    }
}

fn for_vcpu(table: &[kvm_cpuid_entry2], id: u32, machine: Topology) -> Result<CpuId> {
    let mut entries = table.to_vec();
    entries.iter_mut().filter(|entry| entry.function == 1).for_each(|entry| {
        entry.ecx |= 1 << 31; // hypervisor
    });
    CpuTopology { id, machine, is_amd: is_amd(table) }.put(&mut entries);
    CpuId::from_entries(&entries)
        .map_err(|_| Error::new(ErrorKind::Kvm, "KVM_SET_CPUID2", "the CPUID table is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_gets_its_own_id() {
        let entry = kvm_cpuid_entry2 { function: 1, ebx: u32::MAX, ..Default::default() };
        let cpuid = for_vcpu(&[entry], 3, Topology::flat(4)).unwrap();
        assert_eq!(cpuid.as_slice()[0].ebx, 0x0304_ffff);
    }

    #[test]
    fn only_the_table_of_a_single_vcpu_is_kept() {
        static KEPT: OnceBox<CpuId> = OnceBox::new();
        let entry = kvm_cpuid_entry2 { function: 1, ebx: u32::MAX, ..Default::default() };
        let table = GuestCpuid { entries: vec![entry].into(), only_vcpu: Some(&KEPT) };
        let ebx = |id, vcpus| {
            let machine = Topology::flat(vcpus);
            table.with_vcpu(id, machine, |cpuid| Ok(cpuid.as_slice()[0].ebx)).unwrap()
        };
        assert_eq!(
            [ebx(1, 2), ebx(0, 2), ebx(0, 1), ebx(0, 1)],
            [0x0102_ffff, 0x0002_ffff, 0x0001_ffff, 0x0001_ffff]
        );
        assert!(KEPT.get().is_some());
    }
}

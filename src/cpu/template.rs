//! CPU templates: named sets of features, and a user's changes to one. Pure data.

use super::features::{Register, feature};
use crate::error::{Error, ErrorKind, Result};

/// A set of features with a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BaseTemplate {
    /// `SoftwareKvm` if the host has neither vmx nor svm, otherwise `Host`.
    #[default]
    Auto,
    /// Everything that KVM offers, except nested virtualization and AMX.
    Host,
    /// Without the features that a KVM which emulates ring 0 in software cannot execute.
    SoftwareKvm,
    /// The features of one of the psABI's levels, the same on every host.
    Level(Level),
}

/// A micro-architecture level of the System V ABI for x86-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// x86-64-v2: SSE4.2, POPCNT, CMPXCHG16B.
    V2,
    /// x86-64-v3: AVX2, BMI, FMA.
    V3,
    /// x86-64-v4: the common part of AVX-512.
    V4,
}

impl BaseTemplate {
    /// Every template.
    pub const ALL: [Self; 6] = [
        Self::Auto,
        Self::Host,
        Self::SoftwareKvm,
        Self::Level(Level::V2),
        Self::Level(Level::V3),
        Self::Level(Level::V4),
    ];

    /// Its name in a configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Host => "host",
            Self::SoftwareKvm => "software-kvm",
            Self::Level(Level::V2) => "v2",
            Self::Level(Level::V3) => "v3",
            Self::Level(Level::V4) => "v4",
        }
    }

    /// The template with this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|template| template.name() == name)
    }
}

/// A base template and changes to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuTemplate {
    /// What is changed.
    pub base: BaseTemplate,
    /// Names of features to hide.
    pub hide: Vec<String>,
    /// Names of features to show.
    pub expose: Vec<String>,
    /// Bits to change after that, in this order.
    pub bits: Vec<RegisterBits>,
}

impl From<BaseTemplate> for CpuTemplate {
    fn from(base: BaseTemplate) -> Self {
        Self { base, ..Self::default() }
    }
}

/// Changes to bits of one register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterBits {
    /// Leaf and subleaf. The table gains the leaf if it lacks it.
    pub leaf: (u32, u32),
    /// The register.
    pub register: Register,
    /// Bits that become 0.
    pub clear: u32,
    /// Bits that become 1.
    pub set: u32,
}

impl CpuTemplate {
    /// # Errors
    /// [`ErrorKind::Config`] if a feature is not known, or is both hidden and shown.
    pub(super) fn check(&self) -> Result<()> {
        check_names("cpu.template", &self.hide, &self.expose)?;
        match self.bits.iter().find(|bits| bits.clear & bits.set != 0) {
            Some(bits) => {
                let both = bits.clear & bits.set;
                let detail = format!("leaf {:#x}: {both:#x} is both cleared and set", bits.leaf.0);
                Err(Error::new(ErrorKind::Config, "cpu.template.bits", detail))
            }
            None => Ok(()),
        }
    }
}

/// # Errors
/// [`ErrorKind::Config`] if a feature is not known, or is both hidden and shown. The place is a key
/// of the part `at`.
pub(super) fn check_names(at: &str, hide: &[String], expose: &[String]) -> Result<()> {
    for (key, names) in [("hide", hide), ("expose", expose)] {
        if let Some(name) = names.iter().find(|name| feature(name).is_none()) {
            let detail = format!("'{name}' is not a known CPUID feature");
            return Err(Error::new(ErrorKind::Config, format!("{at}.{key}"), detail)
                .hint("names are those of /proc/cpuinfo; pyvmm.cpu_features() lists them"));
        }
    }
    match expose.iter().find(|name| hide.contains(name)) {
        Some(name) => {
            let detail = format!("'{name}' is also in {at}.hide");
            Err(Error::new(ErrorKind::Config, format!("{at}.expose"), detail))
        }
        None => Ok(()),
    }
}

/// Hardware virtualization. No template offers it, because snapshots do not include the state of a
/// guest that uses it.
const NESTING: &str = "vmx svm";

/// AMX, with its way to switch off what it has saved. It needs a permission of the process, which
/// makes every vCPU's state larger, so it is offered only by name.
pub(super) const AMX: &str = "amx_tile amx_int8 amx_bf16 amx_fp16 amx_complex xfd";

/// Features that a KVM which emulates ring 0 in software cannot execute or executes very slowly,
/// and hypercalls that it does not answer. Its guests also see an Intel processor.
const SOFTWARE_KVM: &str = "xsave smap smep popcnt fsgsbase umip pcid invpcid rdpid erms fsrm avx f16c fma avx2 \
    vaes vpclmulqdq avx_vnni avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 \
    avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_bf16 avx512_vp2intersect xsaveopt xsavec xgetbv1 xsaves \
    arch_capabilities kvm_pv_unhalt kvm_pv_ipi kvm_pv_sched_yield";

/// The features that the templates which start from all of KVM's hide.
pub(super) fn hidden(is_software: bool) -> impl Iterator<Item = &'static str> {
    let software = if is_software { SOFTWARE_KVM } else { "" };
    [NESTING, AMX, software].into_iter().flat_map(str::split_whitespace)
}

/// What every x86-64 processor has, and what every KVM adds to it.
const EVERYWHERE: &str = "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr \
    sse sse2 syscall nx lm tsc_adjust x2apic tsc_deadline_timer \
    kvmclock_old kvm_nopiodelay kvmclock kvmclock_stable_bit";
// The levels: System V ABI, AMD64 supplement, table 3.1.
const V2: &str = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3";
const V3: &str = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave";
const V4: &str = "avx512f avx512bw avx512cd avx512dq avx512vl";

impl Level {
    /// The features that a guest of this level has, and that its host must have.
    pub(super) fn features(self) -> impl Iterator<Item = &'static str> {
        EVERYWHERE.split_whitespace().chain(self.instructions())
    }

    /// Those of them that distinguish the levels: instructions that ring 3 may execute.
    pub(super) fn instructions(self) -> impl Iterator<Item = &'static str> {
        let third = if self >= Self::V3 { V3 } else { "" };
        let fourth = if self >= Self::V4 { V4 } else { "" };
        [V2, third, fourth].into_iter().flat_map(str::split_whitespace)
    }

    /// The parts of XCR0: x87 and SSE; AVX; the three of AVX-512.
    pub(super) fn xcr0(self) -> u32 {
        match self {
            Self::V2 => 0,
            Self::V3 => 0x7,
            Self::V4 => 0xe7,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_has_its_name_and_every_feature_is_known() {
        for template in BaseTemplate::ALL {
            assert_eq!(BaseTemplate::named(template.name()), Some(template));
        }
        assert_eq!(BaseTemplate::named("v1"), None);
        let of_levels = Level::V4.features();
        assert_eq!(hidden(true).chain(of_levels).find(|name| feature(name).is_none()), None);
    }

    #[test]
    fn each_level_has_all_of_the_one_before() {
        let [two, three, four] = [Level::V2, Level::V3, Level::V4]
            .map(|level| level.features().collect::<std::collections::HashSet<_>>());
        assert!(two.is_subset(&three) && three.is_subset(&four));
        assert!(two.contains("popcnt") && !two.contains("avx2"));
        assert!(three.contains("avx2") && !three.contains("avx512f"));
        assert!(four.contains("avx512vl") && !four.contains("svm") && !four.contains("amx_tile"));
    }

    #[test]
    fn what_a_template_changes_twice_is_refused() {
        let mut template = CpuTemplate { hide: vec!["aes".into()], ..CpuTemplate::default() };
        template.check().unwrap();
        template.expose = vec!["aes".into()];
        assert_eq!(template.check().unwrap_err().at, "cpu.template.expose");
        template.expose = vec!["no such".into()];
        assert!(template.check().unwrap_err().detail.contains("'no such' is not a known"));
        let bits = RegisterBits { leaf: (7, 0), register: Register::Ebx, clear: 3, set: 2 };
        template = CpuTemplate { bits: vec![bits], ..CpuTemplate::default() };
        assert_eq!(template.check().unwrap_err().at, "cpu.template.bits");
    }
}

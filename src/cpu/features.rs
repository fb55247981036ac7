//! CPUID's features by name. Pure data.

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX
    Eax,
    /// EBX
    Ebx,
    /// ECX
    Ecx,
    /// EDX
    Edx,
}

/// The position of a feature's bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// CPUID leaf and subleaf.
    pub leaf: (u32, u32),
    /// The register.
    pub register: Register,
    /// The bit in it.
    pub bit: u32,
}

/// The features of one register by bit, with their names in /proc/cpuinfo, or `-` for an unnamed
/// bit.
struct FeatureWord {
    leaf: (u32, u32),
    register: Register,
    names: &'static str,
}

const FEATURE_WORDS: [FeatureWord; 16] = [
    FeatureWord {
        leaf: (1, 0),
        register: Register::Edx,
        names: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts \
                acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    },
    FeatureWord {
        leaf: (1, 0),
        register: Register::Ecx,
        names: "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid \
                dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand \
                hypervisor",
    },
    FeatureWord { leaf: (6, 0), register: Register::Eax, names: "- - arat" },
    FeatureWord {
        leaf: (7, 0),
        register: Register::Ebx,
        names: "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm \
                zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt \
                avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    },
    FeatureWord {
        leaf: (7, 0),
        register: Register::Ecx,
        names: "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq \
                avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect \
                cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    },
    FeatureWord {
        leaf: (7, 0),
        register: Register::Edx,
        names: "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
                rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - \
                amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl stibp flush_l1d arch_capabilities \
                core_capabilities ssbd",
    },
    FeatureWord {
        leaf: (7, 1),
        register: Register::Eax,
        names: "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - \
                - - - fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist - - - -",
    },
    FeatureWord {
        leaf: (7, 1),
        register: Register::Edx,
        names: "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - - \
                - avx10",
    },
    FeatureWord {
        leaf: (7, 2),
        register: Register::Edx,
        names: "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    },
    FeatureWord {
        leaf: (0xd, 1),
        register: Register::Eax,
        names: "xsaveopt xsavec xgetbv1 xsaves xfd",
    },
    FeatureWord {
        leaf: (0x8000_0001, 0),
        register: Register::Edx,
        names: "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm \
                3dnowext 3dnow",
    },
    FeatureWord {
        leaf: (0x8000_0001, 0),
        register: Register::Ecx,
        names: "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop \
                skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc \
                perfctr_llc mwaitx - -",
    },
    FeatureWord {
        leaf: (0x8000_0007, 0),
        register: Register::Edx,
        names: "- - - - - - - - constant_tsc",
    },
    FeatureWord {
        leaf: (0x8000_0008, 0),
        register: Register::Ebx,
        names: "clzero irperf xsaveerptr invlpgb rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - \
                amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no",
    },
    FeatureWord {
        leaf: (0x8000_0021, 0),
        register: Register::Eax,
        names: "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr - - - - - - \
                - - - - - - - - - - - sbpb ibpb_brtype srso_no",
    },
    // KVM's own features: the kernel's Documentation/virt/kvm/x86/cpuid.rst, with QEMU's names.
    FeatureWord {
        leaf: (0x4000_0001, 0),
        register: Register::Eax,
        names: "kvmclock_old kvm_nopiodelay kvm_mmu kvmclock kvm_asyncpf kvm_steal_time kvm_pv_eoi \
                kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control \
                kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id \
                kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvmclock_stable_bit",
    },
];

/// Look up a feature by name.
#[must_use]
pub fn feature(name: &str) -> Option<Feature> {
    FEATURE_WORDS.iter().find_map(|word| {
        let at = word.names.split_whitespace().position(|n| n == name && n != "-")?;
        let bit = u32::try_from(at).ok()?;
        Some(Feature { leaf: word.leaf, register: word.register, bit })
    })
}

/// Every name that can be hidden, in the order of the leaves.
pub fn feature_names() -> impl Iterator<Item = &'static str> {
    FEATURE_WORDS.iter().flat_map(|word| word.names.split_whitespace()).filter(|name| *name != "-")
}

/// The names of the features that a register of a leaf has, by bit.
pub fn names_in(
    leaf: (u32, u32),
    register: Register,
    value: u32,
) -> impl Iterator<Item = &'static str> {
    let words =
        FEATURE_WORDS.iter().filter(move |word| (word.leaf, word.register) == (leaf, register));
    words.flat_map(move |word| {
        let bits = (0..u32::BITS).zip(word.names.split_whitespace());
        bits.filter(move |(bit, name)| *name != "-" && value & 1 << bit != 0).map(|(_, name)| name)
    })
}
